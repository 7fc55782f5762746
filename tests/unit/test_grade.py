"""Tests of the grader, on somebody else's model: the contract, the rules, the command."""

import contextlib
import csv
import io
import os
import random
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import types
import unittest
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
from torch.distributions import Normal, kl_divergence

from tests import contract, eval_test, grade, grading, run_test
from tests import fid as evaluator
from tests.unit import stranger
from tests.unit.test_fid import pixels, write_images

SOURCE = Path(stranger.__file__).read_text(encoding="utf-8")
SLEEP = 10**5 + os.getpid()  # seconds: by these, processes that this run left are known

# What a vae_lib.py says, [(what stands in it, what stands there instead, words of the sentence)].
MISTAKES = [
    ("def load(", "def read(", "vae_lib.py has no load(folder)"),
    ("def sample(self, n, seed=0)", "def sample(self, n)", "VAE.sample(self, n) in vae_lib.py has"),
    ("train(vae, images, epochs)", "train(vae, epochs)", "has to take (vae, images, epochs)"),
    ("super().__init__()", "raise NotImplementedError('x')", "VAE.__init__ in vae_lib.py has to"),
    ("    optimiser =", "    raise NotImplementedError\n    optimiser =", "train in vae_lib.py"),
    ("nn.Linear(4, 32)", "nn.Linear(5, 32)", "vae(images) failed in VAE.forward, line 32"),
    ("return self.decoder(z), mu, logvar", "return self.decoder(z)", "expected reconstruction, mu"),
    ("return self.decoder(z), mu, logvar", "return mu, logvar", "returned a tuple of 2, expected"),
    ("Identity()", "Identity(); self.latent.forward = lambda mu, logvar: mu", "draws z with mean"),
    ("nn.Sigmoid()", "nn.Tanh()", "expected them in [0, 1]"),
    ("(1, 32, 32)", "(32, 32)", "expected floats (3, 1, 32, 32)"),
    ("yield Losses(total)", "yield total", "yielded an object of type float"),
    ("yield Losses(total)", "yield {'loss': total}", "yielded an object of type dict"),
    ("yield Losses(total)", "yield loss", "yielded a tensor ()"),
    ("yield Losses(total)", "pass", "returned None"),
    ("yield Losses(total)", "continue\n        yield", "yielded nothing"),
    ("yield Losses(total)", "yield Losses(float('nan'))", "is nan, expected a finite"),
    ("0.5 * (x - x_hat)", "(x - x_hat)", "has learnt nothing: expected ½‖x"),
    ("(x - x_hat).square().sum() / len(x)", "(x - x_hat).square().mean()", "learnt nothing"),
    ("reconstruction + kl", "reconstruction - kl", "is KL's sign wrong?"),
    ("reconstruction + kl", "reconstruction + kl / 4", "the mean of KL over latent dimensions"),
    ("torch.randn(n, 4, ", "torch.randn(n, 3, ", "vae.sample(5, seed=0) failed in VAE.sample"),
    ("self.decoder(torch", "torch.nan * self.decoder(torch", "5, seed=0): its pixels are nan"),
    ("name).state_dict()", "name)", "wrote encoder.pth so that it cannot be loaded without"),
    ('Path(folder, f"{name}.pth"))\n\n', 'f"{name}.pth")\n\n', "wrote no encoder.pth"),
    ("vae = VAE(None)", "vae = VAE()", "load(folder), of what save(vae, folder) wrote, failed"),
    ("PARTS:\n        getattr", "PARTS[1:]:\n        getattr", "returns another model than save("),
]


def blocks():
    """20 images of a white block on black each, no two at the same place."""
    images = torch.zeros(20, 1, 32, 32)
    for i in range(20):
        row, column = divmod(i, 5)
        images[i, 0, 8 * row : 8 * row + 8, 6 * column : 6 * column + 8] = 1
    return images


def module(text):
    found = types.ModuleType("vae_lib")
    found.__file__ = "vae_lib.py"
    exec(compile(text, "vae_lib.py", "exec"), found.__dict__)
    return found


