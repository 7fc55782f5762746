"""Tests of the students' copy: what is in it, and that other models work in it up to the grade."""

import ast
import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch

from tests import contract
from tests.unit.executed import BESIDE, NOTEBOOK, ROOT, use_cheap_features
from tests.unit.test_grade import module
from tools import hand_out

MODELS = Path(__file__).with_name("models")


def source(path):
    return path.read_text(encoding="utf-8")


def replace(path, *pairs):
    """Change texts of a file, (old, new), each of which occurs once."""
    text = source(path)
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} occurs {text.count(old)} times in {path}, expected 1")
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def bodies(text, names):
    """The numbers of the lines that these definitions do something in, and explain it: all but
    signatures and the first paragraph of docstrings."""
    lines = text.splitlines()
    found = set()
    for name in names:
        for node in ast.walk(hand_out.find(text, name)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                start, end = node.body[0].lineno - 1, node.body[0].end_lineno
                task = lines[start:end].index("") if "" in lines[start:end] else end - start
                found |= set(range(start + task, end))
            if isinstance(node, ast.FunctionDef):
                first = 1 if ast.get_docstring(node) else 0
                found |= set(range(node.body[first].lineno - 1, node.end_lineno))
    return found


def functions(text):
    """The names of a module's functions."""
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def fill(folder, model):
    """Write a model into the stubs of a copy, as a student does."""
    given = source(folder / "vae_lib.py")
    written = source(model)
    for name in hand_out.WRITE:
        lines = given.splitlines()
        node, new = hand_out.find(given, name), hand_out.find(written, name)
        body = written.splitlines()[new.lineno - 1 : new.end_lineno]
        lines[node.lineno - 1 : node.end_lineno] = body
        given = "\n".join(lines) + "\n"
    (folder / "vae_lib.py").write_text(given, encoding="utf-8")


def run(folder, *command):
    """A command's exit status and all that it says."""
    few = {"VAE_EPOCHS": "70", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | few,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    return process.returncode, process.stdout


def make_page(folder):
    return run(folder, "-m", "jupyter", "nbconvert", "--config", "page.py", NOTEBOOK)


class CopyTest(unittest.TestCase):
    """The copy as it is handed out."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name, "copy")
        hand_out.hand_out(cls.folder)
        cls.names = {str(p.relative_to(cls.folder)) for p in cls.folder.rglob("*") if p.is_file()}
        cls.texts = {
            name: source(cls.folder / name) for name in cls.names if not name.endswith(".png")
        }

    def test_no_file_is_a_solution(self):
        self.assertFalse([n for n in self.names if n.startswith(("tests/unit", "tools", ".ci"))])
        written = {"encoder.pth", "latent.pth", "decoder.pth", "result.csv", "samples.png"}
        self.assertFalse(self.names & {*written, "BENCHMARKS.md", ".github/workflows/tests.yml"})
        images = {str(p.relative_to(ROOT)) for p in (ROOT / "data").glob("*/*.png")}
        self.assertLessEqual(images, self.names)
        commands = set(re.findall(r"\btests/\w+\.(?:sh|py)", self.texts["README.md"]))
        self.assertLessEqual(commands, self.names)
        self.assertIn("tests/prepare_test.sh", commands)

    def test_no_line_of_the_solution_is_left(self):
        ours = source(ROOT / "vae_lib.py")
        gone = functions(ours) - functions(self.texts["vae_lib.py"])
        inside = bodies(ours, [*hand_out.WRITE, *gone])
        removed, kept = [], []
        for i, line in enumerate(ours.splitlines()):
            (removed if i in inside else kept).append(line)
        for cell in json.loads(source(ROOT / NOTEBOOK))["cells"]:
            solution = "solution" in cell["metadata"].get("tags", [])
            (removed if solution else kept).extend("".join(cell["source"]).splitlines())
        usual = {"super().__init__()", "with torch.no_grad():"}
        solution = {line.strip() for line in removed if len(line.strip()) > 10} - usual
        solution -= {line.strip() for line in kept}
        self.assertGreater(len(solution), 50)
        given = {line.strip() for text in self.texts.values() for line in text.splitlines()}
        cells = json.loads(self.texts[NOTEBOOK])["cells"]
        given |= {line.strip() for cell in cells for line in "".join(cell["source"]).splitlines()}
        self.assertEqual(given & solution, set())
        self.assertNotIn("marginal", self.texts["vae_lib.py"])
        text = self.texts["vae_lib.py"] + self.texts[NOTEBOOK] + self.texts["README.md"]
        self.assertEqual([name for name in gone if re.search(rf"\b{name}\b", text)], [])

    def test_each_function_that_is_left_is_used(self):
        for name in functions(self.texts["vae_lib.py"]) - set(hand_out.WRITE):
            calls = re.findall(rf"\b{name}\(", self.texts["vae_lib.py"] + self.texts[NOTEBOOK])
            self.assertGreater(len(calls), 1, name)

    def test_notebook_has_no_outputs_and_sections_from_1(self):
        cells = json.loads(self.texts[NOTEBOOK])["cells"]
        for cell in cells:
            self.assertFalse(cell.get("outputs"))
            self.assertIsNone(cell.get("execution_count"))
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
        numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertGreater(len(numbers), 4)

    def test_links_and_pictures_exist(self):
        cells = json.loads(self.texts[NOTEBOOK])["cells"]
        pages = {n: text for n, text in self.texts.items() if n.endswith(".md")}
        pages[NOTEBOOK] = "\n\n".join("".join(cell["source"]) for cell in cells)
        for name, text in pages.items():
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
                with self.subTest(target, file=name):
                    path, _, anchor = target.partition("#")
                    self.assertTrue((self.folder / name).with_name(path or name).exists())
                    self.assertTrue(not anchor or anchor in anchors)

    def test_is_well_formatted(self):
        for command in (["check"], ["format", "--check"]):
            status, said = run(self.folder, "-m", "ruff", *command, "--no-cache")
            self.assertEqual(status, 0, said)

    def test_signatures_and_tasks_stay(self):
        for name in hand_out.WRITE:
            library = source(ROOT / "vae_lib.py").replace(", draws=1)", ")")  # for our training
            ours = hand_out.find(library, name)
            theirs = hand_out.find(self.texts["vae_lib.py"], name)
            task = ast.get_docstring(ours).split("\n\n")[0]
            self.assertEqual(ast.get_docstring(theirs), task)
            functions = [
                [
                    (n.name, ast.unparse(n.args))
                    for n in ast.walk(node)
                    if hasattr(n, "args") and hasattr(n, "name")
                ]
                for node in (ours, theirs)
            ]
            self.assertEqual(*functions)

    def test_readmes_speak_to_students_alone(self):
        for name in ("README.md", "data/README.md"):
            self.assertNotRegex(self.texts[name], "(?m)^## For (instructors|maintainers)")

    def test_stubs_say_what_is_to_be_written(self):
        vae_lib = module(self.texts["vae_lib.py"])
        x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        calls = {
            "Encoder": lambda: vae_lib.VAE(x),
            "Latent.forward": lambda: vae_lib.Latent(1)(x, x),
            "Decoder": lambda: vae_lib.Decoder(x, 1, 2),
            "reconstruction_loss": lambda: vae_lib.reconstruction_loss(x, x),
            "kl_divergence": lambda: vae_lib.kl_divergence(x, x),
            "train": lambda: vae_lib.train(None, x, 1),
        }
        self.assertEqual(set(calls), set(hand_out.WRITE))
        with self.assertRaisesRegex(contract.ContractError, "Encoder in vae_lib.py"):
            contract.check(vae_lib, x)  # as the notebook does, before it trains
        for name, call in calls.items():
            with self.subTest(name), self.assertRaisesRegex(NotImplementedError, f"{name} in vae_"):
                call()

    def test_an_instructor_lets_students_write_less(self):
        x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(hand_out, "WRITE", ("kl_divergence",)):
            vae_lib = module(hand_out.students_library(source(ROOT / "vae_lib.py")))
        with self.assertRaisesRegex(NotImplementedError, "kl_divergence in vae_lib.py"):
            next(vae_lib.train(vae_lib.VAE(x), x, 1))
        vae_lib.kl_divergence = lambda mu, logvar: (logvar.exp() + mu**2 - 1 - logvar) / 2
        self.assertEqual(len(list(vae_lib.train(vae_lib.VAE(x), x, 2))), 2)

    def test_a_folder_with_files_is_refused(self):
        with self.assertRaisesRegex(SystemExit, "not an empty folder"):
            hand_out.hand_out(self.folder)


@lru_cache(maxsize=1)
def filled_copies():
    """Copies in which other models are written, and one as it is handed out, all with features that
    cost nothing; and what comes of them, for which one has to wait: a future of `use`."""
    temporary = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folders = {name: Path(temporary, name) for name in ("unfilled", "mlp", "conv", "ours")}
    for name, folder in folders.items():
        hand_out.hand_out(folder)
        use_cheap_features(folder)
        replace(folder / NOTEBOOK, ("for k in range(10)]", "for k in range(2)]"))
        if name in ("mlp", "conv"):
            fill(folder, MODELS / f"{name}.py")
    shutil.copy(ROOT / "vae_lib.py", folders["ours"])
    replace(folders["conv"] / "vae_lib.py", ("latent_dim=1,", "latent_dim=8,"))
    return folders, BESIDE.submit(use, folders)


def use(folders):
    """Run the notebooks and grade: what was said, {name: (exit status, text)}, {name: grade}."""
    pages = {name: make_page(folder) for name, folder in folders.items()}
    _, said = run(folders["ours"], "tests/grade.py", *folders.values())
    return pages, dict(re.findall(r"^\[\d/4\] (\w+): (GRADE .*)$", said, re.MULTILINE))


def load_tests(_loader, tests, _pattern):
    """Let the copies work beside the tests of other files."""
    filled_copies()
    return tests


class FilledTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folders, used = filled_copies()
        cls.pages, cls.grades = used.result()

    def test_unfilled_copy_says_what_to_write(self):
        for text in (self.pages["unfilled"][1], self.grades["unfilled"]):
            self.assertIn("Encoder in vae_lib.py has to be written", text)

    def test_other_models_are_trained_shown_and_graded(self):
        for name in ("mlp", "conv", "ours"):
            with self.subTest(name):
                status, said = self.pages[name]
                self.assertEqual(status, 0, said)
                self.assertTrue((self.folders[name] / "assignment_09.html").is_file())
                self.assertRegex(self.grades[name], "^GRADE score ")
