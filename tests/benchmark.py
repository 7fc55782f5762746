"""The figures of this project, measured beside other libraries on the same images in the same run.

    python -m tests.benchmark                      all but `seeds` and `ours`, in 14 minutes
    python -m tests.benchmark --quick              the same at the size of a smoke test
    python -m tests.benchmark --only distance      one table, here with every peer at every size

The tables go to benchmark/tables.md, or to --output, and a plot beside them. Each is a function
that returns Markdown; what a peer cannot do here is said in its place.
FID is by the `digits` features: 50 is as good as fresh real digits, and F is the memoriser's floor,
the mean over sets of 100 drawn with replacement from the training images. Lower is better. Ranges
are from the least to the greatest. Needs requirements-dev.txt and a machine that is otherwise idle.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from statistics import median
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

import vae_lib
from data.make_data import read_package
from tests.fid import digit_features, fid, frechet_distance, memoriser_floor

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HOLDOUT = ROOT / "data" / "train", ROOT / "data" / "holdout"
PACKAGES = "torch torchvision numpy scipy torchmetrics torch-fidelity pytorch-fid clean-fid pythae"


# ---- helpers -------------------------------------------------------------------------------


def table(header, rows):
    """Markdown of a table, from its header (a string with | between the columns) and rows."""
    header = [title.strip() for title in header.split("|")]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values, digits=1, scale=1.0):
    """Median and range of some numbers, times scale."""
    low, middle, high = (scale * f(values) for f in (min, median, max))
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def milliseconds(times):
    """The median of some times in seconds, to three digits."""
    return f"{float(f'{1e3 * median(times):.3g}'):,g} ms"


def times_as_long(ratio):
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2f}×"


def peak():
    """The most memory that this process has held, in MB; needs nothing of this file."""
    try:  # ru_maxrss would count the process that started this one, too
        with open("/proc/self/status") as file:
            return int(file.read().split("VmHWM:")[1].split()[0]) * 1.024e-3
    except (OSError, IndexError):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def fresh(work, *arguments):
    """What a function of this file returns in a fresh process, and MB with torch and `vae_lib`."""
    code = f"""{inspect.getsource(peak)}
import json, sys, torch
memory = [peak()]
import vae_lib
memory.append(peak())
from tests import benchmark
print(json.dumps([benchmark.{work.__name__}(*sys.argv[1:]), memory]))"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr.strip() or f"exit status {run.returncode}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def repeat(work, seconds, most=7):
    """Seconds of calls until they add up to `seconds` or are `most` in number; the last result."""
    times = []
    while not times or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return times, result


def by_turns(*works):
    """The same for some functions in blocks of 0.2 s by turns, so that a slow spell of the machine
    meets them all, until the last was called for half a second."""
    times, results = [[] for _ in works], [None for _ in works]
    while sum(times[-1]) < 0.5:
        for i, work in enumerate(works):
            time.sleep(0.05)  # threads of the libraries that the last one used still spin
            more, results[i] = repeat(work, 0.2, 1000)
            times[i] += more
    return times, results


@functools.cache
def yardsticks():
    """The training images, their features, the memoriser's floor and the holdout images' FID."""
    images = vae_lib.load_images(TRAIN)
    real = digit_features(images)
    holdout = frechet_distance(real, digit_features(vae_lib.load_images(HOLDOUT)))
    return images, real, memoriser_floor(real)[0], holdout


def fid_of(sample):
    """Mean and standard deviation of the FID of sample(seed), 100 images, over 20 draws."""
    real = yardsticks()[1]
    values = [frechet_distance(real, digit_features(sample(1000 + i))) for i in range(20)]
    return float(np.mean(values)), float(np.std(values))


def fids_of(vae, methods=("iid",)):
    """{method: (mean FID, standard deviation)} of draws from the prior, in evaluation mode."""
    vae.eval()
    scores = {m: fid_of(lambda seed, m=m: vae.sample(100, m, seed)) for m in methods}
    vae.train()
    return scores


def timed_training(vae, images, epochs, **options):
    """Train, and return the seconds of each epoch."""
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in vae_lib.train(vae, images, epochs, **options)]
    return np.diff(times)


# ---- this project over seeds ---------------------------------------------------------------


