"""Tests of the model and its maths against closed forms, references and known answers."""

import itertools
import math
import unittest

import numpy as np
import torch
from scipy.stats import kstest
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

from vae_lib import (
    VAE,
    Latent,
    best_decoder,
    kl_divergence,
    kl_parts,
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


def fix_posterior(vae, logvar):
    """Let the encoder give this logvar for all images; mu stays its own."""

    def changed(module, inputs, outputs):
        mu, _ = outputs
        return mu, torch.full_like(mu, logvar)

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

    def test_several_draws_are_spread_evenly(self):
        """Of four draws, one lies in each quarter of the posterior, in every dimension; by
        themselves and together they follow it."""
        mu, logvar = torch.randn(2, 5000, 2, generator=seeded(0))
        z = Latent(2)(mu, logvar, seeded(1), draws=4).unflatten(0, (4, 5000))  # (4, N, L)
        epsilon = ((z - mu) / (logvar / 2).exp()).double()
        quarters = (4 * torch.special.ndtr(epsilon)).long().sort(0).values
        self.assertTrue((quarters == torch.arange(4).view(4, 1, 1)).all())
        for some in (*epsilon, epsilon.flatten(0, 1)):  # (N, L)
            self.assertGreater(kstest(some, "norm").pvalue.min(), 1e-3)
            self.assertLess(some.T.corrcoef()[0, 1].abs(), 0.05)

    def test_best_decoder_is_the_weighted_average(self):
        """By brute force: one z, one image, one dimension at a time. Far from all images, where
        densities underflow, the widest posterior says which image it is."""
        images = torch.rand(4, 1, 32, 32, generator=seeded(0))
        for dim in (1, 2):
            z = torch.randn(5, dim, generator=seeded(1))
            mu = torch.randn(4, dim, generator=seeded(2))
            logvar = torch.randn(4, dim, generator=seeded(3))
            found = best_decoder(z, mu, logvar, images)
            self.assertEqual(found.shape, (5, 1, 32, 32))
            for k in range(5):
                densities = [
                    math.prod(
                        Normal(mu[i, d], math.exp(logvar[i, d] / 2)).log_prob(z[k, d]).exp().item()
                        for d in range(dim)
                    )
                    for i in range(4)
                ]
                average = sum(densities[i] * images[i] for i in range(4)) / sum(densities)
                with self.subTest(dim=dim, z=k):
                    assert_close(found[k], average, rtol=1e-4, atol=1e-4)
        mu = torch.tensor([[-1.0], [0.0], [1.0]])
        logvar = torch.tensor([[-9.0], [-5.0], [-9.0]])
        found = best_decoder(torch.tensor([[-50.0], [50.0]]), mu, logvar, images[:3])
        assert_close(found, images[1].expand(2, 1, 32, 32))

    def test_the_two_parts_of_kl(self):
        """By quadrature, and by answers that are known."""
        mu = torch.tensor([[-1.0], [-0.2], [1.5]])
        logvar = torch.tensor([[-2.0], [-1.0], [0.0]])
        grid = torch.linspace(-9, 9, 4001)  # (4001,)
        log_q_x = Normal(mu, (logvar / 2).exp()).log_prob(grid)  # (3, 4001)
        log_q = log_q_x.exp().mean(0).log()  # (4001,)
        expected = torch.trapezoid(log_q_x.exp() * (log_q_x - log_q), grid).mean()
        z = Latent(1)(mu, logvar, seeded(0), draws=100_000)
        information, marginal_kl = kl_parts(z, mu, logvar)
        self.assertAlmostEqual(information.item(), expected.item(), delta=0.01)
        expected = torch.trapezoid(log_q.exp() * (log_q - Normal(0, 1).log_prob(grid)), grid)
        self.assertAlmostEqual(marginal_kl.item(), expected.item(), delta=0.01)

        mu = torch.tensor([[-60.0, 5.0], [0.0, 0.0], [60.0, 5.0]])
        logvar = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 0.0]])
        z = Latent(2)(mu, logvar, seeded(0), draws=20_000)
        information, marginal_kl = kl_parts(z, mu, logvar)
        kl = kl_divergence(mu, logvar).sum(1).mean()
        assert_close(information, torch.tensor(math.log(3)), rtol=0.02, atol=0)  # they are apart
        self.assertAlmostEqual(marginal_kl.item() / (kl.item() - math.log(3)), 1, delta=1e-3)

        z = torch.randn(52, 3, generator=seeded(0))
        for part in kl_parts(z, torch.zeros(4, 3), torch.zeros(4, 3)):
            assert_close(part, torch.tensor(0.0))

    def test_log_likelihood_by_quadrature(self):
        """The mean of p(x|z) over a grid's cells, which are equally likely by the prior."""
        images = bars(3)
        vae = VAE(images, hidden=32)
        list(train(vae, images, 60))
        z = torch.special.ndtri((torch.arange(4000) + 0.5) / 4000).unsqueeze(1)  # (4000, 1)
        x_hat = vae.decoder(z).detach()
        darker = 0.7 * images  # which it cannot draw
        for image, found in zip(darker, log_likelihood(vae, darker), strict=True):
            terms = -reconstruction_loss(image, x_hat)
            expected = terms.logsumexp(0).item() - math.log(4000)
            self.assertAlmostEqual(found.item(), expected, delta=0.2)
        few = log_likelihood(vae, images, 5)
        self.assertFalse(torch.equal(few, log_likelihood(vae, images, 5, seed=1)))


