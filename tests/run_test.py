"""The grader's run: python -m unittest tests/run_test.py.

Checks the submission's files, draws ten sets of 100 samples from its .pth files into data/sample,
scores these PNG files in a process of its own, trains a fresh model for ten epochs, and writes
result_autograding.csv for eval_test.py. A step that fails says why, and the others still run.

The features are `imagenet`, or those that FID_FEATURES names in the environment.
"""

import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # see eval_test.py

import vae_lib  # noqa: E402
from tests import fid as evaluator  # noqa: E402
from tests.eval_test import (  # noqa: E402
    EPOCHS,
    ROOT,
    TRAIN,
    features_of,
    is_learnable,
    read_result,
)

SAMPLE = ROOT / "data" / "sample"
WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")
AGAIN = "run assignment_09.ipynb to the end, and commit the five files that it writes together"


def sample_seeds():
    """A seed for each set of samples, from a hash of the weights: nobody sets them directly, and
    they are the same in each run."""
    weights = b"".join((ROOT / name).read_bytes() for name in WEIGHTS if (ROOT / name).is_file())
    digests = [hashlib.sha256(weights + bytes([i])).digest() for i in range(evaluator.DRAWS)]
    return [int.from_bytes(digest[:4], "big") for digest in digests]


def load_model(images):
    """The submission's model. If encoder.pth is missing, an untrained encoder takes its place, for
    samples need none."""
    if (ROOT / "encoder.pth").is_file():
        return vae_lib.load(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        vae_lib.save(vae_lib.VAE(images), folder)
        for name in ("latent.pth", "decoder.pth"):
            shutil.copy(ROOT / name, folder)
        return vae_lib.load(folder)


@torch.no_grad()
def draw_samples(vae):
    """Ten sets of 100 PNG files: data/sample itself, and its folders draw_1 to draw_9."""
    if SAMPLE.exists():
        shutil.rmtree(SAMPLE)  # an earlier run's
    for draw, seed in enumerate(sample_seeds()):
        folder = SAMPLE / f"draw_{draw}" if draw else SAMPLE
        folder.mkdir(parents=True)
        samples = evaluator.as_bytes(vae.sample(evaluator.SAMPLES, seed=seed))  # (100, 1, 32, 32)
        for i, pixels in enumerate(samples.squeeze(1).numpy()):
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def score_samples(features):
    """{key: number} of the PNG files in data/sample, by an evaluator that imports nothing of the
    submission."""
    command = [sys.executable, "-I", "-X", "utf8", ROOT / "tests" / "fid.py"]
    command += ["--draws", TRAIN, SAMPLE, "--features", features]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise ValueError(f"the samples could not be scored: {done.stderr.strip()}")
    rows = [line.split(",") for line in done.stdout.splitlines()]
    return {key: float(value) for key, value in rows}


class RunTest(unittest.TestCase):
    """One test a step, in the order of their names."""

    stored = None  # what result.csv says: {key: number}
    losses = None  # its losses
    vae = None  # the submission's model
    judged = None  # the figures of its samples: {key: number}
    trained = ()  # losses of the fresh model

    @classmethod
    def setUpClass(cls):
        (ROOT / "result_autograding.csv").unlink(missing_ok=True)  # an earlier run's
        cls.images = evaluator.read_folder(TRAIN)

    def test_1_files_are_there(self):
        names = (*WEIGHTS, "result.csv", "samples.png")
        missing = [name for name in names if not (ROOT / name).is_file()]
        if missing:
            self.fail(f"{', '.join(missing)} missing: {AGAIN}")
        try:
            with Image.open(ROOT / "samples.png", formats=["PNG"]) as picture:
                picture.load()
        except Exception as error:  # Pillow has no common type for what damaged files raise
            self.fail(f"samples.png is no picture ({error}): {AGAIN}")

    def test_2_result_is_sound(self):
        if not (ROOT / "result.csv").is_file():
            self.skipTest("result.csv is missing")
        try:
            figures, losses = read_result(ROOT / "result.csv")
        except ValueError as error:
            self.fail(f"{error}: {AGAIN}")
        falls = len(losses) > 1 and losses[-1] < losses[0]
        if is_learnable(self.images) and not falls:
            self.fail(f"result.csv holds {len(losses)} losses, expected two or more that fall")
        RunTest.stored = figures
        RunTest.losses = losses

    def test_3_samples_are_scored(self):
        try:
            features = evaluator.choose_features(os.environ.get("FID_FEATURES", "imagenet"))
            RunTest.vae = load_model(self.images).eval()
            draw_samples(self.vae)
            RunTest.judged = score_samples(features)
        except (ValueError, OSError) as error:
            self.fail(str(error))

    def test_4_result_is_one_honest_draw(self):
        """result.csv holds the FID of one set of samples. It may lie five standard deviations from
        the mean of ours, but a spread counts as three times the memoriser's at most."""
        if self.stored is None or self.judged is None:
            self.skipTest("an earlier step failed")
        named = f"FID_{features_of(self.judged)}"
        if named not in self.stored:
            self.skipTest(f"result.csv has no {named} to compare with")
        found = self.judged["FID"]
        spread = min(self.judged["deviation"], 3 * self.judged["floor_deviation"])
        allowed = 1 + found / 10 + 5 * spread
        if abs(self.stored["FID"] - found) > allowed:
            self.fail(
                f"result.csv says FID {self.stored['FID']:.2f}, but samples from the .pth files"
                f" have {found:.2f} ± {spread:.2f}: {AGAIN}"
            )

    def test_5_encoder_belongs_to_the_rest(self):
        """Samples need no encoder: −ELBO of the training images does."""
        if self.vae is None or self.losses is None or not (ROOT / "encoder.pth").is_file():
            self.skipTest("an earlier step failed")
        x = self.images.repeat(10, 1, 1, 1)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x_hat, mu, logvar = self.vae(x)
        reconstruction = 0.5 * (x - x_hat).square().flatten(1).sum(1)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        loss = (reconstruction + kl).mean().item()
        if not abs(loss - self.losses[-1]) < 1 + 0.25 * abs(self.losses[-1]):
            self.fail(
                f"the .pth files' −ELBO is {loss:.2f} nats per image, but the last loss in"
                f" result.csv is {self.losses[-1]:.2f}: {AGAIN}"
            )

    def test_6_fresh_model_trains(self):
        again = math.ceil(100 / len(self.images))  # an epoch of few images would be a step or two
        x = self.images.repeat(again, 1, 1, 1)
        try:
            epochs = vae_lib.train(vae_lib.VAE(self.images), x, EPOCHS, batch_size=5)  # 200 steps
            RunTest.trained = [float(epoch.loss) for epoch in epochs]
        except (ValueError, OSError, ArithmeticError) as error:
            self.fail(f"a fresh model could not be trained: {error}")

    def test_7_outcome_is_written(self):
        if self.judged is None:
            self.skipTest("the samples have no score")
        named = f"FID_{features_of(self.judged)}"
        lines = [f"{key},{self.judged[key]}" for key in ("FID", named, "score")]
        lines += [f"loss,{loss}" for loss in self.trained]
        (ROOT / "result_autograding.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def tearDownClass(cls):
        if cls.judged is not None:
            figures = f"{cls.judged['FID']:.2f} ± {cls.judged['deviation']:.2f}"
            print(f"\nFID    {figures} ({features_of(cls.judged)} features)")
            print(f"score  {cls.judged['score']:.2f} = 100 − FID")
        if cls.trained:
            print(f"losses of {EPOCHS} epochs:", *(f"{loss:.2f}" for loss in cls.trained))


if __name__ == "__main__":
    unittest.main()