@functools.cache
def our_run(seed, epochs):
    """Seconds of a training run from a seed and its {method: mean FID}; None if it diverged."""
    vae = vae_lib.VAE(seed=seed, images=yardsticks()[0])
    try:
        seconds = timed_training(vae, yardsticks()[0], epochs, seed=seed).sum()
    except FloatingPointError:
        return None
    scores = fids_of(vae, ("iid", "lattice", "sobol"))
    return seconds, {method: mean for method, (mean, _) in scores.items()}


def train_fresh(folder, epochs, device):
    """Seconds to load a folder, of each epoch in batches of 100, MB at the end, FIDs of draws."""
    start = time.perf_counter()
    images = vae_lib.load_images(folder)
    load, vae = time.perf_counter() - start, vae_lib.VAE(images=images)
    if device != "cpu":  # the first call of a kernel loads it
        timed_training(vae_lib.VAE(), images, 3, batch_size=100, device=device)
    seconds = timed_training(vae, images, int(epochs), batch_size=100, device=device).tolist()
    memory, real = peak(), digit_features(images)
    draws = [digit_features(vae.sample(100, "iid", seed)) for seed in range(20)]
    return load, seconds, memory, [frechet_distance(real, draw) for draw in draws]


def ours(options, count=None, few=3):
    """FID over training seeds that were not used for tuning, the shortest of some schedules whose
    median iid FID is at most 50, and peak memory of a fresh process that trains."""
    floor, epochs, short, lines = yardsticks()[2], 5000, (1000, 1500, 2500), []
    count = count or (5 if options.only else 2)
    if options.quick:
        count, few, epochs, short = 2, 2, 60, (40,)
    for steps in (epochs, *short):
        runs = {s: our_run(s, steps) for s in range(100, 100 + (count if steps == epochs else few))}
        good = [run for run in runs.values() if run]
        diverged = [seed for seed, run in runs.items() if not run] or "none"
        fids = {m: [scores[m] for _, scores in good] for m in (good[0][1] if good else ())}
        if steps == epochs:
            rows = [[m, spread(f, 2, 1 / floor), spread(f)] for m, f in fids.items()]
            lines.append(table("draws | FID (digits) ÷ F, median (range) | FID (digits)", rows))
        level, seconds = fids.get("iid", [np.inf]), spread([run[0] for run in good] or [np.nan])
        lines.append(
            f"{steps:,} steps of all images in {seconds} s: iid FID {spread(level)} over"
            f" {len(runs)} seeds from 100; diverged: {diverged}."
        )
        if steps < epochs and median(level) <= 50:
            lines[-1] += " So the level of fresh real digits, 50, is reached within that time."
            break
    (_, _, memory, _), (base, imports) = fresh(train_fresh, TRAIN, 100, "cpu")
    lines.append(
        f"Peak memory {memory - base:.0f} MB above the {base:.0f} MB for importing torch:"
        f" {imports - base:.0f} MB for what `vae_lib` imports, {memory - imports:.0f} MB to train."
    )
    return "\n\n".join(lines)


def seeds(options):
    """The same over 20 seeds, and 5 for the short schedules."""
    return ours(options, 20, 5)


# ---- quality at equal time -----------------------------------------------------------------


class PixelBias(nn.Module):
    """A learned image added to the decoder's logits, at first the mean of the images."""

    def __init__(self, images):
        super().__init__()
        self.bias = nn.Parameter(torch.logit(images.mean(0).clamp(0.02, 0.98)))

    def forward(self, x):
        return x + self.bias


def small_convolutional():
    """Our model with three strided convolutions each way. In trials of 15 s with 4 to 32 channels
    and rates of 3e-3 to 1.5e-2, 8 at our own rate was best; without the bias it is far worse."""
    vae, act = vae_lib.VAE(), nn.SiLU()
    encoder, decoder = [nn.Unflatten(1, (1, 32, 32))], [nn.Linear(2, 192), act, nn.Linear(192, 512)]
    for a, b in itertools.pairwise((1, 8, 16, 32)):
        encoder += [nn.Conv2d(a, b, 4, 2, 1), act]
    decoder.append(nn.Unflatten(1, (32, 4, 4)))
    for a, b in itertools.pairwise((32, 16, 8, 1)):
        decoder += [act, nn.ConvTranspose2d(a, b, 4, 2, 1)]
    vae.encoder.net = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(512, 4))
    vae.decoder.net = nn.Sequential(*decoder, PixelBias(yardsticks()[0]), nn.Flatten())
    return vae


