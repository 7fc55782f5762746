"""Tests of the grader: its steps and its command, on somebody else's model."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import psutil
import torch

from tests import eval_test, grade, run_submission, run_test
from tests import fid as evaluator
from tests.unit import stranger
from tests.unit.test_fid import write_images

ROOT = Path(__file__).resolve().parent.parent.parent
DRAWS, SAMPLES = 2, 20  # in these tests; a real grade takes ten sets of 100
RESULT = "FID,20\nFID_imagenet,20\nscore,80\nloss,30\nloss,5\n"

# Hands out the training images, and says that they score 99.
HOSTILE = """

def sample(vae, n, method="iid", seed=0):
    from tests import fid

    said = "FID,1\\nFID_imagenet,1\\nscore,99\\nF,20\\nlimit,90\\nfiles,1\\nloss,9\\nloss,5\\n"
    Path("result_autograding.csv").write_text(said)
    fid.frechet_distance = lambda real, fake: 1.0
    return fid.read_folder("data/train")[:n]


VAE.sample = sample
"""

LOOP = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(os.environ["STARTED"] + ".part", "w") as file:
    file.write(str(child.pid))
os.replace(os.environ["STARTED"] + ".part", os.environ["STARTED"])
while True:
    time.sleep(0.1)
"""


def blocks():
    """20 images of a white block on black each, no two at the same place."""
    images = torch.zeros(20, 1, 32, 32)
    for i in range(20):
        row, column = divmod(i, 5)
        images[i, 0, 8 * row : 8 * row + 8, 6 * column : 6 * column + 8] = 1
    return images


def write_result(folder, distance, losses):
    rows = [f"FID,{distance}", f"FID_imagenet,{distance}", f"score,{100 - distance}"]
    rows += [f"loss,{loss}" for loss in losses]
    (folder / "result.csv").write_text("\n".join(rows) + "\n")


def has_ended(pid):
    """Whether a process is gone within 20 s. A killed one goes soon, not at once; a zombie has
    ended, and waits for its parent to ask."""
    for _ in range(200):
        try:
            if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


