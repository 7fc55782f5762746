"""What the benchmark's sections share: subjects, one way to train and to measure, tables."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import vae_lib
from tests.fid import frechet_distance, imagenet_features, memoriser_fid, read_folder

ROOT = Path(__file__).resolve().parent.parent
FIRST_SEED = 1000  # no choice was made on seeds from here on
DECIMALS = {"score": 1, "seconds": 0}  # of a column of a table; others have 2


def load_subject(name):
    """100 images of a subject, float32 (100, 1, 32, 32), each pixel k/255."""
    if "digits" in name:
        return load_digits(name)
    from skimage import data

    smallest = largest = 32  # width and height of a crop, in pixels of the picture
    if name == "faces":
        pictures = np.round(255 * data.lfw_subset()[:100]).astype(np.uint8)
        smallest = largest = 25
    elif name == "bricks":
        pictures = [data.brick()]
    elif name == "text":
        pictures = [np.where(data.text() < 100, 0, 255).astype(np.uint8)]
    elif name == "photographs":
        pictures = [data.astronaut(), data.chelsea(), data.rocket()]
        smallest = largest = 64
    elif name == "mixed crops":  # from a moon of hardly any contrast to a wheel of colours
        pictures = [data.moon(), data.brick(), data.camera(), data.astronaut(), data.cell()]
        pictures += [data.retina(), data.colorwheel()]
        largest = 256
    else:
        raise ValueError(f"unknown subject {name!r}")
    generator = np.random.default_rng(0)
    x = np.empty((100, 1, 32, 32))
    for i in range(100):
        picture = Image.fromarray(pictures[i % len(pictures)]).convert("L")
        size = generator.integers(smallest, largest + 1)
        left = generator.integers(picture.width - size + 1)
        top = generator.integers(picture.height - size + 1)
        box = (left, top, left + size, top + size)
        x[i, 0] = picture.resize((32, 32), Image.Resampling.BICUBIC, box)
    if name == "bricks":  # of so little contrast that the mean image costs only 12 nats
        nats = 0.5 * np.square((x - x.mean(0)) / 255).sum((1, 2, 3)).mean()
        x = x.mean() + np.sqrt(12 / nats) * (x - x.mean())
    return torch.from_numpy(x.round().clip(0, 255) / 255).float()


def load_digits(name):
    """The images of data/train as they are, or drawn towards grey."""
    x = read_folder(ROOT / "data" / "train")
    if name == "dimmed digits":
        contrast = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 1, (len(x), 1, 1, 1)))
        return ((255 * (0.5 + contrast * (x - 0.5))).round() / 255).float()
    return x


def train_and_measure(images, epochs, seed, draws, replaced=()):
    """Train with the defaults and measure: {column: number}. `replaced` holds names of the library
    and what stands in their places meanwhile, such as {"vae_lib.DRAWS": 1}."""
    with ExitStack() as stack:
        for name, value in dict(replaced).items():
            stack.enter_context(mock.patch(name, value))
        start = time.perf_counter()
        vae = vae_lib.VAE(images, seed=seed)
        for _ in vae_lib.train(vae, images, epochs, seed=seed):
            pass
        seconds = time.perf_counter() - start
    return {"seconds": seconds} | measure_losses(vae, images) | measure_samples(vae, images, draws)


@torch.no_grad()
def measure_losses(vae, images):
    """−ELBO, and what it would be with the best of all decoders for the same posteriors or with the
    mean image for every z, by 100,000 draws of z in all; and the worst reconstruction."""
    mu, logvar = vae.encoder(images)  # (N, L) each
    kl = vae_lib.kl_divergence(mu, logvar).sum(1).mean().item()
    generator = torch.Generator().manual_seed(0)
    own = best = 0.0
    rounds = 100_000 // len(images)
    for _ in range(rounds):
        z = vae.latent(mu, logvar, generator)  # (N, L)
        x_hat = vae_lib.best_decoder(z, mu, logvar, images)  # (N, 1, 32, 32)
        own += vae_lib.reconstruction_loss(images, vae.decoder(z)).mean().item() / rounds
        best += vae_lib.reconstruction_loss(images, x_hat).mean().item() / rounds
    apart = 0.5 * torch.cdist(images.flatten(1), images.flatten(1)).square()  # (N, N) nats
    clear = apart.fill_diagonal_(torch.inf).amin(1) >= 4  # (N,): images unlike all others
    reconstructions = vae_lib.reconstruction_loss(images, vae.reconstruct(images))  # (N,)
    return {
        "−ELBO": own + kl,
        "best decoder's": best + kl,
        "mean image": vae_lib.reconstruction_loss(images, images.mean(0)).mean().item(),
        "worst reconstruction": reconstructions[clear].max().item(),
    }


@torch.no_grad()
def measure_samples(vae, images, draws):
    """FIDs of sets of 100 samples, means over seeds 0, 1, …, as multiples of F: by iid draws, by
    the same draws and the best decoder, by latin draws; and the score that the last ones get."""
    real = imagenet_features(images)  # (N, 1280)
    unit, _ = memoriser_fid(real)
    posteriors = vae.encoder(images)

    def mean_fid(method, decode):
        sets = [decode(vae.latent.sample(100, method, seed)) for seed in range(draws)]
        return np.mean([frechet_distance(real, imagenet_features(x)) for x in sets])

    latin = mean_fid("latin", vae.decoder)
    best = mean_fid("iid", lambda z: vae_lib.best_decoder(z, *posteriors, images).clamp(0, 1))
    return {
        "iid, F": mean_fid("iid", vae.decoder) / unit,
        "best decoder's iid, F": best / unit,
        "latin, F": latin / unit,
        "score": 100 - latin,
    }


def side_by_side(function, tasks):
    """{name: function(*arguments)} for tasks {name: arguments}. Two processes run them, each on one
    thread. What a task raises ends the benchmark."""
    measured = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        results = pool.map(function, *zip(*tasks.values(), strict=True))
        for name, result in zip(tasks, results, strict=True):
            print(name, {column: round(float(x), 3) for column, x in result.items()}, flush=True)
            measured[name] = result
    return measured


def mean_and_worst(values, decimals, worst):
    """Such as 5.03 (5.06), or 5.03 where the worst is the mean."""
    mean, worst = (f"{value:.{decimals}f}" for value in (np.mean(values), worst(values)))
    return mean if mean == worst else f"{mean} ({worst})"


def table(what, rows, columns):
    """A Markdown table with a line for each of rows {name: what its runs measured}."""
    lines = [[what, *columns], ["---"] + ["--:"] * len(columns)]
    for name, runs in rows.items():
        line = [name]
        for column in columns:
            values = [run[column] for run in runs]
            worst = min if column == "score" else max
            line.append(mean_and_worst(values, DECIMALS.get(column, 2), worst))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
