"""Tests of the model and its maths against closed forms, references and known answers."""

import itertools
import math
import os
import struct
import tempfile
import unittest
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from scipy.stats import kstest
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl
from torch.nn.utils import parameters_to_vector
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close

import vae_lib
from vae_lib import (
    VAE,
    Latent,
    aggregate_kl,
    best_decoder,
    kl_divergence,
    load_images,
    log_likelihood,
    reconstruction_loss,
    train,
)

CONSTANT = 512 * math.log(2 * math.pi)  # −log N(x; x, I) of 1024 pixels


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bars(n=8):
    """Images of one white bar each, at n places."""
    place = torch.arange(32) * n // 32 == torch.arange(n)[:, None]  # (n, 32)
    return place.float().view(n, 1, 1, 32).repeat(1, 1, 32, 1)


def spots(n=20):
    """Images of one bright, soft spot each, with places and radii drawn at random."""
    places = 32 * torch.rand(n, 2, 1, 1, generator=seeded(0))
    radii = 3 + 5 * torch.rand(n, 1, 1, generator=seeded(1))
    pixel = torch.arange(32.0)
    down = (pixel.view(32, 1) - places[:, 0]).square()  # (n, 32, 1)
    across = (pixel - places[:, 1]).square()  # (n, 1, 32)
    brightness = torch.exp(-(down + across) / (2 * radii.square()))  # (n, 32, 32)
    return (1.3 * brightness - 0.15).clamp(0, 1).unsqueeze(1)  # with some pixels black, some white


def noise(n):
    """Images of noise, the first of them dark and the last bright."""
    brightness = torch.linspace(0, 1, n).view(n, 1, 1, 1)
    return brightness * torch.rand(n, 1, 32, 32, generator=seeded(0))


def weights(module):
    return parameters_to_vector(module.parameters()).detach().clone()


def fix_posterior(vae, scale, logvar):
    """Let the encoder give `scale` times its mu, and this logvar."""

    def changed(module, inputs, outputs):
        mu, _ = outputs
        return scale * mu, torch.full_like(mu, logvar)

    vae.encoder.register_forward_hook(changed)


@torch.no_grad()
def reference_elbo(vae, images, decode, draws=50):
    """−ELBO in nats per image, by formulas other than the library's; z goes through `decode`."""
    mu, logvar = vae.encoder(images)
    posterior = Normal(mu, (logvar / 2).exp())
    kl = reference_kl(posterior, Normal(0, 1)).sum() / len(images)
    reconstruction = 0
    for seed in range(draws):
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=seeded(seed))
        log_density = Normal(decode(z), 1).log_prob(images).sum() / len(images)
        reconstruction += (-log_density - CONSTANT).item() / draws
    return reconstruction + kl.item()


