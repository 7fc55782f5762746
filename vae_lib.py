"""A variational autoencoder for a small set of 1×32×32 images: the model, its maths, its files.

    p(z) = N(0, I),   p(x|z) = N(decoder(z), I),   q(z|x) = N(mu, diag(exp(logvar))) by the encoder

Training minimises −ELBO(x) = ½ E_q ‖x − decoder(z)‖² + KL(q(z|x) ‖ p(z)), and 512 log 2π, which is
left out: nats, summed over pixels and latent dimensions, averaged over images (Kingma & Welling
2014, arxiv.org/abs/1312.6114). Images: floats (N, 1, 32, 32) in [0, 1]; D: latent dimensions.
"""

import math
import zipfile
from collections import namedtuple
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.quasirandom import SobolEngine
from torchvision.utils import make_grid

SIZE = 32  # height and width of an image, in pixels
WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")
Losses = namedtuple("Losses", "loss reconstruction kl")  # of an epoch: −ELBO and its terms, nats


def load_images(folder):
    """All PNG files of a folder in name order, (N, 1, 32, 32) float32 in [0, 1]."""
    paths = sorted(path for path in Path(folder).glob("[!.]*") if path.suffix.lower() == ".png")
    if not paths:
        raise FileNotFoundError(f"{folder} holds no PNG files: put the training images there")
    return torch.stack([read_image(path) for path in paths])  # (N, 1, 32, 32)


def read_image(path):
    """One PNG file as grey, (1, 32, 32) float32 in [0, 1]; ValueError if it cannot be used."""
    try:
        with Image.open(path, formats=["PNG"]) as image:  # the header only, whatever size it claims
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{image.height}×{image.width}, expected {SIZE}×{SIZE}: resize it")
            image.verify()  # the checksums, which reading the pixels passes over
        with Image.open(path, formats=["PNG"]) as image:
            if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("its transparent pixels have no defined grey: flatten it")
            deep = image.mode.startswith("I")  # 16 bits, which convert("L") would clip
            pixels = np.array(image if deep else image.convert("L"), dtype=np.float32)
    except Exception as error:  # Pillow has no common type for what damaged files raise
        raise ValueError(f"{path} cannot be used: {error}") from error
    return torch.from_numpy(pixels / (65535 if deep else 255)).unsqueeze(0)


class Encoder(nn.Module):
    """The posterior's parameters: x (N, 1, 32, 32) -> mu, logvar, each (N, D)."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        first, last = nn.Linear(SIZE * SIZE, hidden), nn.Linear(hidden, 2 * latent_dim)
        self.net = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, x):
        return self.net(x.flatten(1)).chunk(2, dim=1)


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
        """Draw n points (n, D), each from the prior: independent ones, `iid`, or ones that cover it
        more evenly, a scrambled `sobol` sequence, the default, or for D < 3 a shifted `lattice`."""
        dim, generator = len(self.prior_mu), torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        if method == "iid":
            u = torch.rand(n, dim, generator=generator, dtype=torch.float64)  # (n, D)
        elif method in ("sobol", None):
            u = SobolEngine(dim, True, generator.initial_seed()).draw(n, dtype=torch.float64)
        elif method == "lattice" and dim < 3:
            step = torch.tensor([1 / n, (math.sqrt(5) - 1) / 2][:dim], dtype=torch.float64)
            order = torch.randperm(n, generator=generator)  # so that neighbours mean nothing
            u = (order[:, None] * step + torch.rand(dim, generator=generator)) % 1  # (n, D)
        else:
            raise ValueError(f"method {method!r}: expected 'iid', 'sobol' or, for D < 3, 'lattice'")
        epsilon = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).to(self.prior_mu)  # N(0, I)
        return self.prior_mu + torch.exp(0.5 * self.prior_logvar) * epsilon


class Decoder(nn.Module):
    """The likelihood's mean: z (N, D) -> image (N, 1, 32, 32) in [0, 1]. Learnt waves (Fourier
    features, Tancik et al. 2020, arxiv.org/abs/2006.10739) let near points decode unlike."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(latent_dim, hidden // 2))
        layers = [layer for _ in range(2) for layer in (nn.Linear(hidden, hidden), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, SIZE * SIZE))

    def forward(self, z):
        u = math.sqrt(3) * torch.erf(z / math.sqrt(2))  # (N, D), uniform, of variance 1
        angle = u @ self.frequencies  # (N, hidden / 2)
        waves = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1)  # (N, hidden)
        x = 1.2 * torch.sigmoid(self.net(waves)) - 0.1  # (N, 1024) in [−0.1, 1.1]
        return nn.functional.hardtanh(x, 0, 1).view(-1, 1, SIZE, SIZE)  # a clamp, but faster


