"""Tests of the model and its maths against closed forms, references and known answers."""

import contextlib
import functools
import itertools
import math
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.stats import kstest
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl
from torch.nn.utils import parameters_to_vector as weights
from torch.testing import assert_close

import vae_lib
from vae_lib import VAE, Latent, Losses, kl_divergence, log_likelihood, reconstruction_loss, train

TRAIN = Path(__file__).resolve().parent.parent / "data" / "train"
CONSTANT = 512 * math.log(2 * math.pi)  # −log N(x; x, I) of 1024 pixels


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bars(n=8):
    """Images of one white bar each, at n places."""
    place = torch.arange(32) * n // 32 == torch.arange(n)[:, None]  # (n, 32)
    return place.float().view(n, 1, 1, 32).repeat(1, 1, 32, 1)


def fixed(vae, scale, logvar):
    """Let the encoder give `scale` times its mu, and this logvar."""
    vae.encoder.register_forward_hook(lambda *a: (scale * a[2][0], 0 * a[2][1] + logvar))


class ModelTest(unittest.TestCase):
    def test_formulas(self):
        mu, logvar = 2 * torch.randn(2, 5, 3, generator=seeded(0))
        posterior = Normal(mu, (logvar / 2).exp())
        assert_close(kl_divergence(mu, logvar), reference_kl(posterior, Normal(0, 1)))  # (5, 3)
        x, x_hat = torch.rand(2, 6, 1, 32, 32, generator=seeded(0), dtype=torch.float64)
        expected = -Normal(x_hat, 1).log_prob(x).sum((1, 2, 3)) - CONSTANT  # (6,)
        assert_close(reconstruction_loss(x, x_hat), expected)
        mu, logvar = torch.randn(2, 3, generator=seeded(0)).requires_grad_()
        z = Latent(3)(mu.expand(20_000, 3), logvar.expand(20_000, 3), seeded(1))
        mu_grad, logvar_grad = torch.autograd.grad(z.sum(), (mu, logvar))
        assert_close(mu_grad, torch.full((3,), 20_000.0))
        assert_close(logvar_grad, ((z - mu) / 2).sum(0), rtol=1e-4, atol=0.1)
        epsilon = (z - mu) / (logvar / 2).exp()
        self.assertGreater(kstest(epsilon.detach(), "norm").pvalue.min(), 1e-3)

    def test_starts_from_the_images_and_learns_them(self):
        images = vae_lib.load_images(TRAIN)
        for dim in (1, 2):
            vae = VAE(images, latent_dim=dim)
            mu = vae.encoder(images)[0]
            self.assertLess((vae.sample(100, seed=0) - images.mean(0)).mean(0).abs().mean(), 0.02)
            assert_close(mu.mean(0), torch.zeros(dim), rtol=0, atol=0.15)
            assert_close(mu.std(0, correction=0), torch.ones(dim), rtol=0, atol=0.15)
        first, *_, last = train(VAE(images), images, 300)
        self.assertLess(last.loss, first.loss / 3)

    def test_pixels_reach_0_and_1_and_stay_between(self):
        vae = VAE(bars(), latent_dim=1, hidden=32)
        list(train(vae, bars(), 200))
        extreme = vae.decoder(torch.tensor([[1e4], [-1e4], [-1e30], [1e30]]))
        pixels = torch.cat([vae.sample(100, seed=0), vae.reconstruct(bars()), extreme])
        self.assertEqual((pixels.min(), pixels.max()), (0, 1))

    def test_few_images_and_other_dimensions(self):
        for n, dim in itertools.product((1, 2, 5), (1, 3)):
            with self.subTest(n=n, dim=dim):
                vae = VAE(bars(n), latent_dim=dim, hidden=16)
                first, *_, last = train(vae, bars(n), 100)
                self.assertLess(last.loss, first.loss)
                shapes = [x.shape for x in (*vae(bars(n)), log_likelihood(vae, bars(n)))]
                self.assertEqual(shapes, [(n, 1, 32, 32), (n, dim), (n, dim), (n,)])

    def test_random_state(self):
        """The global one is neither changed nor of effect, and the seed is."""
        found = []
        for state, seed in ((1, 0), (2, 0), (1, 1)):
            before = torch.manual_seed(state).get_state()
            vae = VAE(bars(), seed, hidden=16)
            list(train(vae, bars(), 3, batch_size=3))
            found.append(torch.cat([weights(vae.parameters()), log_likelihood(vae, bars(), 3)]))
            _ = [vae.sample(9, method) for method in ("iid", "sobol", "lattice")]
            self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertTrue(torch.equal(found[0], found[1]))
        self.assertFalse(torch.equal(found[0], found[2]))


