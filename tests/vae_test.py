"""Tests of the model and its maths against closed forms, references and known answers.

python -m unittest tests.vae_test
"""

import functools
import itertools
import math
import random
import sys
import unittest
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal, Normal
from torch.distributions import kl_divergence as reference_kl

import vae_lib
from vae_lib import VAE, Latent, Losses, kl_divergence, log_likelihood, reconstruction_loss, train

CONSTANT = 512 * math.log(2 * math.pi)  # −log N(x; x, I) over 1024 pixels


threads = torch.get_num_threads()


def setUpModule():
    """One thread: at these sizes more are slower, and far slower where other programs run."""
    torch.set_num_threads(1)


def tearDownModule():
    torch.set_num_threads(threads)


# ---- helpers -------------------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(n, seed=0):
    return torch.rand(n, 1, 32, 32, generator=seeded(seed))


def bars(n=8):
    """Images of one white bar each, at n places: simple, and all different."""
    images = torch.zeros(n, 1, 32, 32)
    for i in range(n):
        images[i, 0, :, i * 32 // n : (i + 1) * 32 // n] = 1
    return images


def small(latent_dim=2, seed=0):
    return VAE(latent_dim, hidden=16, seed=seed)


def parameters(vae):
    """One vector of all the parameters, copied."""
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


def history(vae, images, epochs, **options):
    """Train, and return the losses and the parameters before the first and after each epoch."""
    losses, states = [], [parameters(vae)]
    for epoch in train(vae, images, epochs, **options):
        losses.append(epoch)
        states.append(parameters(vae))
    return losses, states


def random_states():
    """The global random states of torch, numpy and python, in a form that can be compared."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        torch.get_rng_state().tolist(),
        repr(numpy_state),
        numpy_state[1].tolist(),
        random.getstate(),
    )


def failing(function, k, error):
    """`function`, except that its k-th call (the first is 1) raises `error` once it is done."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def wrapper(*arguments, **options):
        value = function(*arguments, **options)
        if next(calls) == k:
            raise error
        return value

    return wrapper


def kolmogorov_smirnov(z):
    """√n times the distance of samples z (n, …) from N(0, 1), for each column: above 1.95 in
    one of 1,000 independent samples, above 2.6 in one of 370,000."""
    n = len(z)
    u = torch.special.ndtr(z.double()).sort(0).values  # (n, …)
    ranks = torch.arange(1, n + 1).view(-1, *[1] * (z.dim() - 1))
    return torch.maximum(ranks / n - u, u - (ranks - 1) / n).amax(0) * math.sqrt(n)


# ---- a linear model, whose likelihood is known ---------------------------------------------


class LinearEncoder(nn.Module):
    """q(z|x) with a linear mean and one variance for all images: what a linear model needs.

    The pixels are centred and scaled so that Adam's steps suit it as they suit the decoder.
    """

    def __init__(self, latent_dim):
        super().__init__()
        self.mean = nn.Linear(1024, latent_dim)
        self.logvar = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x):
        mu = self.mean((x.flatten(1) - 0.5) / 32)
        return mu, self.logvar.expand_as(mu)