def plain_example():
    """The VAE of pytorch/examples at its sizes, 400 hidden units and 20 latents, on 1024 pixels."""
    vae = vae_lib.VAE(latent_dim=20)
    vae.encoder.net = nn.Sequential(nn.Linear(1024, 400), nn.ReLU(), nn.Linear(400, 40))
    vae.decoder.net = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 1024))
    return vae


def large_convolutional(latents=32):
    """A typical student solution: 64-128-256-512 channels, batch normalisation, dropout of 0.2."""
    vae, widths = vae_lib.VAE(latent_dim=latents), (64, 128, 256, 512)

    def block(convolution, channels):
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.2)]

    encoder, decoder = [nn.Unflatten(1, (1, 32, 32))], [nn.Linear(latents, 2048)]
    for a, b in itertools.pairwise((1, *widths)):
        encoder += block(nn.Conv2d(a, b, 3, 2, 1), b)
    decoder.append(nn.Unflatten(1, (512, 2, 2)))
    for a, b in itertools.pairwise((*widths[::-1], 64)):
        decoder += block(nn.ConvTranspose2d(a, b, 4, 2, 1), b)
    vae.encoder.net = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(2048, 2 * latents))
    vae.decoder.net = nn.Sequential(*decoder, nn.Conv2d(64, 1, 3, padding=1), nn.Flatten())
    return vae


def scheduled(build, marks, methods=("iid",)):
    """A fresh model for each number of seconds, trained by our schedule with as many epochs as fit:
    [(seconds taken, epochs, {method: (FID, deviation)})]."""
    images, results = yardsticks()[0], []
    for mark in marks:
        start = time.perf_counter()  # a trial of a tenth of the time tells how many will fit
        trial, taken = vae_lib.train(build(), images, 10**6), [start]
        while taken[-1] - start < mark / 10:
            next(trial)
            taken.append(time.perf_counter())
        vae, epochs = build(), max(20, round(mark / np.mean(np.diff(taken))))
        try:
            seconds = timed_training(vae, images, epochs).sum()
            results.append((seconds, epochs, fids_of(vae, methods)))
        except FloatingPointError:
            results.append((mark, epochs, dict.fromkeys(methods, (np.nan, np.nan))))
    return results


def constant(loss, optimiser, marks, score, batch_size=100):
    """One model trained at a constant rate and scored on the way, while the clock stands still."""
    images, results, seconds, epoch = yardsticks()[0], [], 0.0, 0
    for mark in marks:
        while seconds < mark:
            start = time.perf_counter()
            for rows in torch.randperm(len(images)).split(batch_size):
                optimiser.zero_grad()
                loss(images[rows]).backward()
                optimiser.step()
            seconds += time.perf_counter() - start
            epoch += 1
        results.append((seconds, epoch, score()))
    return results


def absolute(x, x_hat):
    return (x - x_hat).abs().flatten(1).sum(1)


def plain_training(vae, pixel_loss, optimiser, marks):
    """`constant` for a `VAE`, by a sum over pixels and the KL with weight one."""

    def loss(x):
        x_hat, mu, logvar = vae(x)
        return (pixel_loss(x, x_hat) + vae_lib.kl_divergence(mu, logvar).sum(1)).mean()

    return constant(loss, optimiser(vae.parameters(), 1e-3), marks, lambda: fids_of(vae))


def pythae_training(latents, rate, batch_size, marks):
    """pythae's VAE and loss in a plain loop, faster than its trainer, drawn from by its sampler of
    the prior and by its mixture of Gaussians, fitted to the encoded training images."""
    from pythae.models import VAE, VAEConfig
    from pythae.samplers import GaussianMixtureSampler, NormalSampler

    model = VAE(VAEConfig(input_dim=(1, 32, 32), latent_dim=latents))

    def draw(sampler, seed):
        torch.manual_seed(seed)
        if isinstance(sampler, GaussianMixtureSampler):
            sampler.gmm.random_state = seed
        return sampler.sample(100).clamp(0, 1)

    def score():
        model.eval()
        samplers = {"iid": NormalSampler(model), "mixture": GaussianMixtureSampler(model)}
        samplers["mixture"].fit(yardsticks()[0])
        scores = {name: fid_of(functools.partial(draw, s)) for name, s in samplers.items()}
        model.train()
        return scores

    optimiser = torch.optim.Adam(model.parameters(), rate)
    return constant(lambda x: model({"data": x}).loss, optimiser, marks, score, batch_size)


