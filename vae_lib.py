"""A variational autoencoder (VAE) for small sets of images: the model, its maths, its files.

    prior       p(z)   = N(0, I)
    likelihood  p(x|z) = N(decoder(z), I)
    posterior   q(z|x) = N(mu, diag(exp(logvar))),   mu, logvar = encoder(x)

The objective is −ELBO(x) = ½ E_q ‖x − decoder(z)‖² + KL(q(z|x) ‖ p(z)) in nats, summed over pixels
and latent dimensions and averaged over images (Kingma & Welling 2014, arxiv.org/abs/1312.6114). The
likelihood's constant, ½ log 2π for each of 1024 pixels, is left out everywhere.

Images are float tensors (N, 1, 32, 32) with pixels in [0, 1]. N is a number of images, L the number
of latent dimensions.
"""

import math
import os
import tempfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

SIZE = 32  # height and width of an image, in pixels
COMPONENTS = 128  # of an image, that the encoder sees
WAVES = 96  # pairs of sine and cosine that the decoder computes from z
SCALE = 0.3  # of what the decoder's last layer sees
DRAWS = 4  # of z for each image in a step of the training, spread evenly
WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")

# Nats per image: loss (−ELBO) = reconstruction + kl, and kl = information + marginal_kl.
Losses = namedtuple("Losses", "loss reconstruction kl information marginal_kl")


# The model


class Encoder(nn.Module):
    """The posterior's parameters: x (N, 1, 32, 32) -> mu, logvar, each (N, L). The constructor gets
    the images to learn, L, and the width of the hidden layers.

    It sees an image by its principal components: how far it is from the mean image along each of
    the directions in which the images differ most, at most `COMPONENTS`. Adam's steps are about
    equally long along each of them, so small differences between images are soon learnt, too. An
    encoder that sees pixels, most of which change together, hardly notices them.
    """

    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        mean = images.mean(0)  # (1, 32, 32)
        difference = (images - mean).flatten(1)  # (N, 1024)
        directions = torch.linalg.svd(difference, full_matrices=False).Vh[:COMPONENTS]  # (K, 1024)
        spread = difference.norm() / math.sqrt(len(images))  # (), around the mean
        components = difference.new_zeros(COMPONENTS, SIZE * SIZE)  # few images have fewer
        components[: len(directions)] = directions * 16 / spread  # any contrast: y is about 16 long
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)  # (COMPONENTS, 1024)
        self.net = nn.Sequential(
            nn.Linear(COMPONENTS, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_dim),
        )
        with torch.no_grad():  # narrow posteriors: a wide one might never find a place of its own
            self.net[-1].bias[latent_dim:] -= 4  # of logvar

    def forward(self, x):
        y = (x - self.mean).flatten(1) @ self.components.T  # (N, COMPONENTS)
        mu, logvar = self.net(y).chunk(2, dim=1)  # (N, L) each
        return mu, logvar


class Latent(nn.Module):
    """The latent variable z: drawn from the posterior, or from the prior.

    The KL term and the decoder expect the prior N(0, I). Its mu and logvar are buffers, so that
    latent.pth records what samples were drawn from.
    """

    def __init__(self, latent_dim):
        super().__init__()
        self.register_buffer("prior_mu", torch.zeros(latent_dim))
        self.register_buffer("prior_logvar", torch.zeros(latent_dim))

    def forward(self, mu, logvar, generator=None, draws=1):
        """The reparameterisation z = mu + exp(½ logvar) · ε with ε ~ N(0, I): all are (N, L).
        Kingma & Welling 2014, eq. 10.

        Of several draws for each posterior, spread evenly over it, z (draws · N, L) holds the first
        for each, then the second, and so on.
        """
        epsilon = even_noise(draws, mu.shape, generator).to(mu)  # (draws, N, L)
        z = mu + torch.exp(0.5 * logvar) * epsilon  # (draws, N, L)
        return z.flatten(0, 1)

    def sample(self, n, method="latin", seed=0):
        """Draw n points (n, L), each of them from the prior.

        With `iid` they are independent of each other. With `latin` they are spread evenly: in each
        dimension, one lies in each of n equally likely intervals (Latin hypercube sampling, McKay,
        Beckman & Conover 1979). ValueError for another method.
        """
        generator = torch.Generator().manual_seed(int(seed))  # NumPy's integers, too
        dim = len(self.prior_mu)
        if method == "iid":
            epsilon = torch.randn(n, dim, generator=generator)  # (n, L)
        elif method == "latin":
            epsilon = even_noise(n, (dim,), generator)  # (n, L)
        else:
            raise ValueError(f"unknown method {method!r}: choose 'latin' or 'iid'")
        return self.prior_mu + torch.exp(0.5 * self.prior_logvar) * epsilon.to(self.prior_mu)

    def line(self, n, low=0.0, high=1.0):
        """n points (n, L) along the first dimension, in the middles of n equally likely intervals
        of the prior, from probability `low` to `high`. Other dimensions are at its mean."""
        probability = low + (high - low) * (torch.arange(n) + 0.5) / n  # (n,)
        epsilon = torch.special.ndtri(probability).to(self.prior_mu)  # (n,)
        z = self.prior_mu.repeat(n, 1)  # (n, L)
        z[:, 0] += torch.exp(0.5 * self.prior_logvar[0]) * epsilon
        return z


