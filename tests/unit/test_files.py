"""Tests of the exported files: the round trip, old files or new ones, and what is refused."""

import io
import itertools
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from vae_lib import VAE, WEIGHTS, Losses, check_folder, load, save, train, write_result

LOSSES = [Losses(loss, 0.0, 0.0, 0.0, 0.0) for loss in (30.123456789, torch.tensor([9.5]))]
RESULT = "FID,12.5\nFID_imagenet,12.5\nscore,87.5\nloss,30.123456789\nloss,9.5\n"


def images(n=3):
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def small(seed=0, latent_dim=2, hidden=4):
    """A VAE each of whose files depends on the seed."""
    vae = VAE(images(), latent_dim, hidden, seed)
    vae.latent.prior_mu += seed
    vae.latent.prior_logvar += seed
    return vae


def saved(state, **options):
    torch.save(state, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FilesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))
        # The system's folder may be on another disk, from which no file can replace an older one.
        self.enterContext(mock.patch.object(tempfile, "tempdir", "/missing"))

    def test_loaded_model_is_the_saved_one(self):
        """Of whatever sizes and dtype: it trains on alike. The global random state stays."""
        for sizes, dtype in (
            ((2, 16), torch.float32),
            ((1, 4), torch.float64),
            (np.array([5, 129]), torch.float32),
        ):
            x = images().to(dtype)
            vae = small(3, *sizes).to(dtype)
            list(train(vae, x, 2))
            before = torch.manual_seed(1).get_state()
            save(vae, str(self.folder))
            loaded = load(str(self.folder))
            with self.subTest(sizes=sizes, dtype=dtype):
                self.assertTrue(torch.equal(torch.get_rng_state(), before))
                self.assertFalse(loaded.training)
                self.assertTrue(torch.equal(loaded.sample(50, seed=1), vae.sample(50, seed=1)))
                self.assertEqual(*(list(train(model, x, 3)) for model in (vae, loaded)))

    def test_a_wrapped_model(self):
        """What torch.compile and DataParallel put before the names of weights is left out."""
        for wrap in (torch.compile, torch.nn.DataParallel):
            vae = small(1)
            expected = vae.sample(5)
            vae.decoder = wrap(vae.decoder)
            save(vae, self.folder)
            self.assertTrue(torch.equal(load(self.folder).sample(5), expected))

    def test_result(self):
        path = self.folder / "new" / "result.csv"
        write_result(path, 12.5, LOSSES)
        self.assertEqual(path.read_text(), RESULT)
        write_result(str(path), 0.1 + 0.2, [], "inception")
        self.assertIn("FID_inception,0.30000000000000004\n", path.read_text())  # every digit

    def test_a_folder_that_cannot_be_written_to(self):
        check_folder(self.folder / "new" / "one")
        self.assertTrue((self.folder / "new" / "one").is_dir())
        (self.folder / "file").write_text("")
        for folder in (self.folder / "file", "/proc"):  # which is there, but takes no file
            self.assertRaisesRegex(OSError, "cannot be written", check_folder, folder)

    def test_an_export_that_is_broken_off(self):
        """Older files stay until all three new ones are written, and nothing is left beside
        them; whether the disk is full, or somebody presses a key."""
        save(small(1), self.folder)
        new = contents(self.folder)
        save(small(0), self.folder)
        old = contents(self.folder)
        for owner, name, k, error in (
            (torch, "save", 2, RuntimeError("no space left")),
            (torch, "save", 1, KeyboardInterrupt()),
            (os, "replace", 0, OSError("denied")),
        ):
            real = getattr(owner, name)
            calls = itertools.count()

            def call(*arguments, real=real, calls=calls, k=k, error=error, **options):
                if next(calls) < k:
                    return real(*arguments, **options)
                raise error

            with self.subTest(name, error=error), mock.patch.object(owner, name, call):
                expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
                with self.assertRaises(expected) as raised:
                    save(small(1), self.folder)
                if expected is OSError:
                    self.assertIn("could not be written", str(raised.exception))
            self.assertTrue(contents(self.folder) == old)  # a difference would fill the screen
        save(small(1), self.folder)
        self.assertTrue(contents(self.folder) == new)


class LoadTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))
        save(small(0), self.folder)
        self.sound = contents(self.folder)
        self.states = {name: torch.load(self.folder / name) for name in WEIGHTS}

    def load_with(self, name, data):
        """The weights where one file is these bytes, or missing; None where `load` names a file."""
        path = self.folder / name
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        try:
            return load(self.folder).state_dict()
        except ValueError as error:
            named = r"\w+\.pth" if name == "latent.pth" else name  # that one decides the sizes
            self.assertRegex(str(error), f"{named} (cannot be used|does not fit).*export")
        finally:
            path.write_bytes(self.sound[name])

    def test_nothing_is_executed(self):
        marker = self.folder / "marker"
        bomb = type("Bomb", (), {"__reduce__": lambda _: (os.mkdir, (str(marker),))})()
        for name, state in self.states.items():
            zipped = saved(state | {"more": bomb})
            for data in (zipped, saved(bomb, _use_new_zipfile_serialization=False)):
                self.assertIsNone(self.load_with(name, data))
                self.assertFalse(marker.exists())
        torch.load(io.BytesIO(zipped), weights_only=False)  # goes off without care
        self.assertTrue(marker.exists())

    def test_wrong_files(self):
        with tempfile.TemporaryDirectory() as other:
            save(small(0, latent_dim=3, hidden=5), other)
            others = contents(Path(other))
        for name, state in self.states.items():
            key, tensor = next(iter(state.items()))
            for case, wrong in (
                *((other, self.sound[other]) for other in WEIGHTS if other != name),
                ("of other sizes", others[name]),
                ("missing", None),
                ("text", b"text"),
                ("end lost", self.sound[name][:-100]),
                ("a tensor lost", saved({k: state[k] for k in state if k != key})),
                ("a tensor more", saved(state | {"more": tensor})),
                ("no tensors", saved({key: 1.0})),
                ("empty dictionary", saved({})),
                ("a list", saved([1, 2])),
            ):
                with self.subTest(name=name, case=case):
                    self.assertIsNone(self.load_with(name, wrong))
