"""Tests of the evaluator against independent references, known answers and damaged files.

python -m unittest tests.fid_test
"""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from tests import fid

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HOLDOUT = ROOT / "data" / "train", ROOT / "data" / "holdout"


# ---- references for the distance -----------------------------------------------------------


def moments(x):
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))  # (d,), (d, d)


def by_eigenvalues(x, y):
    """The distance with tr (Σ₁Σ₂)^½ as the sum of root eigenvalues of Σ₁^½ Σ₂ Σ₁^½, in float64."""
    (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # (d, d)
    values = np.linalg.eigvalsh(root @ sigma2 @ root)
    values = values[values > values.max() * len(values) * np.finfo(float).eps]  # else √ of rounding
    return np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * np.sqrt(values).sum()


def by_sqrtm(x, y):
    """The distance with scipy's matrix square root, which needs covariances of full rank."""
    (mu1, sigma1), (mu2, sigma2) = moments(x), moments(y)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root).real


def by_torchmetrics(x, y):
    statistics = [torch.from_numpy(part) for part in (*moments(x), *moments(y))]
    return _compute_fid(*statistics).item()


def feature_sets(seed):
    """Pairs of features, (n, d) and (m, d), by name, which says where both are of full rank."""
    rng = np.random.default_rng(seed)
    mixing, basis = rng.normal(size=(24, 24)) / 5, rng.normal(size=(5, 30)) / 5
    return {
        "full, random, n = m": (rng.normal(size=(100, 20)), rng.normal(0.3, 1.5, size=(100, 20))),
        "full, random, n ≠ m": (rng.normal(size=(100, 20)), rng.normal(0.3, 1.5, size=(41, 20))),
        "full, correlated": (rng.normal(size=(90, 24)) @ mixing, rng.normal(size=(60, 24)) / 3),
        "full, heavy-tailed": (rng.standard_t(2.5, (200, 16)), rng.standard_t(3, (150, 16))),
        "full, one wide": (rng.normal(size=(50, 1)), rng.normal(2, 3, size=(20, 1))),
        "rank 5 of 30": (rng.normal(size=(80, 5)) @ basis, rng.normal(size=(60, 5)) @ basis + 0.1),
        "rank 5 against full": (rng.normal(size=(80, 5)) @ basis, rng.normal(size=(60, 30))),
        "constant column": (rng.normal(size=(50, 8)) * [0, *[1] * 7], rng.normal(size=(40, 8))),
        "nearly dependent": (
            (rng.normal(size=(60, 8)) * [1e-7, *[1] * 7]) @ np.linalg.qr(mixing[:8, :8])[0],
            rng.normal(size=(40, 8)),
        ),
        "n, m < d": (rng.normal(size=(30, 64)), rng.normal(0.2, 1, size=(21, 64))),
        "n < d < m": (rng.normal(size=(12, 24)), rng.normal(size=(100, 24)) @ mixing),
        "n = m = 2": (rng.normal(size=(2, 8)), rng.normal(size=(2, 8))),
        "n = 2": (rng.normal(size=(2, 8)), rng.normal(size=(50, 8))),
    }


