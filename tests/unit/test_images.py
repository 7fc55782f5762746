"""Tests of how images are read: every kind of PNG file, what cannot be used, folders."""

import os
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests import fid

SHADES = np.arange(0, 256, 8, dtype=np.uint8)  # a row of 32 pixels
GREY = np.tile(SHADES, (32, 1))  # (32, 32)
RED = np.stack([GREY, 0 * GREY, 0 * GREY], axis=2)
OPAQUE = np.stack([GREY, GREY, GREY, 0 * GREY + 255], axis=2)
CLEAR = np.stack([GREY, GREY, GREY, 0 * GREY + 254], axis=2)


def damaged(data, place):
    """A file's bytes with one bit flipped."""
    data = bytearray(data)
    data[place] ^= 1
    return bytes(data)


class ImagesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))

    def assert_refused(self, words, folder=None):
        """It names the folder or file, and says what is wrong in these words."""
        with self.subTest(words):
            with self.assertRaisesRegex(ValueError, words) as raised:
                fid.read_folder(folder or self.folder)
            self.assertIn(str(folder or self.folder), str(raised.exception))
            self.assertLess(len(str(raised.exception)), 300)

    def test_kinds(self):
        for name, pixels, options, expected in (
            ("8 bits", GREY, {}, SHADES / 255),
            ("16 bits", 257 * GREY.astype(np.uint16), {}, SHADES / 255),
            ("RGB", RED, {}, 0.299 * SHADES / 255),
            ("opaque RGBA", OPAQUE, {}, SHADES / 255),
            ("unused transparent grey", GREY, {"transparency": 7}, SHADES / 255),
        ):
            Image.fromarray(pixels).save(self.folder / "0.png", **options)
            Image.fromarray(GREY).save(self.folder / "1.png")
            with self.subTest(name):
                image = fid.read_folder(self.folder)[0]
                self.assertEqual(image.dtype, torch.float32)
                np.testing.assert_allclose(image[0, 5], expected, atol=0.51 / 255)
        for mode in ("1", "P", "LA"):
            Image.fromarray(GREY).convert(mode).save(self.folder / "0.png")
            with self.subTest(mode):
                expected = np.array(Image.fromarray(GREY).convert(mode).convert("L")) / 255
                np.testing.assert_allclose(fid.read_folder(self.folder)[0, 0], expected, atol=1e-6)

    def test_unfit_files(self):
        Image.fromarray(GREY).save(self.folder / "0.png")
        path = self.folder / "5.png"
        sound = (self.folder / "0.png").read_bytes()
        for words, data in (
            ("5.png.*Git LFS placeholder.*git lfs pull", b"version https://git-lfs.github.com/\n"),
            ("5.png.*no PNG file.*JFIF", b"\xff\xd8\xff\xe0\x00\x10JFIF"),
            ("5.png", damaged(sound, len(sound) - 30)),
            ("5.png", sound[:-40]),
            ("5.png", b""),
        ):
            path.write_bytes(data)
            self.assert_refused(words)
        for words, image, options in (
            ("5.png.*31×32.*32×32", Image.new("L", (32, 31)), {}),
            ("5.png.*transparent", Image.fromarray(CLEAR), {}),
            ("5.png.*transparent", Image.fromarray(GREY), {"transparency": 8}),
        ):
            image.save(path, **options)
            self.assert_refused(words)

    def test_folder(self):
        """PNG files in name order; what is no PNG file by its name, or hidden, is passed over."""
        for name, shade in {"30.png": 30, "4.PNG": 40, "1.png": 10}.items():
            Image.new("L", (32, 32), shade).save(self.folder / name)
        (self.folder / ".2.png").write_text("hidden")
        (self.folder / "2.txt").write_text("text")
        (self.folder / "2.png").mkdir()
        if hasattr(os, "mkfifo"):
            os.mkfifo(self.folder / "3.png")  # reading it would wait for ever
        shades = (255 * fid.read_folder(str(self.folder))[:, 0, 0, 0]).round().tolist()
        self.assertEqual(shades, [10, 30, 40])

    def test_folders_that_are_not_as_expected(self):
        self.assert_refused("holds 0 PNG files")
        Image.fromarray(GREY).save(self.folder / "1.png")
        self.assert_refused("holds 1 PNG files?")
        self.assert_refused("does not exist", self.folder / "trian")
        self.assert_refused("is a file", self.folder / "1.png")
        (self.folder / "digits").mkdir()
        (self.folder / "1.png").rename(self.folder / "digits" / "1.png")
        self.assert_refused("digits")
