"""What the benchmark's sections share: subjects, one way to train and to measure, tables."""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vae_lib
from tests.fid import frechet_distance, imagenet_features, memoriser_fid, nearest

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "data" / "train"
HOLDOUT = ROOT / "data" / "holdout"
EPOCHS = 4000  # of a training, as in the notebook
FIRST_SEED = 1000  # no choice was made on seeds from here on


def load_subject(name):
    """100 images of a subject, float32 (100, 1, 32, 32), each pixel k/255."""
    if name == "digits":
        return vae_lib.load_images(TRAIN)
    from skimage import data

    if name == "faces":
        pictures = np.round(255 * data.lfw_subset()[:100]).astype(np.uint8)
        crop = 25
    elif name == "bricks":
        pictures = [data.brick()]
        crop = 32
    elif name == "text":
        pictures = [np.where(data.text() < 100, 0, 255).astype(np.uint8)]
        crop = 32
    elif name == "photographs":
        pictures = [data.astronaut(), data.chelsea(), data.rocket()]
        crop = 64
    else:
        raise ValueError(f"unknown subject {name!r}")
    generator = np.random.default_rng(0)
    x = np.empty((100, 1, 32, 32))
    for i in range(100):
        picture = Image.fromarray(pictures[i % len(pictures)]).convert("L")
        left = generator.integers(picture.width - crop + 1)
        top = generator.integers(picture.height - crop + 1)
        box = (left, top, left + crop, top + crop)
        x[i, 0] = picture.resize((32, 32), Image.Resampling.BICUBIC, box)
    if name == "bricks":  # of so little contrast that the mean image costs only 12 nats
        nats = 0.5 * np.square((x - x.mean(0)) / 255).sum((1, 2, 3)).mean()
        x = x.mean() + np.sqrt(12 / nats) * (x - x.mean())
        x = x.round().clip(0, 255)
    return torch.from_numpy(x / 255).float()


def train(vae, images, epochs, seed, **options):
    """Train with the library; whether it ended without diverging."""
    try:
        for _ in vae_lib.train(vae, images, epochs, seed=seed, **options):
            pass
    except FloatingPointError:
        return False  # a result of its own: the benchmark reports it and goes on
    return True


@torch.no_grad()
def final_losses(vae, images):
    """−ELBO, and what it would be with the best of all decoders for the same posteriors; both by
    the same 1,000 draws of z for each image."""
    mu, logvar = vae.encoder(images)  # (N, L) each
    kl = vae_lib.kl_divergence(mu, logvar).sum(1).mean().item()
    generator = torch.Generator().manual_seed(0)
    own = best = 0.0
    for _ in range(1000):
        z = vae.latent(mu, logvar, generator)  # (N, L)
        x_hat = vae_lib.best_decoder(z, mu, logvar, images)  # (N, 1, 32, 32)
        own += vae_lib.reconstruction_loss(images, vae.decoder(z)).mean().item() / 1000
        best += vae_lib.reconstruction_loss(images, x_hat).mean().item() / 1000
    return own + kl, best + kl


def figures(model, images, draws=10):
    """FIDs of sets of 100 samples, seeds 0, 1, …: their means by iid and by latin draws, as
    multiples of F, and the score that the latin ones get."""
    real = imagenet_features(images)  # (n, 1280)
    unit, _ = memoriser_fid(real)
    found = {}
    for method in ("iid", "latin"):
        sets = [model.sample(100, method, seed) for seed in range(draws)]
        distance = np.mean([frechet_distance(real, imagenet_features(x)) for x in sets])
        found[method] = float(distance / unit)
    found["score"] = 100 - float(distance)
    return found


@torch.no_grad()
def picture_of_the_line(vae, images):
    """How the images lie: half the mean squared distance of neighbours on the first dimension, the
    least share of the prior that an image has between its neighbours, in 1/n (near 0 where two lie
    on one place), and how many images a latin draw of 100 shows, within a distance of 1."""
    mu, _ = vae.encoder(images)  # (N, L)
    order = mu[:, 0].argsort()
    along = images[order]
    beside = vae_lib.reconstruction_loss(along[1:], along[:-1]).mean().item()
    share = torch.special.ndtr(mu[order, 0])  # (N,)
    least = (share[2:] - share[:-2]).min().item() * len(images) / 2
    distance, index = nearest(vae.sample(100, "latin"), images)
    return {"beside": beside, "least": least, "shown": len(index[distance < 1].unique())}


def judge(vae, images, draws=10):
    """All figures of a trained model, {name: number}."""
    loss, best = final_losses(vae, images)
    found = {"loss": loss, "best": best, "excess": loss - best}
    return found | figures(vae, images, draws) | picture_of_the_line(vae, images)


def run(images, seed, epochs=EPOCHS, draws=10):
    """Train with the defaults and judge: {name: number}, NaN if the training diverged."""
    start = time.perf_counter()
    vae = vae_lib.VAE(images, seed=seed)
    sound = train(vae, images, epochs, seed)
    seconds = time.perf_counter() - start
    if not sound:
        return {"loss": math.nan, "seconds": seconds}
    return judge(vae, images, draws) | {"seconds": seconds}


def side_by_side(function, tasks):
    """{name: function(*arguments)} for tasks {name: arguments}, in the order of the tasks. Two
    processes run them, each on one thread."""
    found = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(function, *arguments): name for name, arguments in tasks.items()}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            print(futures[future], future.result(), flush=True)
    return {name: found[name] for name in tasks}


def column(runs, key, digits=2, worst=max):
    """Mean (worst) of a figure over runs, such as 5.03 (5.06)."""
    values = [each.get(key, math.nan) for each in runs]
    return f"{np.mean(values):.{digits}f} ({worst(values):.{digits}f})"


def table(header, rows):
    """A Markdown table of a list of titles and a list of rows."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