class DistanceTest(unittest.TestCase):
    def each_pair(self, check):
        """Run check(name, x, y) on all feature sets, as a subtest each."""
        for seed in range(3):
            for name, (x, y) in feature_sets(seed).items():
                with self.subTest(name, seed=seed):
                    check(name, x, y)

    def test_agrees_with_independent_references(self):
        def check(name, x, y):
            found = fid.frechet_distance(x, y)
            self.assertAlmostEqual(found, by_eigenvalues(x, y), delta=1e-4)
            self.assertAlmostEqual(found, by_torchmetrics(x, y), delta=1e-4)
            if name.startswith("full"):
                self.assertAlmostEqual(found, by_sqrtm(x, y), delta=1e-4)

        self.each_pair(check)

    def test_agrees_with_independent_references_at_2048_features(self):
        rng = np.random.default_rng(0)  # of the size that Inception features have
        x, y = 0.3 * np.abs(rng.normal(size=(100, 2048))), 0.4 * np.abs(rng.normal(size=(80, 2048)))
        found = fid.frechet_distance(x, y)
        self.assertAlmostEqual(found, by_torchmetrics(x, y), delta=1e-4)
        basis = np.linalg.qr(np.concatenate([x, y]).T)[0]  # (2048, 180) spans both: same distances
        self.assertAlmostEqual(found, by_eigenvalues(x @ basis, y @ basis), delta=1e-4)

    def test_is_zero_from_a_set_to_itself_in_any_order(self):
        def check(_, x, y):
            for features in (x, y):
                self.assertLessEqual(fid.frechet_distance(features, features), 1e-9)
                self.assertLessEqual(fid.frechet_distance(features, features[::-1]), 1e-9)

        self.each_pair(check)

    def test_is_symmetric(self):
        def check(_, x, y):
            found = fid.frechet_distance(x, y)
            self.assertAlmostEqual(found, fid.frechet_distance(y, x), delta=1e-12 * (1 + found))

        self.each_pair(check)

    def test_is_invariant_under_rotation(self):
        def check(_, x, y):
            rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(x.shape[1],) * 2))[0]
            found = fid.frechet_distance(x, y)
            turned = fid.frechet_distance(x @ rotation, y @ rotation)
            self.assertAlmostEqual(found, turned, delta=1e-9 * (1 + found))

        self.each_pair(check)

    def test_equal_covariances_give_the_squared_distance_of_the_means(self):
        def check(_, x, y):
            expected = np.square(x.mean(0) - y.mean(0)).sum()
            found = fid.frechet_distance(x, x - x.mean(0) + y.mean(0))
            self.assertAlmostEqual(found, expected, delta=1e-9 * (1 + expected))

        self.each_pair(check)

    def test_tripled_deviations_give_four_times_the_variance(self):
        def check(_, x, __):  # Σ₂ = 9 Σ₁: tr Σ₁ + 9 tr Σ₁ − 2 · 3 tr Σ₁
            expected = 4 * np.trace(moments(x)[1])
            found = fid.frechet_distance(x, x.mean(0) + 3 * (x - x.mean(0)))
            self.assertAlmostEqual(found, expected, delta=1e-9 * (1 + expected))

        self.each_pair(check)

    def test_computes_in_float64_far_from_the_origin(self):
        x, y = feature_sets(0)["full, random, n ≠ m"]
        expected = fid.frechet_distance(x, y)
        self.assertAlmostEqual(fid.frechet_distance(x + 1e4, y + 1e4), expected, delta=1e-6)
        x, y = np.float32(x), np.float32(y)
        expected = fid.frechet_distance(np.float64(x), np.float64(y))
        self.assertEqual(fid.frechet_distance(torch.from_numpy(x), y), expected)

    def test_refuses_bad_features_by_their_side(self):
        good = np.random.default_rng(0).normal(size=(5, 3))
        for name, bad in {
            "NaN": np.where(np.eye(5, 3) == 1, np.nan, good),
            "infinite": np.where(np.eye(5, 3) == 1, np.inf, good),
            "(1, 3)": good[:1],
            "(0, 3)": good[:0],
            "(5,)": good[:, 0],
        }.items():
            for side, pair in {"real": (bad, good), "fake": (good, bad)}.items():
                with self.subTest(name, side=side), self.assertRaises(ValueError) as caught:
                    fid.frechet_distance(*pair)
                self.assertIn(name, str(caught.exception))
                self.assertIn(side, str(caught.exception))
        with self.assertRaisesRegex(ValueError, "3 wide.* 2"):
            fid.frechet_distance(good, good[:, :2])


# ---- folders of images ---------------------------------------------------------------------


def grey_image(seed=0):
    """Random grey, (32, 32) uint8, with every value from 0 to 255 in it."""
    values = np.arange(32 * 32, dtype=np.uint16) % 256
    return np.random.default_rng(seed).permutation(values).reshape(32, 32).astype(np.uint8)