class PriorTest(unittest.TestCase):
    def test_each_draw_is_standard_normal(self):
        for method, n in itertools.product(("latin", "iid"), (1, 7, 100)):
            draws = torch.stack([Latent(2).sample(n, method, seed) for seed in range(200)])
            for name, z in (("all", draws.flatten(0, 1)), ("last", draws[:, -1])):  # (…, L)
                with self.subTest(method=method, n=n, draws=name):
                    self.assertGreater(kstest(z, "norm").pvalue.min(), 1e-3)

    def test_dimensions_are_independent(self):
        for method in ("latin", "iid"):
            z = Latent(2).sample(2000, method)  # (2000, 2)
            self.assertLess(z.T.corrcoef()[0, 1].abs(), 0.1, method)

    def test_latin_has_one_point_in_each_share(self):
        for dim, n in ((1, 100), (2, 9), (3, 1)):
            z = Latent(dim).sample(n, "latin", seed=3).double()
            shares = (n * torch.special.ndtr(z)).long().sort(dim=0).values  # (n, L)
            with self.subTest(dim=dim, n=n):
                self.assertTrue((shares == torch.arange(n).unsqueeze(1)).all())

    def test_iid_is_left_to_chance(self):
        """The number of points in a third of the prior varies as that of independent draws."""
        z = torch.stack([Latent(1).sample(99, "iid", seed) for seed in range(400)])  # (400, 99, 1)
        counts = (torch.special.ndtr(z) < 1 / 3).sum((1, 2)).double()
        self.assertAlmostEqual(counts.var().item() / 22, 1, delta=0.2)  # 99 · 1/3 · 2/3

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
            expected = vae.decoder(vae.latent.sample(20, method, np.int64(5)))
            self.assertTrue(torch.equal(vae.sample(20, method, 5), expected), method)
            self.assertFalse(torch.equal(vae.sample(20, method, 6), expected), method)
        expected = vae.decoder(vae.latent.sample(20, "latin", 0))
        self.assertTrue(torch.equal(vae.sample(20), expected))
        self.assertRaisesRegex(ValueError, "'sobol'.*'latin'.*'iid'", vae.sample, 5, "sobol")