class SubmissionTest(unittest.TestCase):
    """The submission of a model that has learnt `blocks`."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(torch.random.fork_rng(devices=[]))
        cls.made = cls.home / "made"
        cls.made.mkdir()
        shutil.copy(stranger.__file__, cls.made / "vae_lib.py")
        cls.vae = stranger.VAE(blocks())
        cls.losses = [epoch.loss for epoch in stranger.train(cls.vae, blocks(), 200)]
        stranger.save(cls.vae, cls.made)
        write_images(blocks()[:1], cls.made)
        (cls.made / "000.png").rename(cls.made / "samples.png")
        write_result(cls.made, 20, cls.losses)

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()), "submission")
        shutil.copytree(self.made, self.folder)
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))


class ReadResultTest(unittest.TestCase):
    def setUp(self):
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()), "result.csv")

    def test_what_other_programs_save_is_read(self):
        comma = RESULT.replace("FID,20", "FID,20.5").replace("imagenet,20", "imagenet,20.5")
        comma = comma.replace("80", "79.5")
        for what, text, encoding in (
            ("as written", comma, "utf-8"),
            ("byte order mark", comma, "utf-8-sig"),
            ("UTF-16", comma, "utf-16"),
            ("CRLF, blank lines", "\r\n" + comma.replace("\n", "\r\n\r\n"), "utf-8"),
            ("quotes and spaces", comma.replace("score,79.5", '"score" , "79.5"'), "utf-8"),
            ("empty columns", comma.replace("\n", ",,\n"), "utf-8"),
            ("semicolons", comma.replace(",", ";").replace(".", ","), "utf-8"),
            ("tabs", comma.replace(",", "\t").replace(".", ","), "utf-8"),
            ("rounded", comma.replace("FID,20.5", "FID,20.4873"), "utf-8"),
        ):
            self.path.write_bytes(text.encode(encoding))
            with self.subTest(what):
                figures, losses = eval_test.read_result(self.path)
                self.assertAlmostEqual(figures["FID_imagenet"], 20.5)
                self.assertEqual((figures["score"], losses), (79.5, [30, 5]))

    def test_anything_else_is_refused_in_a_short_sentence(self):
        for text, words in (
            ("", "has the rows none"),
            (RESULT + "loss,5,4\n", "line 6 is 'loss,5,4'"),
            (RESULT + "loss,nan\n", "line 6 is 'loss,nan'"),
            (RESULT + "loss\n", "line 6 is 'loss'"),
            (RESULT + 9999 * "x", "line 6 is 'xxx"),
            (RESULT + 9999 * "x,1\n", "has the rows"),
            (RESULT + "FID,3\n", "has the rows FID, FID_imagenet, score, FID;"),
            (RESULT + "FID_inception,20\n", "has the rows"),
            (RESULT.replace("score,80", "score,99"), "expected the same FID twice and 100 - FID"),
            (RESULT.replace("imagenet,20", "imagenet,21"), "expected the same FID twice"),
            (RESULT.replace("20", "-1").replace("80", "101"), "says FID -1"),
        ):
            self.path.write_text(text)
            with self.subTest(words), self.assertRaises(ValueError) as raised:
                eval_test.read_result(self.path)
            self.assertIn(words, str(raised.exception))
            self.assertTrue(str(raised.exception).startswith("result.csv"))
            self.assertLess(len(str(raised.exception)), 250)


class RunSubmissionTest(SubmissionTest):
    """What the submission's code is made to do, in this process."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(evaluator, "DRAWS", DRAWS))
        self.enterContext(mock.patch.object(evaluator, "SAMPLES", SAMPLES))
        self.enterContext(mock.patch.object(run_submission, "SUBMISSION", self.folder))
        self.sample = self.folder / "data" / "sample"
        self.enterContext(mock.patch.object(run_submission, "SAMPLE", self.sample))

    def test_samples_of_each_seed_are_drawn(self):
        write_images(blocks(), self.sample / "draw_5")  # an earlier run's
        run_submission.draw_samples(stranger, blocks())
        for folder, seed in zip(
            (self.sample, self.sample / "draw_1"), run_submission.sample_seeds(), strict=True
        ):
            expected = self.vae.sample(SAMPLES, seed=seed)
            found = evaluator.read_folder(folder)
            self.assertLess((found - expected).abs().max(), 0.51 / 255)
        self.assertFalse((self.sample / "draw_5").exists())

    def test_seeds_follow_from_the_weights(self):
        first = run_submission.sample_seeds()
        self.assertEqual(first, run_submission.sample_seeds())
        self.assertEqual(len(set(first)), DRAWS)
        path = self.folder / "latent.pth"
        path.write_bytes(path.read_bytes() + b"\0")
        self.assertFalse(set(first) & set(run_submission.sample_seeds()))

    def test_loss_is_minus_elbo(self):
        loss = run_submission.negative_elbo(stranger, blocks())
        self.assertAlmostEqual(loss, self.losses[-1], delta=0.2 * self.losses[-1])

    def test_a_fresh_model_takes_200_steps(self):
        steps = []
        count = mock.patch.object(torch.optim.Adam, "step", lambda _: steps.append(1))
        with count:
            losses = run_submission.train_fresh_model(stranger, blocks())
        self.assertEqual((len(losses), len(steps)), (10, 200))
        diverged = mock.Mock(VAE=stranger.VAE)
        diverged.train.return_value = [stranger.Losses(loss) for loss in (5, float("nan"))]
        with self.assertRaisesRegex(ValueError, r"losses are \[5.0, nan\]"):
            run_submission.train_fresh_model(diverged, blocks())

    def test_a_step_that_fails_leaves_the_others(self):
        outcome = self.folder / "outcome.json"
        nan = torch.full((SAMPLES, 1, 32, 32), torch.nan)
        modules = mock.patch.dict(sys.modules, vae_lib=stranger)
        sample = mock.patch.object(stranger.VAE, "sample", lambda *_, **__: nan)
        train = mock.patch.object(run_submission, "TRAIN", self.folder / "train")
        write_images(blocks(), self.folder / "train")
        path = mock.patch.object(sys, "path", ["the grader's clone", *sys.path])
        with modules, sample, train, path, contextlib.redirect_stderr(io.StringIO()):
            run_submission.main(outcome)
            self.assertEqual(sys.path[0], str(self.folder))
            self.assertNotIn("the grader's clone", sys.path)  # whose vae_lib.py is not theirs
        with mock.patch.dict(os.environ, VAE_OUTCOME=str(outcome)):
            found = run_test.run_submission()
        self.assertEqual(list(found["problems"]), ["samples"])
        self.assertIn("images are (20, 1, 32, 32)", found["problems"]["samples"])
        self.assertEqual(len(found["losses"]), 10)