def png_bytes(image, **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def raw_png(rows, depth, colour):
    """A 32×32 PNG of the rows' bytes, for kinds that Pillow reads but does not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@contextlib.contextmanager
def quiet():
    """What is printed meanwhile, on both streams, as one text."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


class FolderTest(unittest.TestCase):
    """A test with a temporary folder, and no Inception weights unless it brings them."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch.dict(os.environ, TORCH_HOME=str(self.folder / "hub")))
        os.environ.pop("FID_INCEPTION_WEIGHTS", None)

    def write(self, name, data):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def write_good(self, folder, count=3):
        for i in range(count):
            self.write(f"{folder}/{i:03d}.png", png_bytes(grey_image(i)))
        return self.folder / folder

    def assert_refused(self, name, call, *arguments, error=ValueError):
        """The call raises the error with a message of one line that holds the name."""
        with self.assertRaises(error) as caught:
            call(*arguments)
        self.assertIn(str(name), str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))


class ReadingTest(FolderTest):
    def test_reads_in_name_order_as_multiples_of_1_in_255(self):
        for i in (7, 2, 5, 0, 3, 6, 1, 4):
            self.write(f"{i:03d}.png", png_bytes(grey_image(i)))
        images = fid.read_folder(self.folder)
        self.assertEqual((images.shape, images.dtype), ((8, 1, 32, 32), torch.float32))
        expected = np.stack([grey_image(i) for i in range(8)])
        np.testing.assert_array_equal(images[:, 0].numpy(), expected / np.float32(255))

    def test_other_files_are_passed_over(self):
        folder = self.write_good("good")
        expected = fid.read_folder(folder)
        for name in (".DS_Store", "Thumbs.db", ".gitkeep", "._000.png", "notes.txt", "0.jpg"):
            self.write(f"good/{name}", b"not a PNG")
        (folder / "more").mkdir()
        self.assertTrue(torch.equal(fid.read_folder(folder), expected))
        self.write("good/003.PNG", png_bytes(grey_image()))
        self.assertEqual(len(fid.read_folder(folder)), 4)

    def test_every_kind_of_png_reads_as_the_same_grey(self):
        grey = grey_image()
        opaque, rgb = np.full_like(grey, 255), np.stack([grey] * 3, axis=2)
        wide = grey.astype(">u2") * 257  # 16 bits
        palette = Image.fromarray(255 - grey).convert("P")  # index 0 is white, 255 black
        palette.putpalette([255 - i // 3 for i in range(768)])
        for kind, data in {
            "8-bit": png_bytes(grey),
            "16-bit": png_bytes(wide.astype("u2")),
            "palette": png_bytes(palette),
            "palette, opaque": png_bytes(palette, transparency=b"\xff" * 256),
            "RGB": png_bytes(rgb),
            "RGBA, opaque": png_bytes(np.dstack([rgb, opaque])),
            "grey and alpha, opaque": png_bytes(np.dstack([grey, opaque])),
            "16-bit RGB": raw_png(np.repeat(wide, 3, axis=1), 16, 2),
        }.items():
            with self.subTest(kind):
                found = fid.read_png(self.write("image.png", data))
                self.assertEqual(found.dtype, np.uint8)
                np.testing.assert_array_equal(found, grey)

    def test_fewer_bits_read_as_the_nearest_grey(self):
        grey = grey_image()
        black_or_white = png_bytes(Image.fromarray(grey > 127))
        self.assertEqual(black_or_white[24], 1)  # bits in a pixel
        found = fid.read_png(self.write("image.png", black_or_white))
        np.testing.assert_array_equal(found, np.where(grey > 127, 255, 0))
        nibbles = grey // 16
        four_bits = raw_png(nibbles[:, ::2] * 16 + nibbles[:, 1::2], 4, 0)
        found = fid.read_png(self.write("image.png", four_bits))
        np.testing.assert_array_equal(found, nibbles * 17)

    def test_16_bits_are_rounded_not_clipped(self):
        wide = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype("u2")
        found = fid.read_png(self.write("image.png", png_bytes(wide)))
        self.assertLessEqual(np.abs(found - wide / 257).max(), 0.5)

    def test_colours_are_weighed_as_the_eye_does(self):
        luma = {(255, 0, 0): 76, (0, 255, 0): 150, (0, 0, 255): 29}  # ITU-R 601
        for colour, grey in luma.items():
            image = Image.new("RGB", (32, 32), colour)
            found = fid.read_png(self.write("image.png", png_bytes(image)))
            self.assertEqual(np.unique(found).tolist(), [grey])

    def test_bad_files_are_named(self):
        grey = grey_image()
        good = png_bytes(grey)
        flipped = bytearray(good)
        flipped[good.index(b"IDAT") + 300] ^= 1
        jpeg = io.BytesIO()
        Image.fromarray(grey).save(jpeg, "JPEG")
        holes = np.dstack([grey, grey, grey, np.where(np.eye(32), 0, 255).astype("u1")])
        indexed = Image.fromarray(grey).convert("P")
        start, end = good.index(b"IDAT") + 4, good.index(b"IEND") - 8
        rows = b"IDAT" + zlib.compress(zlib.decompress(good[start:end])[: 20 * 33])
        rows = struct.pack(">I", len(rows) - 4) + rows + struct.pack(">I", zlib.crc32(rows))
        for i, (kind, data) in enumerate(
            {
                "empty": b"",
                "28×28": png_bytes(grey[2:30, 2:30]),
                "32×28": png_bytes(grey[:, 2:30]),
                "64×64, damaged": png_bytes(np.tile(grey, (2, 2)))[:-100],
                "cut in the header": good[:20],
                "cut in half": good[: len(good) // 2],
                "cut before the end chunk": good[:-12],
                "20 rows of 32": good[: start - 8] + rows + good[end + 4 :],
                "one bit flipped": bytes(flipped),
                "a JPEG": jpeg.getvalue(),
                "text": b"not a PNG",
                "transparent RGBA": png_bytes(holes),
                "transparent grey and alpha": png_bytes(holes[..., 2:]),
                "transparent grey": png_bytes(grey, transparency=7),
                "transparent palette": png_bytes(indexed, transparency=7),
            }.items()
        ):
            with self.subTest(kind):
                folder = self.write_good(str(i))
                path = self.write(f"{i}/bad.png", data)
                self.assert_refused(path, fid.fid, TRAIN, folder, "digits")
                self.assert_refused(path, fid.fid, folder, TRAIN, "digits")
        self.assert_refused("28×28", fid.read_png, self.folder / "1" / "bad.png")
        self.assert_refused("32×28", fid.read_png, self.folder / "2" / "bad.png")

    def test_broken_links_and_folders_named_as_files_are_named(self):
        link = self.write_good("link") / "bad.png"
        link.symlink_to(self.folder / "gone.png")
        self.assert_refused(link, fid.read_folder, link.parent)
        folder = self.write_good("folder") / "bad.png"
        folder.mkdir()
        self.assert_refused(folder, fid.read_folder, folder.parent)

    def test_bad_folders_are_named(self):
        empty, file = self.folder / "empty", self.write("file.png", png_bytes(grey_image()))
        empty.mkdir()
        for folder, error in {
            self.folder / "missing": OSError,
            file: OSError,
            empty: ValueError,
            self.write_good("one", 1): ValueError,
        }.items():
            with self.subTest(folder.name):
                self.assert_refused(folder, fid.fid, folder, TRAIN, "digits", error=error)
                self.assert_refused(folder, fid.fid, TRAIN, str(folder), "digits", error=error)


# ---- the embedded network ------------------------------------------------------------------


class Bait:
    """Unpickling it makes a folder: the sign that a file was executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    def pickle(self):
        return pickle.dumps(self, protocol=2)


@functools.cache
def references_of_the_project():
    return fid.references(TRAIN, HOLDOUT)


class DigitsTest(FolderTest):
    def test_weights_are_a_small_plain_state_dictionary(self):
        self.assertLess(fid.DIGIT_WEIGHTS.stat().st_size, 500_000)
        state = torch.load(fid.DIGIT_WEIGHTS, weights_only=True)
        expected = fid.DigitNet().state_dict()
        self.assertEqual(list(state), list(expected))
        for name, tensor in state.items():
            self.assertEqual((tensor.shape, tensor.dtype), (expected[name].shape, torch.float32))
            self.assertTrue(tensor.isfinite().all())

    def test_weights_are_never_executed(self):
        path = self.write("bait.pth", Bait(self.folder / "executed").pickle())
        fid.digit_network.cache_clear()
        self.addCleanup(fid.digit_network.cache_clear)
        with (
            mock.patch.object(fid, "DIGIT_WEIGHTS", path),
            self.assertRaises(pickle.UnpicklingError),
        ):
            fid.digit_network()
        self.assertFalse((self.folder / "executed").exists())

    def test_features_are_scaled_activations_of_8_bit_images(self):
        images = fid.read_folder(TRAIN)
        features = fid.digit_features(images)
        self.assertEqual((features.shape, features.dtype), ((100, 128), np.float32))
        network = fid.digit_network()
        expected = network.scale * network.features(images)
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)
        unrounded = (images + 0.4 / 255 * torch.linspace(-1, 1, 32)).clamp(0, 1)
        np.testing.assert_array_equal(fid.digit_features(unrounded), features)

    def test_refuses_what_is_no_batch_of_images(self):
        images = torch.zeros(3, 1, 32, 32)
        for bad in (
            images[0],
            images[..., 2:30],
            images.repeat(1, 3, 1, 1),
            images.numpy(),
            images.byte(),
            images - 0.1,
            images + 1.1,
            images.where(images > 0, torch.nan),
        ):
            for function in (fid.digit_features, fid.inception_features):
                self.assert_refused("images", function, bad)

    def test_equal_folders_are_0_apart(self):
        self.assertLessEqual(fid.fid(TRAIN, TRAIN, "digits"), 1e-9)
        self.assertLessEqual(fid.fid(HOLDOUT, f"{HOLDOUT}/../holdout", "digits"), 1e-9)

    def test_the_figure_is_the_distance_of_the_features(self):
        train, holdout = (fid.digit_features(fid.read_folder(f)) for f in (TRAIN, HOLDOUT))
        expected = by_eigenvalues(np.float64(train), np.float64(holdout))
        self.assertAlmostEqual(fid.fid(TRAIN, HOLDOUT, "digits"), expected, delta=1e-4)

    def test_references_stand_in_order(self):
        rows = dict(references_of_the_project())
        (floor, holdout, blurred, mean, noise), spreads = zip(*rows.values(), strict=True)
        self.assertLess(0, floor)
        self.assertLess(floor, holdout)
        self.assertLess(holdout, 50)
        self.assertLess(50, blurred)
        self.assertLess(blurred, min(mean, noise))
        self.assertTrue(0 < spreads[0] < floor)
        del rows["holdout images"]
        with mock.patch.object(fid, "memoriser_floor", return_value=(floor, spreads[0])):
            self.assertEqual(fid.references(TRAIN), rows)

    def test_floor_is_that_of_draws_with_replacement(self):
        real = np.random.default_rng(0).normal(size=(30, 6))
        rng = np.random.default_rng(1)
        for size in (30, 100):  # 100 by default, as many as a sample has
            draws = [real[rng.choice(30, size)] for _ in range(400)]
            distances = [by_eigenvalues(real, draw) for draw in draws]
            mean, spread = fid.memoriser_floor(real, **({"size": 30} if size == 30 else {}))
            self.assertAlmostEqual(mean, np.mean(distances), delta=4 * spread / 200**0.5)
            self.assertAlmostEqual(spread, np.std(distances), delta=0.3 * spread)