class PriorTest(unittest.TestCase):
    KINDS = [(2, "iid"), (2, "sobol"), (2, "lattice"), (2, None), (1, None), (3, None)]

    def test_each_draw_is_standard_normal(self):
        for (dim, method), n in itertools.product(self.KINDS, (1, 7, 100)):
            draws = torch.stack([Latent(dim).sample(n, method, seed) for seed in range(300)])
            for name, z in (("all", draws.flatten(0, 1)), ("last", draws[:, -1])):  # (…, D)
                with self.subTest(dim=dim, method=method, n=n, draws=name):
                    self.assertGreater(kstest(z, "norm").pvalue.min(), 1e-3)

    def test_evenness(self):
        """How far the number of points in a cell (a third of each dimension) varies, against iid;
        and that a point tells nothing of the next, but in a Sobol sequence by design."""
        for dim, method in self.KINDS:
            with self.subTest(dim=dim, method=method):
                z = torch.stack([Latent(dim).sample(100, method, seed) for seed in range(200)])
                cells = (3 * torch.special.ndtr(z)).long() @ 3 ** torch.arange(dim)  # (200, 100)
                counts = torch.stack([(cells == k).sum(1) for k in range(3**dim)])  # (…, 200)
                p = 3.0**-dim
                ratio = (counts - 100 * p).square().mean().item() / (100 * p * (1 - p))
                self.assertTrue(0.9 < ratio < 1.1 if method == "iid" else ratio < 0.35, ratio)
                if method in ("iid", "lattice"):
                    self.assertLess((z[:, 1:] * z[:, :-1]).mean((0, 1)).abs().max(), 0.05)

    def test_seeds_and_methods(self):
        for dim, method in self.KINDS:
            with self.subTest(dim=dim, method=method):
                one, same, *rest = (Latent(dim).sample(9, method, s) for s in (7, 7, 8, None, None))
                self.assertTrue(torch.equal(one, same))
                for a, b in itertools.combinations([one, *rest], 2):
                    self.assertFalse((a == b).any())
        for dim, method in ((2, "halton"), (3, "lattice")):
            self.assertRaisesRegex(ValueError, method, Latent(dim).sample, 5, method)

    def test_samples_are_decoded_draws_from_the_stored_prior(self):
        vae = VAE(latent_dim=2, hidden=16)
        vae.latent.prior_mu += torch.tensor([5.0, -5.0])
        vae.latent.prior_logvar += math.log(4)
        z = vae.latent.sample(1000, "sobol", 0)
        assert_close(z.mean(0), torch.tensor([5.0, -5.0]), rtol=0, atol=0.05)
        assert_close(z.std(0), torch.tensor([2.0, 2.0]), rtol=0, atol=0.05)
        for method in ("iid", "sobol", "lattice", None):
            expected = vae.decoder(vae.latent.sample(20, method, 5))
            self.assertTrue(torch.equal(vae.sample(20, method, 5), expected), method)


