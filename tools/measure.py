"""What the benchmark's sections share: subjects, the judge, measures of a trained model, tables."""

import hashlib
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vae_lib
from tests.fid import copying, frechet_distance, imagenet_features, memoriser_floor

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "data" / "train"
HOLDOUT = ROOT / "data" / "holdout"

EPOCHS = 5000  # of a training with the defaults
SAMPLES = 100  # images in each draw that is judged
NEAR = 1.0  # Euclidean distance over pixels within which a sample shows a training image


# Subjects


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


# Measures of a model


class Judge:
    """FIDs to some images, as multiples of F, which a memoriser gets by independent draws."""

    def __init__(self, images):
        self.real = imagenet_features(images)  # (n, 1280)
        self.floor, _ = memoriser_floor(self.real)

    def __call__(self, others):
        return frechet_distance(self.real, imagenet_features(others)) / self.floor

    def even_memoriser(self):
        """What a memoriser gets by latin draws: 0 for 100 images, more for more."""
        even, _ = memoriser_floor(self.real, method="latin", size=SAMPLES)
        return even / self.floor

    def draws(self, model, method, count):
        """The figures of `count` draws of 100 samples, of seeds 0, 1, …"""
        return [self(model.sample(SAMPLES, method, seed)) for seed in range(count)]


def train(vae, images, epochs, seed):
    """Train with the library's defaults: −ELBO of each epoch; the last is NaN if it diverged."""
    losses = []
    try:
        for epoch in vae_lib.train(vae, images, epochs, seed=seed):
            losses.append(epoch.loss)
    except FloatingPointError:
        losses.append(math.nan)  # a figure of its own: the benchmark reports it and goes on
    return losses


def final_loss(losses):
    """The mean of the last 2 % of the epochs, NaN after a divergence."""
    return float(np.mean(losses[-max(1, len(losses) // 50) :]))


def mean_image_loss(images):
    """−ELBO of a decoder that shows the mean image whatever z is, where KL is 0."""
    return vae_lib.reconstruction_loss(images, images.mean(0)).mean().item()


@torch.no_grad()
def best_loss(vae, images):
    """−ELBO of the encoder's posteriors with the best of all decoders, by 100,000 draws of z."""
    mu, logvar = vae.encoder(images)  # (N, D) each
    generator = torch.Generator().manual_seed(0)
    draws = 100_000 // len(images)
    reconstruction = 0.0
    for _ in range(draws):
        z = vae.latent(mu, logvar, generator)  # (N, D)
        x_hat = vae_lib.best_decoder(z, mu, logvar, images)  # (N, 1, 32, 32)
        reconstruction += vae_lib.reconstruction_loss(images, x_hat).mean().item() / draws
    kl = vae_lib.kl_divergence(mu, logvar).sum(1).mean().item()
    return reconstruction + kl


@torch.no_grad()
def neighbours(vae, images):
    """Half the mean squared distance of images beside each other on the line, and of any two."""
    mu, _ = vae.encoder(images)  # (N, 1)
    along = images[mu[:, 0].argsort()]
    beside = vae_lib.reconstruction_loss(along[1:], along[:-1]).mean().item()
    any_two = 0.5 * torch.pdist(images.flatten(1)).square().mean().item()
    return beside, any_two


def far_and_shown(vae, images, draws):
    """Percentage of independent samples farther than `NEAR` from every training image, and how many
    training images a Latin draw of 100 shows, within `NEAR`: means over draws."""
    far_shares = []
    counts = []
    for seed in range(draws):
        far, _, _ = copying(vae.sample(SAMPLES, "iid", seed), images, NEAR)
        _, shown, _ = copying(vae.sample(SAMPLES, "latin", seed), images, NEAR)
        far_shares.append(100 * far)
        counts.append(shown)
    return float(np.mean(far_shares)), float(np.mean(counts))


# Running many


def side_by_side(function, tasks, fresh=False):
    """Yield (name, result) of function(*arguments) for tasks {name: arguments} as they finish.

    Two processes run them, each on one thread; with `fresh`, each task has a process of its own.
    """
    pool = ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1 if fresh else None,
    )
    try:
        futures = {}
        for name, arguments in tasks.items():
            futures[pool.submit(function, *arguments)] = name
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fingerprint(*files):
    """A hash of what is measured, so that figures of other code are never kept."""
    code = b"".join((ROOT / file).read_bytes() for file in files)
    return hashlib.sha256(code).hexdigest()


def resumable(path, code, function, tasks, print_line):
    """As `side_by_side`, but results (dictionaries) are kept in a file of JSON lines, and those of
    the same `code()` are not measured again: {name: result}, in the order of the tasks."""
    before = code()
    kept = {}
    if path.exists():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry["code"] == before:
                kept[entry["name"]] = entry["result"]
    missing = {name: tasks[name] for name in tasks if name not in kept}
    for name, result in side_by_side(function, missing):
        if code() != before:
            sys.exit("the code was changed meanwhile: start again, whatever fits will be kept")
        kept[name] = result
        with path.open("a") as file:
            file.write(json.dumps({"name": name, "code": before, "result": result}) + "\n")
        print(print_line(name, result), flush=True)
    return {name: kept[name] for name in tasks}


def peak_memory(process="self"):
    """The most memory that a process has held, in MB, on Linux."""
    with open(f"/proc/{process}/status") as file:
        kibibytes = int(file.read().split("VmHWM:")[1].split()[0])
    return kibibytes * 1024 / 1e6


class Stopwatch:
    """with Stopwatch() as watch: …; then watch.seconds"""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start


# Markdown


def table(header, rows):
    """A Markdown table of a list of titles and a list of rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def mean_and_range(values, digits=2):
    """Such as 1.31 (1.22–1.40)."""
    low, high = min(values), max(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def mean_and_worst(values, digits=2):
    """Such as 5.10 (5.13)."""
    return f"{np.mean(values):.{digits}f} ({max(values):.{digits}f})"


def bounds_table(bounds):
    """A table of rows (what, measured, bound) or (what, measured, bound, aim): kept or not.

    A bound is the largest figure that keeps it, NaN keeps none.
    """
    rows = []
    for what, measured, bound, *aim in bounds:
        verdict = "kept" if measured <= bound else "**not kept**"
        rows.append([what, f"{measured:.3f}", f"≤ {bound}", verdict, *(aim or ["–"])])
    return table(["figure", "measured", "bound", "", "aim"], rows)