def sleepers():
    """Processes that a submission of these tests has left."""
    found = [process.info for process in psutil.process_iter(["cmdline", "status"])]
    return [x for x in found if str(SLEEP) in (x["cmdline"] or []) and x["status"] != "zombie"]


class ContractTest(unittest.TestCase):
    def setUp(self):
        self.enterContext(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        self.enterContext(contextlib.chdir(self.enterContext(tempfile.TemporaryDirectory())))
        self.addCleanup(lambda: self.assertEqual(os.listdir(), []))

    def test_each_mistake_is_named(self):
        for old, new, words in MISTAKES:
            with self.subTest(new), self.assertRaises(contract.ContractError) as raised:
                self.assertIn(old, SOURCE)
                contract.check(module(SOURCE.replace(old, new)), blocks())
            self.assertIn(words, str(raised.exception))
            self.assertNotIn("\n", str(raised.exception))

    def test_logvar_before_mu_is_named(self):
        text = SOURCE.replace("nn.Dropout(0.1)", "nn.Identity()")
        text = text.replace(
            "return self.decoder(z), mu, logvar", "return self.decoder(z), logvar, mu"
        )
        text = text.replace("x_hat, mu, logvar = vae(x)", "x_hat, logvar, mu = vae(x)")
        with self.assertRaisesRegex(contract.ContractError, "logvar before mu"):
            contract.check(module(text), blocks())

    def test_wrong_draws_are_named(self):
        vae = mock.Mock(latent=torch.nn.Identity())

        def right(logvar):
            return torch.exp(0.5 * logvar)

        def check(deviation, order=1, logvar=1.0):
            """A latent with this deviation, and mu 0 and logvar given to it in this order."""
            mu_logvar = torch.zeros(20, 1), torch.full((20, 1), logvar)
            vae.side_effect = lambda x: (vae.latent(*mu_logvar[::order]), *mu_logvar)
            vae.latent.forward = lambda mu, logvar: mu + deviation(logvar) * torch.randn(mu.shape)
            contract.check_draws(vae, blocks())

        for words, *arguments in (
            ("standard deviation (0.99|1.0).* = 2.72", lambda logvar: 0.5 * logvar),
            ("standard deviation 7.* logvar 2, expected 3 and", torch.exp),
            ("standard deviation 0.00 ", torch.zeros_like),
            ("gives them to Latent.forward in the other", right, -1),
        ):
            with self.subTest(words), self.assertRaisesRegex(contract.ContractError, words):
                check(*arguments)
        check(right)
        check(right, -1, 0.0)  # as mu: no order can be told
        contract.check_draws(torch.nn.Identity(), blocks())  # no part of it draws

    def test_sound_models_pass(self):
        """Batch norm and dropout; an epoch's batch of one; batches that are dropped if too few."""
        for old, new in (
            ("", ""),
            ("images.split(10)", "images.split(10)[: len(images) // 10]"),
            ("Dropout(0.1)", "Dropout(0.5)"),
            ("5e-3", "1e-4"),
            ("        z =", "        mu = 40 * mu\n        z ="),
            ("Identity()", "Identity(); self.latent.forward = lambda mu, sigma: mu"),
        ):
            for seed in range(3):
                torch.manual_seed(seed)
                contract.check(module(SOURCE.replace(old, new)), blocks())

    def test_a_training_yields_as_many_epochs_as_asked_for(self):
        for change in ("- 1", "+ 1"):
            text = SOURCE.replace("range(epochs)", f"range(epochs {change})")
            with self.assertRaisesRegex(contract.ContractError, "yielded [24] losses"):
                contract.train_fresh_model(module(text), blocks(), {"epochs": 3})

    def test_random_states_stay(self):
        for generator in (torch.manual_seed, random.seed, np.random.seed):  # noqa: NPY002
            generator(1)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()  # noqa: NPY002
        contract.check(module(SOURCE), blocks())
        self.assertTrue(torch.equal(torch.get_rng_state(), before[0]))
        self.assertEqual(random.getstate(), before[1])
        self.assertEqual(np.random.get_state()[1].sum(), before[2])  # noqa: NPY002
        draws = []
        for _ in range(2):
            contract.seed_all(2)
            draws.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
        self.assertEqual(*draws)


class GraderTest(unittest.TestCase):
    """Small sets, cheap features, and the submission of a model that has learnt `blocks`."""

    @classmethod
    def setUpClass(cls):
        home = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.enterClassContext(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        cls.made = home / "made"
        cls.made.mkdir()
        (cls.made / "vae_lib.py").write_text(SOURCE, encoding="utf-8")
        vae = stranger.VAE(blocks())
        losses = [epoch.loss for epoch in stranger.train(vae, blocks(), 200)]
        losses[-1] = sum(contract.negative_elbo(vae.eval(), blocks())[:2])
        stranger.save(vae, cls.made)
        write_images(blocks()[:1], cls.made)
        (cls.made / "000.png").rename(cls.made / "samples.png")
        rows = ["FID,20", "FID_imagenet,20", "score,80", *(f"loss,{loss}" for loss in losses)]
        (cls.made / "result.csv").write_text("\n".join(rows))
        cls.train = home / "train"
        write_images(blocks(), cls.train)
        cls.enterClassContext(mock.patch.multiple(grading, SETS=2, SAMPLES=20, EPOCHS=20))
        cls.enterClassContext(mock.patch.object(grading, "TRAIN", cls.train))
        cls.enterClassContext(mock.patch.object(evaluator, "extract", pixels))
        os.environ.pop("FID_FEATURES", None)

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.printed = self.enterContext(contextlib.redirect_stdout(io.StringIO()))

    def submission(self, name="submission", text=SOURCE):
        shutil.copytree(self.made, self.folder / name)
        (self.folder / name / "vae_lib.py").write_text(text, encoding="utf-8")
        return self.folder / name

    def zipped(self, name, prefix="", more=()):
        with zipfile.ZipFile(self.folder / name, "w") as archive:
            for path in self.made.iterdir():
                archive.write(path, f"{prefix}{path.name}")
            for other in more:
                archive.writestr(other, "no submission")
        return self.folder / name


class RulesTest(GraderTest):
    def test_result_is_read_or_its_line_named(self):
        path = self.folder / "result.csv"
        path.write_text("\ufeffFID,20\nFID_imagenet,20\nscore,80\nloss,30\nloss,5\n")
        figures, losses = grading.read_result(path)
        self.assertEqual((figures["FID_imagenet"], figures["score"], losses), (20, 80, [30, 5]))
        for text, words in (
            ("", "no row FID"),
            ("FID,20\nscore;80", "line 2 is 'score;80'"),
            ("FID,nan", "line 1 is 'FID,nan'"),
            ("loss,5,4", "line 1 is 'loss,5,4'"),
            ("x" * 9999, "line 1 is 'xxx"),
        ):
            path.write_text(text)
            with self.subTest(words), self.assertRaisesRegex(ValueError, words) as raised:
                grading.read_result(path)
            self.assertLess(len(str(raised.exception)), 150)

    def test_submissions_as_students_make_them(self):
        self.enterContext(mock.patch.object(grading, "FILE_BYTES", 10**6))
        linked, large = self.submission("linked"), self.submission("large")
        (linked / "decoder.pth").unlink()
        (linked / "decoder.pth").symlink_to(self.made / "decoder.pth")
        os.truncate(large / "decoder.pth", 10**12)  # which no memory holds
        broken = shutil.copy(self.made / "result.csv", self.folder / "broken.zip")
        expected = {path.name: path.read_bytes() for path in self.made.iterdir()}
        for i, (archive, words) in enumerate(
            (
                (self.zipped("top.zip"), None),
                (self.zipped("below.zip", "vae ö/", ["__MACOSX/vae ö/._result.csv"]), None),
                (self.zipped("windows.ZIP", "vae\\"), None),
                (self.zipped("backup.zip", "", ["old/vae_lib.py"]), None),
                (self.zipped("out.zip", "a/", ["../x.py"]), "holds the name ../x.py"),
                (self.zipped("two.zip", "a/", ["b/vae_lib.py"]), "more than one submission, a, b"),
                (self.made / "result.csv", "is no folder and no .zip"),
                (broken, "cannot be unpacked"),
                (linked, "decoder.pth missing"),
                (large, "decoder.pth has more than 1 MB"),
            )
        ):
            work = self.folder / str(i)
            with self.subTest(archive.name):
                if words is None:
                    grading.collect(archive, work)
                    found = {path.name: path.read_bytes() for path in work.iterdir()}
                    self.assertTrue(found == expected)
                else:
                    with self.assertRaisesRegex(ValueError, words):
                        grading.collect(archive, work)

    def test_the_least_that_samples_must_be(self):
        """Nearer than copies of the mean image, and than noise."""
        _, real, _, limit = grading.yardsticks(self.train, "imagenet")
        mean = blocks().mean(0, keepdim=True).repeat(20, 1, 1, 1)
        noise = torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        distances = [evaluator.frechet_distance(real, pixels(x)) for x in (mean, noise)]
        self.assertAlmostEqual(limit / min(distances), 1, delta=0.1)

    def test_the_score_is_of_the_samples(self):
        sample = self.folder / "data" / "sample"
        sets = [0.9 * blocks(), 0.8 * blocks()]  # 0.8 and 1.6 from the training images
        sets[1][15:] = sets[0][15:]
        for name, images in zip(("0", "1", "zeroed"), [*sets, 0 * blocks()], strict=True):
            write_images(images, sample / name)
        grading.yardsticks.cache_clear()
        with (
            mock.patch.dict(os.environ, FID_FEATURES="inception"),
            mock.patch.object(evaluator, "extract", wraps=pixels) as extract,
        ):
            figures = grading.score(self.folder)
        self.assertEqual({call.args[1] for call in extract.mock_calls}, {"inception"})
        drawn = [pixels(evaluator.read_folder(sample / name)) for name in "01"]
        expected = np.mean([evaluator.frechet_distance(pixels(blocks()), x) for x in drawn])
        self.assertAlmostEqual(figures["FID"], expected, delta=1e-3)
        self.assertAlmostEqual(figures["score"], 100 - expected, delta=1e-3)
        self.assertEqual(figures["F"], evaluator.memoriser_fid(pixels(blocks()))[0])
        self.assertEqual((figures["copies"], figures["of"]), (25, 40))
        self.assertTrue(figures["from_decoder"])
        write_images((blocks() + 0.02).clamp(0, 1), sample / "zeroed")
        self.assertFalse(grading.score(self.folder)["from_decoder"])
        write_images(torch.cat(sets), sample / "1")
        with self.assertRaisesRegex(ValueError, "1 holds 40 samples, expected 20"):
            grading.score(self.folder)

    def test_each_rule_has_a_sentence(self):
        fresh = {"before": [30, 1], "after": [9, 5], "losses": [31, 14]}
        outcome = {"samples": True, "loss": 8, "fresh": fresh, "problems": {}}
        figures = {"FID": 22, "limit": 90, "from_decoder": True}

        def verdict(more=(), unlike=(), **rest):
            said = grading.Graded(outcome=outcome | dict(more), figures=figures | dict(unlike))
            return grading.verdict(replace(said, **{"losses": [30, 7]} | rest))

        self.assertEqual(verdict(), [])
        idle = {"before": [30, 1], "after": [30, 1], "losses": [31, 31]}
        free = {"before": [26, 0], "after": [10, 22], "losses": [26, 32]}  # KL is free at first
        self.assertEqual(verdict({"fresh": free}), [])
        wrong = {"before": [26, 0], "after": [25, 16], "losses": [26, 10]}  # its sign is wrong
        for found, words in (
            (verdict({"problems": {"contract": "broken", "samples": "so, too"}}), "broken"),
            (verdict({"problems": {"samples": "failed"}}), "failed"),
            (verdict({}, {"from_decoder": False}), "samples do not come from decoder.pth"),
            (verdict({"loss": 9.8}), "the last loss in result.csv"),
            (verdict({"loss": 4.2}), "the last loss in result.csv"),
            (verdict({"fresh": wrong}), "own defaults, took −ELBO from 26 to 41"),
            (verdict({"fresh": idle}), "own defaults, took −ELBO from 31 to 31"),
            (verdict({}, {"limit": 22}), "no better than 100 copies of the mean image"),
            (verdict(files="x missing"), "x missing"),
            (verdict(result="x falls"), "x falls"),
            (verdict(unscored="one PNG is none"), "one PNG is none"),
        ):
            self.assertEqual(len(found), 1, found)
            self.assertIn(words, found[0])

    def test_files_are_looked_at_before_the_code_runs(self):
        for name, text, words in (
            ("samples.png", "not a picture", "samples.png is no picture"),
            ("result.csv", "FID,20\nscore,80\nloss,4\nloss,5", "2 losses, expected two or more"),
            ("result.csv", "FID;20", "result.csv, line 1 is 'FID;20'"),
            ("result.csv", "FID,20\nscore,80", "0 losses, expected two or more"),
            ("result.csv", None, "result.csv missing"),
        ):
            folder = self.submission(words)
            (folder / name).write_text(text) if text else (folder / name).unlink()
            graded = grading.Graded()
            grading.look_at_files(graded, folder, self.folder / words / "work")
            self.assertIn(words, graded.files + graded.result)

    def test_whatever_the_outcome_holds_is_a_failure(self):
        path = self.folder / "outcome.json"
        path.write_text('{"problems": {"loss": "a\\n\\u001b[1m::b"}, "done": true}')
        self.assertEqual(grading.read_outcome(path, "")["problems"], {"loss": "a ?[1m::b"})
        (self.folder / "link").symlink_to(path)
        found = grading.read_outcome(self.folder / "link", "ended")
        self.assertEqual(found["problems"], {"ended": "ended"})
        for text in ("", "[", "[" * 99999, "{}", "[]", '{"problems": 1}', '{"problems": {}}'):
            path.write_text(text)
            self.assertEqual(grading.read_outcome(path, "ended")["problems"], {"ended": "ended"})

    @torch.no_grad()
    def test_samples_and_loss_are_those_of_the_files(self):
        """By seeds that depend on the weights; and, without the decoder's weights, all grey."""
        vae = stranger.load(self.made).eval()
        self.enterContext(contextlib.chdir(self.submission()))
        self.assertTrue(contract.draw_samples(stranger, blocks(), {"sets": 2, "samples": 20}))
        seeds = contract.sample_seeds(self.made, 2)
        self.assertEqual(len({*seeds, *contract.sample_seeds(self.folder, 2)}), 4)
        expected = [vae.sample(20, seed=seed) for seed in seeds] + [torch.tensor(0.5)]
        for name, images in zip(("0", "1", "zeroed"), expected, strict=True):
            found = evaluator.read_folder(Path("data", "sample", name))
            self.assertLess((found - images).abs().max(), 0.51 / 255, name)
        odd = mock.Mock(sample=lambda n, seed: torch.rand(n, 1, 32, 32))  # no seed of its own
        for folder in ("first", "second"):
            contract.write_samples(stranger, odd, folder, 2, seed=7)
        self.assertTrue(torch.equal(*map(evaluator.read_folder, ("first", "second"))))
        x = blocks().repeat(100, 1, 1, 1)
        x_hat, mu, logvar = vae(x)
        posterior, prior = Normal(mu, (logvar / 2).exp()), Normal(0, 1)
        terms = (x - x_hat).square().sum() / 2, kl_divergence(posterior, prior).sum()
        loss = contract.loss_of_weights(stranger, blocks(), {})
        self.assertAlmostEqual(loss, sum(terms).item() / len(x), delta=1)


class ProcessTest(GraderTest):
    """What a submission's code can do."""

    def run_both(self, text, **options):
        """The outcome and what was printed, with bwrap, where it works, and without."""
        for i, prefix in enumerate({grading.isolation()[0], ()}):
            folder = self.submission(f"submission {i}", text)
            with mock.patch.object(grading, "isolation", lambda prefix=prefix: (prefix, "")):
                yield *grading.run_code(folder, **options), folder

    @unittest.skipUnless(sys.platform == "linux", "what is detached can be found on Linux only")
    def test_what_it_starts_and_prints_ends_with_it(self):
        text = (
            "import subprocess, sys\n"
            f"command = [sys.executable, '-c', 'import time; time.sleep({SLEEP})', '{SLEEP}']\n"
            "subprocess.Popen(command, start_new_session=True)\n"
            "while True: print(9999 * 'x')\n"
        )
        with mock.patch.object(grading, "BYTES", 9_000_000):
            for outcome, printed, _ in self.run_both(text):
                self.assertIn("wrote or printed over 9 MB", outcome["problems"]["ended"])
                self.assertLess(len(printed), 20_001)
                self.assertEqual(sleepers(), [])

    def test_it_sees_its_own_folder_and_no_variable(self):
        """And a process that it starts imports its vae_lib."""
        text = (
            "import os, resource, site, subprocess, sys, tempfile\n"
            "print(sorted(os.environ))\n"
            "print(os.environ['PYTHONPATH'] == os.getcwd() in tempfile.gettempdir())\n"
            "print(site.getuserbase(), resource.getrlimit(resource.RLIMIT_FSIZE)[0])\n"
            "code = 'import vae_lib; print(vae_lib.__file__)'\n"
            "if __name__ == '__main__' or 'CHILD' in os.environ: sys.exit()\n"
            "os.environ['CHILD'] = '1'\n"
            "subprocess.run([sys.executable, '-P', '-c', 'import vae_lib'], cwd='/')\n"
        )
        with mock.patch.dict(os.environ, SECRET="told", PYTHONPATH=":."):
            for outcome, printed, folder in self.run_both(text):
                self.assertNotIn("SECRET", printed)
                self.assertEqual(printed.count("True"), 1, printed)
                self.assertEqual(printed.count("PYTHONPATH"), 2, printed)
                self.assertIn(f"{site.getuserbase()} {grading.BYTES}\n", printed)
                self.assertIn("has no VAE(images)", outcome["problems"]["contract"])
                self.assertTrue((folder / "outcome.json").is_file())

    @unittest.skipUnless(grading.isolation()[0], "bwrap does not work here")
    def test_it_writes_nowhere_else_and_has_no_network(self):
        text = (
            "import socket, pathlib\n"
            f"for path in ({str(self.folder / 'x')!r}, '/tmp/x', {__file__!r}):\n"
            "    try: open(path, 'a'); print('WROTE', path)\n"
            "    except OSError: pass\n"
            "print([name for _, name in socket.if_nameindex()])\n"
        )
        _, printed = grading.run_code(self.submission(text=text))
        self.assertNotIn("WROTE", printed)
        self.assertIn("['lo']", printed)

    def test_what_it_did_before_it_ended_counts(self):
        early = "    sys.exit('x') if epochs == 100 else os._exit(0)\n    optimiser ="
        text = SOURCE.replace("    optimiser =", early)  # 100 is of the contract's check
        outcome, _ = grading.run_code(self.submission(text=f"import os, sys\n{text}"))
        self.assertTrue(outcome["samples"])
        self.assertEqual(outcome["problems"]["contract"], "SystemExit: x")
        self.assertIn("ended early", outcome["problems"]["ended"])

    def test_time_and_bytes_are_limited(self):
        graded = grading.run(self.submission(), self.folder / "work", time_limit=0.2)
        self.assertIn("had not ended after 0.2 s", graded.outcome["problems"]["ended"])
        with mock.patch.object(grading, "BYTES", 1000):  # fewer than its files have
            outcome, _ = grading.run_code(self.folder / "submission")
        self.assertIn("wrote or printed over 0 MB", outcome["problems"]["ended"])

    def test_where_bwrap_does_not_work_the_report_says_so(self):
        for found in (None, shutil.which("false")):
            with mock.patch("shutil.which", return_value=found):
                prefix, said = grading.isolation.__wrapped__()
            self.assertEqual((prefix, said[:12]), ((), "NOT ISOLATED"))


class CommandTest(GraderTest):
    def test_a_class(self):
        """A row each, in one run; names as students give them; what looks images up is named."""
        lookup = SOURCE + (
            "\n\nVAE.sample = lambda self, n, seed=0: torch.arange(n * 1024).view(n, 1, 32, 32)"
            ".remainder(7 + seed % 11 + torch.arange(n).view(n, 1, 1, 1)) / 40\n"
        )
        without = self.submission("=without decoder")
        (without / "decoder.pth").unlink()
        paths = [
            self.zipped("Zoë (1).zip", "vae/", ["__MACOSX/vae/._vae_lib.py"]),
            without,
            self.submission("looked up", lookup),
            self.folder / "mistyped",
        ]
        temporary = self.folder / "temporary"
        temporary.mkdir()
        with (
            open(self.folder / "grades.csv", "w", encoding="utf-8-sig", newline="") as table,
            mock.patch.object(tempfile, "tempdir", str(temporary)),
        ):
            self.assertFalse(grade.grade_all(paths, 300, table))
        self.assertEqual(list(temporary.iterdir()), [])
        with open(self.folder / "grades.csv", encoding="utf-8-sig", newline="") as table:
            rows = list(csv.DictReader(table))
        found = [(row["submission"], row["grade"]) for row in rows]
        self.assertEqual(found[0], ("Zoë (1)", "passed"), rows)
        names = ["'=without decoder", "looked up", "mistyped"]
        self.assertEqual(found[1:], [(name, "failed") for name in names])
        for row, words in zip(
            rows[1:],
            ("decoder.pth missing", "not come from decoder", "no folder"),
            strict=True,
        ):
            self.assertIn(words, row["reason"])
        said = self.printed.getvalue().splitlines()
        self.assertEqual(len(said), 4)
        self.assertRegex(said[0], r"\[1/4\] Zoë \(1\): GRADE score .* of 40 samples are copies\)")

    def test_a_row_whatever_happens(self):
        table = self.folder / "grades.csv"
        forged = "open('outcome.json', 'w').write('{\"problems\": {\"contract\": \"=1+1\"}}')\n"
        with open(table, "w", encoding="utf-8") as file:
            text = f"{forged}import os\nprint('```\\n::warning::x', flush=True)\nos._exit(0)"
            grade.grade_all([self.submission(text=text)], 99, file)
        self.assertIn(",'=1+1", table.read_text())  # no formula
        report = (self.folder / "submission.txt").read_text(encoding="utf-8")
        self.assertIn("\n   | ```\n   | ::warning::x\n", report)
        odd = mock.patch.object(grading, "run", side_effect=RuntimeError("odd"))
        with odd, contextlib.redirect_stderr(io.StringIO()), open(table, "w") as file:
            self.assertFalse(grade.grade_all([self.made], 9, file))
        self.assertIn("made,failed,,,,,grading it failed (RuntimeError: odd)", table.read_text())

    def test_one_that_failed_is_enough(self):
        """And the first row is there when the second submission is graded."""
        table = self.folder / "grades.csv"
        command = ["grade.py", "a", "b", "--time-limit", "9", "--csv", str(table)]
        rows = []

        def reports(grades):
            for found in grades:
                rows.append(len(table.read_text().splitlines()))
                yield ["GRADE"], {"grade": found, "reason": ""}

        for grades in (["passed", "passed"], ["failed", "passed"], ["passed", "failed"]):
            with (
                mock.patch.multiple(sys, argv=command, stdout=mock.DEFAULT),
                mock.patch("signal.signal"),
                mock.patch.multiple(grading, run=mock.DEFAULT, finish=mock.DEFAULT) as replaced,
                mock.patch.object(grade, "report", side_effect=reports(grades)),
            ):
                self.assertEqual(grade.main(), int("failed" in grades), grades)
            self.assertEqual(replaced["run"].call_args.args[2], 9)  # seconds
        self.assertEqual(rows[1::2], [2, 2, 2])

    def test_report_and_row_hold_the_figures(self):
        figures = {"FID": 30, "score": 70, "F": 20, "limit": 90, "features": "imagenet"}
        figures |= {"copies": 3, "of": 40, "from_decoder": True}
        lines, row = grade.report(self.made, grading.Graded(figures=figures))
        found = [row[column] for column in ("score", "FID", "F", "copies")]
        self.assertEqual(found, ["70.0", "30.0", "1.50", 3])
        words = "score 70.0 (FID 30.0, 1.50 F, imagenet features, 3 of 40 samples are copies)"
        self.assertEqual(lines, [grading.isolation()[1], f"GRADE {words}"])
        _, row = grade.report(self.made, grading.Graded())
        self.assertEqual(row["grade"], "failed")

    def test_the_report_has_the_last_lines_that_were_printed(self):
        printed = "\n".join(f"line {i}\x1b" for i in range(300))
        lines, _ = grade.report(self.made, grading.Graded(log=printed))
        self.assertIn("   | line 299?", lines)
        self.assertNotIn("   | line 0?", lines)

    def test_two_of_one_name(self):
        paths = [Path("a/x.zip"), Path("b/x.zip"), Path("y.zip")]
        self.assertEqual(grade.names_of(paths), ["a/x.zip", "b/x.zip", "y"])

    def test_differences_are_named_where_they_are_suspicious(self):
        self.assertEqual(grade.differences(self.submission()), [])
        (self.folder / "submission" / "tests").mkdir()
        for name in ("fid.py", "more.py", ".DS_Store"):
            (self.folder / "submission" / "tests" / name).write_text("mine")
        expected = ["changed and not used: fid.py", "added and not used: more.py"]
        self.assertEqual(grade.differences(self.folder / "submission"), expected)

    def test_a_grading_that_is_ended_leaves_nothing_behind(self):
        text = (
            "import subprocess, sys\n"
            f"subprocess.run([sys.executable, '-c', 'import time; time.sleep({SLEEP})', '{SLEEP}'])"
        )
        (self.folder / "temporary").mkdir()
        command = [sys.executable, grade.__file__, self.submission(text=text)]
        variables = os.environ | {"TMPDIR": str(self.folder / "temporary")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
        while not sleepers() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        self.assertEqual(said.splitlines()[-1], "GRADE failed: ended by SIGTERM")
        self.assertEqual(list((self.folder / "temporary").iterdir()), [])
        self.assertEqual(sleepers(), [])

    def test_a_student_sees_the_same(self):
        """run_test.py and eval_test.py in the student's own folder."""
        folder = self.submission()
        (folder / "data" / "train").mkdir(parents=True)
        (folder / "tests").mkdir()
        prepare = shutil.copy(grading.ROOT / "tests" / "prepare_test.sh", folder / "tests")
        before = set(folder.rglob("*"))
        self.enterContext(mock.patch.object(grading, "ROOT", folder))
        self.enterContext(mock.patch.object(run_test, "RESULT", folder / "result_autograding.csv"))
        self.enterContext(mock.patch.object(run_test, "SAMPLE", folder / "data" / "sample"))

        def failures(case):
            suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
            result = unittest.TextTestRunner(io.StringIO()).run(suite)
            return result.errors + result.failures

        self.assertEqual(failures(run_test.RunTest), [])
        self.assertEqual(failures(eval_test.EvalTest), [])
        sets = [evaluator.read_folder(folder / "data" / "sample" / name) for name in "01"]
        self.assertEqual([len(drawn) for drawn in sets], [20, 20])
        self.assertFalse(torch.equal(*sets))
        self.assertRegex(self.printed.getvalue(), r"score \S+ \(FID .* F, imagenet features")
        names = [rule.__name__ for rule in grading.CHECKS]
        with (
            mock.patch.object(run_test.RunTest, "setUpClass"),
            mock.patch.multiple(grading, **{name: lambda _, name=name: name for name in names}),
        ):
            failed = failures(run_test.RunTest) + failures(eval_test.EvalTest)
        self.assertEqual([text.split()[-1] for _, text in failed], names)
        os.utime(folder / "decoder.pth", (time.time() + 9, time.time() + 9))
        self.assertIn("is older than", failures(eval_test.EvalTest)[0][1])
        subprocess.run(["sh", prepare], check=True)
        self.assertEqual(set(folder.rglob("*")), before | {folder / "data" / "sample"})