# ---- the Inception network -----------------------------------------------------------------


def write_stand_in(path):
    """Random weights for torch-fidelity's Inception network, scaled to keep its signal alive."""
    with (
        torch.device("meta"),
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        shapes = inception.FeatureExtractorInceptionV3("shapes", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in shapes.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            noise *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            noise = 1 + 0.1 * noise.tanh()
        else:
            noise *= 0.1
        state[name] = noise.to(tensor.dtype)
    torch.save(state, path)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class InceptionTest(FolderTest):
    def use_weights(self, path, prefix=None):
        """Name the file in the environment; the prefix of its hash makes it the published one."""
        self.enterContext(mock.patch.dict(os.environ, FID_INCEPTION_WEIGHTS=str(path)))
        if prefix is not None:
            self.enterContext(mock.patch.object(fid, "INCEPTION_SHA256_PREFIX", prefix))
        self.addCleanup(fid.inception_network.cache_clear)

    def test_agrees_with_torchmetrics(self):
        weights = self.folder / "weights.pth"
        write_stand_in(weights)
        self.use_weights(weights, sha256(weights)[:8])
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(weights))
        for source in (TRAIN, HOLDOUT):
            batch = []
            for path in sorted(source.glob("*.png"))[::13]:  # 8 images
                self.write(f"{source.name}/{path.name}", path.read_bytes())
                with Image.open(path) as image:
                    large = image.convert("RGB").resize((299, 299), Image.Resampling.BILINEAR)
                batch.append(torch.from_numpy(np.array(large)).permute(2, 0, 1))
            metric.update(torch.stack(batch), real=source == TRAIN)
        expected = metric.compute().item()
        self.assertGreater(expected, 0.1)  # else the stand-in's features say nothing
        found = fid.fid(self.folder / "train", self.folder / "holdout", "inception")
        self.assertAlmostEqual(found, expected, delta=1e-3 * expected)
        self.assertEqual(fid.choose_features("auto")[0], "inception")

    def test_weights_with_a_wrong_hash_are_never_unpickled(self):
        executed = self.folder / "executed"
        bait = self.write("bait.pth", Bait(executed).pickle())
        self.use_weights(bait)
        for features in ("inception", "auto"):
            with quiet():
                self.assert_refused(bait, fid.fid, TRAIN, HOLDOUT, features)
        self.assertFalse(executed.exists())
        self.use_weights(bait, sha256(bait)[:8])  # to see that the bait does work
        with contextlib.suppress(Exception):
            fid.fid(TRAIN, HOLDOUT, "inception")
        self.assertTrue(executed.exists())

    def test_named_weights_that_are_missing_are_named(self):
        missing = self.folder / "missing.pth"
        self.use_weights(missing)
        for features in ("inception", "auto"):
            with quiet():
                self.assert_refused(missing, fid.fid, TRAIN, HOLDOUT, features, error=OSError)

    def test_an_empty_variable_names_no_weights(self):
        self.use_weights("")
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror("no network")):
            self.assertEqual(fid.choose_features("auto")[0], "digits")

    def test_a_download_that_is_not_the_published_file_is_refused(self):
        executed = self.folder / "executed"
        bait = self.write("weights-of-another.pth", Bait(executed).pickle())
        with mock.patch.object(inception, "URL_INCEPTION_V3", bait.as_uri()), quiet():
            refused = (OSError, ValueError)
            self.assert_refused(bait.name, fid.fid, TRAIN, HOLDOUT, "inception", error=refused)
        self.assertFalse(executed.exists())
        self.assertEqual([path for path in self.folder.glob("hub/**/*") if path.is_file()], [])

    def test_a_download_has_a_short_time_out_and_its_failure_names_the_file(self):
        time_outs = []

        def connect(*_, timeout=None, **__):
            time_outs.append(socket.getdefaulttimeout() if timeout is None else timeout)
            raise urllib.error.URLError("no network")

        with (
            mock.patch("urllib.request.urlopen", connect),
            mock.patch("torch.hub.urlopen", connect),
        ):
            name = inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
            self.assert_refused(name, fid.fid, TRAIN, HOLDOUT, "inception", error=OSError)
        self.assertEqual(len(time_outs), 1)
        self.assertIsNotNone(time_outs[0])
        self.assertLessEqual(time_outs[0], 30)  # seconds