OURS, SMALL = "this project", "this project, small convolutional"
MODELS = {
    OURS: lambda marks: scheduled(
        functools.partial(vae_lib.VAE, images=yardsticks()[0]), marks, ("iid", "lattice", "sobol")
    ),
    SMALL: lambda marks: scheduled(small_convolutional, marks),
    "pytorch/examples VAE, our loss": lambda marks: plain_training(
        plain_example(), vae_lib.reconstruction_loss, torch.optim.Adam, marks
    ),
    "large convolutional, L1 + KL": lambda marks: plain_training(
        large_convolutional(), absolute, torch.optim.AdamW, marks
    ),
    "pythae VAE, defaults": functools.partial(pythae_training, 10, 1e-4, 64),
    "pythae VAE, tuned": functools.partial(pythae_training, 2, 1e-3, 100),
}


def trained(name, marks):
    """The (seconds, epochs, scores) of a model at each number of seconds, in its own process."""
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        return MODELS[name](marks)


def on_one_thread_each(tasks):
    """Futures of `trained` for each (name, marks), two at a time, each with one thread."""
    spawn = multiprocessing.get_context("spawn")
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # pythae moves to a GPU it sees
    with patch.dict(os.environ, alone), ProcessPoolExecutor(2, spawn) as pool:
        return [pool.submit(trained, *task) for task in tasks]


def quality(options):
    """Mean FID after equal times of training, for this project and other models."""
    _, _, floor, holdout = yardsticks()
    marks = (0.5, 1, 2) if options.quick else (10, 30, 60, 120)
    # our schedule ends at a rate of zero: each time is a run of its own, planned for so many
    # seconds, and all others get as long as those runs took; long runs first, to end together
    runs = on_one_thread_each([(OURS, [mark]) for mark in marks[::-1]])
    results = {OURS: [run.result()[0] for run in runs[::-1]]}
    seconds = [run[0] for run in results[OURS]]
    tasks = [(name, seconds) for name in list(MODELS)[2:]] + [(SMALL, [s]) for s in seconds[::-1]]
    notes, rows, ahead = [], [], []
    for (name, _), run in zip(tasks, on_one_thread_each(tasks), strict=True):
        if error := run.exception():  # a peer that fails costs its row, not the table
            notes.append(f"{name}: not measured, {type(error).__name__}: {error}.")
        else:
            results[name] = run.result() + results.get(name, [])
    results = {n: results[n] for n in MODELS if len(results.get(n, ())) == len(marks)}
    reference = [scores["iid"][0] for _, _, scores in results[OURS]]
    for name, runs in results.items():
        for method in runs[0][2]:
            row = [name, method, times_as_long(runs[-1][2][method][0] / reference[-1])]
            for mark, (_, _, scores), own in zip(marks, runs, reference, strict=True):
                fid, deviation = scores[method]
                bold = "**" * (name != OURS and fid < own)
                row.append(f"{bold}{fid / floor:.2f} F{bold} ({fid:.1f} ± {deviation:.1f})")
                ahead += [f"{name}, {method}, after {mark} s"] * bool(bold)
            rows.append([*row, f"{runs[-1][1]:,}"])
    taken = [", ".join(f"{run[0]:.1f}" for run in results.get(n, ())) for n in (OURS, SMALL)]
    notes += [
        f"Ahead of this project's iid draws (bold): {'; '.join(ahead) or 'none, at any time'}.",
        "Seconds are those of one core: two models train side by side, one thread each. FID"
        " (digits): mean ± standard deviation over 20 draws of 100 from one training run each, so"
        f" the spread between runs is not in it. F = {floor:.1f}; holdout images"
        f" {holdout / floor:.2f} F; fresh real digits, 50, are {50 / floor:.2f} F.",
        "Our schedule ends at a rate of zero, so in the first two models each time is a run of its"
        f" own, planned by a short trial ({'; '.join(taken)} s). The others train once, at a"
        " constant rate, and are scored, while the clock stands still, when they have had as long"
        " as the first. pytorch/examples: 400 hidden units, 20 latents, 1e-3. Large convolutional:"
        " 64–128–256–512 channels, batch normalisation, dropout 0.2, 32 latents, AdamW at 1e-3."
        " These two have our bound of the log-variance. pythae: its loss, 10 latents, batches of 64"
        " and 1e-4 by default; tuned, 2 latents, all images at once and 1e-3. A mixture, fitted to"
        " encoded training images, is no draw from the prior.",
    ]
    plot_quality(results, marks, floor, holdout, options.output)
    notes.append("![The table above as a plot: FID against seconds of training](quality.png)")
    times = " | ".join(f"after {mark} s" for mark in marks)
    header = f"model | draws | FID ÷ ours, iid, at {marks[-1]} s | {times} | epochs by then"
    return "\n\n".join([table(header, rows), *notes])