class ModelTest(unittest.TestCase):
    def test_any_number_of_images_and_dimensions(self):
        for n, dim, hidden in ((2, 1, 16), (3, 2, 7), (5, 5, 129)):
            with self.subTest(n=n, dim=dim, hidden=hidden):
                images = bars(n)
                vae = VAE(images, dim, hidden)
                first, *_, last = train(vae, images, 100, batch_size=2)
                self.assertLess(last.loss, first.loss)
                mu, logvar = vae.encoder(images)
                self.assertEqual((mu.shape, logvar.shape), ((n, dim), (n, dim)))
                drawn = vae.decoder(vae.latent(mu, logvar, seeded(0)))
                assert_close(vae(images, seeded(0)), (drawn, mu, logvar))
                self.assertEqual(drawn.shape, (n, 1, 32, 32))
                assert_close(vae.reconstruct(images), vae.decoder(mu))
                self.assertEqual(vae.sample(4).numpy().shape, (4, 1, 32, 32))
                self.assertEqual(log_likelihood(vae, images, 3).shape, (n,))

    def test_starts_at_the_mean_image_with_narrow_posteriors(self):
        images = noise(9)
        vae = VAE(images, 2)
        self.assertLess((vae.sample(100).mean(0) - images.mean(0)).abs().mean(), 0.05)
        found = VAE(bars(3)[:2]).sample(100).mean(0)  # one part stays black
        self.assertLess((found - bars(3)[:2].mean(0)).abs().mean(), 0.1)
        mu, logvar = vae.encoder(images)
        self.assertLess(mu.abs().max(), 2)
        self.assertLess((logvar + 4).abs().max(), 2)

    def test_encoder_sees_principal_components(self):
        """Uncorrelated, the largest first, of one size whatever the contrast; few
        images keep their distances."""

        def seen(images):
            found = []
            vae = VAE(images, hidden=16)
            vae.encoder.net.register_forward_pre_hook(lambda net, call: found.append(call[0]))
            vae.encoder(images)
            return found[0]  # (N, 128)

        for images in (noise(9), 0.4 + 0.01 * noise(9), bars(), noise(300)):
            y = seen(images)
            squares = y.T @ y  # (128, 128)
            x = (images - images.mean(0)).flatten(1)  # (N, 1024)
            expected = np.linalg.eigvalsh((x.T @ x).double())[::-1][:128]
            found = squares.diagonal()
            assert_close(squares, found.diag(), rtol=0, atol=1e-3 * found.max().item())
            assert_close(
                found / found[0], torch.tensor(expected / expected[0]).float(), rtol=0, atol=1e-3
            )
            if len(images) < 128:
                self.assertAlmostEqual(found.sum().item() / len(images), 256, places=2)
                assert_close(torch.pdist(y) / y.norm(), torch.pdist(x) / x.norm())

    def test_neighbours_on_the_line_can_differ(self):
        """However many there are."""
        vae = VAE(noise(300))
        x = vae.decoder(vae.latent.line(300)).detach().flatten(1)  # (300, 1024)
        beside = (x[1:] - x[:-1]).norm(dim=1).mean()
        self.assertGreater(beside / torch.pdist(x).mean(), 0.3)

    def test_a_pixel_that_was_cut_off_learns_on(self):
        vae = VAE(bars(), hidden=16)
        with torch.no_grad():
            vae.decoder.pixels.bias.copy_(torch.linspace(-3, 3, 1024))
        x_hat = vae.decoder(torch.zeros(1, 1))
        reconstruction_loss(torch.full_like(x_hat, 0.5), x_hat).sum().backward()
        assert_close(vae.decoder.pixels.bias.grad, x_hat.detach().flatten() - 0.5)

    def test_random_state(self):
        """The global one is neither changed nor of effect; equal seeds give equal bits, others
        give others."""
        found = []
        for state, seed in ((1, 4), (2, np.int64(4)), (1, 5)):
            before = torch.manual_seed(state).get_state()
            vae = VAE(bars(), hidden=16, seed=seed)
            start = weights(vae)
            list(train(vae, bars(), 3, batch_size=3, seed=seed))
            found.append(torch.cat([start, weights(vae), log_likelihood(vae, bars(), 3)]))
            self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertTrue(torch.equal(found[0], found[1]))
        self.assertLess((found[0] == found[2]).float().mean(), 0.2)
        vae = VAE(bars(), hidden=16, seed=4)
        list(train(vae, bars(), 3, batch_size=3, seed=5))
        self.assertFalse(torch.equal(weights(vae), found[0][len(start) : 2 * len(start)]))

    def test_unfit_images_and_settings(self):
        vae = VAE(bars(), hidden=16)
        shapes = [torch.zeros(s) for s in ((1, 32, 32), (3, 1, 28, 28), (3, 3, 32, 32))]
        shapes += [bars()[:0], bars()[:1]]
        types = [bars().byte(), bars().half()]
        values = [255 * bars(), bars() - 0.01, bars() / bars()]
        equal = [bars()[:1].repeat(3, 1, 1, 1)]
        for wrong, message in (
            ([bars().numpy()], "images are of type ndarray, expected a torch.Tensor"),
            (shapes, r"images are .* expected \(2 or more, 1, 32, 32\)"),
            (types, r"images are torch\.\w+, expected torch.float32"),
            (values, r"NaN or pixels outside \[0, 1\]"),
            (equal, "all images are the same"),
        ):
            for images in wrong:
                with self.subTest(message, shape=tuple(images.shape)):
                    self.assertRaisesRegex(ValueError, message, next, train(vae, images, 1))
                    self.assertRaisesRegex(ValueError, message, VAE, images)
        for options in ({"epochs": 0}, {"epochs": 3, "batch_size": 1}):
            epochs = train(vae, bars(), **options)
            self.assertRaisesRegex(ValueError, "epochs .* batch_size .* 2 or more", next, epochs)
        for sizes in ((0, 16), (1, 0)):
            self.assertRaisesRegex(ValueError, "latent_dim .* hidden", VAE, bars(), *sizes)
        for method in ("latin", "iid"):  # each whole number is a seed
            self.assertEqual(len(vae.sample(5, method, -1)), 5)

    def test_the_model_follows_its_images(self):
        """In double precision, or where torch's default is that."""
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        for default, dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
            torch.set_default_dtype(default)
            images = bars().to(dtype)
            vae = VAE(images, hidden=16)
            list(train(vae, images, 2))
            for found in (*vae(images), vae.sample(3), vae.sample(3, "iid")):
                self.assertEqual(found.dtype, dtype)


