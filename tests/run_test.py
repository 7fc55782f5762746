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
SUBMISSION = (*vae_lib.WEIGHTS, "result.csv")
EPOCHS = 10  # of the fresh model
DRAWS = 20  # sets of 100 samples whose spread result.csv's FID is held against


def read_result(path):
    """result.csv as ({key: number} of the first rows, [loss of each epoch])."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(key, float(value)) for key, value in csv.reader(file)]
    return {k: v for k, v in rows if k != "loss"}, [v for k, v in rows if k == "loss"]


class RunTest(unittest.TestCase):
    """One test a step, in order; a step that needs an earlier one's outcome says so."""

    belongs = None
    vae = None
    reproduced = None
    features = None
    distance = None
    losses = ()

    @classmethod
    def setUpClass(cls):
        (ROOT / "result_autograding.csv").unlink(missing_ok=True)  # an earlier run's

    def preflight(self):
        """Fail in plain words unless the submission can be read."""
        missing = [name for name in SUBMISSION if not (ROOT / name).is_file()]
        if missing:
            self.fail(
                f"{', '.join(missing)} missing: run assignment_09.ipynb to the end, once more"
            )
        try:
            return read_result(ROOT / "result.csv")
        except (ValueError, OSError):
            self.fail("result.csv is damaged, expected rows `key,number`: run the notebook again")

    def need(self, outcome):
        if outcome is None:
            self.skipTest("an earlier step failed: mend that one first")

    def test_1_files_belong_together(self):
        figures, losses = self.preflight()
        if not losses or not all(math.isfinite(loss) for loss in losses):
            self.fail("result.csv has no finite `loss` rows: run the notebook again")
        names = [key for key in figures if key.startswith("FID_")]
        if "FID" not in figures or len(names) != 1 or figures["FID"] != figures[names[0]]:
            self.fail("result.csv needs a row FID and the same as FID_digits or FID_inception")
        if not (ROOT / "samples.png").is_file():
            self.fail("samples.png is missing: run assignment_09.ipynb to the end, once more")
        if "checksum" in figures and figures["checksum"] != vae_lib.checksum(ROOT):
            self.fail(
                "result.csv is of another model than the .pth files and samples.png beside it:"
                " run the notebook again and commit all five files together"
            )
        RunTest.belongs = True

    def test_2_weights_load(self):
        self.preflight()
        try:
            RunTest.vae = vae_lib.load(ROOT)
        except (ValueError, OSError) as error:
            self.fail(str(error))

    def test_3_samples_are_scored(self):
        self.need(self.vae)
        figures, _ = self.preflight()
        stored = next((key[4:] for key in figures if key.startswith("FID_")), "digits")
        try:
            chosen, _ = evaluator.choose_features(os.environ.get("FID_FEATURES", stored))
            folder = ROOT / "data" / "sample"
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.png"):
                old.unlink()
            pixels = (
                (255 * self.vae.sample(100, seed=0)).round().to(torch.uint8)
            )  # (100, 1, 32, 32)
            for i, image in enumerate(pixels.squeeze(1).numpy()):
                Image.fromarray(image).save(folder / f"{i:03d}.png")
            RunTest.distance = evaluator.fid(ROOT / "data" / "train", folder, chosen)
            RunTest.features = chosen
        except (ValueError, OSError) as error:
            self.fail(f"the samples could not be scored: {error}")

    def test_4_result_is_reproduced(self):
        self.need(self.distance)
        figures, _ = self.preflight()
        stored = figures.get(f"FID_{self.features}")
        if stored is None:
            RunTest.reproduced = True
            self.skipTest(f"result.csv has no FID_{self.features} to compare with")
        real = evaluator.read_folder(ROOT / "data" / "train")
        real = evaluator.extract(real, self.features)
        draws = DRAWS if self.features == "digits" else 3  # the Inception network takes long
        distances = [
            evaluator.frechet_distance(
                real, evaluator.extract(self.vae.sample(100, seed=seed), self.features)
            )
            for seed in range(1, draws)
        ]
        low, high = min(*distances, self.distance), max(*distances, self.distance)
        margin = high - low
        if not low - margin <= stored <= high + margin:
            self.fail(
                f"result.csv says FID {stored:.2f}, but {draws} draws from the .pth files lie"
                f" between {low:.2f} and {high:.2f}: run the notebook again, commit what it writes"
            )
        RunTest.reproduced = True

    def test_5_fresh_model_trains(self):
        try:
            images = vae_lib.load_images(ROOT / "data" / "train")
            vae = vae_lib.VAE(seed=0)
            epochs = vae_lib.train(vae, images, EPOCHS, batch_size=10, learning_rate=1e-3, seed=0)
            RunTest.losses = [epoch.loss for epoch in epochs]
        except (ValueError, OSError, FloatingPointError) as error:
            self.fail(f"a fresh model could not be trained: {error}")
        self.assertEqual(len(self.losses), EPOCHS)

    def test_6_outcome_is_written(self):
        for outcome in (self.belongs, self.distance, self.reproduced):
            self.need(outcome)
        if not self.losses:
            self.skipTest("no fresh model was trained: mend that first")
        named = f"FID_{self.features}"
        rows = [("FID", self.distance), (named, self.distance), ("score", 100 - self.distance)]
        rows += [("loss", loss) for loss in self.losses]
        with open(ROOT / "result_autograding.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    @classmethod
    def tearDownClass(cls):
        if cls.distance is not None:
            print(f"\nFID    {cls.distance:.2f} ({cls.features} features)")
            print(f"score  {100 - cls.distance:.2f} = 100 − FID")
        if cls.losses:
            print(f"losses of {EPOCHS} epochs:", *(f"{loss:.2f}" for loss in cls.losses))


if __name__ == "__main__":
    unittest.main()