class AutoTest(FolderTest):
    def choose(self):
        """The choice that `auto` makes, which may take 5 seconds at most."""
        start = time.perf_counter()
        name, reason = fid.choose_features("auto")
        self.assertLess(time.perf_counter() - start, 5)
        self.assertTrue(reason)
        return name

    def test_without_a_network_it_falls_back_and_says_so(self):
        failure = socket.gaierror("no network")
        with mock.patch("socket.getaddrinfo", side_effect=failure) as look_up, quiet() as output:
            self.assertEqual(self.choose(), "digits")
            found = fid.fid(TRAIN, HOLDOUT)
        look_up.assert_called()
        self.assertEqual(found, fid.fid(TRAIN, HOLDOUT, "digits"))
        self.assertRegex(output.getvalue(), r"\A[^\n]*\bdigits\b[^\n]*\n\Z")

    def test_a_name_look_up_that_hangs_is_not_waited_for(self):
        release = threading.Event()

        def hang(*_, **__):
            release.wait(20)
            raise socket.gaierror("no network")

        self.addCleanup(release.set)
        with mock.patch("socket.getaddrinfo", hang):
            self.assertEqual(self.choose(), "digits")

    def test_an_answer_chooses_inception(self):
        with mock.patch("urllib.request.urlopen"):
            self.assertEqual(self.choose(), "inception")

    def test_a_refusal_chooses_digits(self):
        refusal = urllib.error.HTTPError("https://example.org", 404, "Not Found", {}, None)
        with mock.patch("urllib.request.urlopen", side_effect=refusal):
            self.assertEqual(self.choose(), "digits")

    def test_weights_that_are_here_choose_inception_without_asking(self):
        name = inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
        self.write(f"hub/hub/checkpoints/{name}", b"")
        with mock.patch("urllib.request.urlopen") as urlopen:
            self.assertEqual(self.choose(), "inception")
        urlopen.assert_not_called()

    def test_unknown_features_are_named(self):
        for features in ("lenet", "", "Digits", None):
            self.assert_refused(repr(features), fid.fid, TRAIN, HOLDOUT, features)