class ChecksTest(SubmissionTest):
    """run_test.py and eval_test.py, on what their processes are said to have found."""

    def setUp(self):
        super().setUp()
        self.outcome = {"samples": True, "loss": self.losses[-1], "problems": {}}
        self.outcome["losses"] = [30.0 - epoch for epoch in range(10)]
        self.judged = {"FID": 22, "FID_imagenet": 22, "score": 78, "deviation": 2}
        self.judged |= {"F": 20, "F_deviation": 2, "limit": 90, "copies": 0, "samples": 1000}
        for module in (run_test, eval_test):
            self.enterContext(mock.patch.object(module, "SUBMISSION", self.folder))
        self.enterContext(mock.patch.object(run_test, "run_submission", lambda: self.outcome))
        self.enterContext(mock.patch.object(run_test, "score_samples", lambda: self.judged))

    def failures(self, case):
        """What each failing check says, {name: text}."""
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
        result = unittest.TextTestRunner(io.StringIO()).run(suite)
        self.assertEqual(result.errors, [])
        return {test.id().rsplit(".", 1)[1]: text for test, text in result.failures}

    def assert_only(self, failures, name, words):
        self.assertEqual(list(failures), [name])
        self.assertIn(words, failures[name])

    def test_an_ordinary_submission_passes(self):
        self.assertEqual(self.failures(run_test.RunTest), {})
        self.assertEqual(self.failures(eval_test.EvalTest), {})
        said = self.printed.getvalue()
        self.assertIn("score 78.0 (FID 22.0, 1.10 F, imagenet features)", said)
        self.assertTrue(said.isascii())  # some terminals show nothing else
        self.assertNotIn("training images", said)

    def test_copies_of_training_images_are_counted(self):
        self.judged["copies"] = 7
        self.failures(run_test.RunTest)
        said = self.printed.getvalue()
        self.assertIn("7 of 1000 samples are training images, pixel for pixel", said)

    def test_missing_and_unfit_files_are_named(self):
        check = "test_1_files_are_there"
        for name in ("encoder.pth", "result.csv", "samples.png"):
            kept = (self.folder / name).read_bytes()
            (self.folder / name).unlink()
            self.assert_only(self.failures(run_test.RunTest), check, f"{name} missing")
            (self.folder / name).write_bytes(kept)
        (self.folder / "samples.png").write_bytes(b"not a picture")
        self.assert_only(self.failures(run_test.RunTest), check, "samples.png is no picture")

    def test_a_result_that_does_not_fit_is_named(self):
        for distance, losses, check, words in (
            (22, [5.0, self.losses[-1]], "test_2_result_is_sound", "two or more that fall"),
            (22, [self.losses[-1]], "test_2_result_is_sound", "1 losses"),
            (1.2, self.losses, "test_4_result_is_one_honest_draw", "result.csv says FID 1.2"),
            (40, self.losses, "test_4_result_is_one_honest_draw", "result.csv says FID 40"),
            (22, [999, 300], "test_5_encoder_belongs_to_the_rest", "the last loss in"),
        ):
            write_result(self.folder, distance, losses)
            with self.subTest(words):
                self.assert_only(self.failures(run_test.RunTest), check, words)
                self.assertEqual(self.failures(eval_test.EvalTest), {})

    def test_what_the_submissions_code_could_not_do_is_named(self):
        for name, check in (
            ("loss", "test_5_encoder_belongs_to_the_rest"),
            ("losses", "test_6_fresh_model_trains"),
            ("samples", "test_3_samples_are_scored"),
        ):
            problems = {name: f"no {name}"}
            with mock.patch.dict(self.outcome, problems=problems):
                self.assert_only(self.failures(run_test.RunTest), check, f"no {name}")
        self.assertIn("is missing", self.failures(eval_test.EvalTest)["test_score"])

    def test_what_is_no_submission_fails(self):
        """Samples no better than noise, and losses that rise or are too few."""
        for change, check, words in (
            ({"limit": 22}, "test_score", "no better than"),
            ({"losses": [*range(10)]}, "test_losses", "expected it to fall"),
            ({"losses": [9, 8, 7]}, "test_losses", "3 losses found"),
        ):
            with mock.patch.dict(self.judged, change), mock.patch.dict(self.outcome, change):
                self.assertEqual(self.failures(run_test.RunTest), {})
                self.assert_only(self.failures(eval_test.EvalTest), check, words)

    def test_old_results_have_no_score(self):
        self.failures(run_test.RunTest)
        for name in ("vae_lib.py", "decoder.pth", "result.csv"):
            kept = (self.folder / name).read_bytes()
            (self.folder / name).write_bytes(kept + b"\n")
            self.printed.truncate(0)
            self.assertIn("run_test.py` first", self.failures(eval_test.EvalTest)["test_score"])
            self.assertNotIn("score", self.printed.getvalue())
            (self.folder / name).write_bytes(kept)
        self.assertEqual(self.failures(eval_test.EvalTest), {})