def plot_quality(results, marks, floor, holdout, output):
    """FID against seconds on logarithmic axes, a line for each row, with floor and holdout."""
    colours = ["#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"]
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for (name, runs), colour in zip(results.items(), colours, strict=False):
        for method, style in zip(runs[0][2], ("-o", "--s", ":^"), strict=False):
            seconds, fids = [run[0] for run in runs], [run[2][method][0] for run in runs]
            axes.plot(seconds, fids, style, ms=4, color=colour, label=f"{name}, {method}")
    for value, name in ((floor, "floor F"), (holdout, "holdout images")):
        axes.axhline(value, color="#777777", lw=0.8)
        axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center")
    axes.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="FID (digits)")
    axes.minorticks_off()
    axes.set_xticks(marks, map(str, marks))
    levels = [10, 20, 30, 50, 100, 200, 500, 1000]
    axes.set_yticks(levels, map(str, levels))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    figure.savefig(Path(output).with_name("quality.png"), dpi=120, metadata={"Software": None})
    plt.close(figure)


# ---- the distance --------------------------------------------------------------------------


def moments(real, fake):
    return [m for x in (real, fake) for m in (x.mean(0), np.cov(x, rowvar=False))]


def torchmetrics(real, fake):
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*map(torch.from_numpy, moments(real, fake))))


def torch_fidelity(real, fake):
    from torch_fidelity import metric_fid

    a, b = (metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (real, fake))
    return metric_fid.fid_statistics_to_metric(a, b, False)[metric_fid.KEY_METRIC_FID]


def pytorch_fid(real, fake):
    from pytorch_fid.fid_score import calculate_frechet_distance

    return calculate_frechet_distance(*moments(real, fake))


def clean_fid(real, fake):
    from cleanfid.fid import fid_from_feats

    return fid_from_feats(real, fake)


