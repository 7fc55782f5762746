"""The grader's run: python -m unittest tests/run_test.py.

It starts two processes, one after the other. run_submission.py draws samples from the submission's
.pth files and trains a fresh model; fid.py scores the samples, and imports nothing of the
submission. Then the submission's files are checked against what the two found, and
result_autograding.csv is written for eval_test.py. A check that fails says why.

The features are `imagenet`, or those that FID_FEATURES names in the environment.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))  # site-packages may hold `tests`

from tests.eval_test import (  # noqa: E402
    ROOT,
    SUBMISSION,
    WEIGHTS,
    checksum,
    features_of,
    in_words,
    read_result,
)

AGAIN = "run assignment_09.ipynb to the end, and commit the five files that it writes together"
CHILD = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # more of them spin, and slow others
    "PYTHONIOENCODING": "utf-8",
}


def how_it_ended(name, status):
    """One sentence on a process that ended with this exit status, which is not 0."""
    if status >= 0:
        return f"{name} failed, see above"
    try:
        killer = signal.Signals(-status).name
    except ValueError:
        killer = f"signal {-status}"
    return (
        f"{name} was killed by {killer}: if memory was short (grading takes about 900 MB), give it"
        " more"
    )


def run(script, *arguments, **options):
    """A script of this folder as a process of its own. -P keeps its folder and the submission's off
    its path, so that no file there is imported in place of a package."""
    command = [sys.executable, "-P", ROOT / "tests" / script, *arguments]
    environment = os.environ | CHILD
    return subprocess.run(command, cwd=SUBMISSION, env=environment, check=False, **options)


def run_submission():
    """What the submission's code did: {"samples": True, "loss": number, "losses": [number]}, and
    under "problems" a sentence for each of these that is missing."""
    problem = "the submission's code ended early"
    with tempfile.TemporaryDirectory() as folder:
        path = os.environ.get("VAE_OUTCOME")  # grade.py ran it already
        if path is None:
            path = Path(folder, "outcome.json")
            status = run("run_submission.py", path).returncode
            if status:
                problem = how_it_ended("run_submission.py", status)
        try:
            outcome = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            outcome = {}
    outcome.setdefault("problems", {})
    for name in ("samples", "loss", "losses"):
        if name not in outcome:
            outcome["problems"].setdefault(name, problem)
    return outcome


def score_samples():
    """{key: number} of the PNG files in data/sample; ValueError if they cannot be scored."""
    features = os.environ.get("FID_FEATURES") or "imagenet"
    folders = (ROOT / "data" / "train", SUBMISSION / "data" / "sample")
    arguments = ["--draws", *folders, "--features", features]
    done = run("fid.py", *arguments, capture_output=True, encoding="utf-8")
    if done.returncode < 0:
        raise ValueError(how_it_ended("fid.py", done.returncode))
    if done.returncode != 0:
        raise ValueError(f"the samples could not be scored: {done.stderr.strip()}")
    rows = [line.split(",") for line in done.stdout.splitlines()]
    return {key: float(value) for key, value in rows}


class RunTest(unittest.TestCase):
    """One test a check, in the order of their names."""

    @classmethod
    def setUpClass(cls):
        result = SUBMISSION / "result_autograding.csv"
        result.unlink(missing_ok=True)  # an earlier run's
        cls.stored = None  # what result.csv says: {key: number}
        cls.unsound = None  # what is wrong with it
        cls.losses = []  # the losses in it
        try:
            cls.stored, cls.losses = read_result(SUBMISSION / "result.csv")
        except (OSError, ValueError) as error:
            cls.unsound = str(error)
        cls.judged = None  # the figures of the samples: {key: number}
        cls.outcome = run_submission()
        cls.problem = cls.outcome["problems"].get("samples")
        if cls.problem is None:
            try:
                cls.judged = score_samples()
            except ValueError as error:
                cls.problem = str(error)
        if cls.judged is not None:
            keys = ("FID", f"FID_{features_of(cls.judged)}", "score", "F", "limit")
            rows = [(key, cls.judged[key]) for key in keys] + [("files", checksum(SUBMISSION))]
            rows += [("loss", float(loss)) for loss in cls.outcome.get("losses", [])]
            result.write_text("".join(f"{key},{value}\n" for key, value in rows))

    def test_1_files_are_there(self):
        names = (*WEIGHTS, "result.csv", "samples.png")
        missing = [name for name in names if not (SUBMISSION / name).is_file()]
        if missing:
            self.fail(f"{', '.join(missing)} missing: {AGAIN}")
        try:
            with Image.open(SUBMISSION / "samples.png", formats=["PNG"]) as picture:
                picture.load()
        except Exception as error:  # Pillow has no common type for what damaged files raise
            self.fail(f"samples.png is no picture ({error}): {AGAIN}")

    def test_2_result_is_sound(self):
        if not (SUBMISSION / "result.csv").is_file():
            self.skipTest("result.csv is missing")
        if self.unsound:
            self.fail(f"{self.unsound}: {AGAIN}")
        if len(self.losses) < 2 or not self.losses[-1] < self.losses[0]:
            count = len(self.losses)
            self.fail(f"result.csv holds {count} losses, expected two or more that fall: {AGAIN}")

    def test_3_samples_are_scored(self):
        if self.problem:
            self.fail(self.problem)

    def test_4_result_is_one_honest_draw(self):
        """result.csv holds the FID of one set of samples. It may differ from the mean of ours by 1,
        and a tenth of it, and five standard deviations, none larger than three of the memoriser's.
        """
        if self.stored is None or self.judged is None:
            self.skipTest("an earlier step failed")
        named = f"FID_{features_of(self.judged)}"
        if named not in self.stored:
            self.skipTest(f"result.csv has no {named} to compare with")
        found = self.judged["FID"]
        spread = min(self.judged["deviation"], 3 * self.judged["F_deviation"])
        allowed = 1 + found / 10 + 5 * spread
        if abs(self.stored["FID"] - found) > allowed:
            self.fail(
                f"result.csv says FID {self.stored['FID']:.4g}, but samples from the .pth files"
                f" have {found:.4g} +- {spread:.2g}: {AGAIN}"
            )

    def test_5_encoder_belongs_to_the_rest(self):
        """Samples need no encoder: -ELBO of the training images does."""
        if "loss" in self.outcome["problems"]:
            self.fail(f"-ELBO of the training images: {self.outcome['problems']['loss']}")
        loss = self.outcome["loss"]
        if not self.losses:
            self.skipTest("an earlier step failed")
        last = self.losses[-1]
        if not abs(loss - last) < 1 + 0.25 * abs(last):
            self.fail(
                f"the .pth files' -ELBO is {loss:.4g} nats per image, but the last loss in"
                f" result.csv is {last:.4g}: losses have to be -ELBO, too, and of the training"
                f" that wrote the .pth files; {AGAIN}"
            )

    def test_6_fresh_model_trains(self):
        if "losses" in self.outcome["problems"]:
            problem = self.outcome["problems"]["losses"]
            self.fail(f"a fresh model could not be trained: {problem}")

    @classmethod
    def tearDownClass(cls):
        if cls.judged is not None:
            spread = cls.judged["deviation"]
            print(f"\nscore {cls.judged['score']:.1f} +- {spread:.1f} ({in_words(cls.judged)})")
            if cls.judged["copies"]:
                shares = f"{cls.judged['copies']:.0f} of {cls.judged['samples']:.0f} samples"
                print(f"{shares} are training images, pixel for pixel: read vae_lib.py")
        if "losses" in cls.outcome:
            print("losses of a fresh model:", *(f"{loss:.2f}" for loss in cls.outcome["losses"]))


if __name__ == "__main__":
    unittest.main()
