"""The grader's verdict: python -m unittest tests/eval_test.py, after run_test.py."""

import math
import unittest

from tests.run_test import EPOCHS, ROOT, read_result

PASS = 50.0  # a FID below this passes


class EvalTest(unittest.TestCase):
    """Judges result_autograding.csv, which run_test.py writes."""

    def setUp(self):
        path = ROOT / "result_autograding.csv"
        if not path.is_file():
            self.fail(
                "result_autograding.csv is missing: run `python -m unittest tests/run_test.py`"
                " first, and mend what it says"
            )
        try:
            self.figures, self.losses = read_result(path)
        except ValueError:
            self.fail(f"{path.name} is damaged: run `python -m unittest tests/run_test.py` again")

    def test_fid(self):
        distance = self.figures.get("FID", math.nan)
        names = [key for key in self.figures if key.startswith("FID_")]
        features = names[0].removeprefix("FID_") if names else "unknown"
        print(f"\nFID {distance:.2f} ({features} features), score {100 - distance:.2f}")
        if not 0 <= distance < PASS:
            self.fail(
                f"the FID is {distance:.2f} and must be below {PASS:.0f}: train longer, look at"
                " samples.png, then run the notebook and run_test.py again"
            )

    def test_score(self):
        self.assertAlmostEqual(self.figures.get("score"), 100 - self.figures.get("FID"))

    def test_losses(self):
        if len(self.losses) != EPOCHS or not all(math.isfinite(loss) for loss in self.losses):
            self.fail(
                f"{len(self.losses)} losses found, expected {EPOCHS} finite ones: training stopped"
                " early or diverged, look at `train` in vae_lib.py"
            )
        if not self.losses[-1] < self.losses[0]:
            self.fail(
                f"the loss went from {self.losses[0]:.2f} to {self.losses[-1]:.2f}, expected it to"
                " fall: look at the loss and the optimiser in vae_lib.py"
            )


if __name__ == "__main__":
    unittest.main()
