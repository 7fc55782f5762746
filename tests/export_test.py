"""Tests of the files: the round trip, old or new, what is refused, and the grader's steps."""

import importlib.util
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import torch

from tests import fid as evaluator
from vae_lib import VAE, WEIGHTS, Losses, load, load_images, save, show_images, train, write_result

ROOT = Path(__file__).resolve().parent.parent
LOSSES = [Losses(30.123456789, 20.0, 10.123456789), Losses(9.5, 5.0, 4.5)]


def small(seed=0, latent_dim=2, hidden=4):
    """A VAE each of whose files depends on the seed."""
    vae = VAE(None, seed, latent_dim, hidden)
    vae.latent.prior_mu += seed
    return vae


def saved(state, **options):
    torch.save(state, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class FilesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))
        self.new, self.old = self.export(1), self.export(0)
        self.states = {name: torch.load(self.folder / name) for name in WEIGHTS}

    def export(self, seed):
        save(small(seed), self.folder)
        write_result(self.folder / "result.csv", 12.5 + seed, LOSSES)
        return contents(self.folder)

    def test_round_trip(self):
        for latent_dim, hidden in ((2, 16), (1, 4), (5, 40)):
            vae, x = small(3, latent_dim, hidden), torch.rand(3, 1, 32, 32)
            save(vae, self.folder)
            loaded = load(self.folder, latent_dim, hidden)
            self.assertTrue(torch.equal(vae.sample(50, seed=1), loaded.sample(50, seed=1)))
            self.assertTrue(torch.equal(vae.reconstruct(x), loaded.reconstruct(x)))
            for name in WEIGHTS:
                state = torch.load(self.folder / name, weights_only=True)
                self.assertEqual({type(value) for value in state.values()}, {torch.Tensor})

    def test_result(self):
        path = self.folder / "result.csv"
        write_result(path, 12.5, LOSSES, "inception")
        text = "FID,12.5\nFID_inception,12.5\nscore,87.5\nloss,30.123456789\nloss,9.5\n"
        self.assertEqual(path.read_text(), text)

    def test_broken_off_at_any_step(self):
        """Of writing a file, half of which is there then, and of putting it in place."""
        steps = [(torch, "save", k) for k in range(3)] + [(os, "replace", k) for k in range(4)]
        for (owner, name, k), error in itertools.product(steps, (OSError, KeyboardInterrupt)):
            real, calls = getattr(owner, name), itertools.count()

            def call(*arguments, real=real, calls=calls, k=k, error=error):
                if next(calls) < k:
                    return real(*arguments)
                if real is torch.save:
                    Path(arguments[1]).write_bytes(b"half")
                raise error

            with mock.patch.object(owner, name, call), self.assertRaises(error):
                self.export(1)
            for file, data in contents(self.folder).items():
                self.assertTrue(file[0] == "." or data in (self.old[file], self.new[file]), file)
            self.assertEqual(self.export(0), self.old)  # and nothing is left beside them

    def test_killed(self):
        """By the system, which leaves no time for anything, when half of a file is written."""
        code = """import os, signal, sys, torch, vae_lib
real, calls = torch.save, []
def save(state, path):
    calls.append(real(state, path))
    if len(calls) == 2:
        path.write_bytes(path.read_bytes()[:500])
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
vae_lib.save(vae_lib.VAE(None, 1, 2, 4), sys.argv[1])"""
        run = subprocess.run([sys.executable, "-c", code, self.folder], cwd=ROOT, check=False)
        self.assertEqual(run.returncode, -signal.SIGKILL)
        self.assertNotEqual((self.folder / "encoder.pth").read_bytes(), self.old["encoder.pth"])
        self.assertEqual((self.folder / "latent.pth").read_bytes(), self.old["latent.pth"])
        load(self.folder, 2, 4)  # each file is whole
        self.assertEqual(self.export(0), self.old)  # the next export clears what was left

    def load_with(self, name, data):
        """The weights where one file is these bytes, or missing; None where `load` names it."""
        path = self.folder / name
        path.unlink() if data is None else path.write_bytes(data)
        try:
            return load(self.folder, 2, 4).state_dict()
        except ValueError as error:
            self.assertIn(str(path), str(error))
        finally:
            path.write_bytes(self.old[name])

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
            data, (key, tensor) = self.old[name], next(iter(state.items()))
            with zipfile.ZipFile(bomb := io.BytesIO(data), "a", zipfile.ZIP_DEFLATED) as file:
                file.writestr(f"{file.namelist()[0].split('/')[0]}/more", bytes(101_000_000))
            for case, wrong in (
                *((other, self.old[other]) for other in self.old if other != name),
                ("missing", None),
                ("empty", b""),
                ("end lost", data[:-100]),
                ("NaN", saved(state | {key: tensor * torch.nan})),
                ("tensor lost", saved({k: state[k] for k in state if k != key})),
                ("40 GB", saved(state | {key: torch.zeros(1).expand(10**10)})),
                ("no dictionary", saved(tensor)),
                ("unpacks to 101 MB", bomb.getvalue()),
            ):
                with self.subTest(name=name, case=case):
                    self.assertIsNone(self.load_with(name, wrong))
        self.assertRaisesRegex(ValueError, "encoder.pth", load, self.folder, 2, 6)

    def test_flipped_bits(self):
        """Each is found, or without effect."""
        dice, sound = random.Random(0), load(self.folder, 2, 4).state_dict()
        for name in 60 * WEIGHTS:
            data = bytearray(self.old[name])
            place = dice.randrange(len(data))
            data[place] ^= 1 << dice.randrange(8)
            found = self.load_with(name, data)
            same = found is None or all(torch.equal(found[key], sound[key]) for key in sound)
            self.assertTrue(same, f"byte {place} of {name}")


