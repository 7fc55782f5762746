"""Tests of the exported files: the round trip, old files or new ones, and what is refused."""

import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from vae_lib import VAE, WEIGHTS, Losses, load, save, train, write_result

ROOT = Path(__file__).resolve().parent.parent
LOSSES = [Losses(30.123456789, 20.0, 10.123456789), Losses(9.5, 5.0, 4.5)]
RESULT = "FID,12.5\nFID_imagenet,12.5\nscore,87.5\nloss,30.123456789\nloss,9.5\n"


def images(n=3):
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def small(seed=0, latent_dim=2, hidden=4):
    """A VAE each of whose files depends on the seed."""
    vae = VAE(images(), latent_dim, hidden, seed)
    vae.latent.prior_mu += seed
    return vae


def saved(state, **options):
    torch.save(state, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(code, *arguments, options=()):
    """Run Python code in a process of its own; the library is at hand."""
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class FilesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))

    def assert_contents(self, expected):
        """The folder holds these files, {name: bytes}; a failure names those that differ."""
        found = contents(self.folder)
        self.assertEqual(set(found), set(expected))
        self.assertEqual([name for name in found if found[name] != expected[name]], [])


class RoundTripTest(FilesTest):
    def test_sizes_come_from_the_files(self):
        x = images(4)
        for latent_dim, hidden in ((2, 16), (1, 4), (5, 193), (1, None)):
            with self.subTest(latent_dim=latent_dim, hidden=hidden):
                vae = small(3, latent_dim, hidden)
                list(train(vae, images(), 2))
                save(vae, self.folder)
                loaded = load(self.folder)
                for method in ("latin", "iid"):
                    expected = vae.sample(50, method, seed=1)
                    self.assertTrue(torch.equal(loaded.sample(50, method, seed=1), expected))
                self.assertTrue(torch.equal(loaded.reconstruct(x), vae.reconstruct(x)))
                for expected, found in zip(vae.encoder(x), loaded.encoder(x), strict=True):
                    self.assertTrue(torch.equal(expected, found))

    def test_loaded_model_is_whole(self):
        """It trains on as the saved one does, and leaves the global random state alone."""
        vae = small()
        save(vae, str(self.folder))
        before = torch.manual_seed(1).get_state()
        loaded = load(str(self.folder))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertFalse(loaded.training)
        losses = [list(train(model, images(), 3)) for model in (vae, loaded)]
        self.assertEqual(losses[0], losses[1])
        self.assertTrue(torch.equal(vae.sample(5), loaded.sample(5)))

    def test_files_are_state_dictionaries(self):
        save(small(), self.folder)
        self.assertEqual(set(contents(self.folder)), set(WEIGHTS))
        for name in WEIGHTS:
            state = torch.load(self.folder / name, weights_only=True)
            self.assertEqual({type(value) for value in state.values()}, {torch.Tensor})

    def test_another_encoder(self):
        """A student's own, with batch statistics, can be saved; `load` says that it is another."""
        vae = small()
        vae.encoder = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.BatchNorm2d(4))
        save(vae, self.folder)
        vae.encoder.load_state_dict(torch.load(self.folder / "encoder.pth", weights_only=True))
        self.assertRaisesRegex(ValueError, self.folder.name, load, self.folder)

    def test_without_docstrings_and_assertions(self):
        """`python -OO` takes both away."""
        code = """import sys, torch, vae_lib
images = torch.rand(3, 1, 32, 32)
vae = vae_lib.VAE(images, 2, 4)
losses = list(vae_lib.train(vae, images, 2))
vae_lib.save(vae, sys.argv[1])
vae_lib.load(sys.argv[1]).sample(3)
vae_lib.write_result(sys.argv[1] + "/result.csv", 1.0, losses)
try:
    list(vae_lib.train(vae, 2 * images, 1))
except ValueError:
    print("refused")"""
        done = run(code, self.folder, options=["-OO"])
        self.assertEqual((done.returncode, done.stdout.split()), (0, ["refused"]), done.stderr)
        self.assertEqual(set(contents(self.folder)), {*WEIGHTS, "result.csv"})


class ResultTest(FilesTest):
    def test_text(self):
        path = self.folder / "result.csv"
        write_result(path, 12.5, LOSSES)
        self.assertEqual(path.read_bytes().decode(), RESULT)
        write_result(str(path), 12.5, LOSSES, "inception")
        self.assertEqual(path.read_text(), RESULT.replace("imagenet", "inception"))
        write_result(path, 0.1 + 0.2, [])
        self.assertIn("FID,0.30000000000000004\n", path.read_text())  # every digit
        self.assertEqual(set(contents(self.folder)), {"result.csv"})

    def test_old_or_new(self):
        path = self.folder / "result.csv"
        write_result(path, 12.5, LOSSES)

        def disk_full(part, text, *_, **__):
            part.write_bytes(text[:5].encode())
            raise OSError("disk full")

        with mock.patch.object(Path, "write_text", disk_full):
            self.assertRaises(OSError, write_result, path, 1.0, LOSSES[:1])
        self.assertEqual(path.read_text(), RESULT)