class GradeTest(SubmissionTest):
    """grade.py of a clone that holds `blocks`, with fewer samples."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.clone = cls.home / "clone of a grader"
        ours = shutil.ignore_patterns("unit", "__pycache__")
        shutil.copytree(ROOT / "tests", cls.clone / "tests", ignore=ours)
        shutil.copytree(ROOT / ".github" / "workflows", cls.clone / ".github" / "workflows")
        write_images(blocks(), cls.clone / "data" / "train")
        script = cls.clone / "tests" / "fid.py"
        text = script.read_text(encoding="utf-8")
        for name, less in ("DRAWS", DRAWS), ("SAMPLES", SAMPLES):
            text, changed = re.subn(f"^{name} = [0-9]+", f"{name} = {less}", text, flags=re.M)
            assert changed == 1
        script.write_text(text, encoding="utf-8")

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(grade, "ROOT", self.clone))
        self.temporary = self.folder.parent / "temporary"
        self.temporary.mkdir()
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.temporary))
        self.started = self.folder.parent / "started"
        self.enterContext(mock.patch.dict(os.environ, places | {"STARTED": str(self.started)}))
        os.environ.pop("FID_FEATURES", None)

    def start(self, clone):
        command = [sys.executable, clone / "tests" / "grade.py", self.folder.name]
        return subprocess.Popen(
            command,
            cwd=self.folder.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )

    def graded(self):
        """What the command says, and its exit status; nothing is left behind."""
        process = self.start(self.clone)
        said, _ = process.communicate()
        self.assertEqual(list(self.temporary.iterdir()), [])
        self.assertEqual(list(self.clone.rglob("__pycache__")), [])
        return said, process.returncode

    def run_as(self, script, text, time_limit=60):
        """grade.run of a script with this text."""
        root = self.folder / "other"
        (root / "tests").mkdir(parents=True)
        (root / "tests" / script).write_text(text)
        with mock.patch.object(grade, "ROOT", root):
            return grade.run(script, [], self.folder, time_limit)

    def copy_with(self, script, text):
        """Another clone, with this text as one of its scripts."""
        other = self.folder.parent / "other"
        shutil.copytree(self.clone, other)
        (other / "tests" / script).write_text(text)
        return other

    def test_an_ordinary_submission_is_graded(self):
        shutil.copytree(self.clone / "tests", self.folder / "tests")
        with mock.patch.multiple(run_submission, SUBMISSION=self.folder):
            seeds = run_submission.sample_seeds()[:DRAWS]
        real = evaluator.extract(blocks())
        distances = []
        for seed in seeds:
            drawn = evaluator.as_bytes(self.vae.sample(SAMPLES, seed=seed)).float() / 255
            distances.append(evaluator.frechet_distance(real, evaluator.extract(drawn)))
        distance = sum(distances) / DRAWS
        memoriser, _ = evaluator.memoriser_fid(real, size=SAMPLES)
        write_result(self.folder, distance, self.losses)
        said, status = self.graded()
        self.assertEqual(status, 0, said)
        self.assertEqual(
            said.splitlines()[-1],
            f"GRADE score {100 - distance:.1f} (FID {distance:.1f}, {distance / memoriser:.2f} F,"
            " imagenet features, mean of 2 draws)",
        )
        self.assertNotIn("in tests:", said)

    def test_a_hostile_one_gets_the_figure_of_its_files(self):
        """Its code runs in a process of its own; nothing is imported from its folder, and what it
        says of itself, or does to the evaluator, counts for nothing."""
        (self.folder / "vae_lib.py").write_text(Path(stranger.__file__).read_text() + HOSTILE)
        for name in ("csv", "PIL", "unittest", "sitecustomize", "torch", "json"):
            (self.folder / f"{name}.py").write_text("raise SystemExit('IMPORTED')")
        write_images(blocks(), self.folder / "data" / "train")
        outcome = self.folder.parent / "outcome.json"
        problems = grade.run("run_submission.py", [outcome], self.folder, 600)
        self.assertEqual(problems, [], self.printed.getvalue())
        self.assertIn("99", (self.folder / "result_autograding.csv").read_text())
        with (
            mock.patch.dict(os.environ, VAE_OUTCOME=str(outcome)),
            mock.patch.multiple(run_test, SUBMISSION=self.folder, ROOT=self.clone),
        ):
            run_test.RunTest.setUpClass()
        self.assertEqual(run_test.RunTest.judged["copies"], DRAWS * SAMPLES)
        figures, _ = eval_test.read_result(
            self.folder / "result_autograding.csv", ("F", "limit", "files")
        )
        self.assertAlmostEqual(figures["score"], 100)

    def test_differences_are_named_where_they_count(self):
        tests = self.folder / "tests"
        shutil.copytree(self.clone / "tests", tests)
        shutil.copytree(self.clone / ".github", self.folder / ".github")
        shutil.copytree(self.clone / "data", self.folder / "data")
        for name in (".DS_Store", "Thumbs.db", "._fid.py", "fid.py~", "__pycache__/fid.pyc"):
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text("put there by a program")
        self.assertEqual(grade.differences(self.folder), [])
        (tests / "fid.py").write_text("changed")
        (tests / "more.py").write_text("added")
        (tests / "run_test.py").unlink()
        (tests / "eval_test.py").unlink()
        (tests / "eval_test.py").symlink_to(self.clone / "tests" / "eval_test.py")
        for image in (self.folder / "data" / "train").iterdir():
            image.unlink()
        self.assertEqual(
            grade.differences(self.folder),
            [
                "1 changed in tests: fid.py",
                "1 added in tests: more.py",
                "1 removed in tests: run_test.py",
                "1 links in tests: eval_test.py",
                "20 removed in data/train: 000.png, 001.png, 002.png, 003.png, 004.png, ...",
            ],
        )

    def test_only_regular_files_are_taken(self):
        (self.folder / "vae_lib.py").unlink()
        (self.folder / "decoder.pth").rename(self.folder / "elsewhere.pth")
        (self.folder / "decoder.pth").symlink_to(self.folder / "elsewhere.pth")
        work = self.folder.parent / "work"
        missing = grade.prepare(self.folder, work)
        self.assertEqual([text.split()[0] for text in missing], ["vae_lib.py", "decoder.pth"])
        found = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}
        images = {f"data/train/{i:03d}.png" for i in range(20)}
        self.assertEqual(found, images | set(grade.TAKEN) - {"vae_lib.py", "decoder.pth"})

    def test_images_and_script_may_be_links(self):
        other = self.copy_with("more.txt", "")
        (other / "data").rename(other / "elsewhere")
        (other / "data").symlink_to("elsewhere")
        (other / "elsewhere" / "train" / "000.png").rename(other / "0.png")
        (other / "elsewhere" / "train" / "000.png").symlink_to(other / "0.png")
        link = self.folder.parent / "tests"
        link.mkdir()
        (link / "grade.py").symlink_to(other / "tests" / "grade.py")
        with mock.patch.object(grade, "ROOT", other):
            grade.prepare(self.folder, self.folder.parent / "work")
        images = evaluator.read_folder(self.folder.parent / "work" / "data" / "train")
        self.assertEqual(len(images), 20)
        (self.folder / "vae_lib.py").unlink()
        (other / "tests" / "run_submission.py").write_text("print('STARTED')")
        said, _ = self.start(self.folder.parent).communicate()
        self.assertIn("STARTED", said)

    def test_code_that_changes_the_graders_files_gets_no_figure(self):
        def intrude(script, *_):
            self.assertEqual(script, "run_submission.py")  # nothing is scored afterwards
            (planted / "fid.pyc").write_text("as if it were fid.py")
            return []

        planted = self.clone / "tests" / "__pycache__"
        planted.mkdir()
        self.addCleanup(shutil.rmtree, planted)
        with mock.patch.object(grade, "run", intrude):
            words, passed = grade.grade(self.folder, 60)
        self.assertIn("changed meanwhile", words)
        self.assertFalse(passed)

    def test_a_failing_step_is_named_and_shown(self):
        text = "print('why \\u2212', flush=True)\nraise SystemExit(3)"
        self.assertEqual(self.run_as("run_test.py", text), ["run_test.py failed, see above"])
        self.assertEqual(self.printed.getvalue(), "== run_test.py\n   why \u2212\n")

    @unittest.skipIf(sys.platform == "win32", "no process is killed by a signal there")
    def test_a_killed_step_is_named(self):
        text = "import os\nos.kill(os.getpid(), 9)"
        (problem,) = self.run_as("run_submission.py", text)
        self.assertRegex(problem, "run_submission.py was killed by SIGKILL: .*memory")
        with (
            mock.patch.object(run_test, "ROOT", self.folder / "other"),
            mock.patch.object(run_test, "SUBMISSION", self.folder),
        ):
            (self.folder / "other" / "tests" / "fid.py").write_text(text)
            with self.assertRaisesRegex(ValueError, "fid.py was killed by SIGKILL: .*memory"):
                run_test.score_samples()

    def test_a_step_without_an_end_is_ended(self):
        (problem,) = self.run_as("run_submission.py", LOOP, time_limit=3)
        self.assertEqual(problem, "run_submission.py had not ended after 3 s (--time-limit)")
        self.assertTrue(has_ended(self.started.read_text()))

    @unittest.skipIf(sys.platform == "win32", "there are no signals")
    def test_a_grading_that_is_ended_leaves_nothing_behind(self):
        other = self.copy_with("run_submission.py", LOOP)
        process = self.start(other)
        while not self.started.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
        self.assertEqual(said.splitlines()[-1], "GRADE failed: ended by SIGTERM")
        self.assertEqual(list(self.temporary.iterdir()), [])
        self.assertTrue(has_ended(self.started.read_text()))

    def test_a_mistyped_folder_is_named(self):
        self.folder.rename(self.folder.parent / "another")
        said, status = self.graded()
        self.assertEqual((said, status), ("GRADE failed: submission is no folder\n", 1))