class TrainTest(unittest.TestCase):
    def run_of(self, stop=None, **options):
        """The losses of three epochs, and the weights before the first and after each; interrupted
        when the encoder has run (`stop` 0, 2, 4) or in the consumer's loop (1, 3, 5)."""
        vae, losses, ticks = VAE(bars(), hidden=16), [], itertools.count()

        def tick(*_):
            if next(ticks) == stop:
                raise KeyboardInterrupt

        vae.encoder.register_forward_hook(tick)
        states = [weights(vae.parameters())]
        with contextlib.suppress(KeyboardInterrupt):
            for epoch in train(vae, bars(), 3, **options):
                losses.append(epoch)
                states.append(weights(vae.parameters()))
                tick()
        self.assertTrue(torch.equal(weights(vae.parameters()), states[-1]))
        return losses, states

    def test_epochs_in_order(self):
        losses, states = self.run_of()
        self.assertEqual([type(value) for value in losses[0]], [float] * 3)
        self.assertEqual((len(losses), len({state.sum().item() for state in states})), (3, 4))
        self.assertNotEqual(losses, self.run_of(seed=1)[0])
        for stop in range(6):
            with self.subTest(stop=stop):
                found, left = self.run_of(stop)
                self.assertEqual(found, losses[: (stop + 1) // 2])
                self.assertTrue(torch.equal(left[-1], states[len(found)]))

    def test_losses_are_the_elbo(self):
        """Means over images, also where the last batch is smaller: to the digit, run by run, if z
        has hardly any variance; else the mean of 100 runs within four standard errors."""
        images = torch.rand(100, 1, 32, 32, generator=seeded(0))
        images *= torch.linspace(0, 1, 100).view(100, 1, 1, 1)
        for batch_size, logvar in itertools.product((None, 30), (-30.0, -1.0)):
            with self.subTest(batch_size=batch_size, logvar=logvar):
                vae = VAE(images, hidden=32)
                list(train(vae, images, 20))
                fixed(vae, 1, logvar)
                options = {"batch_size": batch_size, "learning_rate": 0.0}
                runs = [next(train(vae, images, 1, seed=s, **options)) for s in range(100)]
                loss, found, kl = torch.tensor(runs, dtype=torch.float64).T  # (100,) each
                assert_close(loss, found + kl)
                mean_kl = kl_divergence(*vae.encoder(images)).sum(1).mean().double()
                assert_close(kl, mean_kl.expand(100), rtol=1e-5, atol=0)
                x_hats = (vae(images, seeded(s))[0] for s in range(100))
                draws = torch.stack([reconstruction_loss(images, x).mean() for x in x_hats])
                if logvar == -30:
                    assert_close(found, draws.double(), rtol=1e-5, atol=0)
                error = (found.var() + draws.var()).sqrt().item() / 10
                self.assertLess(abs(found.mean() - draws.mean()), 4 * error + 1e-3)

    def test_objective_ends_as_the_elbo(self):
        """The gradients that reach its two terms."""
        ends = {}

        def spy(name, term, *inputs):
            values = term(*inputs)
            values.register_hook(lambda gradient: ends.update({name: gradient.sum()}))
            return values

        for name in ("kl_divergence", "reconstruction_loss"):
            term = functools.partial(spy, name, getattr(vae_lib, name))
            with mock.patch.object(vae_lib, name, term):
                list(train(VAE(hidden=16), bars(), 40))
            self.assertAlmostEqual(ends[name].item(), 1, places=5)

    def test_errors(self):
        broken = VAE(hidden=16)
        next(broken.decoder.parameters()).data.fill_(math.nan)
        for vae, rate in ((VAE(bars(), hidden=16), 1e6), (broken, 1e-3)):
            with self.assertRaisesRegex(FloatingPointError, "learning_rate"):
                list(train(vae, bars(), 30, learning_rate=rate))
        shapes = (1, 32, 32), (3, 1, 28, 28), (3, 3, 32, 32), (0, 1, 32, 32)
        for images in (*map(torch.zeros, shapes), 255 * bars(), bars() - 0.01, bars() / bars()):
            epochs = train(broken, images, 1)
            self.assertRaisesRegex(ValueError, r"images .* expected .* in \[0, 1\]", next, epochs)

    def test_quadrature(self):
        """The mean of p(x|z) over a grid's cells, which are equally likely by the prior."""
        vae = VAE(bars(3), latent_dim=2, hidden=32)
        list(train(vae, bars(3), 100))
        fixed(vae, 0.5, 0.2)  # wide enough to reach all that matters
        z = torch.special.ndtri((torch.arange(200) + 0.5) / 200)
        x_hat = vae.decoder(torch.cartesian_prod(z, z)).detach()  # (40000, 1, 32, 32)
        for image, found in zip(bars(3), log_likelihood(vae, bars(3), 5000), strict=True):
            log_sum = (-reconstruction_loss(image, x_hat)).logsumexp(0).item()
            self.assertAlmostEqual(found.item(), log_sum - math.log(40_000) - CONSTANT, delta=0.2)
        bounds = [log_likelihood(vae, bars(3).repeat(99, 1, 1, 1), n).mean() for n in (1, 9, 99)]
        self.assertEqual(bounds, sorted(bounds))


class ImagesTest(unittest.TestCase):
    def test_load_images(self):
        grey = np.arange(1024).reshape(32, 32) % 256
        red = np.stack([grey, 0 * grey, 0 * grey], 2).astype(np.uint8)
        sound = (TRAIN / "000.png").read_bytes()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.assertRaisesRegex(FileNotFoundError, folder.name, vae_lib.load_images, folder)
            Image.fromarray(grey.astype(np.uint8)).save(folder / "30.png")
            Image.fromarray((257 * grey).astype(np.uint16)).save(folder / "4.PNG")
            Image.fromarray(red).save(folder / "1.png")
            (folder / ".2.png").write_text("hidden")
            (folder / "2.txt").write_text("text")
            images, x = vae_lib.load_images(folder), torch.tensor(grey / 255).float()
            assert_close(images[:, 0], torch.stack([0.299 * x, x, x]), rtol=0, atol=0.002)
            path = folder / "5.png"
            flipped = sound[:60] + bytes([sound[60] ^ 1]) + sound[61:]
            for data in (b"", b"text", sound[:-30], flipped):
                path.write_bytes(data)
                with self.subTest(data[:9]), self.assertRaisesRegex(ValueError, "5.png"):
                    vae_lib.load_images(folder)
            Image.new("L", (32, 31)).save(path)
            self.assertRaisesRegex(ValueError, "5.png.*31×32", vae_lib.load_images, folder)

    def test_figures(self):
        plt.switch_backend("Agg")
        self.addCleanup(plt.close, "all")
        images = torch.rand(7, 1, 32, 32, generator=seeded(0))
        axes = vae_lib.show_images(images, columns=4, rows=["one", "two"]).axes[0]
        grid = torch.tensor(np.array(axes.images[0].get_array()))  # with a border of 2 pixels
        for i, image in enumerate(images):
            top, left = 2 + i // 4 * 34, 2 + i % 4 * 34
            self.assertTrue(torch.equal(grid[top : top + 32, left : left + 32], image[0]))
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["one", "two"])
        losses = [Losses(30.0, 20.0, 10.0)] * 99 + [Losses(9.0, 5.0, 4.0)]
        axes = vae_lib.plot_losses(losses, "title").axes[0]
        ends = [tuple(line.get_ydata()[[0, -2, -1]]) for line in axes.lines if line.get_alpha()]
        means = [tuple(line.get_ydata())[-2:] for line in axes.lines if not line.get_alpha()]
        self.assertEqual(ends, [(30, 30, 9), (20, 20, 5), (10, 10, 4)])
        self.assertEqual(means, [(30, 19.5), (20, 12.5), (10, 7)])  # of two epochs
        labels = " ".join(text.get_text() for text in axes.get_legend().get_texts())
        self.assertRegex(axes.get_title() + labels, "title.*ELBO.*reconstruction.*KL")
