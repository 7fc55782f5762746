"""The student's check: python -m unittest tests/run_test.py, after the notebook.

It does what the instructor's grade.py does, by the same rules (grading.py), to the files of this
folder, and writes result_autograding.csv and data/sample. A check that fails says why.
"""

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))  # site-packages may hold `tests`

from tests import grading  # noqa: E402

RESULT = grading.ROOT / "result_autograding.csv"
SAMPLE = grading.ROOT / "data" / "sample"


class RunTest(unittest.TestCase):
    """One test a check, in the order of their names."""

    @classmethod
    def setUpClass(cls):
        RESULT.unlink(missing_ok=True)
        shutil.rmtree(SAMPLE, ignore_errors=True)
        temporary = cls.enterClassContext(tempfile.TemporaryDirectory())
        work = Path(temporary, "work")
        cls.graded = grading.finish(grading.run(grading.ROOT, work), work)
        print(f"\n{cls.graded.log}", end="")
        if (work / "data" / "sample").is_dir():
            shutil.copytree(work / "data" / "sample", SAMPLE)
        if cls.graded.figures:
            losses = (cls.graded.outcome.get("fresh") or {}).get("losses", [])
            grading.write_result(RESULT, cls.graded.figures, losses)
            print(grading.in_words(cls.graded.figures))

    def check(self, rule):
        sentence = rule(self.graded)
        if sentence:
            self.fail(sentence)

    def test_1_files_are_there(self):
        self.check(grading.files_are_there)

    def test_2_result_is_sound(self):
        self.check(grading.result_is_sound)

    def test_3_contract_is_kept(self):
        self.check(grading.contract_is_kept)

    def test_4_samples_are_drawn(self):
        self.check(grading.samples_are_drawn)

    def test_5_encoder_belongs_to_the_rest(self):
        self.check(grading.encoder_belongs_to_the_rest)

    def test_6_fresh_model_learns(self):
        self.check(grading.fresh_model_learns)


if __name__ == "__main__":
    unittest.main()
