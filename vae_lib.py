"""A variational autoencoder for a small set of 1×32×32 images: the model, its maths, its files.

    p(z) = N(0, I),   p(x|z) = N(decoder(z), I),   q(z|x) = N(mu, diag(exp(logvar))) by the encoder

Training minimises −ELBO(x) = ½ E_q ‖x − decoder(z)‖² + KL(q(z|x) ‖ p(z)): summed over pixels and
latent dimensions, averaged over images, in nats (Kingma & Welling 2014, arxiv.org/abs/1312.6114).
Images are float tensors (N, 1, 32, 32) in [0, 1]; D is the number of latent dimensions.
"""

import contextlib
import csv
import io
import math
import os
import pickletools
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.adam import adam

SIZE = 32  # height and width of an image, in pixels
WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")


# ---- images --------------------------------------------------------------------------------


def load_images(folder):
    """All PNG files of a folder in name order, (N, 1, 32, 32) float32 in [0, 1], colour made grey.

    Raises FileNotFoundError if there are none, ValueError naming a file that cannot be used.
    """
    names = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    paths = [p for p in names if p.suffix.lower() == ".png" and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no PNG files: put the training images there")
    return torch.stack([read_image(path) for path in paths])  # (N, 1, 32, 32)


def read_image(path):
    """One PNG file as grey, (1, 32, 32) float32 in [0, 1]."""
    try:
        with Image.open(path, formats=["PNG"]) as image:  # the header only, whatever size it claims
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{image.height}×{image.width}, expected {SIZE}×{SIZE}: resize it")
            image.verify()  # the checksums, which reading the pixels passes over
        with Image.open(path, formats=["PNG"]) as image, Image.open(path, formats=["PNG"]) as again:
            again.im = Image.new(again.mode, (SIZE, SIZE), 1).im  # where rows are missing, 1 stays
            if image.tobytes() != again.tobytes():
                raise ValueError("its rows end early: save it again")
            deep = image.mode.startswith("I")  # 16 bits, which convert("L") would clip
            flat = image.convert("RGBA") if image.has_transparency_data else image
            if flat is not image and (deep or flat.getextrema()[3][0] < 255):
                raise ValueError("its transparent pixels have no defined grey: flatten it")
            pixels = np.array(flat if deep else flat.convert("L"), dtype=np.float32)
    except Exception as error:  # Pillow has no common type for what damaged files raise
        raise ValueError(f"{path} cannot be used: {error}") from error
    return torch.from_numpy(pixels / (65535 if deep else 255)).unsqueeze(0)


def check_images(images):
    """Raise ValueError unless images are a float tensor (N, 1, 32, 32) in [0, 1] with N ≥ 1."""
    shape = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
    if shape[1:] != (1, SIZE, SIZE) or len(images) == 0:
        raise ValueError(f"images are {shape}, expected (N, 1, {SIZE}, {SIZE}) with N of 1 or more")
    if images.dtype != torch.float32:
        raise ValueError(f"images are {images.dtype}, expected float32: divide 8-bit pixels by 255")
    if not ((images >= 0) & (images <= 1)).all():  # false for NaN, too
        raise ValueError("images hold NaN or pixels outside [0, 1]: scale them to [0, 1]")


# ---- model ---------------------------------------------------------------------------------


def mlp(*widths):
    """Linear layers with SiLU between them."""
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.SiLU())][:-1])


