"""Slow campaigns against faults and bad files: python -m tests.campaign [--share 1.0].

Each prints what was tried and what failed, and the command fails if anything did. CI runs a share.
"""

import argparse
import io
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

import vae_lib
from tests import fid as evaluator
from tests.notebook_test import EXPORTS, copy_project
from tests.run_test import read_result

ROOT = Path(__file__).resolve().parent.parent
LOSSES = [vae_lib.Losses(3.0, 1.0, 2.0)] * 1000


def state_of(folder, models):
    """Which model a folder holds, "mixture" where the preflight finds one, or what is wrong."""
    if not all((folder / name).is_file() for name in EXPORTS):
        return "a file is missing"
    vae = vae_lib.load(folder)
    figures, _ = read_result(folder / "result.csv")
    if figures["checksum"] != vae_lib.checksum(folder):
        return "mixture"
    held = [fid for fid, model in models.items() if torch.equal(vae.sample(9, seed=0), model)]
    return "whole" if held == [figures["FID"]] else "wrong figure"


def kill_exports(times):
    """SIGKILL during an export, at random moments and between any two of its renames (POSIX)."""
    models = {float(seed): vae_lib.VAE(seed=seed) for seed in (1, 2)}
    samples = {fid: vae.sample(100, seed=0) for fid, vae in models.items()}
    known = {fid: vae.sample(9, seed=0) for fid, vae in models.items()}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def export(fid, renames=None):
            replace, done = os.replace, []

            def counted(*arguments):
                if len(done) == renames:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(replace(*arguments))

            os.replace = counted
            try:
                vae_lib.export(models[fid], samples[fid], fid, LOSSES, folder=folder)
            finally:
                os.replace = replace

        export(1.0)
        started = time.perf_counter()
        export(1.0)
        duration = time.perf_counter() - started
        for attempt in range(times):
            fid = float(attempt % 2 + 1)
            process = os.fork()
            if process == 0:
                torch.set_num_threads(1)
                # one in ten is killed between two renames, which chance would hardly meet
                export(fid, attempt // 10 % 10 if attempt % 10 == 0 else None)
                os._exit(0)
            if attempt % 10:
                time.sleep(random.Random(attempt).uniform(0, 1.2 * duration))
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            state = state_of(folder, known)
            found[state] = found.get(state, 0) + 1
            if state == "mixture":
                export(1.0)
    bad = sum(count for state, count in found.items() if state not in ("whole", "mixture"))
    counts = ", ".join(f"{count} {state}" for state, count in found.items())
    return f"{times} exports killed: {counts} (a mixture fails the preflight)", bad


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def mutate(data, dice):
    """Damage PNG bytes: flipped bits, cuts, repeats, new chunks with valid checksums."""
    way = dice.randrange(7)
    at = dice.randrange(len(data))
    if way == 0:
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    if way in (1, 2):  # cut, or a piece twice
        return data[:at] + (way - 1) * (data[at : at + dice.randrange(1, 40)] + data[at:])
    if way == 3:  # a header that lies
        fields = [dice.choice([32, 31, 0, 64, 2**31 - 1]) for _ in range(2)]
        rest = bytes(dice.choice([(8, 0), (16, 0), (8, 2), (8, 3), (1, 0), (7, 9)])) + bytes(3)
        return data[:8] + chunk(b"IHDR", struct.pack(">II", *fields) + rest) + data[33:]
    if way == 4:  # other pixels, a text bomb, transparency
        bomb = b"t\0\0" + zlib.compress(bytes(10**7))
        kind, value = dice.choice([(b"zTXt", bomb), (b"tRNS", b"\0\0"), (b"gAMA", b"\0\0\0\1")])
        return data[:33] + chunk(kind, value) + data[33:]
    if way == 5:  # rows that end early, in a sound stream
        start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
        pixels = zlib.decompress(data[start:end])
        shorter = chunk(b"IDAT", zlib.compress(pixels[: dice.randrange(len(pixels))]))
        return data[: start - 8] + shorter + data[end + 4 :]
    return data[:at] + bytes(dice.randrange(256) for _ in range(dice.randrange(1, 30))) + data[at:]


def reference(data):
    """The grey pixels that libpng reads, or None."""
    buffer = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these functions will move to another package
            colour = decode_png(buffer, ImageReadMode.RGB)  # (3, 32, 32)
    except RuntimeError:
        return None
    scale = 65535 if colour.dtype == torch.uint16 else 255
    weights = (0.299, 0.587, 0.114)  # ITU-R 601
    grey = sum(w * c.double() / scale for w, c in zip(weights, colour, strict=True))
    return grey if grey.shape == (32, 32) else None


def fuzz_images(times):
    """Damaged PNG files through both readers: read as libpng reads them, or refused by name."""
    dice, bad, read = random.Random(0), 0, 0
    sources = []
    for mode in ("L", "RGB", "RGBA", "P", "1", "I;16"):
        image = Image.open(ROOT / "data" / "train" / "042.png")
        buffer = io.BytesIO()
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        image.save(buffer, "PNG")
        sources.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "000.png"
        for _ in range(times):
            data = mutate(dice.choice(sources), dice)
            path.write_bytes(data)
            started = time.perf_counter()
            for reader in (vae_lib.read_image, evaluator.read_png):
                try:
                    pixels = torch.tensor(reader(path).tolist()).double().squeeze()
                except ValueError as error:
                    bad += str(path) not in str(error)
                    continue
                pixels = pixels / 255 if reader is evaluator.read_png else pixels
                expected = reference(data)
                close = expected is not None and (pixels - expected).abs().max() < 0.006
                read += bool(close)
                if not close:
                    bad += 1
                    print("read otherwise than by libpng:", data.hex()[:200])
            bad += time.perf_counter() - started > 2
    return f"{times} damaged PNG files, two readers: {read} read correctly, the rest refused", bad


def sample_memory(times):
    """1,000 samples of 100 in a row: the peak memory after the first hundred stays."""
    vae = vae_lib.VAE()
    peaks = []
    for i in range(times):
        vae.sample(100, seed=i)
        if i in (times // 10, times - 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return f"{times} samples of 100: {peaks[1] - peaks[0]:.1f} MB grown", int(
        peaks[1] - peaks[0] > 20
    )


def repeat_notebook(times):
    """The notebook again and again in one kernel: the same bytes, no more open figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        os.environ["VAE_EPOCHS"] = "50"
        notebook = nbformat.read(folder / "assignment_09.ipynb", as_version=4)
        cells = list(notebook.cells)
        check = nbformat.v4.new_code_cell(
            "import shutil\nfor n in (*vae_lib.WEIGHTS, 'result.csv', 'samples.png'):\n"
            "    shutil.copy(n, Path('data') / f'{len(runs)}-{n}')\n"
            "runs.append(len(plt.get_fignums()))\nprint('runs', runs)"
        )
        notebook.cells = [nbformat.v4.new_code_cell("runs = []"), *(cells + [check]) * times]
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        bad = f"runs {[0] * times}" not in notebook.cells[-1].outputs[0].text
        for export in EXPORTS:
            found = {(folder / "data" / f"{i}-{export}").read_bytes() for i in range(times)}
            bad += len(found) != 1
    return (
        f"the notebook {times} times in one kernel: all five files bit-equal, no open figure",
        bad,
    )


def main():
    parser = argparse.ArgumentParser("python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the full campaigns' sizes")
    share = parser.parse_args().share
    failed = 0
    for campaign, times in (
        (kill_exports, 200),
        (fuzz_images, 4000),
        (sample_memory, 1000),
        (repeat_notebook, 10),
    ):
        text, bad = campaign(max(2, round(share * times)))
        print(f"{campaign.__name__}: {text}; {bad} failures", flush=True)
        failed += bad
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
