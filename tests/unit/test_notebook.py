"""Tests of assignment_09.ipynb: as committed, and executed with few epochs in a temporary copy."""

import atexit
import contextlib
import io
import os
import re
import shutil
import tempfile
import unittest
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import torch
from PIL import Image

import plots
import vae_lib
from tests import contract
from tests import fid as evaluator
from tests.grading import read_result
from tests.unit.executed import (
    BESIDE,
    NOTEBOOK,
    ROOT,
    copy_project,
    execute,
    executed_notebook,
    use_cheap_features,
)


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def printed(notebook):
    return "".join(out.text for out in outputs(notebook) if out.output_type == "stream")


def tables(notebook):
    return "".join(out.get("data", {}).get("text/markdown", "") for out in outputs(notebook))


def tiles(path):
    """The 100 images of samples.png, (100, 32, 32) uint8."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    found = []
    for row in range(10):
        for column in range(10):
            top = 6 + 102 * row  # 96 pixels and a border of 6
            left = 6 + 102 * column
            found.append(pixels[top : top + 96 : 3, left : left + 96 : 3])
    return np.stack(found)


class CommittedTest(unittest.TestCase):
    """The file in the repository."""

    def test_executed_from_top_to_bottom_and_clean(self):
        notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        counts = [cell.execution_count for cell in code]
        self.assertEqual(counts, list(range(1, len(code) + 1)))
        self.assertNotIn("widgets", notebook.metadata)
        for cell in code:
            self.assertNotIn("execution", cell.metadata)  # timings
        for out in outputs(notebook):
            self.assertIn(out.output_type, ("stream", "display_data", "execute_result"))
            self.assertNotEqual(out.get("name"), "stderr")
            if "image/png" in out.get("data", {}):
                self.assertGreater(len(out.metadata["image/png"]["alt"]), 20)


class CellTest(unittest.TestCase):
    """Cells of the notebook, run out of order as people do."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.images = evaluator.read_folder(ROOT / "data" / "train")[:3]

    def run_cell(self, words, **names):
        """Run the code cell that has these words in it."""
        notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        (source,) = [source for source in code if words in source]
        modules = {"vae_lib": vae_lib, "contract": contract, "evaluator": evaluator, "os": os}
        modules |= {"plots": plots, "torch": torch}
        settings = {"images": self.images, "output_folder": str(self.folder), "seed": 0}
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(source, modules | settings | names)
        return text.getvalue()

    def test_no_epoch_saves_nothing(self):
        names = {"vae": vae_lib.VAE(self.images), "history": [], "mean_image": 25.0}
        with self.assertRaisesRegex(RuntimeError, "no epoch was finished"):
            self.run_cell("vae.eval()  # the training is over", **names)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_all_exports_are_of_one_model(self):
        vae_lib.save(vae_lib.VAE(self.images, seed=1), self.folder)  # of an earlier training
        vae = vae_lib.VAE(self.images, seed=2).requires_grad_(False)
        history = [SimpleNamespace(loss=5.0)]
        names = {"vae": vae, "history": history, "samples": vae.sample(100), "fid": 14.0}
        text = self.run_cell("write_result", features="imagenet", **names)
        self.assertIn("draws the same samples", text)
        self.assertEqual({path.name for path in self.folder.iterdir()}, set(contract.EXPORTS))

    def test_wrong_settings_show_before_the_training(self):
        for wrong in ({"features": "Inception"}, {"features": "imagenet", "seed": None}):
            with self.subTest(**wrong), self.assertRaises((ValueError, TypeError)):
                self.run_cell("contract.check", **wrong)