def even_noise(n, shape, generator=None):
    """n draws from N(0, 1) for each place in `shape`, spread evenly: (n, *shape). One lies in each
    of n equally likely intervals, at a random point of it, in random order."""
    interval = torch.rand(n, *shape, generator=generator).argsort(0)  # (n, *shape): 0 to n − 1
    within = torch.rand(n, *shape, generator=generator, dtype=torch.float64)  # (n, *shape)
    return torch.special.ndtri((interval + within) / n)  # (n, *shape), normal quantiles


class Decoder(nn.Module):
    """The likelihood's mean: z (N, L) -> image (N, 1, 32, 32) in [0, 1]. The constructor gets the
    images to learn, L, and the width of the hidden layers.

    It sees z through waves from long to short, so that near points can decode to different images
    (Fourier features, Tancik et al. 2020, arxiv.org/abs/2006.10739). More images to learn need
    shorter waves. It starts near the mean of the images.
    """

    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        direction = nn.functional.normalize(torch.randn(latent_dim, WAVES), dim=0)  # (L, WAVES)
        # How many waves fit between the two ends of the prior. In one dimension the longest is six
        # times as long, and the shortest spans three images (of at least 10).
        most = max(10, len(images)) ** (1 / latent_dim) / 3
        count = torch.logspace(math.log10(1 / 6), math.log10(most), WAVES)  # (WAVES,)
        self.register_buffer("waves", count * direction)  # (L, WAVES)
        self.net = nn.Sequential(
            nn.Linear(2 * WAVES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
        )
        self.pixels = nn.Linear(hidden, SIZE * SIZE)
        with torch.no_grad():
            self.pixels.bias.copy_(images.mean(0).flatten())  # (1024,)

    def forward(self, z):
        u = torch.special.ndtr(z)  # (N, L), normal CDF: uniform in (0, 1) if z is from the prior
        angle = 2 * math.pi * u @ self.waves  # (N, WAVES)
        features = torch.cat([angle.sin(), angle.cos()], dim=1)  # (N, 2 · WAVES)
        # Scaled down, so that a step of the last layer's weights moves pixels less.
        x = self.pixels(SCALE * self.net(features))  # (N, 1024)
        with torch.no_grad():  # unseen by autograd: gradients pass as if nothing were cut off
            x.clamp_(0, 1)
        return x.unflatten(1, (1, SIZE, SIZE))


class VAE(nn.Module):
    """Encoder, latent and decoder, with random weights drawn from `seed`.

    The images (N, 1, 32, 32) are those that it is to learn by `train`, below; it computes in their
    dtype. `hidden` is the width of the hidden layers. ValueError if images or sizes cannot be used.
    """

    def __init__(self, images, latent_dim=1, hidden=128, seed=0):
        super().__init__()
        check_images(images)
        if latent_dim < 1 or hidden < 1:
            raise ValueError(f"latent_dim {latent_dim}, hidden {hidden}: each must be 1 or more")
        # What `load` calls this constructor with: all arguments but images and seed
        self.arguments = {"latent_dim": int(latent_dim), "hidden": int(hidden)}
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(int(seed))
            self.encoder = Encoder(images, latent_dim, hidden)
            self.latent = Latent(latent_dim)
            self.decoder = Decoder(images, latent_dim, hidden)
        self.to(images.dtype)

    def forward(self, x, generator=None):
        """x (N, 1, 32, 32) -> x_hat (N, 1, 32, 32), mu (N, L), logvar (N, L)."""
        mu, logvar = self.encoder(x)
        z = self.latent(mu, logvar, generator)  # (N, L)
        return self.decoder(z), mu, logvar

    @torch.no_grad()
    def reconstruct(self, x):
        """Decode the posterior's mean: (N, 1, 32, 32)."""
        mu, _ = self.encoder(x)
        return self.decoder(mu)

    @torch.no_grad()
    def sample(self, n, method="latin", seed=0):
        """Decode n draws from the prior: (n, 1, 32, 32)."""
        return self.decoder(self.latent.sample(n, method, seed))


def check_images(images):
    """ValueError unless images are a tensor (N, 1, 32, 32), float32 or float64, with pixels in
    [0, 1], not all of them equal."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images are of type {type(images).__name__}, expected a torch.Tensor")
    if len(images) < 2 or images.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(f"images are {tuple(images.shape)}, expected (2 or more, 1, 32, 32)")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {images.dtype}, expected torch.float32: use images.float()")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images hold NaN or pixels outside [0, 1]: scale them to this range")
    if (images == images[0]).all():
        raise ValueError("all images are the same, so there is nothing to learn: give others")


# The objective


def reconstruction_loss(x, x_hat):
    """½‖x − x_hat‖² in nats, summed over the pixels: images (…, 1, 32, 32) -> a number for each,
    (…). It is −log N(x; x_hat, I) without its constant."""
    x, x_hat = torch.broadcast_tensors(x, x_hat)
    # The squares, for a tenth less time of the whole training than by (x - x_hat).square()
    squares = nn.functional.mse_loss(x_hat, x, reduction="none")  # (…, 1, 32, 32)
    return 0.5 * squares.sum((-3, -2, -1))


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) in nats, of each dimension: mu, logvar (N, L) -> (N, L).
    Kingma & Welling 2014, app. B."""
    return -0.5 * (1 + logvar - logvar.exp() - mu.square())


def log_densities(z, mu, logvar):
    """log q(z|x) of each z (M, L) under each posterior, mu and logvar (N, L): (M, N) nats."""
    distance = (z.unsqueeze(1) - mu) * torch.exp(-0.5 * logvar)  # (M, N, L), in standard deviations
    return -0.5 * (distance.square() + logvar + math.log(2 * math.pi)).sum(2)


def kl_parts(z, mu, logvar):
    """The two parts of the mean KL in nats, estimated from draws: information and marginal KL
    (Hoffman & Johnson 2016, "ELBO surgery").

    z (k·N, L) are k rounds of draws of the posteriors, mu and logvar (N, L), one of each a round.
    q(z) is the average of the posteriors. Information is the mean of log q(z|x) − log q(z), what z
    tells about which image it came from: at most ln N. Marginal KL is KL(q(z) ‖ N(0, I)).
    """
    n = len(mu)
    log_q_x = log_densities(z, mu, logvar)  # (k·N, N)
    own = log_q_x.unflatten(0, (-1, n)).diagonal(dim1=1, dim2=2)  # (k, N), of each z's own image
    # Far posteriors add nothing to the sum, and exponentials that small take ten times as long.
    near = torch.maximum(log_q_x, own.reshape(-1, 1) - 80)  # (k·N, N)
    log_q = near.logsumexp(1) - math.log(n)  # (k·N,)
    log_p = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)  # (k·N,)
    return own.mean() - log_q.mean(), log_q.mean() - log_p.mean()


