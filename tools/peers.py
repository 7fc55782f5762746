"""This project beside others: the benchmark's sections `peers` and `distance`."""

import contextlib
import time

import numpy as np
import torch
from torch import nn

import vae_lib
from tests.fid import frechet_distance
from tools import measure

# Other models after equal times of training

RATES = (1e-3, 3e-3, 1e-2)  # of which each tuned peer gets its best
OURS = "this project"
PEERS = {  # pythae's class, its latent dimensions, its learning rate (None: the best of RATES)
    "pythae VAE, its defaults": ("VAE", 10, 1e-4),
    "pythae VAE, two latent dimensions": ("VAE", 2, None),
    "pythae InfoVAE, two latent dimensions": ("INFOVAE_MMD", 2, None),
    "pythae IWAE, two latent dimensions": ("IWAE", 2, None),
}


class Pythae(nn.Module):
    """A model of pythae with its default layers and its own loss."""

    def __init__(self, name, latent_dim):
        super().__init__()
        from pythae import models

        config = getattr(models, f"{name}_Config" if name == "INFOVAE_MMD" else f"{name}Config")
        self.model = getattr(models, name)(config(input_dim=(1, 32, 32), latent_dim=latent_dim))
        self.prior = vae_lib.Latent(latent_dim)

    def loss(self, x):
        return self.model({"data": x}).loss

    @torch.no_grad()
    def sample(self, n, method, seed):
        return self.model.decoder(self.prior.sample(n, method, seed)).reconstruction.clamp(0, 1)


def train_peer(name, images, rate, seconds, seed):
    """Train for some seconds, a tuned rate falling along a straight line: the model, epochs."""
    kind, latent_dim, fixed = PEERS[name]
    torch.manual_seed(seed)  # pythae draws from the global generator; this process is ours
    with contextlib.redirect_stdout(None):
        model = Pythae(kind, latent_dim)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    start = time.perf_counter()
    epochs = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        if fixed is None:
            optimiser.param_groups[0]["lr"] = rate * (1 - elapsed / seconds)
        optimiser.zero_grad()
        model.loss(images).backward()
        optimiser.step()
        epochs += 1
    return model, epochs


def train_ours(images, seconds, seed):
    """The library's training, of as many epochs as a short trial says will fit."""
    start = time.perf_counter()
    trial = 0
    for _ in vae_lib.train(vae_lib.VAE(images, seed=seed), images, measure.EPOCHS, seed=seed):
        trial += 1
        if time.perf_counter() - start > seconds / 10:
            break
    epochs = max(1, round(trial * seconds / (time.perf_counter() - start)))
    vae = vae_lib.VAE(images, seed=seed)
    measure.train(vae, images, epochs, seed)
    return vae, epochs


def try_rate(name, rate, seconds, draws):
    """The iid figure of a peer trained on the holdout images, which no other section uses."""
    images = vae_lib.load_images(measure.HOLDOUT)
    model, _ = train_peer(name, images, rate, seconds, seed=0)
    return measure.figures(model, images, draws)["iid"]


def compare(name, rate, seconds, seed, draws):
    """What a training of so many seconds gives."""
    images = vae_lib.load_images(measure.TRAIN)
    if name == OURS:
        model, epochs = train_ours(images, seconds, seed)
    else:
        model, epochs = train_peer(name, images, rate, seconds, seed)
    return measure.figures(model, images, draws) | {"epochs": epochs}


def peers(options):
    """A table: other models after equal times of training."""
    seconds = 30 * options.epochs / measure.EPOCHS
    trials = {}
    for name, (_, _, fixed) in PEERS.items():
        for rate in RATES if fixed is None else (fixed,):
            trials[name, rate] = (name, rate, seconds / 3, min(3, options.draws))
    tried = measure.side_by_side(try_rate, trials)
    rates = {
        name: min((tried[key], key[1]) for key in tried if key[0] == name)[1] for name in PEERS
    }
    seeds = range(measure.FIRST_SEED, measure.FIRST_SEED + min(2, options.seeds))
    tasks = {}
    for name in (OURS, *PEERS):
        for seed in seeds:
            tasks[name, seed] = (name, rates.get(name), seconds, seed, options.draws)
    runs = measure.side_by_side(compare, tasks)
    rows = []
    for name in (OURS, *PEERS):
        of_name = [runs[name, seed] for seed in seeds]
        rate = "the library's" if name == OURS else f"{rates[name]:g}"
        cells = [measure.column(of_name, "iid"), measure.column(of_name, "latin")]
        rows.append([name, rate, *cells, f"{np.mean([run['epochs'] for run in of_name]):,.0f}"])
    return [measure.table(["model", "rate", "iid, F", "latin, F", "epochs"], rows)]


# The Fréchet distance of other libraries


def by_torchmetrics(mu1, sigma1, mu2, sigma2):
    from torchmetrics.image.fid import _compute_fid

    moments = [torch.from_numpy(moment) for moment in (mu1, sigma1, mu2, sigma2)]
    return float(_compute_fid(*moments))


def by_torch_fidelity(mu1, sigma1, mu2, sigma2):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first = {"mu": mu1, "sigma": sigma1}
    second = {"mu": mu2, "sigma": sigma2}
    return fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]


def by_pytorch_fid(mu1, sigma1, mu2, sigma2):
    from pytorch_fid.fid_score import calculate_frechet_distance

    return calculate_frechet_distance(mu1, sigma1, mu2, sigma2)


def by_clean_fid(mu1, sigma1, mu2, sigma2):
    from cleanfid.fid import frechet_distance as clean_distance

    return clean_distance(mu1, sigma1, mu2, sigma2)


LIBRARIES = {
    "torchmetrics": by_torchmetrics,
    "torch-fidelity": by_torch_fidelity,
    "pytorch-fid": by_pytorch_fid,
    "clean-fid": by_clean_fid,
}


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def timed(function):
    """Median seconds of the calls that fit in half a second, at least one; and the result."""
    times = []
    while sum(times) < 0.5:
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), result


def distance(options):
    """A table: time of the Fréchet distance in other libraries, and how far they disagree."""
    generator = np.random.default_rng(0)
    rows = []
    for n, d in ((100, 1280), (100, 2048), (500, 2048)):
        noise = generator.standard_normal((2, n, d))
        real = np.maximum(noise[0] + 0.1, 0)  # (n, d), as features are after a ReLU
        fake = np.maximum(noise[1] - 0.1, 0)
        seconds, ours = timed(lambda real=real, fake=fake: frechet_distance(real, fake))
        cells = [f"{1e3 * seconds:.1f} ms"]
        for library in LIBRARIES.values():
            with contextlib.redirect_stdout(None):  # some print warnings
                library(*moments(real[:, :8]), *moments(fake[:, :8]))  # imports what it needs
                theirs, other = timed(
                    lambda library=library, real=real, fake=fake: library(
                        *moments(real), *moments(fake)
                    )
                )
            cells.append(f"{theirs / seconds:,.0f}×, {abs(other / ours - 1):.0e}")
        rows.append([f"{n} of {d:,}", *cells])
    return [measure.table(["features", "ours", *LIBRARIES], rows)]
