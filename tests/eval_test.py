"""The grader's verdict: python -m unittest tests/eval_test.py, after run_test.py.

There is no pass mark, the score is 100 − FID. What fails is no submission: a figure that is not
finite, losses that do not fall (unless all images are nearly the same), samples that are no nearer
to the training images than 100 copies of their mean, or than noise. Nothing of the submission is
imported here.
"""

import csv
import math
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # from any folder: site-packages may hold another `tests`

from tests import fid as evaluator  # noqa: E402

TRAIN = ROOT / "data" / "train"
EPOCHS = 10  # of the fresh model that run_test.py trains
AGAIN = "run `python -m unittest tests/run_test.py` first, and put right what it says"


def read_result(path):
    """result.csv or result_autograding.csv as ({key: number}, [loss of each epoch]).

    ValueError says what is wrong unless the keys are FID, FID_imagenet or FID_inception, score and
    any number of loss, all numbers are finite, both FIDs are equal, and the score is 100 − FID.
    """
    name = Path(path).name
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(key, float(value)) for key, value in csv.reader(file)]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name} is damaged, expected rows `key,number`: {error}") from error
    losses = [value for key, value in rows if key == "loss"]
    keys = sorted(key for key, _ in rows if key != "loss")
    if keys not in (["FID", "FID_imagenet", "score"], ["FID", "FID_inception", "score"]):
        expected = "FID, FID_imagenet or FID_inception, score, and loss for each epoch"
        raise ValueError(f"{name} has the rows {', '.join(keys) or 'none'}; expected {expected}")
    if not all(math.isfinite(value) for _, value in rows):
        raise ValueError(f"{name} holds a number that is not finite")
    figures = {key: value for key, value in rows if key != "loss"}
    distance, named, score = (figures[key] for key in keys)
    if distance < 0 or named != distance or abs(score - (100 - distance)) > 1e-6:
        what = f"FID {distance:g}, {keys[1]} {named:g} and score {score:g}"
        raise ValueError(f"{name} says {what}: expected the same FID twice and 100 − FID")
    return figures, losses


def is_learnable(images):
    """Whether the images (n, 1, 32, 32) differ enough for a loss to fall: their mean image, in
    place of each, costs one nat or more."""
    return 0.5 * (images - images.mean(0)).square().sum() / len(images) >= 1


def features_of(figures):
    """The features that a result was computed with, `imagenet` or `inception`."""
    return next(key.removeprefix("FID_") for key in figures if key.startswith("FID_"))


class EvalTest(unittest.TestCase):
    """Judges result_autograding.csv, which run_test.py writes."""

    def setUp(self):
        path = ROOT / "result_autograding.csv"
        if not path.is_file():
            self.fail(f"{path.name} is missing: {AGAIN}")
        try:
            self.figures, self.losses = read_result(path)
        except ValueError as error:
            self.fail(f"{error}: {AGAIN}")

    def test_score(self):
        distance = self.figures["FID"]
        features = features_of(self.figures)
        found = evaluator.yardsticks(evaluator.read_folder(TRAIN), features)
        multiple = evaluator.in_floors(distance, found.floor)
        floors = f"{multiple:.2f} F" if multiple is not None else "F is 0: all images are alike"
        print(f"\nscore {100 - distance:.2f}: FID {distance:.2f} ({features} features), {floors}")
        if not distance < evaluator.worst_figure(found):
            self.fail(
                f"the samples have FID {distance:.2f}, which is no better than 100 copies of the"
                f" mean image ({found.mean_image:.2f}) or noise ({found.noise:.2f}): look at"
                " data/sample, train longer, then run the notebook and run_test.py again"
            )

    def test_losses(self):
        if len(self.losses) != EPOCHS:
            self.fail(
                f"{len(self.losses)} losses found, expected {EPOCHS}: training stopped early or"
                " failed, look at `train` in vae_lib.py"
            )
        learnable = is_learnable(evaluator.read_folder(TRAIN))
        if learnable and not self.losses[-1] < self.losses[0]:
            self.fail(
                f"the loss of a fresh model went from {self.losses[0]:.2f} to {self.losses[-1]:.2f}"
                " within 10 epochs, expected it to fall: look at `train` in vae_lib.py"
            )


if __name__ == "__main__":
    unittest.main()
