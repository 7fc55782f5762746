"""Tests of assignment_09.ipynb: as committed, and executed in quick mode in a temporary copy."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image

import vae_lib
from tests.run_test import read_result

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "assignment_09.ipynb"
EXPORTS = (*vae_lib.WEIGHTS, "result.csv", "samples.png")
CALLBACKS = """
box, parts = explorer()
canvas, walk = parts["canvas"], parts["walk"]
before = canvas.value
parts["z1"].value = 1.25
assert canvas.value != before, "a slider must change the picture"
before = canvas.value
parts["random"].click()
assert canvas.value != before, "the random button must change the picture"
for walk.value, end in ((1.0, second), (0.0, first)):
    expected = picture_of(vae.reconstruct(images[[end]]))
    assert canvas.value == expected, "the walk's ends are the two reconstructions"
"""


def copy_project(folder):
    """A copy of what the notebook needs."""
    shutil.copytree(ROOT / "data" / "train", folder / "data" / "train")
    shutil.copytree(ROOT / "data" / "holdout", folder / "data" / "holdout")
    (folder / "tests").mkdir()
    for name in ("__init__.py", "fid.py", "digit_features.pth"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    for name in ("vae_lib.py", "assignment_09.ipynb"):
        shutil.copy(ROOT / name, folder)


def execute(folder, epochs, extra="", output="."):
    """The notebook executed in `folder`, with one more cell at its end."""
    notebook = nbformat.read(folder / "assignment_09.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(extra))
    environment = {"VAE_EPOCHS": str(epochs), "VAE_OUTPUT": str(output)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("JPY_SESSION_NAME", None)
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
        client.execute()
    notebook.cells.pop()
    if extra:  # its widgets are not the notebook's: headless, that makes none
        notebook.metadata.pop("widgets", None)
    return notebook


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def printed(notebook):
    return "".join(out.text for out in outputs(notebook) if out.output_type == "stream")


class CommittedTest(unittest.TestCase):
    """The file in the repository."""

    @classmethod
    def setUpClass(cls):
        cls.notebook = nbformat.read(NOTEBOOK, as_version=4)
        cls.code = [cell for cell in cls.notebook.cells if cell.cell_type == "code"]

    def test_executed_from_top_to_bottom(self):
        counts = [cell.execution_count for cell in self.code]
        self.assertEqual(counts, list(range(1, len(self.code) + 1)))

    def test_clean(self):
        self.assertLess(NOTEBOOK.stat().st_size, 1.5e6)
        self.assertEqual(self.notebook.metadata.kernelspec.name, "python3")
        self.assertNotIn("widgets", self.notebook.metadata)
        for cell in self.code:
            self.assertNotIn("execution", cell.metadata)  # timings
        for out in outputs(self.notebook):
            self.assertIn(out.output_type, ("stream", "display_data", "execute_result"))
            self.assertNotEqual(out.get("name"), "stderr")
            self.assertNotIn("application/vnd.jupyter.widget-view+json", out.get("data", {}))

    def test_readable(self):
        prose = [c.source for c in self.notebook.cells if c.cell_type == "markdown"]
        self.assertTrue(600 <= sum(len(text.split()) for text in prose) <= 900)
        for cell in self.code:
            self.assertLessEqual(len(cell.source.splitlines()), 20)

    def test_every_picture_once_and_with_a_text(self):
        pictures = [o for o in outputs(self.notebook) if "image/png" in o.get("data", {})]
        self.assertGreaterEqual(len(pictures), 6)
        self.assertEqual(len({o.data["image/png"] for o in pictures}), len(pictures))
        for out in pictures:
            self.assertGreater(len(out.metadata["image/png"]["alt"]), 20)

    def test_exports_equal_what_it_printed(self):
        figures, losses = read_result(ROOT / "result.csv")
        if f"checksum {figures['checksum']:.0f}" not in printed(self.notebook):
            self.skipTest("the files were exported anew since the notebook was saved")
        self.assertIn(f"FID {figures['FID']:.2f}", printed(self.notebook))
        self.assertIn(f"−ELBO {losses[-1]:.2f}", printed(self.notebook))
        self.assertEqual(vae_lib.checksum(ROOT), figures["checksum"])


class ExecutedTest(unittest.TestCase):
    """A copy, executed with 30 epochs, in a folder whose name has a space and an umlaut."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = Path(cls.temporary.name) / "Übung 09"
        cls.folder.mkdir()
        copy_project(cls.folder)
        cls.notebook = execute(cls.folder, 30, CALLBACKS)  # fails if a callback does

    def test_five_files(self):
        for name in EXPORTS:
            self.assertTrue((self.folder / name).is_file(), name)
        figures, losses = read_result(self.folder / "result.csv")
        self.assertEqual(len(losses), 30)
        self.assertEqual(figures["score"], 100 - figures["FID"])
        self.assertEqual(figures["checksum"], vae_lib.checksum(self.folder))
        self.assertEqual(vae_lib.load(self.folder).sample(3).shape, (3, 1, 32, 32))

    def test_nothing_else_is_written(self):
        expected = {"data", "tests", "vae_lib.py", "assignment_09.ipynb", *EXPORTS}
        self.assertEqual({path.name for path in self.folder.iterdir()}, expected)

    def test_texts(self):
        text = printed(self.notebook)
        for words in ("(100, 1, 32, 32)", "decoder: 272,320 parameters", "nats", "FID", "holdout"):
            self.assertIn(words, text)
        shown = [out.get("data", {}) for out in outputs(self.notebook)]
        (table,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
        self.assertIn("memoriser's floor", table)
        self.assertNotIn("stderr", {out.get("name") for out in outputs(self.notebook)})

    def test_page(self):
        page, _ = HTMLExporter().from_notebook_node(self.notebook)
        pictures = re.findall(r"<img[^>]*>", page)
        self.assertGreaterEqual(len(pictures), 7)
        for picture in pictures:
            self.assertRegex(picture, r'alt="[^"]{20,}"')
            self.assertRegex(picture, r'src="(data:image/png;base64,|samples\.png)')
        for broken in ("No description has been provided", '<script type="application/vnd.jup'):
            self.assertFalse(broken in page, broken)  # assertNotIn would print the page


class OtherImagesTest(unittest.TestCase):
    """Another subject, RGB and 16-bit files, no holdout, training stopped by hand; a checkout that
    is read-only (which does not stop root, so its files are compared, too), files elsewhere."""

    def test_runs_to_the_end(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder, output = Path(temporary) / "checkout", Path(temporary) / "output"
            folder.mkdir()
            output.mkdir()
            copy_project(folder)
            shutil.rmtree(folder / "data" / "holdout")
            self.write_images(folder / "data" / "train")
            with open(folder / "vae_lib.py", "a") as file:
                file.write(
                    "\n\ndef interrupted(*arguments, original=train, **options):\n"
                    "    for epoch, losses in enumerate(original(*arguments, **options)):\n"
                    "        if epoch == 20:\n"
                    "            raise KeyboardInterrupt\n"
                    "        yield losses\n\n\ntrain = interrupted\n"
                )
            before, places = contents(folder), [folder, *folder.rglob("*")]
            for place in places:
                place.chmod(place.stat().st_mode & ~0o222)
            try:
                notebook = execute(folder, 1000, output=output)
            finally:
                for place in places:
                    place.chmod(place.stat().st_mode | 0o200)
            self.assertEqual(contents(folder), before)
            self.assertEqual({path.name for path in output.iterdir()}, set(EXPORTS))
            self.assertIn("stopped by hand", printed(notebook))
            self.assertIn("no holdout images", printed(notebook))
            self.assertNotIn("widgets", notebook.metadata)
            _, losses = read_result(output / "result.csv")
            self.assertEqual(len(losses), 20)

    def write_images(self, folder):
        """100 discs: half of the files RGB, half 16-bit grey."""
        y, x = np.mgrid[:32, :32]
        for i in range(100):
            radius = np.hypot(x - 8 - i % 10 * 1.7, y - 8 - i // 10 * 1.7)
            grey = 255 / (1 + np.exp(radius - 5))
            if i % 2:
                image = Image.fromarray(np.stack([grey.astype(np.uint8)] * 3, axis=2))
            else:
                image = Image.fromarray((257 * grey).astype(np.uint16))
            image.save(folder / f"{i:03d}.png")


class ElsewhereTest(unittest.TestCase):
    """Started in a wrong folder, or without images."""

    def first_cell(self, folder):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        run = subprocess.run(
            [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False
        )
        self.assertNotEqual(run.returncode, 0)
        return run.stderr.splitlines()[-1]

    def test_one_clear_sentence(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertIn("start in the repository's folder", self.first_cell(folder))
            copy_project(Path(folder))
            shutil.rmtree(Path(folder) / "data" / "train")
            self.assertIn("data/train", self.first_cell(folder))


if __name__ == "__main__":
    unittest.main()