class TrainTest(unittest.TestCase):
    def test_losses_are_the_elbo(self):
        """Whatever the training weighs: sums over pixels and dimensions, means over the images,
        also where the last batch is smaller."""
        images = noise(40)
        for batch_size in (None, 15):
            vae = VAE(images, latent_dim=2, hidden=32)
            list(train(vae, images, 20))
            fix_posterior(vae, -30.0)  # so z is mu, and nothing is left to chance
            mu, logvar = vae.encoder(images)
            posterior = Normal(mu.double(), (logvar.double() / 2).exp())
            kl = reference_kl(posterior, Normal(0, 1)).sum().item() / 40
            x_hat = vae.decoder(mu).detach().numpy().astype(np.float64)
            reconstruction = 0.5 * ((images.numpy() - x_hat) ** 2).sum() / 40
            for found in train(vae, images, 10, batch_size=batch_size, learning_rate=0.0):
                with self.subTest(batch_size=batch_size):
                    self.assertEqual({type(value) for value in found}, {float})
                    self.assertAlmostEqual(found.reconstruction / reconstruction, 1, places=4)
                    self.assertAlmostEqual(found.kl / kl, 1, places=4)
                    self.assertAlmostEqual(found.loss, found.reconstruction + found.kl, places=3)
                    parts = found.information + found.marginal_kl
                    self.assertAlmostEqual(found.kl, parts, places=3)
                    self.assertLessEqual(found.information, math.log(40) + 1e-3)

    def test_losses_are_of_draws_from_the_posterior(self):
        images = noise(20)
        vae = VAE(images, latent_dim=2, hidden=32)
        list(train(vae, images, 20))
        fix_posterior(vae, 0.0)
        found = []
        for seed in range(100):
            (losses,) = train(vae, images, 1, seed=seed, learning_rate=0.0)
            found.append(losses.loss)
        found = torch.tensor(found)  # (100,)
        expected = reference_elbo(vae, images, vae.decoder, draws=400)
        error = found.std().item() / 10
        self.assertGreater(error, 0.001)
        self.assertLess(abs(found.mean().item() - expected), 5 * error)

    def test_first_step_spreads_and_last_step_descends_the_elbo(self):
        """The gradients that steps use: at first the marginal KL costs much, at the end the loss
        is −ELBO itself. Posteriors are narrow, so that z is mu."""
        images = noise(10)
        for epochs, weight in ((1, 11), (40, 1)):
            vae = VAE(images, latent_dim=2, hidden=16)
            fix_posterior(vae, -14.0)
            list(train(vae, images, epochs, learning_rate=0.0))
            found = [parameter.grad.clone() for parameter in vae.parameters()]
            mu, _ = vae.encoder(images)
            kl = weight * 0.5 * mu.square().sum() / 10  # and what does not depend on the weights
            reconstruction = 0.5 * (images - vae.decoder(mu)).square().sum() / 10
            expected = torch.autograd.grad(reconstruction + kl, list(vae.parameters()))
            with self.subTest(epochs=epochs):
                assert_close(found, list(expected), rtol=0.02, atol=0.02)

    def test_batches(self):
        """Each epoch sees every image, in batches about as large as asked for, none of which holds
        an image alone, in another order."""
        images = noise(8)
        for batch_size, sizes in ((3, {3, 2}), (7, {4}), (8, {8}), (None, {8})):
            vae = VAE(images, hidden=16)
            batches = []
            vae.encoder.register_forward_hook(lambda *call, seen=batches: seen.append(call[1][0]))
            orders = set()
            for _ in train(vae, images, 4, batch_size=batch_size):
                self.assertEqual({len(batch) for batch in batches}, sizes)
                seen = torch.cat(batches).sum((1, 2, 3))  # brightness tells the images apart
                orders.add(tuple(seen.tolist()))
                assert_close(seen.unique(), images.sum((1, 2, 3)))
                batches.clear()
            self.assertGreater(len(orders), 1)

    def test_an_epoch_at_a_time(self):
        """The model has learnt what was yielded, so that an interrupt leaves it as it stands, in
        steps that end small."""
        runs = []
        for stop in (20, 1):
            vae = VAE(bars(), hidden=16)
            states = [weights(vae)]
            for epoch, _ in enumerate(train(vae, bars(), 20), 1):
                states.append(weights(vae))
                if epoch == stop:
                    break
            self.assertTrue(torch.equal(weights(vae), states[-1]))
            runs.append(states)
        self.assertTrue(torch.equal(runs[0][1], runs[1][1]))
        steps = [(b - a).abs().max().item() for a, b in itertools.pairwise(runs[0])]
        self.assertGreater(min(steps), 0)
        self.assertLess(steps[-1], 0.3 * steps[0])

    def test_diverged(self):
        broken = VAE(bars(), hidden=16)
        next(broken.decoder.parameters()).data.fill_(math.nan)
        for vae, rate in ((VAE(bars(), hidden=16), 1e6), (broken, 1e-3)):
            with self.assertRaisesRegex(FloatingPointError, "learning_rate"):
                list(train(vae, bars(), 30, learning_rate=rate))