class VAE(nn.Module):
    """Encoder, latent, decoder. `seed` draws the weights; training needs the `images`' start."""

    def __init__(self, images=None, seed=0, latent_dim=1, hidden=192):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder(latent_dim, hidden)
            self.latent = Latent(latent_dim)
            self.decoder = Decoder(latent_dim, hidden)
        if images is not None:
            self.start_from(images)

    @torch.no_grad()
    def start_from(self, images):
        """Let the encoder give each image an equal share of the prior, in the order of the first
        principal component, and the decoder the mean image, with waves as long as a few shares."""
        first, activation, last = self.encoder.net
        dim, x = len(self.latent.prior_mu), images.flatten(1)  # x (N, 1024)
        self.decoder.net[-1].bias.copy_(torch.logit((x.mean(0) + 0.1) / 1.2))
        self.decoder.frequencies *= 0.4 * len(x) ** (1 / dim)
        axes = torch.linalg.svd(x - x.mean(0)).Vh[:dim]  # (D, 1024)
        rank = (x @ axes.T).argsort(0).argsort(0)  # (N, D)
        mu = torch.special.ndtri((rank + 0.5) / len(x))  # (N, D)
        share = math.sqrt(2 * math.pi) * torch.exp(mu.square() / 2) / len(x) ** (1 / dim)  # (N, D)
        goal = torch.cat([mu, 2 * torch.log(share / 6)], dim=1)  # (N, 2D): 6σ to a share
        first.weight *= 8  # so that the hidden layer tells the images apart
        first.bias.copy_(-first.weight @ x.mean(0))
        h = torch.cat([activation(first(x)), torch.ones(len(x), 1)], dim=1)  # (N, hidden + 1)
        fit = torch.linalg.lstsq(h, goal, driver="gelsd").solution  # (hidden + 1, 2D)
        last.weight.copy_(fit[:-1].T)
        last.bias.copy_(fit[-1])

    def forward(self, x, generator=None):
        """x (N, 1, 32, 32) -> x_hat (N, 1, 32, 32), mu (N, D), logvar (N, D)."""
        mu, logvar = self.encoder(x)
        return self.decoder(self.latent(mu, logvar, generator)), mu, logvar

    @torch.no_grad()
    def reconstruct(self, x):
        """Decode the posterior's mean: (N, 1, 32, 32)."""
        return self.decoder(self.encoder(x)[0])

    @torch.no_grad()
    def sample(self, n, method=None, seed=None):
        """Decode n draws from the prior: (n, 1, 32, 32)."""
        return self.decoder(self.latent.sample(n, method, seed))


def reconstruction_loss(x, x_hat):
    """½‖x − x_hat‖² over the pixels, (N,) nats: −log N(x; x_hat, I) without its 512 log 2π."""
    return 0.5 * (x_hat - x).square().sum((-3, -2, -1))


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) of each latent dimension, (N, D) nats (App. B)."""
    return -0.5 * (1 + logvar - logvar.exp() - mu.square())


def train(vae, images, epochs, *, batch_size=None, learning_rate=7e-3, seed=0, device="cpu"):
    """Train on images (N, 1, 32, 32) in [0, 1], by default all at once, and yield each epoch's
    `Losses`. Draws z come with 2 mu − z, of the same distribution (antithetic): much of the
    gradient's noise cancels. The encoder learns slowly, or images would change places at once."""
    if images[:1].shape != (1, 1, SIZE, SIZE) or not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"images {tuple(images.shape)}: expected (N, 1, {SIZE}, {SIZE}) in [0, 1]")
    vae, images, n = vae.to(device), images.to(device), len(images)
    size, generator = batch_size or n, torch.Generator(device).manual_seed(seed)
    slow = {"params": vae.encoder.parameters(), "lr": 0.15 * learning_rate / n}
    fast = {"params": vae.decoder.parameters(), "lr": learning_rate}
    optimiser = torch.optim.Adam([slow, fast], betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * math.ceil(n / size))
    for _ in range(epochs):
        sums = torch.zeros(2, device=device)
        for x in images[torch.randperm(n, generator=generator, device=device)].split(size):
            mu, logvar = vae.encoder(x)  # (B, D) each
            z = vae.latent(mu, logvar, generator)  # (B, D)
            x_hat = vae.decoder(torch.cat([z, 2 * mu - z])).view(2, *x.shape)  # (2, B, 1, 32, 32)
            reconstruction = reconstruction_loss(x, x_hat).mean()
            kl = kl_divergence(mu, logvar).sum(1).mean()
            optimiser.zero_grad()
            (reconstruction + kl).backward()
            optimiser.step()
            schedule.step()
            sums += torch.stack([reconstruction, kl]).detach() * (len(x) / n)
        terms = sums.tolist()
        if not math.isfinite(sum(terms)):
            raise FloatingPointError(f"the loss is {sum(terms)}: try a lower learning_rate")
        yield Losses(sum(terms), *terms)