# ---- the command ---------------------------------------------------------------------------


class CommandTest(FolderTest):
    def test_exit_status_and_streams(self):
        missing = self.folder / "missing"
        commands = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.fid", TRAIN, folder, "--features", "digits"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            for folder in (HOLDOUT, missing)
        ]
        (figure, nothing), (silence, error) = [command.communicate() for command in commands]
        self.assertEqual([command.returncode for command in commands], [0, 1])
        self.assertEqual((nothing, silence), ("", ""))
        self.assertRegex(figure, r"\A[^\n]*\bdigits\b[^\n]*\n\Z")
        printed = float(re.search(r"\d+\.\d+", figure)[0])
        self.assertAlmostEqual(printed, fid.fid(TRAIN, HOLDOUT, "digits"), delta=1e-3)
        self.assertRegex(error, rf"\Aerror: [^\n]*{re.escape(str(missing))}[^\n]*\n\Z")

    def test_errors_are_one_line_that_names_the_cause(self):
        bad = self.write_good("bad")
        path = self.write("bad/bad.png", b"not a PNG")
        for arguments, cause in {
            (bad, TRAIN, "--features", "digits"): path,
            (self.write_good("one", 1), TRAIN, "--features", "digits"): "one",
            (TRAIN, HOLDOUT, "--features", "lenet"): "lenet",
            (TRAIN, "--features", "digits"): "two folders",
            ("--references", bad, "--features", "digits"): path,
            ("--references", TRAIN, bad, "--features", "digits"): path,
        }.items():
            with self.subTest(arguments), self.assertRaises(SystemExit) as caught, quiet():
                fid.main([str(argument) for argument in arguments])
            self.assertRegex(caught.exception.code, rf"\Aerror: .*{re.escape(str(cause))}")
            self.assertNotIn("\n", caught.exception.code)

    def test_references_are_printed_with_their_features(self):
        with quiet() as output:
            fid.main(["--references", str(TRAIN), str(HOLDOUT), "--features", "digits"])
        rows = output.getvalue().splitlines()
        expected = references_of_the_project()
        self.assertEqual(len(rows), len(expected))
        for row, (name, (figure, _)) in zip(rows, expected.items(), strict=True):
            self.assertIn(name, row)
            self.assertRegex(row, r"\bdigits\b")
            self.assertAlmostEqual(float(row.split()[0]), figure, delta=0.01)


if __name__ == "__main__":
    unittest.main()