def best_decoder(z, mu, logvar, images):
    """What the best of all decoders makes of z (M, L): (M, 1, 32, 32).

    With the given posteriors, mu and logvar (N, L) of the images (N, 1, 32, 32), no decoder has a
    lower −ELBO: at each z it shows the average of the images, each weighted by the density of its
    posterior (Fyffe 2019, arxiv.org/abs/1912.10309).
    """
    weights = log_densities(z, mu, logvar).softmax(dim=1)  # (M, N)
    return (weights @ images.flatten(1)).unflatten(1, (1, SIZE, SIZE))


@torch.no_grad()
def log_likelihood(vae, images, samples=10_000, seed=0):
    """log p(x) of images (N, 1, 32, 32): (N,) nats, without the constant, as in the loss.

    It is the log of the mean of p(x|z) over evenly spread draws of z from the prior, on average a
    lower bound (Burda et al. 2016, arxiv.org/abs/1509.00519, eq. 8, with the prior in place of the
    encoder): a tight one for one or two latent dimensions, a loose one for many.
    """
    x_hat = vae.sample(samples, "latin", seed)  # (S, 1, 32, 32)
    distance = torch.cdist(images.flatten(1), x_hat.flatten(1))  # (N, S)
    return torch.logsumexp(-0.5 * distance.square(), 1) - math.log(samples)


