"""The grader's verdict: python -m unittest tests/eval_test.py, after run_test.py.

There is no pass mark, the score is 100 - FID. It fails only what cannot count as a submission:
samples that are no nearer to the training images than 100 copies of their mean, or than noise;
losses of a fresh model that do not fall; results of other files than those that are there now.

It reads result_autograding.csv and computes no figure itself.
"""

import codecs
import math
import os
import unittest
import zlib
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
SUBMISSION = Path(os.environ.get("VAE_SUBMISSION") or ROOT)  # grade.py names a copy of another's
WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")
EPOCHS = 10  # of the fresh model that run_submission.py trains
FIRST = "run `python -m unittest tests/run_test.py` first, and put right what it says"


def checksum(folder):
    """One number that changes with the submission's code, weights or result."""
    found = 0
    for name in ("vae_lib.py", *WEIGHTS, "result.csv"):
        path = Path(folder, name)
        found = zlib.crc32(path.read_bytes() if path.is_file() else b"", found)
    return found


def read_rows(path):
    """The rows of a file `key,number`, [(key, number)], also as spreadsheets and editors save it.
    ValueError names the line that cannot be understood."""
    data = path.read_bytes()
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if data.startswith(marks) else "utf-8-sig"
    rows = []
    for number, line in enumerate(data.decode(encoding, errors="replace").splitlines(), 1):
        separator = next((mark for mark in ";\t" if mark in line), ",")
        cells = [cell.strip(' \t"') for cell in line.split(separator)]
        if not any(cells):
            continue
        try:
            key, value = cells[:2]
            if separator != ",":
                value = value.replace(",", ".")  # a decimal comma
            value = float(value)
            if any(cells[2:]) or not math.isfinite(value):
                raise ValueError
        except ValueError:
            text = line if len(line) <= 60 else line[:60] + "..."
            expected = "expected a key and a finite number, such as loss,5.1"
            raise ValueError(f"{path.name}, line {number} is {text!r}: {expected}") from None
        rows.append((key, value))
    return rows


def read_result(path, more=()):
    """result.csv or result_autograding.csv as ({key: number}, [loss of each epoch]).

    ValueError says what is wrong unless the keys are FID, FID_imagenet or FID_inception, score,
    those of `more`, and any number of loss; both FIDs must be equal, and the score 100 - FID, but
    for rounding.
    """
    path = Path(path)
    rows = read_rows(path)
    losses = [value for key, value in rows if key == "loss"]
    keys = [key for key, _ in rows if key != "loss"]
    named = "FID_inception" if "FID_inception" in keys else "FID_imagenet"
    expected = ["FID", named, "score", *more]
    if sorted(keys) != sorted(expected):
        found = ", ".join(keys) or "none"
        found = found if len(found) <= 60 else found[:60] + "..."
        expected = f"{', '.join(expected)}, each once, and loss for each epoch"
        raise ValueError(f"{path.name} has the rows {found}; expected {expected}")
    figures = {key: value for key, value in rows if key != "loss"}
    fid, again, score = figures["FID"], figures[named], figures["score"]
    if fid < 0 or abs(again - fid) > 0.1 or abs(100 - fid - score) > 0.1:
        what = f"FID {fid:g}, {named} {again:g} and score {score:g}"
        raise ValueError(f"{path.name} says {what}: expected the same FID twice and 100 - FID")
    return figures, losses


def features_of(figures):
    """The features that a result was computed with, `imagenet` or `inception`."""
    return "inception" if "FID_inception" in figures else "imagenet"


def in_words(figures):
    """FID, multiple of F and features of a result, for people."""
    fid, memoriser = figures["FID"], figures["F"]
    multiple = f"{fid / memoriser:.2f} F" if memoriser > 0 else "F is 0"
    return f"FID {fid:.1f}, {multiple}, {features_of(figures)} features"


class EvalTest(unittest.TestCase):
    """Judges result_autograding.csv, which run_test.py writes."""

    def setUp(self):
        path = SUBMISSION / "result_autograding.csv"
        if not path.is_file():
            self.fail(f"{path.name} is missing: {FIRST}")
        try:
            self.figures, self.losses = read_result(path, ("F", "limit", "files"))
        except ValueError as error:
            self.fail(f"{error}: {FIRST}")
        if self.figures["files"] != checksum(SUBMISSION):
            self.fail(f"{path.name} is of other files than those that are here now: {FIRST}")

    def test_score(self):
        print(f"\nscore {self.figures['score']:.1f} ({in_words(self.figures)})")
        if not self.figures["FID"] < self.figures["limit"]:
            self.fail(
                f"the samples have FID {self.figures['FID']:.1f}, which is no better than 100"
                f" copies of the mean image or noise ({self.figures['limit']:.1f}): look at"
                " data/sample, train longer, then run the notebook and run_test.py again"
            )

    def test_losses(self):
        if len(self.losses) != EPOCHS:
            self.fail(
                f"{len(self.losses)} losses found, expected {EPOCHS}: training stopped early or"
                " failed, look at `train` in vae_lib.py"
            )
        if not self.losses[-1] < self.losses[0]:
            self.fail(
                f"the loss of a fresh model went from {self.losses[0]:.2f} to {self.losses[-1]:.2f}"
                f" within {EPOCHS} epochs, expected it to fall: look at `train` in vae_lib.py"
            )


if __name__ == "__main__":
    unittest.main()