class Encoder(nn.Module):
    """The posterior's parameters: x (N, 1, 32, 32) -> mu, logvar, each (N, D)."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        self.net = mlp(SIZE * SIZE, hidden, 2 * latent_dim)

    def forward(self, x):
        mu, logvar = self.net(x.flatten(1)).chunk(2, dim=1)  # (N, D) each
        return mu, 6 * torch.tanh(logvar / 6)  # in ±6: exp(logvar) cannot overflow, sigma > 0.049


class Latent(nn.Module):
    """The latent variable z: drawn from the posterior, or from the prior, which lives here."""

    def __init__(self, latent_dim):
        super().__init__()
        self.register_buffer("prior_mu", torch.zeros(latent_dim))
        self.register_buffer("prior_logvar", torch.zeros(latent_dim))

    def forward(self, mu, logvar, generator=None):
        """The reparameterisation z = mu + exp(½ logvar) · ε with ε ~ N(0, I) (eq. 10): (N, D)."""
        epsilon = torch.randn(mu.shape, generator=generator, device=mu.device)  # (N, D)
        return mu + torch.exp(0.5 * logvar) * epsilon

    def sample(self, n, method=None, seed=None):
        """Draw n points from the prior, (n, D), each of them N(0, I). Without a seed, new ones.

        `iid` draws are independent. A scrambled `sobol` sequence or, for D = 2, a randomly shifted
        golden-ratio `lattice` covers the unit cube more evenly, and the normal quantile carries it
        to the prior. The default is `lattice` for D = 2, else `sobol`.
        """
        dim = len(self.prior_mu)
        method = method or ("lattice" if dim == 2 else "sobol")
        if n < 1:
            raise ValueError(f"n is {n}, expected 1 or more samples")
        if method not in ("iid", "sobol", "lattice") or (method == "lattice" and dim != 2):
            raise ValueError(f"method {method!r} is not 'iid', 'sobol' or, for D = 2, 'lattice'")
        generator = torch.Generator()
        seed = generator.seed() if seed is None else seed
        generator.manual_seed(seed)
        if method == "iid":
            epsilon = torch.randn(n, dim, generator=generator)  # (n, D)
        else:
            if method == "sobol":
                u = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(n)  # (n, D)
            else:
                step = torch.tensor([1 / n, (math.sqrt(5) - 1) / 2], dtype=torch.float64)
                order = torch.randperm(n, generator=generator)  # so that neighbours mean nothing
                u = (order[:, None] * step + torch.rand(2, generator=generator)) % 1  # (n, 2)
            epsilon = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).float()
        return self.prior_mu + torch.exp(0.5 * self.prior_logvar) * epsilon.to(self.prior_mu.device)


class Decoder(nn.Module):
    """The likelihood's mean: z (N, D) -> image (N, 1, 32, 32) in [0, 1]."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        self.net = mlp(latent_dim, hidden, hidden, hidden, SIZE * SIZE)

    def forward(self, z):
        return torch.sigmoid(self.net(z)).view(-1, 1, SIZE, SIZE)


class VAE(nn.Module):
    """Encoder, latent and decoder. `seed` draws the weights; given images, the decoder starts
    from their mean, which it would otherwise have to find."""

    def __init__(self, latent_dim=2, hidden=192, seed=0, images=None):
        super().__init__()
        if latent_dim < 1 or hidden < 1:
            raise ValueError(f"latent_dim {latent_dim} and hidden {hidden} must be 1 or more")
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder(latent_dim, hidden)
            self.latent = Latent(latent_dim)
            self.decoder = Decoder(latent_dim, hidden)
        if images is not None:
            check_images(images)
            mean = images.mean(0).flatten().clamp(0.02, 0.98)  # (1024,)
            self.decoder.net[-1].bias.data.copy_(torch.logit(mean))

    def forward(self, x, generator=None):
        """x (N, 1, 32, 32) -> x_hat (N, 1, 32, 32), mu (N, D), logvar (N, D)."""
        mu, logvar = self.encoder(x)
        return self.decoder(self.latent(mu, logvar, generator)), mu, logvar

    @torch.no_grad()
    def reconstruct(self, x):
        """Decode the posterior's mean: (N, 1, 32, 32)."""
        check_images(x)
        return self.decoder(self.encoder(x)[0])

    @torch.no_grad()
    def sample(self, n, method=None, seed=None):
        """Decode n draws from the prior: (n, 1, 32, 32)."""
        return self.decoder(self.latent.sample(n, method, seed))


# ---- objective -----------------------------------------------------------------------------


