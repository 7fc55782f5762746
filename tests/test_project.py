"""Tests of what surrounds the code: requirements, workflows, README."""

import csv
import re
import subprocess
import sys
import unittest
from pathlib import Path
from shutil import which

import yaml

from tests.test_data import OTHER_IMAGES

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def requirements(name):
    """The lines of a requirements file, {package: its versions}."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return dict(re.fullmatch(r"([a-z0-9-]+)(.+)", line).groups() for line in lines)


class RequirementsTest(unittest.TestCase):
    def test_each_is_pinned_or_has_two_bounds(self):
        for name in ("requirements.txt", "requirements-dev.txt"):
            for package, versions in requirements(name).items():
                with self.subTest(package):
                    self.assertRegex(versions, r"\A(==[\d.]+|>=[\d.]+,<[\d.]+)\Z")

    def test_lower_bounds_are_the_versions_tried(self):
        lower = {}
        for package, versions in requirements("requirements.txt").items():
            lower[package] = re.match(r"[=>]=([\d.]+)", versions)[1]
        tried = requirements(".github/lowest.txt")
        self.assertEqual(tried, {package: f"=={version}" for package, version in lower.items()})

    def test_the_assignments_packages_are_there(self):
        wanted = "torch torchvision numpy scipy matplotlib ipywidgets nbconvert jupyter"
        self.assertLessEqual(set(wanted.split()), set(requirements("requirements.txt")))

    def test_conda_takes_everything_from_requirements(self):
        environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
        self.assertEqual(environment["channels"], ["conda-forge"])
        python, pip, through_pip = environment["dependencies"]
        self.assertEqual((python, pip), ("python>=3.11", "pip"))
        self.assertEqual(through_pip, {"pip": ["-r requirements.txt"]})


class WorkflowTest(unittest.TestCase):
    def setUp(self):
        self.jobs = {}
        for path in WORKFLOWS:
            workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
            self.assertEqual(workflow["permissions"], {"contents": "read"}, path.name)
            self.jobs |= workflow["jobs"]

    def test_published_schema(self):
        command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
        run = subprocess.run(
            [sys.executable, *command, *map(str, WORKFLOWS)],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_actions_are_pinned_and_leave_no_credentials(self):
        for name, job in self.jobs.items():
            actions = [step for step in job["steps"] if "uses" in step]
            self.assertTrue(actions, name)
            for step in actions:
                self.assertRegex(step["uses"], r"\Aactions/[a-z-]+@v\d+\Z")
                if step["uses"].startswith("actions/checkout"):
                    self.assertIs(step["with"]["persist-credentials"], False)

    def test_lowest_versions_are_tried(self):
        steps = "\n".join(step.get("run", "") for step in self.jobs["lowest"]["steps"])
        self.assertIn("-r requirements.txt", steps)
        self.assertIn("-c .github/lowest.txt", steps)


class CommandTest(unittest.TestCase):
    def test_commands_do_without_docstrings(self):
        """Which `python -OO` strips."""
        for module in ("tests.fid", "tests.protected", "data.make_data"):
            with self.subTest(module):
                command = [sys.executable, "-OO", "-m", module, "--help"]
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


class ReadmeTest(unittest.TestCase):
    def setUp(self):
        self.text = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_links_and_pictures_exist(self):
        for readme in (ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "BENCHMARKS.md"):
            text = readme.read_text(encoding="utf-8")
            for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
                with self.subTest(target, file=readme.name):
                    self.assertTrue((readme.parent / target).exists())

    def test_two_commands_are_marked(self):
        for name in ("run", "test"):
            found = re.findall(rf"<!-- command:{name} -->\n```sh\n(.+?)\n```", self.text, re.S)
            self.assertEqual(len(found), 1, name)

    @unittest.skipIf(OTHER_IMAGES, OTHER_IMAGES)
    def test_figures_are_those_of_the_committed_submission(self):
        command = ["git", "diff", "--quiet", "HEAD", "--", "result.csv"]
        if not which("git") or subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            self.skipTest("result.csv is not the committed one: README.md speaks of that")
        with open(ROOT / "result.csv", newline="", encoding="utf-8") as file:
            figures = {key: float(value) for key, value in csv.reader(file) if key != "loss"}
        for words in (f"FID {figures['FID']:.1f}", f"score .{{0,20}}{figures['score']:.1f}"):
            self.assertRegex(self.text, words, "README.md states other figures than result.csv")


if __name__ == "__main__":
    unittest.main()
