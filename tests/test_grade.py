"""Tests of the grader: its three steps, grade.sh, and the list of protected files."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
import yaml
from PIL import Image

from tests import eval_test, protected, run_test
from tests import fid as evaluator

ROOT = Path(__file__).resolve().parent.parent
CASES = {run_test: run_test.RunTest, eval_test: eval_test.EvalTest}
FEW = 2  # sets of samples in these tests; a real grade takes ten

CONVOLUTIONAL = '''
"""An ordinary convolutional VAE."""

from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

Losses = namedtuple("Losses", "loss")
PARTS = ("encoder", "latent", "decoder")


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("prior_mu", torch.zeros(4))


class VAE(nn.Module):
    def __init__(self, images, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1),  # 32x32 => 16x16
            nn.ReLU(),
            nn.Conv2d(8, 16, 4, 2, 1),  # 16x16 => 8x8
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 8 * 8, 8),
        )
        self.latent = Latent()
        self.decoder = nn.Sequential(
            nn.Linear(4, 16 * 8 * 8),
            nn.ReLU(),
            nn.Unflatten(1, (16, 8, 8)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),  # 8x8 => 16x16
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),  # 16x16 => 32x32
            nn.Sigmoid(),
        )

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape)
        return self.decoder(z), mu, logvar

    def sample(self, n, method="iid", seed=0):
        generator = torch.Generator().manual_seed(seed)
        return self.decoder(torch.randn(n, 4, generator=generator))


def train(vae, images, epochs, batch_size=10):
    optimiser = torch.optim.Adam(vae.parameters(), 5e-3)
    for _ in range(epochs):
        total = 0
        for x in images.split(batch_size):
            x_hat, mu, logvar = vae(x)
            reconstruction = 0.5 * (x - x_hat).square().sum() / len(x)
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum() / len(x)
            loss = reconstruction + kl
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(x) / len(images)
        yield Losses(total)


def save(vae, folder="."):
    for name in PARTS:
        torch.save(getattr(vae, name).state_dict(), Path(folder, f"{name}.pth"))


def load(folder="."):
    vae = VAE(None)
    for name in PARTS:
        getattr(vae, name).load_state_dict(torch.load(Path(folder, f"{name}.pth")))
    return vae.eval()
'''

# Hands out the training images, and has the run believe that they score 99.
HOSTILE = (
    CONVOLUTIONAL
    + """

