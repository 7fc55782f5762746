"""The grader's verdict: python -m unittest tests/eval_test.py, after run_test.py.

It reads result_autograding.csv and computes nothing itself. There is no pass mark: the score is
100 - FID. Only what cannot count as samples of these images, or as training, fails.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))  # site-packages may hold `tests`

from tests import grading  # noqa: E402

FIRST = "run `python -m unittest tests/run_test.py` first, and put right what it says"


class EvalTest(unittest.TestCase):
    def setUp(self):
        path = grading.ROOT / "result_autograding.csv"
        if not path.is_file():
            self.fail(f"{path.name} is missing: {FIRST}")
        files = [grading.ROOT / name for name in grading.TAKEN]
        newest = max(file.stat().st_mtime for file in files if file.is_file())
        if path.stat().st_mtime < newest:
            self.fail(f"{path.name} is older than the files that are here now: {FIRST}")
        self.figures, self.losses = grading.read_result(path)

    def test_score(self):
        print(f"\nscore {self.figures['score']:.1f}")
        sentence = grading.samples_beat_noise(grading.Graded(figures=self.figures))
        if sentence:
            self.fail(sentence)

    def test_losses(self):
        if len(self.losses) != grading.EPOCHS:
            expected = f"expected {grading.EPOCHS}"
            self.fail(f"{len(self.losses)} losses of a fresh model, {expected}: {FIRST}")


if __name__ == "__main__":
    unittest.main()