def scipy_sqrtm(real, fake):
    from scipy.linalg import sqrtm

    mu1, a, mu2, b = moments(real, fake)
    return np.square(mu1 - mu2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real


def half(times):
    """The span of the middle half of some times, over their median."""
    return np.ptp(np.quantile(times, (0.25, 0.75))) / median(times)


def evaluate_fresh():
    """Milliseconds of the whole evaluator, a first and a second time."""
    work = functools.partial(fid, TRAIN, HOLDOUT, "digits")
    return [1e3 * repeat(work, 0)[0][0] for _ in range(2)]


def distance(options):
    """Time and disagreement of the distance between two sets of n features of width d in float64,
    means and covariances included, then the time of the whole evaluator in a fresh process."""
    peers = (torchmetrics, torch_fidelity, pytorch_fid, clean_fid, scipy_sqrtm)
    # at d = 2048 pytorch_fid and the two after it take 20 s a cell: left out unless asked for
    slow = () if options.only else (pytorch_fid, clean_fid, scipy_sqrtm)
    sizes = (50, 100) if options.quick else (50, 100, 200, 500, 1000, 2000)
    widths = (128, 256) if options.quick else (128, 2048)
    generator, rows, ahead, halves = np.random.default_rng(0), [], [], []
    headline, least = "", (np.inf, "")
    for d, n in itertools.product(widths, sizes):
        shift = 0.2 * generator.standard_normal(d)
        real, fake = np.maximum(generator.standard_normal((2, n, d)) + [[shift], [-shift]], 0)
        frechet_distance(real[:9, :4], fake[:9, :4])
        every, cells = [], []  # times of ours, in all turns
        for peer in peers:
            if d > 1000 and peer in slow and (peer, n) != (pytorch_fid, 100):
                cells.append("–")
                continue
            try:
                with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
                    peer(real[:9, :4], fake[:9, :4])  # imports what it needs
                    work = [functools.partial(f, real, fake) for f in (frechet_distance, peer)]
                    (own, times), (expected, value) = by_turns(*work)
            except Exception as error:  # imaginary parts, what SciPy dropped, a missing package
                cells.append(f"{type(error).__name__}: {str(error)[:50]}")
                continue
            every += own
            ratio, off = median(times) / median(own), abs(value / expected - 1)
            halves += [half(times)] * (len(times) >= 8)
            level = np.quantile(own, 0.75) > np.quantile(times, 0.25)
            where = f"{peer.__name__} at d = {d}, n = {n}"
            least = min(least, (ratio, where))
            ahead += [where] * (ratio < 1)
            cell = f"{'≈ ' * int(level)}{times_as_long(ratio)}, {milliseconds(times)}, {off:.0e}"
            cells.append(f"**{cell}**" if ratio < 1 else cell)
            if peer is torchmetrics and (d, n) == (widths[-1], 100):
                headline = f"At n = 100, d = {d} torchmetrics takes {ratio:,.0f} times as long."
        halves += [half(every)] * (len(every) >= 8)
        rows.append([d, n, milliseconds(every or [np.nan]), *cells])
    runs = zip(*[fresh(evaluate_fresh)[0] for _ in range(3)], strict=True)
    first, second = (spread(times, 0) for times in runs)
    lines = [
        headline,
        table("d | n | this project | " + " | ".join(p.__name__ for p in peers), rows),
        "Two sets of n synthetic features of width d. Cells: time as a multiple of ours, time,"
        " relative disagreement with ours. Medians of the calls within half a second, in blocks by"
        " turns with ours, or of one that takes longer; ≈ where the middle halves of the two"
        f" overlap. The middle half of a cell's calls spans {spread(halves, 0, 100)} % of their"
        " median."
        + " A dash: not measured for want of time; `--only distance` fills it."
        * any("–" in row for row in rows),
        f"Ahead of ours (bold): {'; '.join(ahead) or 'none of the cells measured'}. Our lead is"
        f" least against {least[1]}: {times_as_long(least[0])}. Above n = d ours, too, works on d×d"
        " matrices.",
        f"The whole of `fid(train, holdout, 'digits')` in a fresh process, imports aside: {first}"
        f" ms for 200 PNG files, {second} ms a second time. Median (range) of 3 processes.",
    ]
    return "\n\n".join(lines)


# ---- cost as work grows --------------------------------------------------------------------


def scale(options):
    """Training, memory and loading as the number of images grows, each in a fresh process, with
    about as many steps at each N; a row for CUDA where there is one."""
    try:
        digits, generator = read_package(options.tarball), np.random.default_rng(0)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"Not measured, for want of the npm package (--tarball names its file): {error}."
    runs = {100: 20, 1000: 4} if options.quick else {100: 900, 1000: 90, 9000: 10}  # N: epochs
    devices, rows, first = ["cpu"] + ["cuda"] * torch.cuda.is_available(), [], {}
    for n, epochs in runs.items():
        turns = ([digit[i] for digit in digits if i < len(digit)] for i in range(n))
        images = np.stack(list(itertools.islice(itertools.chain.from_iterable(turns), n)))
        real = digit_features(torch.from_numpy(images).unsqueeze(1).float() / 255)
        draws = [real[generator.integers(n, size=100)] for _ in range(20)]
        floor = np.mean([frechet_distance(real, draw) for draw in draws])
        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(images):
                Image.fromarray(image).save(f"{folder}/{i:05d}.png", compress_level=1)
            done = {device: fresh(train_fresh, folder, epochs, device) for device in devices}
        for device, ((load, times, memory, fids), (_, imports)) in done.items():
            each, mean = median(times) / n, np.mean(fids)
            ratio = times_as_long(each / first.setdefault(device, each))
            row = [f"{n:,}, {device}", ratio, f"{1e6 * each:.0f} µs", spread(times, 1, 1e3)]
            row += [f"{memory - imports:.0f} MB", f"{load:.2f} s", epochs, f"{sum(times):.1f} s"]
            rows.append([*row, f"{mean / floor:.2f} F", f"{mean:.1f} ± {np.std(fids):.1f}"])
    header = "N | time per image ÷ at N = 100 | per image | ms per epoch, median (range) | memory"
    header += " | `load_images` | epochs | training | FID ÷ floor | FID (digits)"
    note = (
        "Batches of 100. Memory: the host's peak above the imports. FID of 20 iid draws of 100 to"
        " the N training images; each N has its own floor, the mean of 20 sets of 100 drawn with"
        " replacement from these N. The same number of steps at each N, so the FID shows what equal"
        " work buys; at N = 9,000 the digit network was trained on most of the images. A process"
        " for each row." + " No CUDA device here." * (len(devices) == 1)
    )
    return "\n\n".join([table(header, rows), note] + [cuda_share() for _ in devices[1:]])


def cuda_share():
    """Where the time of a step on a GPU goes: its kernels, and the host."""
    from torch.profiler import ProfilerActivity, profile

    step = np.median(timed_training(vae_lib.VAE(), yardsticks()[0], 200, device="cuda"))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        timed_training(vae_lib.VAE(), yardsticks()[0], 50, device="cuda")
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [event for event in trace.key_averages() if event.device_type == on_device]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    shares = [event.self_device_time_total / 50 / 1e6 / step for event in kernels]
    most = "; ".join(f"{s:.0%} {k.key[:60]}" for s, k in zip(shares[:3], kernels, strict=False))
    return (
        f"{torch.cuda.get_device_name()}: a step takes {1e3 * step:.2f} ms, of which kernels run"
        f" for {sum(shares):.0%} (most: {most}). The rest is the host's: Python, autograd, launches"
        " and, once an epoch, waiting for the loss."
    )


# ---- the whole job -------------------------------------------------------------------------


def notebook(options):
    """Wall time of one headless run of the notebook, by section, and its kernel's peak memory."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(ROOT / "assignment_09.ipynb", as_version=4)
    probe = f"{inspect.getsource(peak)}\nprint(peak())"
    codes = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell in codes:
        book.cells.insert(book.cells.index(cell) + 1, nbformat.v4.new_code_cell(probe))
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(book, timeout=1800, record_timing=True, resources=where)
    epochs = os.environ.get("VAE_EPOCHS") or "30" * options.quick
    with tempfile.TemporaryDirectory() as folder:
        extra = {"VAE_OUTPUT": folder} | ({"VAE_EPOCHS": epochs} if epochs else {})
        start = time.perf_counter()
        client.execute(env=os.environ | extra)
        wall = time.perf_counter() - start
    section, sections, memory = "", {}, {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line[:1] == "#"]
            section = (titles or [section])[-1]
        elif cell.source == probe:
            memory[section] = f"{float(cell.outputs[0].text):.0f} MB"
        elif "execution" in cell.metadata:
            keys = ("iopub.execute_input", "shell.execute_reply")
            start, end = (datetime.fromisoformat(cell.metadata.execution[key]) for key in keys)
            sections[section] = sections.get(section, 0.0) + (end - start).total_seconds()
    last = list(memory.values())[-1]
    sections["the kernel's start and end"] = wall - sum(sections.values())
    rows = [[f"{s / wall:.0%}", f"{s:.2f} s", memory.get(t, ""), t] for t, s in sections.items()]
    rows.append(["100%", f"{wall:.2f} s", last, "all"])
    note = f"One run, {epochs or '5000'} epochs. Training includes drawing the losses. Memory: the"
    note += " kernel's peak by the end of the section, imports included."
    return "\n\n".join([table("share | time | peak memory | section", rows), note])


# ---- distance to the limits ----------------------------------------------------------------


def step_products(vae, batch=100):
    """The matrix products of a training step, as pairs of matrices: each linear layer's output, its
    weight's gradient and, but for the first, its input's. The decoder sees two draws."""
    products = []
    for part, m in ((vae.encoder, batch), (vae.decoder, 2 * batch)):
        for layer in (module for module in part.net if isinstance(module, nn.Linear)):
            weight = layer.weight.detach()  # (n, k)
            x, gradient = torch.randn(m, weight.shape[1]), torch.randn(m, weight.shape[0])
            products += [(x, weight.t()), (gradient.t(), x)]
            products += [(gradient, weight)] * (layer is not vae.encoder.net[0])
    return products


def limits(options):
    """A training step's FLOPs over the rate of the same matrix products with nothing in between,
    and the FID against the floor and zero. In turns, so that a slow spell meets all pieces."""
    images, _, floor, _ = yardsticks()
    vae, calls = vae_lib.VAE(images=images), 30 if options.quick else 150
    products = step_products(vae)
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)
    values, counts = (
        [p.detach() for p in vae.parameters()],
        [torch.zeros(()) for _ in vae.parameters()],
    )
    gradients, *moments = [[torch.full_like(value, 1e-3) for value in values] for _ in range(3)]
    constants = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0}
    constants |= {"amsgrad": False, "maximize": False, "fused": True}
    adam = functools.partial(vae_lib.adam, values, gradients, *moments, [], counts, **constants)
    rounds, square = [], torch.randn(2048, 2048)
    for _ in range(5):
        step = np.median(timed_training(vae_lib.VAE(images=images), images, calls)[5:])
        bare = median(repeat(lambda: [torch.mm(a, b) for a, b in products], 60, calls)[0])
        large = median(repeat(lambda: torch.mm(square, square), 60, 3)[0])
        rounds.append((step, bare, median(repeat(adam, 60, calls)[0]), large))
    rest = [step - bare - update for step, bare, update, _ in rounds]
    step, bare, update, large = zip(*rounds, strict=True)
    rates = [flops / s * t / (2 * 2048**3) for s, t in zip(step, large, strict=True)]
    pieces = {
        f"matrix products, at {flops / median(bare) / 1e9:.0f} GFLOP/s": bare,
        "Adam's update": update,
        "the rest: activations, draws, losses, calls": rest,
        f"a step, at {flops / median(step) / 1e9:.0f} GFLOP/s": step,
    }
    rows = []
    for name, part in pieces.items():
        shares = [a / b for a, b in zip(part, step, strict=True)]
        rows.append([spread(shares, 0, 100), spread(part, 2, 1e3), name])
    epochs = 60 if options.quick else 5000
    fids = (our_run(100, epochs) or (0, {"diverged": np.nan}))[1].items()
    left = "; ".join(f"{method} {fid / floor:.2f} F ({fid:.1f})" for method, fid in fids)
    lines = [
        f"A step runs at {rows[0][0]} % of the machine's own matrix-product rate at these sizes,"
        f" and at {spread(rates, 0, 100)} % of its rate for a product of two 2048×2048 matrices.",
        table("% of a step | ms | what", rows),
        f"{flops / 1e6:.0f} MFLOP a step, 2·m·k·n for each product. Median (range) of 5 rounds.",
        f"FID (digits) left after {epochs:,} steps from seed 100: {left}. A memoriser that draws"
        f" independently has 1 F ({floor:.1f}), and every image once has 0.",
    ]
    return "\n\n".join(lines)


# ---- command -------------------------------------------------------------------------------

TABLES = {
    "seeds": ("This project over 20 training seeds", seeds),
    "ours": ("This project over training seeds", ours),
    "quality": ("Quality at equal time", quality),
    "distance": ("The Fréchet distance", distance),
    "scale": ("Cost as the number of images grows", scale),
    "notebook": ("The whole notebook", notebook),
    "limits": ("Distance to the limits", limits),
}


def machine():
    """Processor, threads and versions; not the machine's name."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    threads = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
    return f"Measured on {model} ({threads}) with {', '.join(versions)}."


def main():
    parser = argparse.ArgumentParser("python -m tests.benchmark", description="See the file's top.")
    parser.add_argument("--quick", action="store_true", help="the size of a smoke test")
    parser.add_argument("--only", nargs="+", choices=TABLES, help="default: all but seeds and ours")
    parser.add_argument("--output", default=ROOT / "benchmark" / "tables.md", type=Path)
    parser.add_argument("--tarball", default=os.environ.get("MNIST_TARBALL"), help="for scale")
    options = parser.parse_args()
    start, parts, failed = time.perf_counter(), [machine()], []
    print(parts[0], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or list(TABLES)[2:]:
        title, function = TABLES[name]
        try:
            text = function(options)
        except Exception as error:  # the other tables are still worth having
            text = f"Not measured: {type(error).__name__}: {error}"
            failed.append(name)
        parts.append(f"## {title}\n\n{text}")
        print(f"\n{parts[-1]}", flush=True)
        options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"\nAll of it took {time.perf_counter() - start:.0f} s: {options.output}")
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
