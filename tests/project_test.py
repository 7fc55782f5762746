"""Tests of what surrounds the code: requirements, workflows, protected files, README."""

import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import yaml

from tests import protected
from tests.run_test import read_result

ROOT = Path(__file__).resolve().parent.parent


class EnvironmentTest(unittest.TestCase):
    def test_conda_takes_everything_from_requirements(self):
        environment = yaml.safe_load((ROOT / "environment.yml").read_text())
        self.assertEqual(environment["channels"], ["conda-forge"])
        python, pip, through_pip = environment["dependencies"]
        self.assertEqual((python, pip), ("python>=3.11", "pip"))
        self.assertEqual(through_pip, {"pip": ["-r requirements.txt"]})

    def test_every_requirement_is_pinned_or_has_two_bounds(self):
        for name in ("requirements.txt", "requirements-dev.txt"):
            for line in (ROOT / name).read_text().splitlines():
                self.assertRegex(line, r"^[a-z0-9-]+(==[\d.]+|>=\d[\d.]*,<\d[\d.]*)$")

    def test_the_assignments_packages_are_there(self):
        named = re.findall(r"^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.M)
        wanted = "torch torchvision numpy scipy matplotlib ipywidgets nbconvert jupyter"
        self.assertLessEqual(set(wanted.split()), set(named))


class WorkflowTest(unittest.TestCase):
    def test_published_schema(self):
        files = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
        self.assertEqual([Path(file).name for file in files], ["grade.yml", "tests.yml"])
        command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files]
        run = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False
        )
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_least_permissions_and_pinned_actions(self):
        for file in (ROOT / ".github" / "workflows").glob("*.yml"):
            workflow = yaml.safe_load(file.read_text())
            self.assertEqual(workflow["permissions"], {"contents": "read"})
            for job in workflow["jobs"].values():
                for action in (step["uses"] for step in job["steps"] if "uses" in step):
                    self.assertRegex(action, r"^actions/[a-z-]+@v\d+$")

    def test_grader_takes_its_evaluator_from_the_base_branch(self):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "grade.yml").read_text())
        self.assertIn("pull_request_target", workflow[True])  # YAML reads the key `on` as true
        steps = workflow["jobs"]["grade"]["steps"]
        self.assertEqual(steps[0]["with"]["path"], "base")
        self.assertNotIn("ref", steps[0]["with"])
        text = "\n".join(step.get("run", "") for step in steps)
        self.assertIn("--root submission --list base/.github/protected.sha256", text)
        self.assertIn("cp -R base/tests submission/tests", text)


class ProtectedTest(unittest.TestCase):
    def test_list_is_up_to_date(self):
        found = protected.differences(ROOT, ROOT / protected.LIST)
        self.assertEqual(found, [], "maintainers: python -m tests.protected --renew")

    def test_names_each_difference(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "tests").mkdir()
            (root / ".github" / "workflows").mkdir(parents=True)
            for name in ("kept.py", "changed.py", "removed.py"):
                (root / "tests" / name).write_text(name)
            arguments = ["--root", folder, "--list", str(root / "list")]
            with mock.patch("sys.stdout"):
                protected.main([*arguments, "--renew"])
                protected.main(arguments)  # no difference, no error
            (root / "tests" / "changed.py").write_text("return 0")
            (root / "tests" / "removed.py").unlink()
            (root / ".github" / "workflows" / "added.yml").write_text("")
            with self.assertRaises(SystemExit) as raised:
                protected.main(arguments)
            message = str(raised.exception)
            self.assertIn("tests/changed.py was changed", message)
            self.assertIn("tests/removed.py was removed", message)
            self.assertIn(".github/workflows/added.yml was added", message)
            self.assertNotIn("kept.py", message)


class PrepareTest(unittest.TestCase):
    @unittest.skipIf(sys.platform == "win32", "a shell script")
    def test_clears_from_any_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "with space"
            (root / "tests").mkdir(parents=True)
            (root / "data" / "sample").mkdir(parents=True)
            (root / "data" / "sample" / "old.png").write_text("")
            (root / "result_autograding.csv").write_text("")
            script = root / "tests" / "prepare_test.sh"
            script.write_text((ROOT / "tests" / "prepare_test.sh").read_text())
            for _ in range(2):
                subprocess.run(["sh", str(script)], cwd="/", check=True)
                self.assertEqual(list((root / "data" / "sample").iterdir()), [])
                self.assertFalse((root / "result_autograding.csv").exists())


class ReadmeTest(unittest.TestCase):
    def setUp(self):
        self.text = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_links_and_pictures_exist(self):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", self.text):
            self.assertTrue((ROOT / target).exists(), target)

    def test_one_page_with_two_commands(self):
        self.assertLessEqual(len(self.text.split()), 1200)
        for name in ("run", "test"):
            found = re.findall(rf"<!-- command:{name} -->\n```sh\n(.+?)\n```", self.text, re.S)
            self.assertEqual(len(found), 1)

    def test_figures_are_those_of_the_submission(self):
        figures, _ = read_result(ROOT / "result.csv")
        self.assertIn(f"FID {figures['FID']:.1f}", self.text)
        self.assertIn(f"score {figures['score']:.1f}", self.text)


if __name__ == "__main__":
    unittest.main()