# The training: `progress` runs from 0 at its start to 1 at its end. First the images find places:
# information is free, so that even those that look nearly alike part, and the marginal KL costs
# much, so that they spread evenly. Then the decoder draws, and both weights become 1.


def information_weight(progress):
    """The weight of information in the loss: 0 for the first third of the training, then rising to
    1, which it reaches at two thirds, along a straight line."""
    return min(1, max(0, 3 * progress - 1))


def marginal_weight(progress):
    """The weight of the marginal KL in the loss: from 11 to 1 over the first 90 % of the training,
    along a straight line."""
    return 11 - 10 * min(1, progress / 0.9)


def decoder_rate(progress):
    """The decoder's learning rate as a fraction of its initial one: 1 for the first 70 % of the
    training, then falling to 0 along a straight line."""
    return min(1, (1 - progress) / 0.3)


def encoder_rate(progress):
    """The encoder's learning rate as a fraction of the decoder's initial one. It starts at 0.8 and
    falls to 3.5 % of that over the first 70 % of the training, so that images settle; then it falls
    to 0 together with the decoder's."""
    return 0.8 * 0.035 ** min(1, progress / 0.7) * decoder_rate(progress)


def train(vae, images, epochs, *, batch_size=None, learning_rate=5e-3, seed=0):
    """Train on images (N, 1, 32, 32) in [0, 1], at most `batch_size` of them a step (by default
    all), and yield the mean `Losses` of each epoch, in nats per image. An epoch runs only when a
    loop asks for it; all chance comes from `seed`. ValueError if images or settings cannot be used,
    FloatingPointError if training diverges.

    Information and marginal KL, the two parts of KL, have weights a and b that end at 1 (InfoVAE,
    Zhao et al. 2017, arxiv.org/abs/1706.02262, keeps such weights); the losses that it yields are
    without them. q(z) is that of the batch, so in small ones information reads too low and the
    marginal KL too high. `learning_rate` is the decoder's at the start.
    """
    check_images(images)
    n = len(images)
    batch_size = n if batch_size is None else batch_size
    if epochs < 1 or batch_size < 2:
        what = f"epochs {epochs}, batch_size {batch_size}"
        raise ValueError(f"{what}: expected 1 or more epochs, and 2 or more images in a batch")
    generator = torch.Generator().manual_seed(int(seed))
    # Adam divides each step by the root of an average of squared gradients. These shrink as
    # posteriors narrow: with 0.95 in place of 0.999, the average forgets large ones sooner.
    groups = [{"params": vae.encoder.parameters()}, {"params": vae.decoder.parameters()}]
    optimiser = torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    rates = [lambda epoch: encoder_rate(epoch / epochs), lambda epoch: decoder_rate(epoch / epochs)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rates)
    for epoch in range(epochs):
        a = information_weight(epoch / epochs)
        b = marginal_weight(epoch / epochs)
        means = torch.zeros(3)  # reconstruction, KL and information, over the epoch
        order = torch.randperm(n, generator=generator)
        for x in images[order].tensor_split(math.ceil(n / batch_size)):  # (B, 1, 32, 32) each
            mu, logvar = vae.encoder(x)  # (B, L) each
            z = vae.latent(mu, logvar, generator, DRAWS)  # (4·B, L)
            x_hat = vae.decoder(z).unflatten(0, (DRAWS, len(x)))  # (4, B, 1, 32, 32)
            reconstruction = reconstruction_loss(x, x_hat).mean()
            kl = kl_divergence(mu, logvar).sum(1).mean()
            information, marginal_kl = kl_parts(z, mu, logvar)
            # The exact KL less the marginal KL trains better than information from draws.
            loss = reconstruction + a * (kl - marginal_kl) + b * marginal_kl
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            means += len(x) / n * torch.stack([reconstruction, kl, information]).detach()
        scheduler.step()
        reconstruction, kl, information = means.tolist()
        if not math.isfinite(reconstruction + kl):
            raise FloatingPointError("the loss is not finite: try a lower learning_rate")
        yield Losses(reconstruction + kl, reconstruction, kl, information, kl - information)


