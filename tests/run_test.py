"""The grader's run: python -m unittest tests/run_test.py, from the repository's folder.

Checks the submission, draws 100 samples from it into data/sample, scores them, trains a fresh model
for ten epochs, and writes result_autograding.csv for eval_test.py. FID_FEATURES=inception (or auto)
in the environment scores with other features than those that result.csv names.
"""

import csv
import math
import os
import unittest
from pathlib import Path

import torch
from PIL import Image

import vae_lib
from tests import fid as evaluator

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 10  # of the fresh model
DRAWS = 10  # sets of 100 samples whose spread result.csv's FID is held against
AGAIN = "run assignment_09.ipynb to the end, and commit the five files that it writes together"


def read_result(path):
    """result.csv as ({key: number} of the first rows, [loss of each epoch])."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(key, float(value)) for key, value in csv.reader(file)]
    return {k: v for k, v in rows if k != "loss"}, [v for k, v in rows if k == "loss"]


class RunTest(unittest.TestCase):
    """One test a step, in order; a step that needs an earlier one's outcome says so."""

    figures, losses, vae, distance, reproduced, trained = {}, [], None, None, None, None

    @classmethod
    def setUpClass(cls):
        (ROOT / "result_autograding.csv").unlink(missing_ok=True)  # an earlier run's

    def need(self, outcome):
        if not outcome:
            self.skipTest("an earlier step failed: mend that one first")

    def test_1_result_is_readable(self):
        for name in (*vae_lib.WEIGHTS, "result.csv", "samples.png"):
            if not (ROOT / name).is_file():
                self.fail(f"{name} is missing: {AGAIN}")
        try:
            figures, losses = read_result(ROOT / "result.csv")
        except (ValueError, OSError, csv.Error) as error:
            self.fail(f"result.csv is damaged, expected rows `key,number` ({error}): {AGAIN}")
        names = [key for key in figures if key.startswith("FID_")]
        if len(names) != 1 or figures[names[0]] != figures.get("FID"):
            self.fail(f"result.csv needs a row FID and the same as FID_imagenet: {AGAIN}")
        if not losses or not all(map(math.isfinite, [*losses, *figures.values()])):
            self.fail(f"result.csv needs `loss` rows, and finite numbers only: {AGAIN}")
        stored = names[0].removeprefix("FID_")
        try:
            RunTest.features = evaluator.choose_features(os.environ.get("FID_FEATURES", stored))
        except ValueError as error:
            self.fail(f"result.csv or FID_FEATURES: {error}")
        RunTest.figures, RunTest.losses = figures, losses

    def test_2_weights_load(self):
        self.need(self.figures)
        try:
            RunTest.vae = vae_lib.load(ROOT)
        except (ValueError, OSError) as error:
            self.fail(str(error))

    def test_3_samples_are_scored(self):
        self.need(self.vae)
        folder = ROOT / "data" / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        pixels = (255 * self.vae.sample(100, seed=0)).round().byte()  # (100, 1, 32, 32)
        for i, image in enumerate(pixels.squeeze(1).numpy()):
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        try:
            RunTest.distance = evaluator.fid(ROOT / "data" / "train", folder, self.features)
        except (ValueError, OSError) as error:
            self.fail(f"the samples could not be scored: {error}")

    def test_4_result_is_reproduced(self):
        self.need(self.distance is not None)
        images = vae_lib.load_images(ROOT / "data" / "train")
        with torch.no_grad():  # the encoder's file is seen in the loss only
            generator = torch.Generator().manual_seed(0)
            x_hat, mu, logvar = self.vae(images.repeat(10, 1, 1, 1), generator)
            kl = vae_lib.kl_divergence(mu, logvar).sum(1)
        loss = (vae_lib.reconstruction_loss(images.repeat(10, 1, 1, 1), x_hat) + kl).mean().item()
        if not abs(loss - self.losses[-1]) < 0.5 + 0.1 * abs(loss):
            self.fail(f"the .pth files' loss is {loss:.2f}, not {self.losses[-1]:.2f}: {AGAIN}")
        stored = self.figures.get(f"FID_{self.features}")
        if stored is None:
            RunTest.reproduced = True
            self.skipTest(f"result.csv has no FID_{self.features} to compare with")
        real = evaluator.extract(images, self.features)
        draws = [self.vae.sample(100, seed=seed) for seed in range(1, DRAWS)]
        fakes = [evaluator.extract(draw, self.features) for draw in draws]
        found = [self.distance] + [evaluator.frechet_distance(real, fake) for fake in fakes]
        low, high = min(found), max(found)
        if not 2 * low - high <= stored <= 2 * high - low:
            self.fail(
                f"result.csv says FID {stored:.2f}, but {DRAWS} draws from the .pth files lie"
                f" between {low:.2f} and {high:.2f}: {AGAIN}"
            )
        RunTest.reproduced = True

    def test_5_fresh_model_trains(self):
        try:
            images = vae_lib.load_images(ROOT / "data" / "train")
            epochs = vae_lib.train(vae_lib.VAE(images), images, EPOCHS, batch_size=10)
            RunTest.trained = [epoch.loss for epoch in epochs]
        except (ValueError, OSError, FloatingPointError) as error:
            self.fail(f"a fresh model could not be trained: {error}")
        self.assertEqual(len(self.trained), EPOCHS)

    def test_6_outcome_is_written(self):
        self.need(self.reproduced and self.trained)
        named = f"FID_{self.features}"
        rows = [("FID", self.distance), (named, self.distance), ("score", 100 - self.distance)]
        rows += [("loss", loss) for loss in self.trained]
        with open(ROOT / "result_autograding.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    @classmethod
    def tearDownClass(cls):
        if cls.distance is not None:
            print(f"\nFID    {cls.distance:.2f} ({cls.features} features)")
            print(f"score  {100 - cls.distance:.2f} = 100 − FID")
        if cls.trained:
            print(f"losses of {EPOCHS} epochs:", *(f"{loss:.2f}" for loss in cls.trained))


if __name__ == "__main__":
    unittest.main()