def reconstruction_loss(x, x_hat):
    """½‖x − x_hat‖² over the pixels, (N,) nats: −log N(x; x_hat, I) without its 512 log 2π.

    An x_hat (K, N, 1, 32, 32) of K draws gives (K, N).
    """
    return 0.5 * F.mse_loss(x_hat, x.expand_as(x_hat), reduction="none").sum((-3, -2, -1))


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) of each latent dimension, (N, D) nats (App. B)."""
    return -0.5 * (1 + logvar - logvar.exp() - mu.square())


class Losses(NamedTuple):
    """Means over one epoch, in nats per image: −ELBO and its two terms."""

    loss: float
    reconstruction: float
    kl: float


def train(vae, images, epochs, *, batch_size=None, learning_rate=1.5e-2, seed=0, device="cpu"):
    """Train on images (N, 1, 32, 32), by default all in one batch, and yield each epoch's `Losses`.

    Each image is decoded from a draw z and from its mirror image 2 mu − z, which has the same law:
    much of the gradient's noise cancels. Adam's rate rises for a twentieth of the steps and falls
    to zero along a cosine. An epoch cut short is undone. A loss that is not finite raises
    FloatingPointError, and leaves the parameters that last had a finite one.
    """
    check_images(images)
    n = len(images)
    batch_size = min(n if batch_size is None else batch_size, n)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs {epochs} and batch_size {batch_size} must be 1 or more")
    if not learning_rate >= 0:
        raise ValueError(f"the learning rate is {learning_rate}, expected 0 or more")
    vae.to(device).train()
    images = images.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    parameters = list(vae.parameters())
    values = [p.detach() for p in parameters]  # the same memory, changed behind autograd's back
    start = [value.clone() for value in values]
    # Adam as a function, since the class torch.optim.Adam imports a compiler, slow and large.
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    counts = [torch.zeros((), device=device) for _ in values]
    constants = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    per_epoch = math.ceil(n / batch_size)
    steps = epochs * per_epoch
    warmup = max(1, steps // 20)
    for epoch in range(epochs):
        last, start = start, [value.clone() for value in values]
        batches = [images]
        if per_epoch > 1:
            order = torch.randperm(n, generator=generator, device=device)
            batches = (images[rows] for rows in order.split(batch_size))
        sums = torch.zeros(2, device=device)
        try:
            for step, x in enumerate(batches, epoch * per_epoch):  # x (B, 1, 32, 32)
                mu, logvar = vae.encoder(x)  # (B, D) each
                z = vae.latent(mu, logvar, generator)  # (B, D)
                x_hat = vae.decoder(torch.cat([z, 2 * mu - z])).unflatten(0, (2, -1))  # (2, B, …)
                reconstruction = reconstruction_loss(x, x_hat).mean()
                kl = kl_divergence(mu, logvar).sum(1).mean()
                gradients = torch.autograd.grad(reconstruction + kl, parameters)
                rate = min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * step / steps)) / 2
                rates = {"lr": learning_rate * rate, "maximize": False, "fused": True}
                adam(values, gradients, *moments, [], counts, **constants, **rates)
                sums += torch.stack([reconstruction, kl]).detach() * (len(x) / n)
            terms = sums.tolist()
            if not math.isfinite(sum(terms)):
                raise FloatingPointError(
                    f"the loss is {sum(terms)} in epoch {epoch + 1}: try a learning_rate below"
                    f" {learning_rate} or another seed than {seed}"
                )
        except BaseException as error:  # KeyboardInterrupt, too
            kept = last if isinstance(error, FloatingPointError) else start
            for value, old in zip(values, kept, strict=True):
                value.copy_(old)
            raise
        yield Losses(sum(terms), *terms)


@torch.no_grad()
def log_likelihood(vae, images, samples=200, seed=0):
    """The importance-weighted bound on log p(x), (N,) nats (Burda et al. 2016, eq. 8).

    It includes the 512 log 2π that the loss leaves out, and rises to log p(x) with `samples`.
    """
    check_images(images)
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected 1 or more")
    generator = torch.Generator(images.device).manual_seed(seed)
    bounds = []
    for x in images.split(1):  # (1, 1, 32, 32); one at a time, for the memory's sake
        mu, logvar = (t.expand(samples, -1) for t in vae.encoder(x))  # (K, D) each
        z = vae.latent(mu, logvar, generator)  # (K, D)
        log_ratio = 0.5 * ((z - mu).square() / logvar.exp() + logvar - z.square()).sum(1)  # p(z)/q
        x_hat = vae.decoder(z)  # (K, 1, 32, 32)
        log_weights = log_ratio - reconstruction_loss(x, x_hat)  # (K,)
        bounds.append(torch.logsumexp(log_weights, 0) - math.log(samples))
    return torch.stack(bounds) - SIZE * SIZE / 2 * math.log(2 * math.pi)


# ---- files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(folder):
    """Yield a scratch folder whose files move to `folder`, one by one, once all are written."""
    moved = []
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            yield Path(scratch)
            for path in Path(scratch).iterdir():
                os.replace(path, Path(folder) / path.name)
                moved.append(path.name)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        what = f"only {', '.join(moved)}" if moved else "nothing"
        raise OSError(f"{what} was written to {folder}: {error}") from error


def save(vae, folder="."):
    """Write encoder.pth, latent.pth and decoder.pth: state dictionaries of CPU tensors."""
    with replacing(folder) as scratch:
        for name in WEIGHTS:
            state = getattr(vae, name.removesuffix(".pth")).state_dict()
            torch.save({key: value.cpu() for key, value in state.items()}, scratch / name)


def load(folder="."):
    """The VAE of the three files that `save` wrote, on the CPU.

    Raises FileNotFoundError or ValueError, naming the file, for anything but the finite tensors of
    one such model. Nothing in a file is executed.
    """
    paths = {name.removesuffix(".pth"): Path(folder) / name for name in WEIGHTS}
    states = {part: read_state(path) for part, path in paths.items()}
    first, prior = states["encoder"].get("net.0.weight"), states["latent"].get("prior_mu")
    if first is None or prior is None:
        part = "encoder" if first is None else "latent"
        raise ValueError(f"{paths[part]} is not of this model's {part}: export it again")
    with torch.device("meta"):  # no memory for sizes that only a file claims
        vae = VAE(latent_dim=max(1, prior.numel()), hidden=max(1, first.numel() // SIZE**2))
    for part, state in states.items():
        try:
            getattr(vae, part).load_state_dict(state, assign=True)
        except Exception as error:  # RuntimeError; others where keys are not even names
            raise ValueError(
                f"{paths[part]} is of another model, export it again: {error}"
            ) from error
    return vae.eval()


def read_state(path):
    """The finite tensors of one .pth file, by name; refuses whatever asks for more."""
    plain = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 20e6:
                raise ValueError("it unpacks to over 20 MB")
            contents = {name.lower(): archive.read(name) for name in archive.namelist()}
        inspected = io.BytesIO()  # torch shall see what was inspected, and nothing else of the file
        with zipfile.ZipFile(inspected, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
                if name.endswith(".pkl"):
                    codes = pickletools.genops(content[:100_000])  # fails on a pickle cut short
                    asked = {argument for code, argument, _ in codes if "GLOBAL" in code.name}
                    if not asked <= plain:
                        raise ValueError(f"it asks for {asked - plain}, which no tensor needs")
        inspected.seek(0)
        state = torch.load(inspected, map_location="cpu", weights_only=True)
        for name, value in state.items():
            if not value.is_contiguous() or not value.isfinite().all():
                raise ValueError(f"{name} is not stored whole or not finite")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: run the notebook to export it") from None
    except Exception as error:  # whatever a damaged or foreign file brings about
        raise ValueError(
            f"{path} is no sound file of weights ({error}): export it again"
        ) from error
    return state


def write_result(path, fid, losses, *, features="digits", checksum=None):
    """Write result.csv, rows `key,number`: FID, FID_features, score, checksum, loss per epoch."""
    rows = [("FID", fid), (f"FID_{features}", fid), ("score", 100 - fid)]
    rows += [] if checksum is None else [("checksum", checksum)]
    rows += [("loss", epoch.loss) for epoch in losses]
    folder, name = Path(path).parent, Path(path).name
    with replacing(folder) as scratch, open(scratch / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def checksum(folder="."):
    """CRC-32 of the four files that result.csv belongs to, so that a mixture is found out."""
    names = (*WEIGHTS, "samples.png")
    return zlib.crc32(b"".join((Path(folder) / name).read_bytes() for name in names))


def export(vae, samples, fid, losses, *, features="digits", folder="."):
    """Write .pth files, samples.png and result.csv, whose checksum exposes a mixture of models."""
    with replacing(folder) as scratch:
        save(vae, scratch)
        image = Image.fromarray((255 * tile(samples, 10)).round().byte().numpy())
        image.resize((3 * image.width, 3 * image.height), 0).save(scratch / "samples.png")
        name = scratch / "result.csv"
        write_result(name, fid, losses, features=features, checksum=checksum(scratch))


# ---- figures -------------------------------------------------------------------------------


def tile(images, columns):
    """Images (N, 1, 32, 32) side by side in rows, white lines of two pixels around them: (H, W)."""
    check_images(images)
    step, columns = SIZE + 2, min(columns, len(images))
    grid = torch.ones(2 + step * math.ceil(len(images) / columns), 2 + step * columns)
    for i, image in enumerate(images.cpu()):
        top, left = 2 + step * (i // columns), 2 + step * (i % columns)
        grid[top : top + SIZE, left : left + SIZE] = image[0]
    return grid


def show_images(images, columns=10, rows=(), width=6.0):
    """A figure of images (N, 1, 32, 32) in a grid, with a label beside each row if given."""
    grid = tile(images, columns)  # (H, W)
    size = (width, width * grid.shape[0] / grid.shape[1])
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([2 + SIZE / 2 + (SIZE + 2) * row for row in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def plot_losses(losses, title=""):
    """A figure of −ELBO, reconstruction and KL per epoch, on logarithmic axes."""
    if not losses:
        raise ValueError("there are no losses to plot: train for an epoch at least")
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    styles = {
        "−ELBO": ("#000000", "-"),
        "reconstruction": ("#D55E00", "--"),
        "KL": ("#0072B2", ":"),
    }
    for (name, (colour, line)), values in zip(
        styles.items(), zip(*losses, strict=True), strict=True
    ):
        epochs = range(1, len(values) + 1)
        dot = "." if len(values) == 1 else ""  # a line needs two points
        axes.plot(epochs, values, line, marker=dot, color=colour, label=f"{name} {values[-1]:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="epoch", ylabel="nats per image", title=title)
    axes.set_ylim(bottom=0.05)
    axes.legend(loc="lower left", frameon=False)
    return figure