class ExecutedTest(unittest.TestCase):
    """A copy, executed with 30 epochs, in a folder whose name has a space and an umlaut."""

    @classmethod
    def setUpClass(cls):
        cls.folder, cls.notebook = executed_notebook()
        cls.images = evaluator.read_folder(cls.folder / "data" / "train")
        cls.vae = vae_lib.load(cls.folder)
        cls.real = evaluator.imagenet_features(cls.images)

    def test_result_is_that_of_the_exported_model(self):
        figures, losses = read_result(self.folder / "result.csv")
        samples = self.vae.sample(100, "latin", seed=0)
        fid = evaluator.frechet_distance(self.real, evaluator.imagenet_features(samples))
        self.assertAlmostEqual(figures["FID"], fid, delta=1e-3 * fid)
        told = float(re.search(r"FID (\S+), score", printed(self.notebook))[1])
        self.assertAlmostEqual(told, fid, delta=0.01 + 1e-3 * fid)
        vae = vae_lib.VAE(self.images, seed=0)
        expected = [epoch.loss for epoch in vae_lib.train(vae, self.images, 30)]
        np.testing.assert_allclose(losses, expected, rtol=1e-3)

    def test_figures_are_those_of_model_and_images(self):
        text = printed(self.notebook)
        _, losses = read_result(self.folder / "result.csv")
        mean_image = 0.5 * (self.images - self.images.mean(0)).square().sum((1, 2, 3)).mean()
        self.assertIn(f"\n{mean_image:6.2f}  −ELBO where nothing is learnt", text)
        self.assertEqual("learnt nothing" in text, losses[-1] >= mean_image)
        distance, _ = evaluator.nearest(self.vae.sample(100), self.images)
        self.assertIn(f"\n{(distance < 1).sum()} of 100 samples are copies\n", text)
        ours = float(re.search(r"(\S+)  −ELBO of our model", text)[1])
        self.assertAlmostEqual(ours / losses[-1], 1, delta=0.03)
        evidence = float(re.search(r"training images: −log p\(x\) (\S+) nats", text)[1])
        self.assertTrue(0 < evidence < ours, (evidence, ours))
        mean, worst = re.search(r"nats: mean (\S+), worst (\S+) \(", text).groups()
        self.assertLess(float(mean), float(worst))

    def test_picture_shows_the_samples_in_order(self):
        samples = self.vae.sample(100, "latin", seed=0)
        expected = 255 * samples.squeeze(1).numpy()  # (100, 32, 32)
        difference = np.abs(tiles(self.folder / "samples.png") - expected)
        self.assertLessEqual(difference.max(), 1)

    def test_card_judges_what_it_names(self):
        sets = {"reconstructions": self.vae.reconstruct(self.images)}
        if (self.folder / "data" / "holdout").is_dir():
            sets["holdout"] = evaluator.read_folder(self.folder / "data" / "holdout")
        for name, images in sets.items():
            fid = evaluator.frechet_distance(self.real, evaluator.imagenet_features(images))
            self.assertRegex(tables(self.notebook), rf"\| {name}.* \| {fid:.1f} \|")
        row = re.search(r"\| samples \| (\S+) ± ", tables(self.notebook))
        draws = [self.vae.sample(100, seed=seed) for seed in (1000, 1001)]
        fids = [evaluator.frechet_distance(self.real, evaluator.extract(x)) for x in draws]
        self.assertAlmostEqual(float(row[1]), np.mean(fids), delta=0.5)


@lru_cache(maxsize=1)
def other_settings():
    """A notebook executed with other settings: seven images of another subject, no holdout, two
    latent dimensions, independent draws, training stopped by hand, another folder for the files,
    and features that cost nothing. This folder, and a future of the notebook."""
    temporary = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = Path(temporary) / "checkout"
    folder.mkdir()
    output = Path(temporary) / "output" / "new"
    copy_project(folder)
    shutil.rmtree(folder / "data")
    (folder / "data" / "train").mkdir(parents=True)
    y, x = np.mgrid[:32, :32]
    for i, place in enumerate((0, 0, 1, 2, 3, 4, 5)):  # dark discs on white, two the same
        grey = 255 - 255 / (1 + np.exp(np.hypot(x - 8 - 2 * place, y - 16) - 5))
        picture = Image.fromarray(grey.astype(np.uint8))
        picture.save(folder / "data" / "train" / f"{i}.png")
    with open(folder / "vae_lib.py", "a", encoding="utf-8") as file:
        file.write(
            "\n\ndef interrupted(*arguments, original=train, **options):\n"
            "    for epoch, losses in enumerate(original(*arguments, **options)):\n"
            "        if epoch == 20:\n"
            "            raise KeyboardInterrupt\n"
            "        yield losses\n\n\ntrain = interrupted\n"
        )
    use_cheap_features(folder)
    changes = [
        ("vae = vae_lib.VAE(images)  #", "vae = vae_lib.VAE(images, latent_dim=2)  #"),
        ("vae.sample(100, seed=seed)\n", 'vae.sample(100, "iid", seed)\n'),
    ]
    return output, BESIDE.submit(execute, folder, 1000, changes, output)


def load_tests(_loader, tests, _pattern):
    """Let that notebook run beside the tests of other files."""
    other_settings()
    return tests


class OtherSettingsTest(unittest.TestCase):
    def test_runs_to_the_end(self):
        output, notebook = other_settings()
        notebook = notebook.result()
        self.assertEqual({path.name for path in output.iterdir()}, set(contract.EXPORTS))
        self.assertIn("Stopped by hand", printed(notebook))
        self.assertIn("Only 6 of them differ", printed(notebook))
        self.assertIn("no holdout", tables(notebook))
        self.assertIn("draws the same samples", printed(notebook))
        self.assertEqual(len(read_result(output / "result.csv")[1]), 20)
        self.assertEqual(len(vae_lib.load(output).latent.prior_mu), 2)