class QualityTest(unittest.TestCase):
    """What a short training reaches: a broken one misses it by far."""

    @classmethod
    def setUpClass(cls):
        cls.images = spots()
        cls.vae = VAE(cls.images)
        cls.losses = list(train(cls.vae, cls.images, 400))

    def test_learns_the_images(self):
        """Naming one of 20 images takes ln 20 = 3.0 nats, showing all of them as their mean 32;
        the best decoder is no worse than ours."""
        loss = reference_elbo(self.vae, self.images, self.vae.decoder)
        self.assertLess(loss, 3.6)  # 3.3 to 3.5 with other seeds
        self.assertAlmostEqual(self.losses[-1].loss, loss, delta=0.5)

        def decode(z):
            return best_decoder(z, *self.vae.encoder(self.images), self.images)

        best = reference_elbo(self.vae, self.images, decode)
        self.assertLess(best, loss + 0.01)
        self.assertGreater(best, math.log(20) - 0.5)

    def test_images_spread_evenly(self):
        """Each has a piece of the line; at the end z tells nearly which image it came from."""
        mu, _ = self.vae.encoder(self.images)
        share = torch.special.ndtr(mu[:, 0]).sort().values  # (20,)
        between = 20 * (share[2:] - share[:-2]) / 2
        self.assertGreater(between.min().item(), 0.2)
        self.assertGreater(self.losses[-1].information, math.log(20) - 0.5)
        self.assertLess(self.losses[-1].marginal_kl, 0.7)

    def test_pixels_reach_0_and_1_and_stay_between(self):
        far = torch.tensor([[1e4], [-1e4], [-1e30], [1e30]])
        samples = self.vae.sample(100)
        pixels = torch.cat([samples, self.vae.decoder(far).detach()])
        self.assertEqual((samples.min(), samples.max()), (0, 1))
        self.assertEqual((pixels.min(), pixels.max()), (0, 1))