class MathsTest(unittest.TestCase):
    def test_kl_divergence(self):
        mu, logvar = 2 * torch.randn(2, 5, 3, generator=seeded(0))
        posterior = Normal(mu, (logvar / 2).exp())
        assert_close(kl_divergence(mu, logvar), reference_kl(posterior, Normal(0, 1)))  # (5, 3)

    def test_reconstruction_loss(self):
        x, x_hat = torch.rand(2, 6, 1, 32, 32, generator=seeded(0), dtype=torch.float64)
        expected = -Normal(x_hat, 1).log_prob(x).sum((1, 2, 3)) - CONSTANT  # (6,)
        assert_close(reconstruction_loss(x, x_hat), expected)

    def test_reparameterisation(self):
        """z − mu, over the standard deviation, is standard normal, and gradients go through."""
        mu = torch.tensor([0.0, -2.0, 3.0], requires_grad=True)
        logvar = torch.tensor([1.0, 0.0, -4.0], requires_grad=True)
        n = 20_000
        z = Latent(3)(mu.expand(n, 3), logvar.expand(n, 3), seeded(1))
        mu_gradient, logvar_gradient = torch.autograd.grad(z.sum(), (mu, logvar))
        assert_close(mu_gradient, torch.full((3,), float(n)))
        assert_close(logvar_gradient, ((z - mu) / 2).sum(0), rtol=1e-4, atol=0.1)
        epsilon = ((z - mu) / (logvar / 2).exp()).detach()
        self.assertGreater(kstest(epsilon, "norm").pvalue.min(), 1e-3)
        self.assertTrue(torch.equal(z, Latent(3)(mu.expand(n, 3), logvar.expand(n, 3), seeded(1))))

    def test_best_decoder_is_the_weighted_average(self):
        """By brute force: one z, one image, one dimension at a time."""
        images = torch.rand(4, 1, 32, 32, generator=seeded(0))
        for dim in (1, 2, 3):
            z = torch.randn(5, dim, generator=seeded(1))
            mu = torch.randn(4, dim, generator=seeded(2))
            logvar = torch.randn(4, dim, generator=seeded(3))
            found = best_decoder(z, mu, logvar, images)
            self.assertEqual(found.shape, (5, 1, 32, 32))
            for k in range(5):
                average = torch.zeros(1, 32, 32, dtype=torch.float64)
                total = 0
                for i in range(4):
                    density = 1
                    for d in range(dim):
                        variance = math.exp(logvar[i, d])
                        distance = (z[k, d] - mu[i, d]).item()
                        density *= math.exp(-(distance**2) / (2 * variance))
                        density /= math.sqrt(2 * math.pi * variance)
                    average += density * images[i].double()
                    total += density
                with self.subTest(dim=dim, z=k):
                    assert_close(found[k].double(), average / total, rtol=1e-4, atol=1e-4)

    def test_aggregate_kl(self):
        """By quadrature in one dimension; 0 where the posteriors together are the prior."""
        mu = torch.tensor([[-1.0], [-0.2], [1.5]])
        logvar = torch.tensor([[-2.0], [-1.0], [0.0]])
        posteriors = Normal(mu, (logvar / 2).exp())
        grid = torch.linspace(-9, 9, 4001).unsqueeze(1)  # (4001, 1)
        q = posteriors.log_prob(grid.T).exp().mean(0)  # (4001,)
        log_ratio = q.log() - Normal(0, 1).log_prob(grid.flatten())
        expected = torch.trapezoid(q * log_ratio, grid.flatten())
        z = Latent(1)(mu.repeat(100_000, 1), logvar.repeat(100_000, 1), seeded(0))
        self.assertAlmostEqual(aggregate_kl(z, mu, logvar).item(), expected.item(), delta=0.01)
        z = torch.randn(50, 3, generator=seeded(0))
        assert_close(aggregate_kl(z, torch.zeros(4, 3), torch.zeros(4, 3)), torch.tensor(0.0))

    def test_aggregate_kl_is_the_mean_kl_less_the_information(self):
        mu = torch.tensor([[-60.0, 5.0], [0.0, 0.0], [60.0, 5.0]])  # so far apart that z tells all
        logvar = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 0.0]])
        z = Latent(2)(mu.repeat(20_000, 1), logvar.repeat(20_000, 1), seeded(0))
        expected = kl_divergence(mu, logvar).sum(1).mean().item() - math.log(3)
        found = aggregate_kl(z, mu, logvar).item()
        self.assertAlmostEqual(found / expected, 1, delta=1e-3)

    def test_best_decoder_far_from_every_image(self):
        """There the widest posterior says which image it is, however small all densities are."""
        images = bars(3)
        mu = torch.tensor([[-1.0], [0.0], [1.0]])
        logvar = torch.tensor([[-9.0], [-5.0], [-9.0]])
        found = best_decoder(torch.tensor([[-50.0], [50.0]]), mu, logvar, images)
        assert_close(found, images[1].expand(2, 1, 32, 32))

    def test_no_decoder_is_better_than_the_best(self):
        """The reconstruction term by quadrature, for it and for decoders near it."""
        images = torch.rand(4, 1, 32, 32, generator=seeded(0))
        mu = torch.tensor([[-1.0], [-0.2], [0.3], [1.5]])
        logvar = torch.tensor([[-2.0], [-1.0], [-3.0], [0.0]])
        z = torch.linspace(-8, 8, 801).unsqueeze(1)  # (801, 1)
        density = Normal(mu, (logvar / 2).exp()).log_prob(z.T).exp()  # (4, 801)

        def reconstruction(x_hat):
            losses = torch.stack(
                [reconstruction_loss(image, x_hat) for image in images]
            )  # (4, 801)
            return torch.trapezoid(density * losses, z.flatten()).mean().item()

        best = best_decoder(z, mu, logvar, images)
        lowest = reconstruction(best)
        self.assertGreater(lowest, 1)  # there is something to lose
        change = torch.randn(best.shape, generator=seeded(1))
        wave = torch.sin(z).view(-1, 1, 1, 1) * change[0]
        for name, other in (
            ("noise", change),
            ("a wave", wave),
            ("brighter", torch.ones(1)),
            ("towards the mean", images.mean(0) - best),
        ):
            for step in (0.05, -0.05):
                with self.subTest(change=name, step=step):
                    self.assertGreater(reconstruction(best + step * other), lowest)

    def test_log_likelihood_by_quadrature(self):
        """The mean of p(x|z) over a grid's cells, which are equally likely by the prior."""
        images = bars(3)
        for dim, cells, error in ((1, 4000, 0.2), (2, 150, 1.0)):
            vae = VAE(images, dim, hidden=32)
            list(train(vae, images, 60))
            line = torch.special.ndtri((torch.arange(cells) + 0.5) / cells)
            z = torch.cartesian_prod(*[line] * dim).view(-1, dim)  # (cells ** dim, dim)
            x_hat = vae.decoder(z).detach()
            darker = 0.7 * images  # which it cannot draw
            found = log_likelihood(vae, darker)
            self.assertEqual(found.shape, (3,))
            for image, value in zip(darker, found, strict=True):
                terms = -reconstruction_loss(image, x_hat)
                expected = terms.logsumexp(0).item() - math.log(len(z)) - CONSTANT
                with self.subTest(dim=dim):
                    self.assertAlmostEqual(value.item(), expected, delta=error)

    def test_log_likelihood_rises_with_the_samples(self):
        """On average over seeds; a bound from few samples is a loose one, but a bound."""
        images = bars(3)
        vae = VAE(images, hidden=32)
        list(train(vae, images, 60))
        means = []
        for samples in (1, 9, 99):
            bounds = [log_likelihood(vae, images, samples, seed).mean() for seed in range(50)]
            means.append(torch.stack(bounds).mean().item())
        self.assertEqual(means, sorted(means))
        first = log_likelihood(vae, images, 5)
        self.assertTrue(torch.equal(first, log_likelihood(vae, images, 5, seed=0)))
        self.assertFalse(torch.equal(first, log_likelihood(vae, images, 5, seed=1)))


