"""Tests of assignment_09.ipynb: as committed, and executed with few epochs in a temporary copy."""

import os
import re
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from PIL import Image

import vae_lib
from tests import fid as evaluator
from tests.eval_test import read_result

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "assignment_09.ipynb"
EXPORTS = {*vae_lib.WEIGHTS, "result.csv", "samples.png"}


def copy_project(folder):
    """A copy of what the notebook needs."""
    (folder / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "data" / "train", folder / "data" / "train")
    if (ROOT / "data" / "holdout").is_dir():
        shutil.copytree(ROOT / "data" / "holdout", folder / "data" / "holdout")
    for name in ("tests/__init__.py", "tests/fid.py", "vae_lib.py", "plots.py"):
        shutil.copy(ROOT / name, folder / name)


def execute(folder, epochs, changes=(), output="."):
    """The notebook executed in `folder`, with texts of its code changed: (old, new) pairs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for old, new in changes:
        cells = [cell for cell in notebook.cells if old in cell.source]
        if len(cells) != 1:
            raise ValueError(f"{old!r} occurs in {len(cells)} cells, expected 1")
        cells[0].source = cells[0].source.replace(old, new)
    environment = {"VAE_EPOCHS": str(epochs), "VAE_OUTPUT": str(output)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with mock.patch.dict(os.environ, environment):
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}})
        client.config.KernelManager.transport_encryption = "auto"  # left out, it prints a warning
        client.execute()
    return notebook


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

    def test_every_picture_has_a_text(self):
        pictures = [out for out in outputs(self.notebook) if "image/png" in out.get("data", {})]
        self.assertGreaterEqual(len(pictures), 6)
        for out in pictures:
            self.assertGreater(len(out.metadata["image/png"]["alt"]), 20)

    def test_exports_equal_what_it_printed(self):
        figures, losses = read_result(ROOT / "result.csv")
        if f"FID {figures['FID']:.2f}," not in printed(self.notebook):
            self.skipTest("the files were exported anew since the notebook was saved")
        self.assertIn(f"score 100 − FID = {figures['score']:.2f}", printed(self.notebook))
        self.assertEqual(len(losses), 5000)


class ExecutedTest(unittest.TestCase):
    """A copy, executed with 30 epochs, in a folder whose name has a space and an umlaut."""

    @classmethod
    def setUpClass(cls):
        temporary = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.folder = Path(temporary) / "Übung 09"
        copy_project(cls.folder)
        cls.notebook = execute(cls.folder, 30)
        cls.images = vae_lib.load_images(cls.folder / "data" / "train")
        cls.vae = vae_lib.load(cls.folder)

    def test_writes_the_five_files_and_nothing_else(self):
        expected = EXPORTS | {"data", "tests", "vae_lib.py", "plots.py"}
        self.assertEqual({path.name for path in self.folder.iterdir()}, expected)

    def test_result_is_that_of_the_exported_model(self):
        figures, losses = read_result(self.folder / "result.csv")
        samples = self.vae.sample(100, "latin", seed=0)
        real = evaluator.extract(self.images, "imagenet")
        fid = evaluator.frechet_distance(real, evaluator.extract(samples, "imagenet"))
        self.assertAlmostEqual(figures["FID"], fid, delta=1e-3 * fid)
        told = float(re.search(r"FID (\S+), score", printed(self.notebook))[1])
        self.assertAlmostEqual(told, fid, delta=0.01 + 1e-3 * fid)
        vae = vae_lib.VAE(self.images, seed=0)
        expected = [epoch.loss for epoch in vae_lib.train(vae, self.images, 30)]
        np.testing.assert_allclose(losses, expected, rtol=1e-3)

    def test_picture_shows_the_samples_in_order(self):
        samples = self.vae.sample(100, "latin", seed=0)
        expected = 255 * samples.squeeze(1).numpy()  # (100, 32, 32)
        difference = np.abs(tiles(self.folder / "samples.png") - expected)
        self.assertLessEqual(difference.max(), 1)

    def test_loss_is_set_beside_the_best(self):
        """For the draws that the notebook takes, 100 for each image."""
        mean_image = 0.5 * (self.images - self.images.mean(0)).square().flatten(1).sum(1).mean()
        self.assertIn(f"{mean_image:6.2f}  −ELBO where nothing is learnt", printed(self.notebook))
        with torch.no_grad():
            mu, logvar = self.vae.encoder(self.images)
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
            many = mu.repeat(100, 1), logvar.repeat(100, 1)
            z = self.vae.latent(*many, torch.Generator().manual_seed(0))
            ours = self.vae.decoder(z)
            best = vae_lib.best_decoder(z, mu, logvar, self.images)
        rows = printed(self.notebook).splitlines()
        found = []
        for words, x_hat in (("of our model", ours), ("of the best decoder", best)):
            difference = self.images.repeat(100, 1, 1, 1) - x_hat
            loss = 0.5 * difference.square().flatten(1).sum(1).mean() + kl
            line = next(row for row in rows if words in row)
            found.append(float(line.split()[0]))
            self.assertAlmostEqual(found[-1], loss.item(), delta=0.02)
        if mean_image > 1:
            self.assertGreater(found[0] - found[1], 0.04)  # they can be told apart

    def test_card_judges_what_it_names(self):
        reconstructions = self.vae.reconstruct(self.images)
        sets = {"reconstructions": reconstructions}
        if (self.folder / "data" / "holdout").is_dir():
            sets["holdout"] = vae_lib.load_images(self.folder / "data" / "holdout")
        real = evaluator.extract(self.images, "imagenet")
        rows = tables(self.notebook).splitlines()
        for name, images in sets.items():
            fid = evaluator.frechet_distance(real, evaluator.extract(images, "imagenet"))
            row = next(line for line in rows if line.startswith(f"| {name}"))
            self.assertIn(f"| {fid:.1f} |", row)
        for method in ("latin", "iid"):
            draws = [self.vae.sample(100, method, 1000 + k) for k in range(10)]
            found = [
                evaluator.frechet_distance(real, evaluator.extract(x, "imagenet")) for x in draws
            ]
            self.assertIn(f"| {np.mean(found):.1f} ±", tables(self.notebook))

    def test_nothing_is_left_to_complain(self):
        self.assertNotIn("stderr", {out.get("name") for out in outputs(self.notebook)})
        self.assertNotIn("widgets", self.notebook.metadata)  # headless, nobody can move a slider


class OtherSettingsTest(unittest.TestCase):
    """Seven images of another subject, RGB and 16-bit files, no holdout, two latent dimensions,
    mini-batches, training stopped by hand, another folder for the files; then no training."""

    def test_runs_to_the_end(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "checkout"
            output = Path(temporary) / "output"
            output.mkdir()
            copy_project(folder)
            shutil.rmtree(folder / "data")
            (folder / "data" / "train").mkdir(parents=True)
            y, x = np.mgrid[:32, :32]
            for i in range(7):  # dark discs on white
                radius = np.hypot(x - 8 - 2 * i, y - 16)
                grey = 255 - 255 / (1 + np.exp(radius - 5))
                colour = np.stack([grey] * 3, axis=2).astype(np.uint8)
                picture = Image.fromarray(colour if i % 2 else (257 * grey).astype(np.uint16))
                picture.save(folder / "data" / "train" / f"{i}.png")
            with open(folder / "vae_lib.py", "a") as file:
                file.write(
                    "\n\ndef interrupted(*arguments, original=train, **options):\n"
                    "    for epoch, losses in enumerate(original(*arguments, **options)):\n"
                    "        if epoch == 20:\n"
                    "            raise KeyboardInterrupt\n"
                    "        yield losses\n\n\ntrain = interrupted\n"
                )
            changes = [
                ("latent_dim = 1 ", "latent_dim = 2 "),
                ("batch_size = 100 ", "batch_size = 3 "),
            ]
            notebook = execute(folder, 1000, changes, output)
            self.assertEqual({path.name for path in output.iterdir()}, EXPORTS)
            self.assertIn("Stopped by hand", printed(notebook))
            self.assertIn("no holdout", tables(notebook))
            self.assertEqual(len(read_result(output / "result.csv")[1]), 20)
            vae = vae_lib.load(output)
            self.assertEqual(vae.sample(5).shape, (5, 1, 32, 32))
            self.assertEqual(len(vae.latent.prior_mu), 2)
            before = {path.name: path.read_bytes() for path in output.iterdir()}
            changes.append(("train_anew = True ", "train_anew = False "))
            notebook = execute(folder, 1000, changes, output)
            self.assertIn("not trained here", printed(notebook))
            self.assertEqual({path.name: path.read_bytes() for path in output.iterdir()}, before)


if __name__ == "__main__":
    unittest.main()