def linear_vae(latent_dim):
    """A VAE with p(x|z) = N(W z + b, I): probabilistic PCA with the noise fixed."""
    vae = small(latent_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae.encoder = LinearEncoder(latent_dim)
        vae.decoder = nn.Sequential(nn.Linear(latent_dim, 1024), nn.Unflatten(1, (1, 32, 32)))
    vae.encoder.mean.weight.data.mul_(0.1)
    vae.decoder[0].weight.data.mul_(0.1)
    vae.decoder[0].bias.data.fill_(0.5)
    return vae


def known_linear_vae(shrink=1.0, spread=0.0):
    """A linear VAE with columns of W of length √20 and 2, at right angles, and b = ½.

    Its exact posterior has mu = (WᵀW + I)⁻¹ Wᵀ (x − b) and variance (WᵀW + I)⁻¹, which is
    diagonal. `shrink` scales that mean and `spread` is added to logvar: a posterior that is off.
    """
    vae = linear_vae(2)
    W = patterns()[:2].T * torch.tensor([20.0, 4.0]).sqrt()  # (1024, 2)
    precision = 1 + W.square().sum(0)  # (2,)
    with torch.no_grad():
        vae.decoder[0].weight.copy_(W)
        vae.encoder.mean.weight.copy_(32 * shrink * (W / precision).T)
        vae.encoder.mean.bias.zero_()
        vae.encoder.logvar.copy_(spread - precision.log())
    return vae


def patterns():
    """Three stripe patterns of −1/32 and 1/32, (3, 1024): orthonormal."""
    column = torch.arange(32).expand(32, 32)
    stripes = [1 - 2 * ((column // width) % 2) for width in (16, 8, 4)]
    return torch.stack(stripes).flatten(1).float() / 32


def linear_images(n=32):
    """Images ½ + a mixture of the three patterns: the pixels' covariance has three eigenvalues
    above zero, of which two are above 1, the noise of the model."""
    width = 32 * torch.tensor([0.25, 0.12, 0.02])
    mixture = (2 * torch.rand(n, 3, generator=seeded(1)) - 1) * width  # (n, 3)
    return (0.5 + mixture @ patterns()).view(n, 1, 32, 32)


def eigenvalues(images):
    """Those of the pixels' covariance (divided by n) that can be above zero, falling."""
    centred = (images - images.mean(0)).flatten(1).double()  # (n, 1024)
    return torch.linalg.svdvals(centred).square() / len(images)


def pca_loss(images, latent_dim):
    """The least −log likelihood, mean over images and without 512 log 2π, of any linear model.

    The model covariance is C = WWᵀ + I, and −log p = ½ (log |C| + tr C⁻¹S) with S the data's
    covariance once b is its mean. C shares the eigenvectors of S, and in a direction of variance λ
    the variance c of C costs ½ (log c + λ/c): least at c = λ, where it is ½ (log λ + 1), but W can
    only raise c above 1, and in `latent_dim` directions. The others have c = 1 and cost ½ λ.
    """
    values = eigenvalues(images)
    raised = (torch.arange(len(values)) < latent_dim) & (values > 1)
    return 0.5 * torch.where(raised, values.clamp(min=1e-12).log() + 1, values).sum().item()


def exact_elbo_loss(vae, images):
    """−ELBO of a linear VAE, (n,), its expectation over z worked out instead of drawn."""
    mu, logvar = vae.encoder(images)
    W = vae.decoder[0].weight  # (1024, D)
    residual = images.flatten(1) - mu @ W.T - vae.decoder[0].bias
    expected = residual.square().sum(1) + (logvar.exp() * W.square().sum(0)).sum(1)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return (0.5 * expected + kl).detach()


# ---- the objective -------------------------------------------------------------------------


class ObjectiveTest(unittest.TestCase):
    def setUp(self):
        self.mu = 2 * torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
        self.logvar = 1.5 * torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)

    def posterior(self):
        return Normal(self.mu, torch.exp(0.5 * self.logvar))

    def test_kl_is_that_of_torch(self):
        expected = reference_kl(self.posterior(), Normal(0.0, 1.0))
        torch.testing.assert_close(kl_divergence(self.mu, self.logvar), expected)

    def test_kl_is_the_mean_log_ratio(self):
        draws = torch.randn(200_000, 5, 3, generator=seeded(2), dtype=torch.float64)
        z = self.mu + torch.exp(0.5 * self.logvar) * draws
        ratio = self.posterior().log_prob(z) - Normal(0.0, 1.0).log_prob(z)  # (200000, 5, 3)
        error = (kl_divergence(self.mu, self.logvar) - ratio.mean(0)).abs()
        self.assertTrue((error < 5 * ratio.std(0) / math.sqrt(len(z))).all())

    def test_kl_is_zero_at_the_prior_and_positive_elsewhere(self):
        zero = torch.zeros(4, 2)
        self.assertTrue((kl_divergence(zero, zero) == 0).all())
        self.assertTrue((kl_divergence(zero + 0.1, zero) > 0).all())
        self.assertTrue((kl_divergence(zero, zero + 0.1) > 0).all())
        self.assertTrue((kl_divergence(zero, zero - 0.1) > 0).all())

    def test_reconstruction_loss_is_the_likelihood_without_its_constant(self):
        x, x_hat = random_images(6, 0), random_images(6, 1)
        log_prob = Normal(x_hat.double(), 1.0).log_prob(x.double()).sum((1, 2, 3))  # (6,)
        loss = reconstruction_loss(x, x_hat)
        self.assertEqual(loss.shape, (6,))
        torch.testing.assert_close(loss.double(), -log_prob - CONSTANT, rtol=1e-5, atol=0)
        self.assertTrue((reconstruction_loss(x, x) == 0).all())
        of_draws = reconstruction_loss(x, torch.stack([x, x_hat]))
        self.assertTrue(torch.equal(of_draws, torch.stack([torch.zeros(6), loss])))


# ---- the model -----------------------------------------------------------------------------


class ModelTest(unittest.TestCase):
    def test_shapes_and_range(self):
        for n, dim in itertools.product((1, 7, 100), (1, 2, 5)):
            with self.subTest(n=n, D=dim):
                vae, x = small(dim), random_images(n)
                x_hat, mu, logvar = vae(x)
                self.assertEqual([mu.shape, logvar.shape], [(n, dim)] * 2)
                self.assertEqual(vae.latent(mu, logvar).shape, (n, dim))
                self.assertEqual(kl_divergence(mu, logvar).shape, (n, dim))
                self.assertEqual(reconstruction_loss(x, x_hat).shape, (n,))
                self.assertEqual(log_likelihood(vae, x, 3).shape, (n,))
                for images in (x_hat, vae.reconstruct(x), vae.sample(n), vae.sample(n, "iid")):
                    self.assertEqual(images.shape, (n, 1, 32, 32))
                    self.assertEqual(images.dtype, torch.float32)
                    self.assertTrue(((images >= 0) & (images <= 1)).all())

    def test_extreme_latents_stay_within_the_range_of_pixels(self):
        images = small().decoder(torch.tensor([[1e4, -1e4], [-1e30, 1e30]]))
        self.assertTrue(((images >= 0) & (images <= 1)).all())

    def test_gradient_reaches_mu_and_logvar_through_z(self):
        mu, logvar = (torch.randn(6, 3, generator=seeded(s)).requires_grad_() for s in (0, 1))
        z = Latent(3)(mu, logvar, seeded(2))
        z.sum().backward()
        torch.testing.assert_close(mu.grad, torch.ones(6, 3))
        torch.testing.assert_close(logvar.grad, 0.5 * (z - mu).detach())

    def test_gradient_reaches_every_parameter(self):
        vae, x = small(), random_images(4)
        x_hat, mu, logvar = vae(x, seeded(0))
        (reconstruction_loss(x, x_hat).sum() + kl_divergence(mu, logvar).sum()).backward()
        for name, parameter in vae.named_parameters():
            self.assertGreater(parameter.grad.abs().sum(), 0, name)

    def test_z_is_normal_with_mean_mu_and_variance_exp_logvar(self):
        mu, logvar = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-4.0, 0.0, 2.0])
        n = 100_000
        z = Latent(3)(mu.expand(n, 3), logvar.expand(n, 3), seeded(0))
        epsilon = (z - mu) / torch.exp(0.5 * logvar)  # (n, 3)
        self.assertLess((epsilon.mean(0) * math.sqrt(n)).abs().max(), 4)
        self.assertLess(((epsilon.var(0) - 1) * math.sqrt(n / 2)).abs().max(), 4)
        self.assertLess(kolmogorov_smirnov(epsilon).max(), 1.95)
        self.assertLess((torch.corrcoef(epsilon.T) - torch.eye(3)).abs().max(), 4 / math.sqrt(n))

    def test_reconstruct_decodes_the_mean(self):
        vae, x = small(), random_images(5)
        torch.testing.assert_close(vae.reconstruct(x), vae.decoder(vae.encoder(x)[0]).detach())
        self.assertFalse(vae.reconstruct(x).requires_grad)
        self.assertFalse(vae.sample(3).requires_grad)

    def test_forward_follows_its_generator(self):
        vae, x = small(), random_images(5)
        first, same, other = (vae(x, seeded(seed))[0] for seed in (0, 0, 1))
        self.assertTrue(torch.equal(first, same))
        self.assertFalse(torch.equal(first, other))

    def test_seed_draws_the_weights(self):
        self.assertTrue(torch.equal(parameters(small(seed=3)), parameters(small(seed=3))))
        self.assertFalse(torch.equal(parameters(small(seed=3)), parameters(small(seed=4))))

    def test_starts_from_the_mean_image(self):
        images = bars()
        plain, started = small(), VAE(2, 16, images=images)
        mean = images.mean(0)
        near = (started.sample(50, seed=0) - mean).abs().mean()
        self.assertLess(near, 0.1)
        self.assertLess(near, 0.5 * (plain.sample(50, seed=0) - mean).abs().mean())
        black = VAE(2, 16, images=torch.zeros(3, 1, 32, 32))
        self.assertTrue(parameters(black).isfinite().all())

    def test_logvar_is_bounded(self):
        for extreme in (1e3, -1e3, 1e30, -1e30):
            with self.subTest(extreme):
                vae = small()
                vae.encoder.net[-1].bias.data[2:] = extreme
                mu, logvar = vae.encoder(random_images(3))
                kl = kl_divergence(mu, logvar).sum()
                kl.backward()
                self.assertTrue(kl.isfinite() and logvar.exp().isfinite().all())
                self.assertGreater(logvar.exp().min(), 0)
                self.assertTrue(all(p.grad.isfinite().all() for p in vae.encoder.parameters()))

    def test_prior_is_standard_normal(self):
        latent = Latent(3)
        self.assertEqual([name for name, _ in latent.named_buffers()], ["prior_mu", "prior_logvar"])
        self.assertTrue((latent.prior_mu == 0).all() and (latent.prior_logvar == 0).all())
        latent.prior_mu += 5
        latent.prior_logvar += math.log(4)
        z = latent.sample(1024, "sobol", 0)
        torch.testing.assert_close(z.mean(0), torch.full((3,), 5.0), rtol=0, atol=0.02)
        torch.testing.assert_close(z.std(0), torch.full((3,), 2.0), rtol=0, atol=0.02)


# ---- draws from the prior ------------------------------------------------------------------


METHODS = [(2, "iid"), (2, "sobol"), (2, "lattice"), (4, "iid"), (4, "sobol")]


@functools.cache
def prior_draws(dim, method, draws=300, n=100):
    """Sets of n points drawn with seeds 0, 1, …: (draws, n, D)."""
    latent = Latent(dim)
    return torch.stack([latent.sample(n, method, seed) for seed in range(draws)]).double()


class PriorTest(unittest.TestCase):
    def check_moments(self, z):
        """Mean, variance and correlations of z (n, D) within 5 standard errors of N(0, I)'s."""
        root = math.sqrt(len(z))
        self.assertLess((z.mean(0) * root).abs().max(), 5)
        self.assertLess(((z.var(0) - 1) * root / math.sqrt(2)).abs().max(), 5)
        off = torch.corrcoef(z.T) - torch.eye(z.shape[1], dtype=z.dtype)
        self.assertLess(off.abs().max() * root, 5)

    def test_all_draws_together_are_standard_normal(self):
        for dim, method in METHODS:
            with self.subTest(D=dim, method=method):
                z = prior_draws(dim, method).flatten(0, 1)  # (30000, D)
                self.check_moments(z)
                self.assertLess(kolmogorov_smirnov(z).max(), 1.95)

    def test_each_position_of_a_set_is_standard_normal(self):
        for dim, method in METHODS:
            with self.subTest(D=dim, method=method):
                z = prior_draws(dim, method)  # (300, 100, D), independent along the first
                self.assertLess(kolmogorov_smirnov(z).max(), 2.6)
                for position in z.unbind(1):
                    self.check_moments(position)

    def test_small_sets_are_standard_normal(self):
        for dim, method in METHODS:
            for n in (1, 7):
                with self.subTest(D=dim, method=method, n=n):
                    z = prior_draws(dim, method, 200, n)
                    self.assertEqual(z.shape, (200, n, dim))
                    self.assertLess(kolmogorov_smirnov(z).max(), 2.6)

    def test_same_seed_same_draw(self):
        for dim, method in METHODS:
            with self.subTest(D=dim, method=method):
                latent = Latent(dim)
                first, same, other = (latent.sample(100, method, seed) for seed in (7, 7, 8))
                self.assertTrue(torch.equal(first, same))
                self.assertFalse((first == other).any())
                unseeded = [latent.sample(100, method) for _ in range(2)]
                self.assertFalse((unseeded[0] == unseeded[1]).any())

    def test_low_discrepancy_sets_are_even(self):
        """Each tenth of each dimension holds n/10 points give or take 3; independent draws have a
        standard deviation of 3 there, so that a set of them hardly ever does."""
        for dim, method in METHODS:
            with self.subTest(D=dim, method=method):
                tenth = (10 * torch.special.ndtr(prior_draws(dim, method))).long()  # (300, 100, D)
                counts = torch.stack([(tenth == k).sum(1) for k in range(10)])  # (10, 300, D)
                even = ((counts - 10).abs() <= 3).all(2).all(0).double().mean()  # share of the sets
                if method == "iid":
                    self.assertLess(even, 0.1)
                else:
                    self.assertEqual(even, 1)

    def test_low_discrepancy_sets_are_even_in_two_dimensions(self):
        """Each ninth of the square holds 100/9 points give or take 4.2: the joint law, too."""
        for method in ("iid", "sobol", "lattice"):
            with self.subTest(method):
                ninth = (3 * torch.special.ndtr(prior_draws(2, method))).long()  # (300, 100, 2)
                cells = ninth @ torch.tensor([3, 1])  # (300, 100)
                counts = torch.stack([(cells == k).sum(1) for k in range(9)], 1)  # (300, 9)
                even = ((counts - 100 / 9).abs() <= 4.2).all(1).double().mean()
                if method == "iid":
                    self.assertLess(even, 0.5)
                else:
                    self.assertGreater(even, 0.99)

    def test_neighbours_in_a_lattice_are_independent(self):
        """Its points come in no order. (A Sobol sequence's neighbours lie apart by design.)"""
        for method in ("iid", "lattice"):
            with self.subTest(method):
                z = prior_draws(2, method)  # (300, 100, 2)
                products = (z[:, 1:] * z[:, :-1]).mean((0, 1))  # (2,)
                self.assertLess(products.abs().max(), 0.05)

    def test_default_is_a_low_discrepancy_set(self):
        for dim, method in ((2, "lattice"), (1, "sobol"), (4, "sobol")):
            latent = Latent(dim)
            self.assertTrue(torch.equal(latent.sample(9, None, 1), latent.sample(9, method, 1)))

    def test_sample_decodes_prior_draws(self):
        vae = small()
        for method in ("iid", "sobol", "lattice"):
            images = vae.sample(10, method, seed=5)
            expected = vae.decoder(vae.latent.sample(10, method, 5)).detach()
            torch.testing.assert_close(images, expected)


# ---- training ------------------------------------------------------------------------------


class TrainTest(unittest.TestCase):
    def test_200_steps_on_8_images(self):
        """From 128 nats; log 8 = 2.1 of them name one of the eight."""
        for seed in range(3):
            with self.subTest(seed=seed):
                losses, _ = history(VAE(2, 64, seed), bars(), 200, seed=seed)
                self.assertEqual(len(losses), 200)
                self.assertGreater(losses[0].loss, 100)
                self.assertLess(losses[-1].loss, 25)
                self.assertGreater(losses[-1].kl, 2)

    def test_losses_are_floats_that_add_up(self):
        for epoch in history(small(), bars(), 3)[0]:
            self.assertIsInstance(epoch, Losses)
            self.assertEqual([type(value) for value in epoch], [float] * 3)
            self.assertEqual(epoch.loss, epoch.reconstruction + epoch.kl)

    def test_loss_is_the_mean_over_images(self):
        """Weights of one per image, though the last of the batches is smaller."""
        images = random_images(10) * torch.linspace(0, 1, 10).view(-1, 1, 1, 1)
        vae = linear_vae(2)
        vae.encoder.logvar.data.fill_(-40)  # z = mu, all but
        x_hat, mu, logvar = vae(images)
        reconstruction = reconstruction_loss(images, x_hat).mean().item()
        kl = kl_divergence(mu, logvar).sum(1).mean().item()
        for batch_size in (None, 10, 1000, 4, 3, 1):
            with self.subTest(batch_size=batch_size):
                options = {"batch_size": batch_size, "learning_rate": 0.0}
                (losses,), _ = history(vae, images, 1, **options)
                self.assertAlmostEqual(losses.reconstruction / reconstruction, 1, places=5)
                self.assertAlmostEqual(losses.kl / kl, 1, places=5)

    def test_every_epoch_takes_every_image_once(self):
        images = torch.linspace(0, 1, 10).view(10, 1, 1, 1).expand(10, 1, 32, 32)
        for batch_size, sizes in ((None, [10]), (4, [4, 4, 2]), (99, [10])):
            vae, seen = small(), []
            vae.encoder.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            history(vae, images, 2, batch_size=batch_size)
            self.assertEqual([len(x) for x in seen], sizes * 2)
            halves = torch.cat(seen)[:, 0, 0, 0].view(2, 10)
            self.assertTrue((halves.sort(1).values == images[:, 0, 0, 0]).all())
            self.assertEqual(torch.equal(halves[0], halves[1]), len(sizes) == 1)  # else shuffled

    def test_batches_lower_the_loss_too(self):
        losses, _ = history(small(), bars(10), 40, batch_size=4, learning_rate=5e-3)
        self.assertLess(losses[-1].loss, 0.6 * losses[0].loss)

    def test_same_seed_same_parameters(self):
        for batch_size in (None, 4):
            with self.subTest(batch_size=batch_size):
                vaes = [VAE(2, 32, seed=1, images=bars(10)) for _ in range(3)]
                losses = [
                    history(vae, bars(10), 20, seed=seed, batch_size=batch_size)[0]
                    for vae, seed in zip(vaes, (0, 0, 1), strict=True)
                ]
                first, same, other = map(parameters, vaes)
                self.assertTrue(torch.equal(first, same))
                self.assertEqual(losses[0], losses[1])
                self.assertFalse(torch.equal(first, other))
                self.assertTrue(torch.equal(vaes[0].sample(50, seed=3), vaes[1].sample(50, seed=3)))

    def test_images_are_left_alone(self):
        images = bars()
        history(small(), images, 2)
        self.assertTrue(torch.equal(images, bars()))

    def test_global_random_state_is_left_alone(self):
        images, before = bars(), random_states()
        vae = VAE(2, 16, seed=5, images=images)
        list(train(vae, images, 2, batch_size=3))
        for method in ("iid", "sobol", "lattice", None):
            vae.sample(5, method)
            vae.sample(5, method, seed=1)
        log_likelihood(vae, images, 3)
        vae.reconstruct(images)
        self.assertEqual(random_states(), before)

    def test_global_random_state_has_no_effect(self):
        results = []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                vae = small()
                history(vae, bars(), 3)
                results.append((parameters(vae), log_likelihood(vae, bars(), 5)))
        for one, two in zip(*results, strict=True):
            self.assertTrue(torch.equal(one, two))


class InterruptTest(unittest.TestCase):
    """An interrupt leaves the parameters of the last epoch that was yielded."""

    epochs, images = 3, bars(10)

    def check(self, vae, losses):
        """The parameters are those that as many epochs of an undisturbed run leave."""
        self.assertTrue(torch.equal(parameters(vae), self.states[len(losses)]))

    def setUp(self):
        self.losses, self.states = history(small(), self.images, self.epochs, batch_size=4)
        for one, two in itertools.pairwise(self.states):
            self.assertFalse(torch.equal(one, two))

    def interrupted(self, patch=None, error=KeyboardInterrupt, vae=None):
        vae, losses = vae or small(), []
        with patch or mock.MagicMock(), self.assertRaises(error):
            for epoch in train(vae, self.images, self.epochs, batch_size=4):
                losses.append(epoch)
        self.assertEqual(losses, self.losses[: len(losses)])
        self.check(vae, losses)
        return losses

    def test_in_any_step(self):
        """At the k-th of the 9 steps: in the decoder, and when the parameters have changed."""
        for k in range(1, 10):
            for error in (KeyboardInterrupt, MemoryError):
                with self.subTest(step=k, error=error.__name__):
                    vae = small()
                    decode = failing(vae.decoder.forward, k, error)
                    patch = mock.patch.object(vae.decoder, "forward", decode)
                    self.assertEqual(len(self.interrupted(patch, error, vae)), (k - 1) // 3)
                    patch = mock.patch.object(vae_lib, "adam", failing(vae_lib.adam, k, error))
                    self.assertEqual(len(self.interrupted(patch, error)), (k - 1) // 3)

    def test_at_any_line(self):
        """Raised by a tracer at the k-th line that `train` runs, for each k; not as it yields."""
        source = vae_lib.__file__

        def tracer_at(k):
            lines = itertools.count(1)

            def local(frame, event, _):
                if event == "line" and next(lines) == k:
                    raise KeyboardInterrupt
                return local

            return lambda frame, event, _: (
                local
                if frame.f_code.co_name == "train" and frame.f_code.co_filename == source
                else None
            )

        previous, completed = sys.gettrace(), False
        for k in itertools.count(1):
            vae, losses = small(), []
            try:
                sys.settrace(tracer_at(k))
                for epoch in train(vae, self.images, self.epochs, batch_size=4):
                    losses.append(epoch)
                completed = True
            except KeyboardInterrupt as error:
                trace = error.__traceback__
                while trace.tb_frame.f_code.co_name != "train":
                    trace = trace.tb_next
                line = trace.tb_lineno
            finally:
                sys.settrace(previous)
            if completed:
                break
            with (
                self.subTest(line=line, losses=len(losses)),
                open(source, encoding="utf-8") as file,
            ):
                if not file.readlines()[line - 1].strip().startswith("yield"):
                    self.check(vae, losses)
        self.assertGreater(k, 80)

    def test_between_epochs(self):
        for stop in range(1, self.epochs + 1):
            vae = small()
            epochs = train(vae, self.images, self.epochs, batch_size=4)
            losses = list(itertools.islice(epochs, stop))
            epochs.close()
            self.check(vae, losses)

    def test_training_goes_on_after_an_interrupt(self):
        vae = small()
        patch = mock.patch.object(vae.decoder, "forward", failing(vae.decoder.forward, 5, OSError))
        self.interrupted(patch, OSError, vae)
        self.assertLess(history(vae, self.images, 40)[0][-1].loss, self.losses[0].loss)


class NonFiniteTest(unittest.TestCase):
    """A loss that is not finite stops the training, and leaves parameters that are."""

    images = random_images(10)

    def diverge(self, epochs=5, **options):
        """The epochs that were yielded, the message, and whether the parameters are of use."""
        vae, losses = small(), []
        with self.assertRaises(FloatingPointError) as caught:
            for epoch in train(vae, self.images, epochs, **options):
                losses.append(epoch)
        message = str(caught.exception)
        self.assertIn(f"epoch {len(losses) + 1}:", message)
        self.assertIn("learning_rate", message)
        self.assertTrue(all(math.isfinite(value) for epoch in losses for value in epoch))
        self.assertTrue(parameters(vae).isfinite().all())
        self.assertTrue(vae(self.images)[0].isfinite().all())
        self.assertTrue(log_likelihood(vae, self.images, 3).isfinite().all())
        return len(losses), parameters(vae)

    def test_huge_learning_rate(self):
        for batch_size, rate in itertools.product((None, 4), (1e30, 1e38)):
            with self.subTest(batch_size=batch_size, learning_rate=rate):
                self.diverge(batch_size=batch_size, learning_rate=rate)

    def test_bad_step(self):
        """The loss is NaN or infinite in the k-th of 15 steps, three an epoch."""
        _, states = history(small(), self.images, 5, batch_size=4)
        for k, value in itertools.product(range(1, 16), (math.nan, math.inf)):
            with self.subTest(step=k, value=value):
                calls = itertools.count(1)

                def bad(x, x_hat, calls=calls, k=k, value=value):
                    return reconstruction_loss(x, x_hat) * (value if next(calls) == k else 1)

                with mock.patch.object(vae_lib, "reconstruction_loss", bad):
                    # log_likelihood calls it, too, but only later
                    epochs, left = self.diverge(batch_size=4)
                self.assertEqual(epochs, (k - 1) // 3)
                self.assertTrue(any(torch.equal(left, state) for state in states[: epochs + 1]))


# ---- a known answer ------------------------------------------------------------------------


class LinearTest(unittest.TestCase):
    """With a linear decoder the best ELBO is the likelihood of probabilistic PCA (Tipping & Bishop
    1999): the posterior is then normal and, after a rotation of z, diagonal, so nothing is lost."""

    def test_training_reaches_the_closed_form(self):
        images = linear_images()
        values = eigenvalues(images)
        self.assertGreater(values[1], 2)  # two directions to be found
        self.assertLess(values[2], 0.9)  # and one that the noise explains
        for dim in (1, 3):
            with self.subTest(D=dim):
                vae = linear_vae(dim)
                losses, _ = history(vae, images, 500, learning_rate=0.08)
                best = pca_loss(images, dim)
                self.assertAlmostEqual(exact_elbo_loss(vae, images).mean().item(), best, delta=0.01)
                last = np.mean([epoch.loss for epoch in losses[-100:]])
                self.assertAlmostEqual(last, best, delta=0.05)
                likelihood = log_likelihood(vae, images, 20).mean().item()
                self.assertAlmostEqual(likelihood, -best - CONSTANT, delta=0.01)
                lengths = torch.linalg.svdvals(vae.decoder[0].weight.detach()).square()  # (D,)
                expected = (values[:dim] - 1).clamp(min=0).float()
                torch.testing.assert_close(lengths, expected, rtol=0.05, atol=0.05)
                precision = 1 + vae.decoder[0].weight.detach().square().sum(0)  # (D,), posterior's
                logvar = vae.encoder.logvar.detach()
                torch.testing.assert_close(logvar, -precision.log(), rtol=0, atol=0.03)


class LikelihoodTest(unittest.TestCase):
    def setUp(self):
        self.images = linear_images(16)

    def exact(self):
        """log p(x), (n,), of the known linear model, from its covariance WWᵀ + I."""
        vae = known_linear_vae()
        W = vae.decoder[0].weight.detach().double()
        marginal = LowRankMultivariateNormal(
            vae.decoder[0].bias.double(), W, torch.ones(1024).double()
        )
        return marginal.log_prob(self.images.flatten(1).double()).detach()

    def mean(self, vae, samples, seeds):
        """The bound averaged over seeds, (n,), and its standard error."""
        bounds = torch.stack(
            [log_likelihood(vae, self.images, samples, seed) for seed in range(seeds)]
        )
        return bounds.double().mean(0), bounds.double().std(0) / math.sqrt(seeds)

    def test_exact_where_the_posterior_is(self):
        """Then all weights are equal, and one sample is enough; 512 log 2π is in it."""
        for samples in (1, 2, 50):
            bound = log_likelihood(known_linear_vae(), self.images, samples).double()
            torch.testing.assert_close(bound, self.exact(), rtol=0, atol=2e-3)
        self.assertLess(self.exact().max(), -CONSTANT)

    def test_elbo_with_one_sample(self):
        vae = known_linear_vae(shrink=0.9, spread=0.4)
        bound, error = self.mean(vae, 1, 400)
        elbo = -exact_elbo_loss(vae, self.images) - CONSTANT
        self.assertLess(((bound - elbo) / error).abs().max(), 4)
        self.assertLess((elbo - self.exact()).max(), -0.01)  # the gap that more samples close

    def test_rises_with_samples_to_the_exact_value(self):
        vae = known_linear_vae(shrink=0.9, spread=0.4)
        elbo = -exact_elbo_loss(vae, self.images).mean() - CONSTANT
        means = [self.mean(vae, samples, 20)[0].mean().item() for samples in (2, 10, 50, 1000)]
        self.assertGreater(means[0], elbo)
        self.assertEqual(means, sorted(means))
        self.assertAlmostEqual(means[-1], self.exact().mean().item(), delta=0.01)

    def test_not_below_the_elbo_of_a_trained_model(self):
        images, vae = bars(), VAE(2, 32)
        history(vae, images, 150)
        losses = [history(vae, images, 1, learning_rate=0.0, seed=s)[0][0].loss for s in range(50)]
        elbo = -np.mean(losses) - CONSTANT
        few, many = (log_likelihood(vae, images, samples).mean().item() for samples in (20, 2000))
        self.assertGreater(few, elbo)
        self.assertGreater(many, few)
        self.assertLess(many, elbo + 20)

    def test_seed(self):
        vae = small()
        first, same, other = (log_likelihood(vae, self.images, 5, seed) for seed in (1, 1, 2))
        self.assertTrue(torch.equal(first, same))
        self.assertFalse(torch.equal(first, other))


# ---- bad input -----------------------------------------------------------------------------


def spoiled(value):
    images = random_images(3)
    images[1, 0, 4, 5] = value
    return images


BAD_IMAGES = {
    "rank": (random_images(3)[:, 0], r"\(3, 32, 32\), expected \(N, 1, 32, 32\)"),
    "one image": (random_images(1)[0], r"\(1, 32, 32\), expected"),
    "size": (torch.rand(3, 1, 28, 28), r"\(3, 1, 28, 28\), expected"),
    "colour": (torch.rand(3, 3, 32, 32), r"\(3, 3, 32, 32\), expected"),
    "empty set": (torch.rand(0, 1, 32, 32), r"\(0, 1, 32, 32\), expected .* 1 or more"),
    "number": (torch.tensor(0.5), r"\(\), expected"),
    "array": (np.zeros((3, 1, 32, 32), np.float32), r"ndarray, expected"),
    "list": ([random_images(1)[0]], r"list, expected"),
    "nothing": (None, r"NoneType, expected"),
    "8-bit": (torch.zeros(3, 1, 32, 32, dtype=torch.uint8), r"uint8, expected .* 255"),
    "float64": (random_images(3).double(), r"float64, expected"),
    "above 1": (spoiled(1.001), r"outside \[0, 1\]"),
    "8-bit range": (255 * random_images(3), r"outside \[0, 1\]"),
    "below 0": (spoiled(-0.001), r"outside \[0, 1\]"),
    "NaN": (spoiled(math.nan), r"NaN"),
    "infinite": (spoiled(math.inf), r"outside \[0, 1\]"),
}


class BadInputTest(unittest.TestCase):
    """Refused in words: what was got, and what was expected."""

    def test_images(self):
        vae = small()
        before = parameters(vae)
        functions = {
            "train": lambda images: list(train(vae, images, 1)),
            "log_likelihood": lambda images: log_likelihood(vae, images, 2),
            "reconstruct": vae.reconstruct,
            "VAE": lambda images: VAE(2, 16, images=images),
        }
        for (name, function), (kind, (images, words)) in itertools.product(
            functions.items(), BAD_IMAGES.items()
        ):
            if (name, kind) == ("VAE", "nothing"):
                continue  # its default
            with self.subTest(function=name, images=kind):
                self.assertRaisesRegex(ValueError, words, function, images)
        self.assertTrue(torch.equal(parameters(vae), before))

    def test_numbers(self):
        two, four, images = small(2), small(4), random_images(3)
        for words, call in (
            ("n is 0, expected 1 or more", lambda: two.sample(0)),
            ("n is -3, expected 1 or more", lambda: two.latent.sample(-3, "iid")),
            ("'halton'", lambda: two.sample(5, "halton")),
            ("'lattice'.* D = 2", lambda: four.sample(5, "lattice")),
            ("epochs 0 .* 1 or more", lambda: list(train(two, images, 0))),
            ("epochs -1 .* 1 or more", lambda: list(train(two, images, -1))),
            ("batch_size 0 .* 1 or more", lambda: list(train(two, images, 1, batch_size=0))),
            ("learning rate", lambda: list(train(two, images, 1, learning_rate=-1.0))),
            ("learning rate", lambda: list(train(two, images, 1, learning_rate=math.nan))),
            ("samples is 0, expected 1 or more", lambda: log_likelihood(two, images, 0)),
            ("latent_dim 0 .* 1 or more", lambda: VAE(0)),
            ("hidden -5 .* 1 or more", lambda: VAE(2, -5)),
        ):
            with self.subTest(words):
                self.assertRaisesRegex(ValueError, words, call)

    def test_pairs_that_do_not_match(self):
        for other in (random_images(4), random_images(3)[..., :16], random_images(3)[:, 0]):
            with self.subTest(shape=other.shape):
                self.assertRaises(RuntimeError, reconstruction_loss, random_images(3), other)


# ---- other devices -------------------------------------------------------------------------


class DeviceTest:
    """Training elsewhere, and back on the CPU."""

    device = None

    def test_train_and_return(self):
        vae = small()
        losses, _ = history(vae, bars(), 60, device=self.device)
        self.assertLess(losses[-1].loss, 0.7 * losses[0].loss)
        here = bars().to(self.device)
        likelihood = log_likelihood(vae, here, 10)
        self.assertEqual({x.device.type for x in (vae.sample(3), likelihood)}, {self.device})
        there = vae.sample(20, seed=1).cpu()
        torch.testing.assert_close(vae.cpu().sample(20, seed=1), there, rtol=0, atol=1e-3)

    def test_same_seed_same_parameters(self):
        vaes = [small(), small()]
        for vae in vaes:
            history(vae, bars(), 5, device=self.device)
        self.assertTrue(torch.equal(parameters(vaes[0]), parameters(vaes[1])))

    def test_global_random_state_is_left_alone(self):
        module = getattr(torch, self.device)
        before = module.get_rng_state()
        list(train(small(), bars(), 1, device=self.device))
        self.assertTrue(torch.equal(module.get_rng_state(), before))


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class CudaTest(DeviceTest, unittest.TestCase):
    device = "cuda"


@unittest.skipUnless(torch.backends.mps.is_available(), "needs an Apple GPU")
class MpsTest(DeviceTest, unittest.TestCase):
    device = "mps"


if __name__ == "__main__":
    unittest.main()