@torch.no_grad()
def log_likelihood(vae, images, samples=200, seed=0):
    """The importance-weighted bound on log p(x), (N,) nats (Burda et al. 2016, eq. 8), with the
    512 log 2π that the loss leaves out. Its mean rises to log p(x) with `samples`."""
    generator = torch.Generator(images.device).manual_seed(seed)
    mu, logvar = vae.encoder(images)  # (N, D) each
    log_weights = []
    for _ in range(samples):
        z = vae.latent(mu, logvar, generator)  # (N, D)
        log_ratio = 0.5 * ((z - mu).square() / logvar.exp() + logvar - z.square()).sum(1)  # p(z)/q
        log_weights.append(log_ratio - reconstruction_loss(images, vae.decoder(z)))  # (N,)
    return torch.stack(log_weights).logsumexp(0) - math.log(samples) - 512 * math.log(2 * math.pi)


def replace(path, write):
    """Let `write` make a file beside `path`, and move it there once it is whole."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    write(part)
    part.replace(path)


def save(vae, folder="."):
    """Write encoder.pth, latent.pth and decoder.pth: state dictionaries."""
    for name in WEIGHTS:
        state = getattr(vae, name.removesuffix(".pth")).state_dict()
        replace(Path(folder) / name, lambda part, state=state: torch.save(state, part))


def load(folder=".", latent_dim=1, hidden=192):
    """The VAE of the three files that `save` wrote; ValueError names one that holds anything but
    finite tensors of such a model. Nothing in a file is executed."""
    vae = VAE(latent_dim=latent_dim, hidden=hidden)
    for name in WEIGHTS:
        path, part = Path(folder) / name, getattr(vae, name.removesuffix(".pth"))
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(e.file_size for e in archive.infolist()) > 100e6 or archive.testzip():
                    raise ValueError("it unpacks to over 100 MB, or a checksum is wrong")
            part.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            if not all(value.isfinite().all() for value in part.state_dict().values()):
                raise ValueError("a value is not finite")
        except Exception as e:  # whatever a damaged or foreign file brings about
            raise ValueError(f"{path}: no VAE({latent_dim=}, {hidden=}), export again: {e}") from e
    return vae.eval()


def write_result(path, fid, losses, features="imagenet"):
    """Write result.csv, rows `key,number`: FID, FID_features, score, loss per epoch."""
    text = f"FID,{fid}\nFID_{features},{fid}\nscore,{100 - fid}\n"
    text += "".join(f"loss,{epoch.loss}\n" for epoch in losses)
    replace(path, lambda part: part.write_text(text))


def show_images(images, columns=10, rows=(), width=6.0):
    """A figure of images (N, 1, 32, 32) in a grid, with a label beside each row if given."""
    grid = make_grid(images, nrow=columns, pad_value=1)[0]  # (H, W)
    height = width * len(grid) / len(grid[0])
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([(SIZE + 2) * (row + 0.5) for row in range(len(rows))], rows)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def plot_losses(losses, title=""):
    """A figure of −ELBO, reconstruction and KL per epoch, and means over the last 2 % of epochs."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    epoch = range(1, len(losses) + 1)
    for name, values in zip(("−ELBO", "reconstruction", "KL"), np.array(losses).T, strict=True):
        mean = [values[k - max(1, k // 50) : k].mean() for k in epoch]
        (line,) = axes.plot(epoch, mean, label=f"{name} {mean[-1]:.2f}", zorder=3)
        axes.plot(epoch, values, color=line.get_color(), alpha=0.25, linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel="epoch", ylabel="nats per image", title=title)
    axes.legend(loc="lower left", frameon=False)
    return figure