class GradeTest(unittest.TestCase):
    """The submission of a short training, in a copy of the project."""

    @classmethod
    def setUpClass(cls):
        cls.folder = folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(mock.patch.dict(os.environ)).pop("FID_FEATURES", None)
        shutil.copy(ROOT / "vae_lib.py", folder)
        shutil.copytree(ROOT / "tests", folder / "tests")
        cls.script = folder / "tests" / "run_test.py"
        cls.script.write_bytes(cls.script.read_bytes().replace(b"DRAWS = 10", b"DRAWS = 3"))
        shutil.copytree(ROOT / "data" / "train", folder / "data" / "train")
        images = load_images(ROOT / "data" / "train")
        for training, epochs in ((1 - images, 50), (images, 600)):
            vae, cls.other = VAE(training), contents(folder)  # of the negatives in the second round
            losses = list(train(vae, training, epochs))
            save(vae, folder)
        show_images(images).savefig(folder / "samples.png")
        sets = images, vae.sample(100, seed=0)
        cls.fid = evaluator.frechet_distance(*(evaluator.extract(x, "imagenet") for x in sets))
        write_result(folder / "result.csv", cls.fid, losses)

    @unittest.skipIf(sys.platform == "win32", "one step is a shell script")
    def test_three_steps(self):
        for name in ("prepare_test.sh", "run_test.py", "eval_test.py"):
            step = ["sh"] if name.endswith("sh") else [sys.executable, "-m", "unittest"]
            step.append(f"tests/{name}")
            run = subprocess.run(step, cwd=self.folder, capture_output=True, text=True, check=False)
            self.assertEqual((run.returncode, "skipped" in run.stderr), (0, False), run.stderr)

    def failure(self):
        """What the copy's run_test.py says first, run in this process."""
        spec = importlib.util.spec_from_file_location("graded", self.script)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        suite = unittest.defaultTestLoader.loadTestsFromModule(module)
        with mock.patch("sys.stdout", io.StringIO()):
            result = unittest.TextTestRunner(io.StringIO(), failfast=True).run(suite)
        self.assertEqual(result.errors, [])
        return "".join(text for _, text in result.failures)

    def test_faults(self):
        result, head = (self.folder / "result.csv").read_text(), "FID,1\nFID_imagenet,1\n"
        foreign = result.replace(str(self.fid), str(self.fid + 100))
        texts = "", "\xff\0", head, head + "loss,nan", head + "loss,1,2", 200_000 * "1"
        for name, data, words in (
            ("encoder.pth", self.other["encoder.pth"], r"\.pth files' loss"),
            ("decoder.pth", self.other["decoder.pth"], r"\.pth files' loss"),
            ("result.csv", foreign.encode(), "result.csv says FID .* draws from the .pth files"),
            *((name, None, f"{name} is missing") for name in ("latent.pth", "result.csv")),
            *(("result.csv", text.encode("latin-1"), "Error: result.csv") for text in texts),
        ):
            path = self.folder / name
            kept = path.read_bytes()
            path.unlink() if data is None else path.write_bytes(data)
            with self.subTest(name, data=data and data[:40]):
                self.assertRegex(self.failure(), words)
            path.write_bytes(kept)