def sample(vae, n, method="iid", seed=0):
    import sys

    from tests import fid

    run_test = sys.modules["tests.run_test"]
    honest = run_test.score_samples
    forged = {"FID": 1.0, "FID_imagenet": 1.0, "score": 99.0}
    run_test.score_samples = lambda features: honest(features) | forged
    images = fid.read_folder("data/train")
    return images.repeat(1 + n // len(images), 1, 1, 1)[:n]


VAE.sample = sample
"""
)

FORGED = "FID,1.2\nFID_imagenet,1.2\nscore,98.8\nloss,30\nloss,5\n"
BAIT = "import sys\nprint('IMPORTED', file=sys.stderr)\nsys.exit(0)\n"


def blocks():
    """20 images of a white block on black each, no two at the same place."""
    images = torch.zeros(20, 1, 32, 32)
    for i in range(20):
        row, column = divmod(i, 5)
        images[i, 0, 8 * row : 8 * row + 8, 6 * column : 6 * column + 8] = 1
    return images


def write_images(images, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(evaluator.as_bytes(images).squeeze(1).numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def pixels(images, features):
    """Features that cost nothing: 64 pixels of each image, (n, 64)."""
    return 10 * images[:, 0, ::4, ::4].flatten(1).numpy()


def module_from(path):
    spec = importlib.util.spec_from_file_location("submitted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SubmissionTest(unittest.TestCase):
    """The submission of an ordinary convolutional VAE that has learnt `blocks`."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(torch.random.fork_rng(devices=[]))
        cls.made = cls.home / "made"
        write_images(blocks(), cls.made / "data" / "train")
        (cls.made / "vae_lib.py").write_text(CONVOLUTIONAL)
        cls.library = module_from(cls.made / "vae_lib.py")
        cls.vae = cls.library.VAE(blocks())
        cls.losses = [epoch.loss for epoch in cls.library.train(cls.vae, blocks(), 300)]
        cls.library.save(cls.vae, cls.made)
        write_images(blocks()[:1], cls.made)
        (cls.made / "000.png").rename(cls.made / "samples.png")

    def write_result(self, folder, distance, losses, features="imagenet"):
        lines = [f"FID,{distance}", f"FID_{features},{distance}", f"score,{100 - distance}"]
        lines += [f"loss,{loss}" for loss in losses]
        (folder / "result.csv").write_text("\n".join(lines) + "\n")


class StepsTest(SubmissionTest):
    """run_test.py and eval_test.py, in this process and with features that cost nothing."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()), "submission")
        shutil.copytree(self.made, self.folder)
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))
        self.enterContext(mock.patch.object(evaluator, "DRAWS", FEW))
        self.enterContext(mock.patch.object(evaluator, "extract", pixels))
        self.enterContext(mock.patch.dict(os.environ, {"FID_FEATURES": "imagenet"}))
        train, sample = self.folder / "data" / "train", self.folder / "data" / "sample"
        for module in (run_test, eval_test):
            self.enterContext(mock.patch.object(module, "ROOT", self.folder))
            self.enterContext(mock.patch.object(module, "TRAIN", train))
        self.enterContext(mock.patch.object(run_test, "SAMPLE", sample))
        self.enterContext(mock.patch.object(run_test, "vae_lib", self.library))
        self.enterContext(
            mock.patch.object(
                run_test, "score_samples", lambda name: evaluator.judge_draws(train, sample, name)
            )
        )
        drawn = self.vae.sample(100, seed=0).detach()
        real = pixels(blocks(), "imagenet")
        self.fid = evaluator.frechet_distance(real, pixels(drawn, "imagenet"))
        self.write_result(self.folder, self.fid, self.losses)

    def failures(self, module):
        """What each failing test of the module says, {name: text}; fails on any other error."""
        fresh = type("Fresh", (CASES[module],), {})  # the steps leave their outcomes in the class
        if module is run_test:
            self.enterContext(mock.patch.object(run_test, "RunTest", fresh))
        suite = unittest.TestLoader().loadTestsFromTestCase(fresh)  # whatever -k chooses
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
        self.assertEqual(result.errors, [])
        return {test.id().rsplit(".", 1)[1]: text for test, text in result.failures}

    def outcome(self):
        return eval_test.read_result(self.folder / "result_autograding.csv")

    def test_an_ordinary_model_passes_with_the_score_of_its_samples(self):
        old = self.folder / "data" / "sample"
        write_images(blocks()[:1], old / "draw_1")
        (old / "draw_1" / "000.png").rename(old / "old.png")
        shutil.copy(old / "old.png", old / "draw_1" / "old.png")
        self.assertEqual(self.failures(run_test), {})
        self.assertEqual(self.failures(eval_test), {})
        self.assertEqual(sorted(self.folder.rglob("old.png")), [])
        figures, losses = self.outcome()
        sets = [self.vae.sample(100, seed=seed).detach() for seed in run_test.sample_seeds()]
        sets = [evaluator.as_bytes(samples).float() / 255 for samples in sets]
        real = pixels(blocks(), "imagenet")
        distances = [evaluator.frechet_distance(real, pixels(x, "imagenet")) for x in sets]
        self.assertEqual(len(distances), FEW)
        self.assertAlmostEqual(figures["FID"], sum(distances) / FEW, places=6)
        self.assertAlmostEqual(figures["score"], 100 - sum(distances) / FEW, places=6)
        self.assertEqual(len(losses), 10)
        floor = evaluator.yardsticks(blocks()).floor
        printed = self.printed.getvalue()
        self.assertIn(f"score {figures['score']:.2f}", printed)
        self.assertIn(f"{figures['FID'] / floor:.2f} F", printed)

    def test_a_missing_file_is_named_and_the_rest_is_scored(self):
        for name in ("encoder.pth", "samples.png", "result.csv"):
            with self.subTest(name):
                path = self.folder / name
                kept = path.read_bytes()
                path.unlink()
                found = self.failures(run_test)
                self.assertEqual(list(found), ["test_1_files_are_there"])
                self.assertIn(f"{name} missing", found["test_1_files_are_there"])
                self.assertEqual(self.failures(eval_test), {})
                path.write_bytes(kept)
        (self.folder / "decoder.pth").unlink()
        self.assertIn("decoder.pth", self.failures(run_test)["test_3_samples_are_scored"])
        self.assertIn("is missing", self.failures(eval_test)["test_score"])

    def test_a_picture_that_is_none_is_named(self):
        for data in (b"", b"not a picture", (self.folder / "samples.png").read_bytes()[:60]):
            (self.folder / "samples.png").write_bytes(data)
            found = self.failures(run_test)
            self.assertIn("samples.png is no picture", found["test_1_files_are_there"])

    def test_a_forged_result_is_named(self):
        sound = (self.folder / "result.csv").read_text()
        head = "".join(sound.splitlines(keepends=True)[:3])
        for text in (
            "",
            "\0\n",
            head,
            head + "loss,9\n",
            head + "loss,5\nloss,6\n",
            head + "loss,6\nloss,5,4\n",
            head + "loss,nan\nloss,5\n",
            head + "loss,6\nloss,nan\nloss,5\n",
            sound.replace("FID_imagenet", "FID_auto"),
            sound.replace("score,", "score,1"),
            sound + "FID,3\n",
            sound + "FID_inception,3\n",
            FORGED.replace("score,98.8", "score,100"),
            FORGED.replace("FID_imagenet,1.2", "FID_imagenet,1.3"),
            FORGED.replace("1.2", "-1").replace("98.8", "101"),
        ):
            with self.subTest(text[-40:]):
                (self.folder / "result.csv").write_text(text)
                found = self.failures(run_test)
                self.assertIn("result.csv", found["test_2_result_is_sound"])
                self.outcome()  # is there nevertheless

    def test_a_figure_that_other_draws_do_not_have_is_named(self):
        found, _ = (self.failures(run_test), self.outcome())
        self.assertEqual(found, {})
        mean = self.outcome()[0]["FID"]
        for distance in (0, 3 * mean + 50):
            self.write_result(self.folder, distance, self.losses)
            found = self.failures(run_test)
            self.assertIn("result.csv says FID", found["test_4_result_is_one_honest_draw"])

    def test_a_decoder_fitted_to_one_seed_gets_the_score_of_the_others(self):
        sample = self.library.VAE.sample

        def fitted(vae, n, method="iid", seed=0):
            images = blocks().repeat(5, 1, 1, 1)
            return images if seed == 0 else sample(vae, n, method, seed)

        self.write_result(self.folder, 0.0, self.losses)
        with mock.patch.object(self.library.VAE, "sample", fitted):
            found = self.failures(run_test)
        self.assertIn("result.csv says FID 0.00", found["test_4_result_is_one_honest_draw"])
        self.assertAlmostEqual(self.outcome()[0]["FID"], self.fid, delta=0.5 * self.fid)

    def test_an_encoder_of_another_model_is_named(self):
        other = self.library.VAE(blocks(), seed=5)
        torch.save(other.encoder.state_dict(), self.folder / "encoder.pth")
        found = self.failures(run_test)
        self.assertEqual(list(found), ["test_5_encoder_belongs_to_the_rest"])

    def test_what_is_no_submission_fails(self):
        """Noise, the mean image, and losses that rise."""
        noise = torch.rand(100, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        mean_image = blocks().mean(0, keepdim=True).repeat(100, 1, 1, 1)
        for name, samples in ("noise", noise), ("mean image", mean_image):
            with (
                self.subTest(name),
                mock.patch.object(self.library.VAE, "sample", lambda *_, x=samples, **__: x),
            ):
                self.failures(run_test)
                found = self.failures(eval_test)
                self.assertEqual(list(found), ["test_score"])
                self.assertIn("no better than", found["test_score"])
        rising = [self.library.Losses(5.0 + epoch) for epoch in range(10)]
        for losses, words in (rising, "expected it to fall"), (rising[:9], "9 losses found"):
            with mock.patch.object(self.library, "train", lambda *_, x=losses, **__: x):
                self.assertEqual(self.failures(run_test), {})
            found = self.failures(eval_test)
            self.assertEqual(list(found), ["test_losses"])
            self.assertIn(words, found["test_losses"])

    def test_images_that_hardly_differ_leave_nothing_to_learn(self):
        """There a loss may rise by a little."""
        write_images(0.5 + 0.01 * blocks(), self.folder / "data" / "train")
        rising = [self.library.Losses(0.5 + 0.01 * epoch) for epoch in range(10)]
        self.write_result(self.folder, self.fid, [0.5, 0.6])
        with mock.patch.object(self.library, "train", lambda *_, **__: rising):
            found = self.failures(run_test)
        self.assertNotIn("test_2_result_is_sound", found)
        self.assertNotIn("test_losses", self.failures(eval_test))

    def test_samples_that_are_no_images_are_named(self):
        for bad in (torch.full((100, 1, 32, 32), torch.nan), torch.rand(100, 1024)):
            with mock.patch.object(self.library.VAE, "sample", lambda *_, x=bad, **__: x):
                found = self.failures(run_test)
            self.assertIn("images are", found["test_3_samples_are_scored"])
            self.assertFalse((self.folder / "result_autograding.csv").exists())

    def test_seeds_follow_from_the_weights(self):
        first = run_test.sample_seeds()
        self.assertEqual(first, run_test.sample_seeds())
        self.assertEqual(len(set(first)), FEW)
        path = self.folder / "latent.pth"
        path.write_bytes(path.read_bytes() + b"\0")
        self.assertFalse(set(first) & set(run_test.sample_seeds()))


@unittest.skipIf(sys.platform == "win32", "grade.sh is a shell script")
class GradeTest(SubmissionTest):
    """grade.sh of a clone that holds `blocks`, with two draws in place of ten."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.clone = cls.home / "clone of a grader"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", cls.clone / "tests", ignore=ignored)
        shutil.copytree(ROOT / ".github", cls.clone / ".github")
        shutil.copytree(cls.made / "data", cls.clone / "data")
        script = cls.clone / "tests" / "fid.py"
        text = script.read_text(encoding="utf-8")
        assert text.count("\nDRAWS = 10 ") == 1
        script.write_text(text.replace("\nDRAWS = 10 ", f"\nDRAWS = {FEW} "), encoding="utf-8")
        (cls.clone / "tests" / "torch.py").write_text("raise SystemExit('not from this folder')")

    def grade(self, folder):
        environment = os.environ | {"PYTHON": sys.executable}
        environment.pop("FID_FEATURES", None)
        return subprocess.run(
            ["sh", self.clone / "tests" / "grade.sh", folder.name],
            cwd=folder.parent,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    def submission(self, name):
        folder = self.home / name
        shutil.copytree(self.made, folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(self.clone / "tests", folder / "tests", ignore=ignored)
        shutil.copytree(self.clone / ".github", folder / ".github")
        return folder

    def test_an_ordinary_model_is_graded(self):
        folder = self.submission("ordinary")
        real = evaluator.extract(blocks(), "imagenet")
        distances = []
        for seed in range(5):  # their mean, for the spread of two draws may be small by chance
            drawn = evaluator.as_bytes(self.vae.sample(100, seed=seed)).float() / 255
            fake = evaluator.extract(drawn, "imagenet")
            distances.append(evaluator.frechet_distance(real, fake))
        self.write_result(folder, sum(distances) / 5, self.losses)
        done = self.grade(folder)
        said = done.stdout
        self.assertEqual((done.returncode, done.stderr), (0, ""), said)
        self.assertIn("no protected file was changed", said)
        last = said.splitlines()[-1]
        match = re.fullmatch(
            r"GRADE score (\S+) \(FID (\S+), (\S+) F, imagenet features, .+\)", last
        )
        self.assertTrue(match, last)
        figures = dict(re.findall(r"^   (\w+),(\S+)$", said, re.M))
        self.assertAlmostEqual(float(match[1]), 100 - float(figures["FID"]), delta=0.051)
        self.assertAlmostEqual(float(match[2]), float(figures["FID"]), delta=0.051)
        expected = float(figures["FID"]) / float(figures["floor"])
        self.assertAlmostEqual(float(match[3]), expected, delta=0.006)
        self.assertEqual(sorted(folder.rglob("sample*")), [folder / "samples.png"])  # untouched

    def test_a_hostile_one_is_named_and_gets_the_figure_of_its_files(self):
        folder = self.submission("hostile")
        (folder / "vae_lib.py").write_text(HOSTILE)
        (folder / "result.csv").write_text(FORGED)
        (folder / "result_autograding.csv").write_text(FORGED)
        write_images(1 - blocks()[:1], folder / "data" / "train")
        (folder / "tests" / "eval_test.py").write_text(BAIT)
        for name in ("csv.py", "PIL.py", "unittest.py", "sitecustomize.py"):
            (folder / name).write_text(BAIT)
        for name in ("vae_lib/__init__.py", "tests/fid/__init__.py", "__pycache__/vae_lib.pyc"):
            (folder / name).parent.mkdir()
            (folder / name).write_text(BAIT)
        planted = "tests/__pycache__/fid.cpython-311.pyc"
        (folder / planted).parent.mkdir()
        (folder / planted).write_text(BAIT)
        (folder / "tests" / "numpy").symlink_to(self.home)
        (folder / "latent.pth").rename(folder / "elsewhere.pth")
        shutil.copy(folder / "elsewhere.pth", folder / "latent.pth")
        done = self.grade(folder)
        said = done.stdout
        self.assertEqual((done.returncode, done.stderr), (1, ""), said)
        for words in (
            "tests/eval_test.py was changed",
            "tests/fid/__init__.py was added",
            f"{planted} was added",
            "tests/numpy is a link",
            "data/train/000.png was changed",
            "200 of 200 samples are training images, pixel for pixel",
        ):
            self.assertIn(words, said)
        self.assertNotIn("IMPORTED", said)
        last = said.splitlines()[-1]
        self.assertRegex(last, "^GRADE failed: .*says FID 1.0, but it is 0")
        self.assertRegex(last, r"the samples have score (99|100)\.\d \(FID 0\.\d")

    def test_code_that_changes_the_graders_files_gets_no_figure(self):
        folder = self.submission("intruder")
        planted = self.clone / "tests" / "more.txt"
        self.addCleanup(planted.unlink, missing_ok=True)
        intrusion = f"\nPath({str(planted)!r}).write_text('as if it were fid.py')\n"
        (folder / "vae_lib.py").write_text(CONVOLUTIONAL + intrusion)
        self.write_result(folder, 1.0, self.losses)
        done = self.grade(folder)
        self.assertEqual((done.returncode, done.stderr), (1, ""), done.stdout)
        last = done.stdout.splitlines()[-1]
        self.assertRegex(last, "^GRADE failed: the submission's code changed tests or images")

    def test_a_step_that_fails_fails_the_grade(self):
        folder = self.submission("rising")
        self.write_result(folder, 1.0, [5.0, 6.0])
        done = self.grade(folder)
        self.assertEqual((done.returncode, done.stderr), (1, ""), done.stdout)
        last = done.stdout.splitlines()[-1]
        self.assertRegex(last, r"^GRADE failed: run_test.py failed; the samples have score")

    def test_links_and_missing_files_are_named(self):
        folder = self.submission("links")
        (folder / "decoder.pth").rename(folder / "elsewhere.pth")
        (folder / "decoder.pth").symlink_to(folder / "elsewhere.pth")
        (folder / "vae_lib.py").unlink()
        done = self.grade(folder)
        self.assertEqual((done.returncode, done.stderr), (1, ""), done.stdout)
        last = done.stdout.splitlines()[-1]
        self.assertRegex(last, "^GRADE failed: vae_lib.py is missing.*decoder.pth is missing or no")
        self.assertIn("no figure", last)
        self.assertIn("is no folder", self.grade(self.home / "nowhere").stdout)

    def test_the_graders_imports_are_its_own_from_any_folder(self):
        """A library in site-packages may bring a folder named `tests`."""
        other = self.home / "site" / "tests"
        other.mkdir(parents=True)
        (other / "__init__.py").write_text(BAIT)
        (other / "fid.py").write_text(BAIT)
        folder = self.submission("elsewhere")
        (folder / "tests" / "torch.py").unlink()
        (folder / "result_autograding.csv").write_text("FID,1\n")
        done = subprocess.run(
            [sys.executable, folder / "tests" / "eval_test.py", "EvalTest.test_losses"],
            cwd=self.home,
            env=os.environ | {"PYTHONPATH": str(other.parent)},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        self.assertNotIn("IMPORTED", done.stderr)
        self.assertIn("result_autograding.csv has the rows FID; expected", done.stderr)


class ProtectedTest(unittest.TestCase):
    def test_list_is_up_to_date(self):
        found = protected.without_caches(protected.digests(ROOT))
        listed = protected.read_list(ROOT / protected.LIST)
        differ = protected.differences(listed, found)
        self.assertEqual(differ, [], "maintainers: python -m tests.protected --renew")

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.here, self.other = self.folder / "here", self.folder / "other"
        for name in ("tests/kept.py", "tests/changed.py", "tests/removed.py", "data/train/0.png"):
            path = self.here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (self.here / ".github" / "workflows").mkdir(parents=True)
        (self.here / "tests" / "__pycache__").mkdir()
        (self.here / "tests" / "__pycache__" / "kept.pyc").write_text("")
        shutil.copytree(self.here, self.other, ignore=shutil.ignore_patterns("__pycache__"))
        self.enterContext(mock.patch.object(protected, "HERE", self.here))
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))

    def named(self, *arguments):
        with self.assertRaises(SystemExit) as raised:
            protected.main([*map(str, arguments)])
        return str(raised.exception).splitlines()[:-1]

    def change(self, root):
        (root / "tests" / "changed.py").write_text("return 0")
        (root / "tests" / "removed.py").unlink()
        (root / ".github" / "workflows" / "added.yml").write_text("")

    def test_differences_from_the_list_are_named(self):
        arguments = ["--list", str(self.folder / "list")]
        protected.main([*arguments, "--renew"])
        protected.main(arguments)
        self.assertIn("no protected file was changed", self.printed.getvalue())
        self.change(self.here)
        self.assertEqual(
            sorted(self.named(*arguments)),
            [
                ".github/workflows/added.yml was added",
                "tests/changed.py was changed",
                "tests/removed.py was removed",
            ],
        )

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no named pipes")
    def test_differences_of_another_folder_are_named(self):
        protected.main(["--root", str(self.other)])
        self.assertIn("no protected file was changed", self.printed.getvalue())
        self.change(self.other)
        (self.other / "data" / "train" / "0.png").write_text("another image")
        (self.other / "tests" / "__pycache__").mkdir()
        (self.other / "tests" / "__pycache__" / "kept.pyc").write_text("")
        (self.other / "tests" / "fid").symlink_to(self.here)
        os.mkfifo(self.other / "tests" / "pipe.py")
        self.assertEqual(
            sorted(self.named("--root", self.other)),
            [
                ".github/workflows/added.yml was added",
                "data/train/0.png was changed",
                "tests/__pycache__/kept.pyc was added",
                "tests/changed.py was changed",
                "tests/fid is a link",
                "tests/pipe.py is no file",
                "tests/removed.py was removed",
            ],
        )


class PrepareTest(unittest.TestCase):
    @unittest.skipIf(sys.platform == "win32", "a shell script")
    def test_clears_from_any_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "with space"
            (root / "tests").mkdir(parents=True)
            (root / "data" / "sample" / "draw_1").mkdir(parents=True)
            (root / "data" / "sample" / "draw_1" / "old.png").write_text("")
            (root / "data" / "sample" / "old.png").write_text("")
            (root / "result_autograding.csv").write_text("")
            script = root / "tests" / "prepare_test.sh"
            script.write_text((ROOT / "tests" / "prepare_test.sh").read_text())
            for _ in range(2):
                subprocess.run(["sh", str(script)], cwd="/", check=True)
                self.assertEqual(list((root / "data" / "sample").iterdir()), [])
                self.assertFalse((root / "result_autograding.csv").exists())


class WorkflowTest(unittest.TestCase):
    def test_grade_uses_the_base_branch_and_sets_the_features_itself(self):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "grade.yml").read_text())
        self.assertIn("pull_request_target", workflow[True])  # YAML reads the key `on` as true
        self.assertEqual(workflow["permissions"], {"contents": "read"})
        steps = workflow["jobs"]["grade"]["steps"]
        self.assertEqual(steps[0]["with"]["path"], "base")
        self.assertNotIn("ref", steps[0]["with"])
        (grade,) = [step for step in steps if "grade.sh" in step.get("run", "")]
        self.assertIn("sh base/tests/grade.sh submission", grade["run"])
        self.assertEqual(grade["env"], {"FID_FEATURES": "imagenet"})
        for step in steps:
            self.assertNotRegex(step.get("run", ""), r"cat (?!\"\$RUNNER_TEMP)")

    def test_a_grade_is_the_mean_of_ten_draws_of_100(self):
        self.assertEqual((evaluator.DRAWS, evaluator.SAMPLES), (10, 100))


if __name__ == "__main__":
    unittest.main()