# Files


def check_folder(folder):
    """Make the folder of the exported files, and see that they can be written there. OSError if
    not: better before the training than after it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        what = f"the exported files cannot be written to {folder} ({error})"
        raise OSError(f"{what}: choose a folder of your own") from error


def replace_files(folder, writers):
    """Write files into a folder, {name: function that writes to a path}. Older ones stay until all
    new ones are written; OSError if they cannot be, for instance on a full disk."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part", dir=folder) as part:
            for name, write in writers.items():
                write(Path(part, name))
            for name in writers:
                Path(part, name).replace(Path(folder, name))
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError
        what = f"{', '.join(writers)} could not be written to {folder}"
        raise OSError(f"{what}, make room there and try again: {error}") from error


def save(vae, folder="."):
    """Write the state dictionaries encoder.pth, latent.pth and decoder.pth; latent.pth also keeps
    the constructor's arguments. OSError if they cannot be written."""
    states = {}
    for name in WEIGHTS:
        state = getattr(vae, name.removesuffix(".pth")).state_dict()
        for prefix in ("_orig_mod.", "module."):  # of torch.compile and DataParallel
            consume_prefix_in_state_dict_if_present(state, prefix)
        states[name] = state
    states["latent.pth"]["arguments"] = vae.arguments
    replace_files(folder, {name: partial(torch.save, state) for name, state in states.items()})


def load(folder="."):
    """The VAE of the three files that `save` wrote, in evaluation mode. Nothing in the files is
    executed. ValueError names a file that is damaged, or that does not fit to the others."""
    states = {}
    for name in WEIGHTS:
        path = Path(folder, name)
        try:
            states[name] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(states[name], dict):
                raise TypeError(f"it holds a {type(states[name]).__name__}, no state dictionary")
        except Exception as error:  # whatever a damaged or foreign file brings about
            raise ValueError(f"{path} cannot be used, export it again: {error}") from error
    path = Path(folder, "latent.pth")  # the file that an error names
    try:
        dtype = states["latent.pth"]["prior_mu"].dtype
        any_images = torch.eye(2, dtype=dtype)[0].view(2, 1, 1, 1).repeat(1, 1, SIZE, SIZE)
        # All that it takes from images is in the files
        vae = VAE(any_images, **states["latent.pth"].pop("arguments"))
        for name, state in states.items():
            path = Path(folder, name)
            getattr(vae, name.removesuffix(".pth")).load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = "does not fit the two other .pth files, or vae_lib.py (self.arguments in VAE, too)"
        raise ValueError(f"{path} {what}: export the three again ({error})") from error
    return vae.eval()


def write_result(path, fid, losses, features="imagenet"):
    """Write result.csv, rows `key,number`: the FID; the FID again under a key that names its
    features, since FIDs from different features cannot be compared; the score, 100 − FID; and the
    loss of each epoch, −ELBO in nats per image. `losses` are what `train` yields. OSError if the
    file cannot be written."""
    rows = [f"FID,{fid}", f"FID_{features},{fid}", f"score,{100 - fid}"]
    rows += [f"loss,{float(epoch.loss)}" for epoch in losses]
    path = Path(path)
    replace_files(path.parent, {path.name: lambda part: part.write_text("\n".join(rows) + "\n")})