class SaveTest(FilesTest):
    def setUp(self):
        super().setUp()
        save(small(1), self.folder)
        self.new = contents(self.folder)
        save(small(0), self.folder)
        self.old = contents(self.folder)

    def test_broken_off_at_any_step(self):
        """Each file is an old or a new one, and only old ones until all new ones are read back."""
        steps = [(torch, "save", k) for k in range(3)]
        steps += [(torch, "load", k) for k in range(3)]
        steps += [(os, "replace", k) for k in range(3)]
        for (owner, name, k), error in itertools.product(steps, (OSError, KeyboardInterrupt)):
            real, calls = getattr(owner, name), itertools.count()

            def call(*arguments, real=real, calls=calls, k=k, error=error, **options):
                if next(calls) < k:
                    return real(*arguments, **options)
                if real is torch.save:
                    Path(arguments[1]).write_bytes(b"half")
                raise error

            with self.subTest(step=name, k=k, error=error):
                with mock.patch.object(owner, name, call):
                    self.assertRaises((error, ValueError), save, small(1), self.folder)
                replaced = k if name == "replace" else 0
                expected = dict(self.old)
                for file in WEIGHTS[:replaced]:
                    expected[file] = self.new[file]
                self.assert_contents(expected)
                self.assertEqual(len(list(self.folder.iterdir())), 3)  # nothing is left beside them
                save(small(0), self.folder)

    def test_written_wrongly(self):
        """By a disk that loses the end of a file, or by a model that has diverged."""

        def loses_the_end(state, path, real=torch.save):
            real(state, path)
            Path(path).write_bytes(Path(path).read_bytes()[:-100])

        with mock.patch.object(torch, "save", loses_the_end):
            self.assertRaisesRegex(ValueError, "encoder.pth", save, small(1), self.folder)
        self.assert_contents(self.old)
        vae = small(1)
        vae.decoder.net[0].bias.data[0] = torch.nan
        self.assertRaisesRegex(ValueError, "decoder.pth.*finite", save, vae, self.folder)
        self.assert_contents(self.old)

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "Windows has no such signal")
    def test_killed(self):
        """By the system, which leaves no time for anything, when half of a file is written."""
        code = """import os, signal, sys, torch, vae_lib
real, calls = torch.save, []
def save(state, path):
    calls.append(real(state, path))
    if len(calls) == 3:
        path.write_bytes(path.read_bytes()[:500])
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
vae_lib.save(vae_lib.VAE(torch.rand(3, 1, 32, 32), 2, 4, seed=1), sys.argv[1])"""
        done = run(code, self.folder)
        self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
        self.assert_contents(self.old)
        load(self.folder)
        save(small(1), self.folder)  # the next export is not in the way of what was left
        self.assert_contents(self.new)

    def test_no_such_folder(self):
        self.assertRaises(OSError, save, small(), self.folder / "none")


class LoadTest(FilesTest):
    def setUp(self):
        super().setUp()
        save(small(0), self.folder)
        self.sound = contents(self.folder)
        self.states = {name: torch.load(self.folder / name) for name in WEIGHTS}

    def load_with(self, name, data):
        """The weights where one file is these bytes, or missing; None where `load` says which file
        it cannot use, or that the three do not go together."""
        path = self.folder / name
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        try:
            return load(self.folder).state_dict()
        except ValueError as error:
            self.assertRegex(str(error), f"{path} cannot be used|.pth files are not of one")
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
        for name, state in self.states.items():
            data = self.sound[name]
            key, tensor = next(iter(state.items()))
            for case, wrong in (
                *((other, self.sound[other]) for other in WEIGHTS if other != name),
                ("missing", None),
                ("empty", b""),
                ("text", b"text"),
                ("end lost", data[:-100]),
                ("a tensor lost", saved({k: state[k] for k in state if k != key})),
                ("a tensor more", saved(state | {"more": tensor})),
                ("NaN", saved(state | {key: tensor * torch.nan})),
                ("infinite", saved(state | {key: tensor + torch.inf})),
                ("numbers by name", saved({i: state[k] for i, k in enumerate(state)})),
                ("no tensors", saved({key: 1.0})),
                ("no dictionary", saved(tensor)),
                ("empty dictionary", saved({})),
            ):
                with self.subTest(name=name, case=case):
                    self.assertIsNone(self.load_with(name, wrong))

    def test_other_sizes_together(self):
        """One file is of a model with other sizes."""
        for latent_dim, hidden in ((1, 4), (3, 4), (2, 5)):
            with tempfile.TemporaryDirectory() as other:
                save(small(0, latent_dim, hidden), other)
                files = contents(Path(other))
            for name in WEIGHTS:
                if name == "latent.pth" and latent_dim == 2:
                    continue  # it is of the same size
                with self.subTest(name=name, latent_dim=latent_dim, hidden=hidden):
                    self.assertIsNone(self.load_with(name, files[name]))

    def test_says_what_is_wrong(self):
        state = self.states["decoder.pth"]
        wrong = saved(state | {"frequencies": state["frequencies"] * torch.nan})
        (self.folder / "decoder.pth").write_bytes(wrong)
        self.assertRaisesRegex(ValueError, "decoder.pth.*finite", load, self.folder)

    def test_flipped_bits(self):
        """Each is found, or without effect."""
        dice = random.Random(0)
        sound = load(self.folder).state_dict()
        for name in 60 * WEIGHTS:
            data = bytearray(self.sound[name])
            place = dice.randrange(len(data))
            data[place] ^= 1 << dice.randrange(8)
            found = self.load_with(name, data)
            same = found is None or all(torch.equal(found[key], sound[key]) for key in sound)
            self.assertTrue(same, f"byte {place} of {name}")