class ModelTest(unittest.TestCase):
    def test_any_number_of_images_and_dimensions(self):
        for n, dim, hidden in ((2, 1, 16), (3, 2, 7), (5, 5, 193), (9, 1, None)):
            with self.subTest(n=n, dim=dim, hidden=hidden):
                images = bars(n)
                vae = VAE(images, dim, hidden)
                first, *_, last = train(vae, images, 100)
                self.assertLess(last.loss, first.loss)
                x_hat, mu, logvar = vae(images)
                self.assertEqual(x_hat.shape, (n, 1, 32, 32))
                self.assertEqual((mu.shape, logvar.shape), ((n, dim), (n, dim)))
                self.assertEqual(vae.reconstruct(images[:1]).shape, (1, 1, 32, 32))
                self.assertEqual(vae.sample(4).shape, (4, 1, 32, 32))
                self.assertEqual(log_likelihood(vae, images, 3).shape, (n,))

    def test_sizes(self):
        """`hidden` is what it says; left out, it grows with the images."""

        def size(n, hidden=None):
            return len(weights(VAE(bars(n), hidden=hidden)))

        self.assertLess(size(8, 7), size(8, 8))
        self.assertLess(size(100), size(1000))

    def test_encoder_sees_standardised_images(self):
        """Other brightness and contrast, in each pixel's own units, make no difference to it."""
        images = noise(9)
        pattern = torch.rand(1, 32, 32, generator=seeded(1))
        vae = VAE(images, hidden=16)
        other = VAE(0.5 * images + 0.5 * pattern, hidden=16)
        expected = vae.encoder(images)
        assert_close(other.encoder(0.5 * images + 0.5 * pattern), expected, rtol=1e-3, atol=1e-4)
        moved = vae.encoder(0.5 * images + 0.5 * pattern)
        self.assertGreater((moved[0] - expected[0]).abs().max(), 0.01)

    def test_standardised_input_is_of_the_order_of_one(self):
        images = 0.1 * noise(9) + 0.4
        vae = VAE(images, hidden=16)
        seen = []
        vae.encoder.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        vae.encoder(images)
        assert_close(seen[0].mean(0), torch.zeros(1, 32, 32), rtol=0, atol=1e-3)
        self.assertAlmostEqual(seen[0].std(0).mean().item(), 1, delta=0.1)

    def test_starts_at_the_mean_image(self):
        images = noise(9)
        samples = VAE(images).sample(100)
        self.assertLess((samples.mean(0) - images.mean(0)).abs().mean(), 0.05)

    def test_images_that_hardly_differ(self):
        """Identical ones, and grey ones of which one has a white pixel."""
        grey = torch.full((5, 1, 32, 32), 0.5)
        spotted = grey.clone()
        spotted[0, 0, 9, 9] = 1
        for name, images in (("equal", bars(1).repeat(5, 1, 1, 1)), ("spotted", spotted)):
            with self.subTest(name):
                vae = VAE(images, hidden=16)
                losses = [epoch.loss for epoch in train(vae, images, 200)]
                self.assertLess(max(losses), 1000)
                self.assertLess(losses[-1], 1)
                assert_close(vae.sample(3), images[1:4], rtol=0, atol=0.2)

    def test_reconstruction_is_the_decoded_mean(self):
        vae = VAE(bars(), 2, hidden=16)
        fix_posterior(vae, 3, 1.0)
        mu, _ = vae.encoder(bars())
        self.assertTrue(torch.equal(vae.reconstruct(bars()), vae.decoder(mu)))

    def test_random_state(self):
        """The global one is neither changed nor of effect; equal seeds give equal bits."""
        found = []
        for state in (1, 2):
            before = torch.manual_seed(state).get_state()
            vae = VAE(bars(), hidden=16, seed=3)
            list(train(vae, bars(), 3, batch_size=3, seed=4))
            numbers = [weights(vae), log_likelihood(vae, bars(), 3)]
            numbers += [vae.sample(9, method).flatten() for method in ("latin", "iid")]
            numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002  # that it is left alone
            self.assertTrue(torch.equal(torch.get_rng_state(), before))
            found.append((torch.cat(numbers), numpy_state))
        self.assertTrue(torch.equal(found[0][0], found[1][0]))
        self.assertTrue((found[0][1] == found[1][1]).all())

    def test_seeds_matter(self):
        first = VAE(bars(), hidden=16)
        self.assertTrue(torch.equal(weights(first), weights(VAE(bars(), hidden=16, seed=0))))
        second = VAE(bars(), hidden=16, seed=1)
        for name in ("encoder", "decoder"):
            one, two = getattr(first, name), getattr(second, name)
            self.assertFalse(torch.equal(weights(one), weights(two)), name)


