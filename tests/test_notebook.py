"""Tests of assignment_09.ipynb: as committed, and executed in quick mode in a temporary copy."""

import os
import re
import shutil
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
EXPLORER = """
canvas, slider, *_ = explorer().children
before, slider.value = canvas.value, 1.25
assert canvas.value != before, "a slider must change the picture"
"""


def copy_project(folder):
    """A copy of what the notebook needs."""
    for name in ("data/train", "data/holdout"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    for name in ("tests/__init__.py", "tests/fid.py", "vae_lib.py", "assignment_09.ipynb"):
        shutil.copy(ROOT / name, folder / name)


def execute(folder, epochs, extra="", output="."):
    """The notebook executed in `folder`, with one more cell at its end."""
    notebook = nbformat.read(folder / "assignment_09.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(extra))
    environment = {"VAE_EPOCHS": str(epochs), "VAE_OUTPUT": str(output)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("JPY_SESSION_NAME", None)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.config.KernelManager.transport_encryption = "auto"  # without it, a warning
        client.execute()
    notebook.cells.pop()
    if extra:  # its widgets are not the notebook's: headless, that makes none
        notebook.metadata.pop("widgets", None)
    return notebook


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

    def test_executed_from_top_to_bottom_and_clean(self):
        counts = [cell.execution_count for cell in self.code]
        self.assertEqual(counts, list(range(1, len(self.code) + 1)))
        self.assertLess(NOTEBOOK.stat().st_size, 2.5e6)
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
        self.assertLessEqual(len(self.code), 22)
        for cell in self.code:
            self.assertLessEqual(len(cell.source.splitlines()), 20)

    def test_every_picture_has_a_text(self):
        pictures = [o for o in outputs(self.notebook) if "image/png" in o.get("data", {})]
        self.assertGreaterEqual(len(pictures), 6)
        for out in pictures:
            self.assertGreater(len(out.metadata["image/png"]["alt"]), 20)

    def test_exports_equal_what_it_printed(self):
        figures, losses = read_result(ROOT / "result.csv")
        if f"FID {figures['FID']:.2f} " not in printed(self.notebook):
            self.skipTest("the files were exported anew since the notebook was saved")
        self.assertIn(f"score 100 − FID = {figures['score']:.2f}", printed(self.notebook))
        self.assertIn(f"−ELBO {np.mean(losses[-100:]):.2f}", printed(self.notebook))


class ExecutedTest(unittest.TestCase):
    """A copy, executed with 30 epochs, in a folder whose name has a space and an umlaut."""

    def test_files_texts_and_page(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "Übung 09"
            folder.mkdir()
            copy_project(folder)
            notebook = execute(folder, 30, EXPLORER)
            expected = {"data", "tests", "vae_lib.py", "assignment_09.ipynb", *EXPORTS}
            self.assertEqual({path.name for path in folder.iterdir()}, expected)
            figures, losses = read_result(folder / "result.csv")
            self.assertEqual(len(losses), 30)
            self.assertEqual(figures["score"], 100 - figures["FID"])
            with Image.open(folder / "samples.png") as picture:  # the samples, three times as large
                first = np.asarray(picture.convert("L"))[6:102:3, 6:102:3]
            expected = 255 * vae_lib.load(folder).sample(100, seed=0)[0, 0].numpy()
            self.assertLessEqual(np.abs(first - expected).max(), 1)
        for words in ("(100, 1, 32, 32)", "decoder: ", "nats", "imagenet features", "holdout"):
            self.assertIn(words, printed(notebook))
        tables = [out.get("data", {}).get("text/markdown", "") for out in outputs(notebook)]
        self.assertIn("memoriser's floor", "".join(tables))
        self.assertNotIn("stderr", {out.get("name") for out in outputs(notebook)})
        page, _ = HTMLExporter(template_file=str(ROOT / "page.html.j2")).from_notebook_node(
            notebook
        )
        pictures = re.findall(r"<img[^>]*>", page)
        self.assertGreaterEqual(len(pictures), 7)
        for picture in pictures:
            self.assertRegex(picture, r'alt="[^"]{20,}"')
        self.assertEqual(len(re.findall(r'<input [^>]*type="range"', page)), 2)


class OtherImagesTest(unittest.TestCase):
    """Another subject, RGB and 16-bit files, no holdout, training stopped by hand."""

    def test_runs_to_the_end(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder, output = Path(temporary) / "checkout", Path(temporary) / "output"
            folder.mkdir()
            output.mkdir()
            copy_project(folder)
            shutil.rmtree(folder / "data" / "holdout")
            y, x = np.mgrid[:32, :32]
            for i in range(100):  # discs: half of the files RGB, half 16-bit grey
                radius = np.hypot(x - 8 - i % 10 * 1.7, y - 8 - i // 10 * 1.7)
                grey = 255 / (1 + np.exp(radius - 5))
                colour = np.stack([grey] * 3, axis=2).astype(np.uint8)
                picture = Image.fromarray(colour if i % 2 else (257 * grey).astype(np.uint16))
                picture.save(folder / "data" / "train" / f"{i:03d}.png")
            with open(folder / "vae_lib.py", "a") as file:
                file.write(
                    "\n\ndef interrupted(*arguments, original=train, **options):\n"
                    "    for epoch, losses in enumerate(original(*arguments, **options)):\n"
                    "        if epoch == 20:\n"
                    "            raise KeyboardInterrupt\n"
                    "        yield losses\n\n\ntrain = interrupted\n"
                )
            notebook = execute(folder, 1000, output=output)
            self.assertEqual({path.name for path in output.iterdir()}, set(EXPORTS))
            self.assertIn("stopped by hand", printed(notebook))
            self.assertIn("no holdout images", printed(notebook))
            self.assertEqual(len(read_result(output / "result.csv")[1]), 20)
            self.assertNotIn("widgets", notebook.metadata)  # their manager is on the network


if __name__ == "__main__":
    unittest.main()