class PriorTest(unittest.TestCase):
    def test_each_draw_is_standard_normal(self):
        for dim, method, n in itertools.product((1, 2, 3), ("latin", "iid"), (1, 7, 100)):
            draws = torch.stack([Latent(dim).sample(n, method, seed) for seed in range(200)])
            for name, z in (("all", draws.flatten(0, 1)), ("last", draws[:, -1])):  # (…, D)
                with self.subTest(dim=dim, method=method, n=n, draws=name):
                    self.assertGreater(kstest(z, "norm").pvalue.min(), 1e-3)

    def test_latin_has_one_point_in_each_share(self):
        for dim, n in ((1, 100), (2, 9), (3, 1), (5, 100)):
            z = Latent(dim).sample(n, "latin", seed=3).double()
            shares = (n * torch.special.ndtr(z)).long().sort(dim=0).values  # (n, D)
            with self.subTest(dim=dim, n=n):
                self.assertTrue((shares == torch.arange(n).unsqueeze(1)).all())

    def test_iid_is_left_to_chance(self):
        """The number of points in a third of the prior varies as that of independent draws."""
        z = torch.stack([Latent(1).sample(99, "iid", seed) for seed in range(400)])  # (400, 99, 1)
        counts = (torch.special.ndtr(z) < 1 / 3).sum((1, 2)).double()
        self.assertAlmostEqual(counts.var().item() / 22, 1, delta=0.2)  # 99 · 1/3 · 2/3

    def test_points_and_dimensions_are_independent(self):
        for method in ("latin", "iid"):
            z = torch.stack([Latent(3).sample(50, method, seed) for seed in range(200)])
            with self.subTest(method):
                self.assertLess((z[:, 1:] * z[:, :-1]).mean((0, 1)).abs().max(), 0.05)
                self.assertLess((z * z.roll(1, dims=2)).mean((0, 1)).abs().max(), 0.05)

    def test_seeds_and_methods(self):
        for dim, method in itertools.product((1, 2), ("latin", "iid")):
            with self.subTest(dim=dim, method=method):
                one = Latent(dim).sample(9, method, seed=7)
                self.assertTrue(torch.equal(one, Latent(dim).sample(9, method, seed=7)))
                self.assertFalse((one == Latent(dim).sample(9, method, seed=8)).any())
        default = Latent(2).sample(9)
        self.assertTrue(torch.equal(default, Latent(2).sample(9, "latin", 0)))
        self.assertRaisesRegex(ValueError, "'sobol'.*'latin'.*'iid'", Latent(2).sample, 5, "sobol")

    def test_line(self):
        """Middles of equal shares of the prior, along the first dimension alone."""
        latent = Latent(2)
        latent.prior_mu += torch.tensor([5.0, -5.0])
        latent.prior_logvar += torch.tensor([math.log(4), math.log(9)])
        z = latent.line(5)
        assert_close(Normal(5, 2).cdf(z[:, 0]), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
        assert_close(z[:, 1], torch.full((5,), -5.0))
        part = Normal(5, 2).cdf(latent.line(2, 0.2, 0.3)[:, 0])
        assert_close(part, torch.tensor([0.225, 0.275]))

    def test_samples_are_decoded_draws_from_the_stored_prior(self):
        vae = VAE(bars(), 2, hidden=16)
        vae.latent.prior_mu += torch.tensor([5.0, -5.0])
        vae.latent.prior_logvar += torch.tensor([math.log(4), math.log(9)])
        for method in ("latin", "iid"):
            z = vae.latent.sample(2000, method)
            assert_close(z.mean(0), torch.tensor([5.0, -5.0]), rtol=0, atol=0.2)
            assert_close(z.std(0), torch.tensor([2.0, 3.0]), rtol=0.1, atol=0)
            expected = vae.decoder(vae.latent.sample(20, method, 5))
            self.assertTrue(torch.equal(vae.sample(20, method, 5), expected), method)
        expected = vae.decoder(vae.latent.sample(20, "latin", 0))
        self.assertTrue(torch.equal(vae.sample(20), expected))


class TrainTest(unittest.TestCase):
    def test_losses_are_the_elbo(self):
        """Whatever the training weighs: sums over pixels and dimensions, means over the images,
        also where the last batch is smaller."""
        images = noise(40)
        for batch_size in (100, 15):
            vae = VAE(images, latent_dim=2, hidden=32)
            list(train(vae, images, 20))
            fix_posterior(vae, 1, -30.0)  # so z is mu, and nothing is left to chance
            mu, logvar = vae.encoder(images)
            posterior = Normal(mu.double(), (logvar.double() / 2).exp())
            kl = reference_kl(posterior, Normal(0, 1)).sum().item() / 40
            x_hat = vae.decoder(mu).detach().numpy().astype(np.float64)
            reconstruction = 0.5 * ((images.numpy() - x_hat) ** 2).sum() / 40
            losses = list(train(vae, images, 10, batch_size=batch_size, learning_rate=0.0))
            self.assertEqual(len(losses), 10)
            for epoch, found in enumerate(losses[4:], 4):  # those before are of wider posteriors
                with self.subTest(batch_size=batch_size, epoch=epoch):
                    self.assertEqual({type(value) for value in found}, {float})
                    self.assertAlmostEqual(found.reconstruction / reconstruction, 1, places=4)
                    self.assertAlmostEqual(found.kl / kl, 1, places=4)
                    self.assertAlmostEqual(found.loss, found.reconstruction + found.kl, places=3)

    def test_losses_are_of_draws_from_the_posterior(self):
        images = noise(20)
        vae = VAE(images, latent_dim=2, hidden=32)
        list(train(vae, images, 20))
        fix_posterior(vae, 1, 0.0)
        found = []
        for seed in range(100):
            _, last = train(vae, images, 2, seed=seed, learning_rate=0.0)
            found.append(last.loss)
        found = torch.tensor(found)  # (100,)
        expected = reference_elbo(vae, images, vae.decoder, draws=400)
        error = found.std().item() / 10
        self.assertGreater(error, 0.001)
        self.assertLess(abs(found.mean().item() - expected), 5 * error)

    def test_last_step_descends_the_elbo(self):
        """The gradients that it used are those of the −ELBO itself, in encoder and decoder."""
        images = noise(10)
        vae = VAE(images, latent_dim=2, hidden=16)
        fix_posterior(vae, 1, -30.0)
        list(train(vae, images, 40, learning_rate=0.0))
        found = [parameter.grad.clone() for parameter in vae.parameters()]
        mu, _ = vae.encoder(images)
        kl = 0.5 * mu.square().sum() / 10  # and what does not depend on the weights
        loss = 0.5 * (images - vae.decoder(mu)).square().sum() / 10 + kl
        assert_close(found, list(torch.autograd.grad(loss, list(vae.parameters()))))

    def test_each_term_weighs_one_in_every_epoch(self):
        """In its gradient, and for each dimension."""
        gradients = {"kl_divergence": [], "reconstruction_loss": []}

        def spy_on(name):
            term = getattr(vae_lib, name)

            def spied(*inputs):
                values = term(*inputs)
                values.register_hook(lambda gradient: gradients[name].append(gradient.sum(0)))
                return values

            return mock.patch.object(vae_lib, name, spied)

        with spy_on("kl_divergence"), spy_on("reconstruction_loss"):
            list(train(VAE(bars(), 2, hidden=16), bars(), 40, batch_size=3))
        for kl in gradients["kl_divergence"]:
            assert_close(kl, torch.ones(2))
        for reconstruction in gradients["reconstruction_loss"]:
            assert_close(reconstruction.sum(), torch.ones(()))

    def test_posteriors_are_wide_at_first(self):
        """From one place for all to one for each within 40 % of the epochs, in each dimension
        alike; after that they are the encoder's own."""
        for latent_dim, images in ((1, noise(8)), (2, noise(9))):
            vae = VAE(images, latent_dim, hidden=16)
            fix_posterior(vae, 0.2, -30.0)
            n = len(images)
            seen = []  # mu, logvar
            vae.latent.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs))
            list(train(vae, images, 10))
            for epoch, (mu, logvar, *_) in enumerate(seen):
                with self.subTest(latent_dim=latent_dim, epoch=epoch):
                    if epoch >= 4:
                        assert_close(logvar, torch.full((n, latent_dim), -30.0))
                        continue
                    places = n ** (epoch / 4 / latent_dim)
                    density = Normal(0, 1).log_prob(mu).exp()
                    share = 6 * torch.exp(0.5 * logvar) * density  # of the prior, (n, D)
                    assert_close(share * places, torch.ones_like(mu))

    def test_widen(self):
        mu = torch.tensor([[0.0, 0.0], [1.5, -1.5], [9.0, -99.0]])
        logvar = torch.tensor([[-30.0, 0.5], [-30.0, 0.5], [-30.0, 8.0]])
        found = torch.exp(0.5 * vae_lib.widen(mu, logvar, 10))  # (3, 2)
        density = math.exp(-0.5 * 1.5**2) / math.sqrt(2 * math.pi)
        assert_close(found[0, 0], torch.tensor(math.sqrt(2 * math.pi) / 60))
        assert_close(found[1, 0], torch.tensor(1 / (60 * density)))
        assert_close(found[:2, 1], torch.full((2,), math.exp(0.25)))  # wide enough
        assert_close(found[2, 0], torch.tensor(math.exp(1.5)))  # far out, where a place has no end
        assert_close(found[2, 1], torch.tensor(math.exp(4.0)))

    def test_batches(self):
        """Each epoch sees every image, in batches of the size asked for, a step for each."""
        images = noise(8)
        for batch_size, sizes in ((3, {3, 2}), (8, {8}), (100, {8})):
            vae = VAE(images, hidden=16)
            batches, steps = [], []
            vae.encoder.register_forward_hook(lambda *call, seen=batches: seen.append(call[1][0]))
            handle = register_optimizer_step_post_hook(lambda *_, seen=steps: seen.append(1))
            self.addCleanup(handle.remove)
            orders = set()
            for _ in train(vae, images, 4, batch_size=batch_size):
                with self.subTest(batch_size=batch_size):
                    self.assertEqual({len(batch) for batch in batches}, sizes)
                    self.assertEqual(len(steps), math.ceil(8 / batch_size))
                    seen = torch.cat(batches).sum((1, 2, 3))  # brightness tells the images apart
                    orders.add(tuple(seen.tolist()))
                    assert_close(seen.unique(), images.sum((1, 2, 3)))
                batches.clear()
                steps.clear()
            self.assertGreater(len(orders), 1)  # another order in each epoch
            handle.remove()

    def test_an_epoch_at_a_time(self):
        """The model has learnt what was yielded, so that an interrupt leaves it as it stands."""
        runs = []
        for stop in (3, 1):
            vae = VAE(bars(), hidden=16)
            states = [weights(vae)]
            losses = []
            for epoch in train(vae, bars(), 3):
                losses.append(epoch)
                states.append(weights(vae))
                if len(losses) == stop:
                    break
            self.assertTrue(torch.equal(weights(vae), states[-1]))
            runs.append((losses, states))
        (losses, states), (stopped_losses, stopped_states) = runs
        self.assertEqual(stopped_losses, losses[:1])
        self.assertTrue(torch.equal(stopped_states[1], states[1]))
        for before, after in itertools.pairwise(states):
            self.assertFalse(torch.equal(before, after))

    def test_seed_and_learning_rate(self):
        ends = []
        for options in ({}, {"seed": 0}, {"seed": 1}, {"learning_rate": 1e-3}):
            vae = VAE(bars(), hidden=16)
            list(train(vae, bars(), 2, **options))
            ends.append(weights(vae))
        self.assertTrue(torch.equal(ends[0], ends[1]))
        self.assertFalse(torch.equal(ends[0], ends[2]))
        self.assertFalse(torch.equal(ends[0], ends[3]))

    def test_settles(self):
        """The last epochs move the weights far less than the fastest does."""
        vae = VAE(bars(), hidden=16)
        states = [weights(vae)]
        for _ in train(vae, bars(), 60):
            states.append(weights(vae))
        moves = [(after - before).norm().item() for before, after in itertools.pairwise(states)]
        self.assertLess(moves[-1], 0.1 * max(moves))

    def test_another_encoder_in_place(self):
        class Convolutional(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(
                    nn.Conv2d(1, 8, 4, 2, 1),  # 32x32 => 16x16
                    nn.SiLU(),
                    nn.Conv2d(8, 16, 4, 2, 1),  # 16x16 => 8x8
                    nn.SiLU(),
                    nn.Flatten(),
                    nn.Linear(16 * 8 * 8, 128),
                    nn.SiLU(),
                    nn.Linear(128, 2),
                )

            def forward(self, x):
                mu, logvar = self.net(x).chunk(2, dim=1)
                return mu, logvar

        images = spots()
        vae = VAE(images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae.encoder = Convolutional()
        before = weights(vae.encoder)
        first, *_, last = train(vae, images, 1000)
        self.assertLess(last.loss, 0.25 * first.loss)
        self.assertFalse(torch.equal(before, weights(vae.encoder)))
        self.assertEqual(vae.reconstruct(images).shape, (20, 1, 32, 32))

    def test_diverged(self):
        broken = VAE(bars(), hidden=16)
        next(broken.decoder.parameters()).data.fill_(math.nan)
        for vae, rate in ((VAE(bars(), hidden=16), 1e6), (broken, 1e-3)):
            with self.assertRaisesRegex(FloatingPointError, "learning_rate"):
                list(train(vae, bars(), 30, learning_rate=rate))

    def test_images_out_of_range(self):
        vae = VAE(bars(), hidden=16)
        wrong = [torch.zeros(s) for s in ((1, 32, 32), (3, 1, 28, 28), (3, 3, 32, 32))]
        wrong += [bars()[:0], bars()[:1], 255 * bars(), bars() - 0.01, bars() / bars()]
        message = r"images are .* expected \(N, 1, 32, 32\)|pixels outside \[0, 1\]"
        for images in wrong:
            with self.subTest(tuple(images.shape)):
                self.assertRaisesRegex(ValueError, message, next, train(vae, images, 1))
                self.assertRaisesRegex(ValueError, message, VAE, images)

    def test_nothing_to_do(self):
        for options in ({"epochs": 0}, {"epochs": 3, "batch_size": 0}):
            epochs = train(VAE(bars(), hidden=16), bars(), **options)
            self.assertRaisesRegex(ValueError, "epochs .* batch_size .* 1 or more", next, epochs)

    def test_negative_seed(self):
        """Latin hypercubes take none, which must not come up after the training."""
        with self.assertRaisesRegex(ValueError, "seed is -1, expected 0 or more"):
            VAE(bars(), hidden=16, seed=-1)


class QualityTest(unittest.TestCase):
    """What a short training reaches: a broken one misses it by far."""

    @classmethod
    def setUpClass(cls):
        cls.images = spots()
        cls.vae = VAE(cls.images)
        list(train(cls.vae, cls.images, 400))
        cls.loss = reference_elbo(cls.vae, cls.images, cls.vae.decoder)

    def test_learns_the_images(self):
        """Naming one of 20 images takes ln 20 = 3.0 nats, showing all of them as their mean 32."""
        mean_image = reconstruction_loss(self.images, self.images.mean(0)).mean().item()
        self.assertGreater(mean_image, 30)
        self.assertLess(self.loss, 7)

    def test_best_decoder_is_no_worse(self):
        def decode(z):
            return best_decoder(z, *self.vae.encoder(self.images), self.images)

        best = reference_elbo(self.vae, self.images, decode)
        self.assertLess(best, self.loss + 0.01)
        self.assertGreater(best, math.log(20) - 0.5)

    def test_pixels_reach_0_and_1_and_stay_between(self):
        far = torch.tensor([[1e4], [-1e4], [-1e30], [1e30]])
        samples = self.vae.sample(100)
        pixels = torch.cat([samples, self.vae.decoder(far).detach()])
        self.assertEqual((samples.min(), samples.max()), (0, 1))
        self.assertEqual((pixels.min(), pixels.max()), (0, 1))


def chunk(name, data):
    """A PNG file's chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels, rows=32, depth=8, colour=0, extra=b""):
    """The bytes of a PNG file of `rows` equal rows, with a header that says 32×32."""
    header = struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0)
    stream = zlib.compress(rows * (b"\0" + pixels))
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def key(grey):
    """The chunk that makes one grey of an image transparent."""
    return chunk(b"tRNS", struct.pack(">H", grey))


def row(*pixels):
    return bytes(value for pixel in pixels for value in pixel)


RGB, PALETTE, RGBA = 2, 3, 6  # colour types of the PNG specification; 0 is grey
SHADES = bytes(range(0, 256, 8))  # a row of 32 pixels
REDS = row(*[(shade, 0, 0) for shade in SHADES])
OPAQUE = row(*[(shade, shade, shade, 255) for shade in SHADES])
CLEAR = row(*[(shade, shade, shade, 254) for shade in SHADES])
INDICES = bytes(range(32))  # into a palette of these shades, backwards
COLOURS = chunk(b"PLTE", row(*[(shade, shade, shade) for shade in SHADES[::-1]]))
DEEP = struct.pack(">32H", *[257 * shade + 1 for shade in SHADES])  # 1 more than 8 bits can say
TWELVE = struct.pack(">32H", *[16 * shade for shade in SHADES])
SOUND = png(SHADES)


class ImagesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="é漢 ")))

    def read(self, data):
        path = self.folder / "5.png"
        path.write_bytes(data)
        return vae_lib.read_image(path)

    def test_kinds(self):
        shades = torch.tensor(list(SHADES)) / 255
        steps = torch.tensor([0, 1, 0, 1]).float().repeat_interleave(8)
        for name, data, expected, tolerance in (
            ("8 bits", SOUND, shades, 1e-6),
            ("1 bit", png(b"\x00\xff\x00\xff", depth=1), steps, 1e-6),
            ("16 bits", png(DEEP, depth=16), shades + 1 / 65535, 1e-6),
            ("RGB", png(REDS, colour=RGB), 0.299 * shades, 0.5 / 255),
            ("opaque RGBA", png(OPAQUE, colour=RGBA), shades, 1e-6),
            ("palette", png(INDICES, colour=PALETTE, extra=COLOURS), shades.flip(0), 1e-6),
            ("unused transparent grey", png(SHADES, extra=key(7)), shades, 1e-6),
        ):
            with self.subTest(name):
                image = self.read(data)
                self.assertEqual(image.dtype, torch.float32)
                assert_close(image, expected.expand(1, 32, 32), rtol=0, atol=tolerance)

    def test_unfit(self):
        """Each is named, and what is wrong with it where a person can tell."""
        flipped = bytearray(SOUND)
        flipped[-20] ^= 1
        for name, data, words in (
            ("transparent pixels", png(CLEAR, colour=RGBA), "transparent"),
            ("transparent grey", png(SHADES, extra=key(8)), "transparent"),
            (
                "transparent grey, 16 bits",
                png(DEEP, depth=16, extra=key(257 * 8 + 1)),
                "transparent",
            ),
            ("12 bits in 16", png(TWELVE, depth=16), "16.bit.*3968"),
            ("a flipped bit", bytes(flipped), ""),
            ("end lost", SOUND[:-20], ""),
            ("empty", b"", ""),
            ("text", b"text", ""),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"5.png cannot.*{words}"):
                self.read(data)

    def test_other_size(self):
        path = self.folder / "5.png"
        Image.new("L", (32, 31)).save(path)
        self.assertRaisesRegex(ValueError, "5.png.*31×32.*32×32", vae_lib.read_image, path)

    def test_folder(self):
        """PNG files in name order; what is no PNG file by its name, or hidden, is passed over."""
        places = {"30.png": 0, "4.PNG": 2, "1.png": 1}
        for name, place in places.items():
            Image.fromarray((255 * bars(3)[place, 0]).byte().numpy()).save(self.folder / name)
        (self.folder / ".2.png").write_text("hidden")
        (self.folder / "2.txt").write_text("text")
        (self.folder / "2.png").mkdir()
        if hasattr(os, "mkfifo"):
            os.mkfifo(self.folder / "3.png")  # reading it would wait for ever
        self.assertTrue(torch.equal(load_images(self.folder), bars(3)[[1, 0, 2]]))
        self.assertTrue(torch.equal(load_images(str(self.folder)), bars(3)[[1, 0, 2]]))
        (self.folder / "5.png").write_bytes(SOUND[:-30])
        self.assertRaisesRegex(ValueError, "5.png", load_images, self.folder)

    def test_too_few(self):
        for n in (0, 1):
            with self.subTest(n=n):
                self.assertRaisesRegex(ValueError, f"{n} PNG.* two", load_images, self.folder)
            (self.folder / "1.png").write_bytes(SOUND)
