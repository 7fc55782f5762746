"""This project with one thing changed: the benchmark's section `changes`.

A row is this project with some names of its library replaced by others: {name: replacement}.
"""

from functools import partial

import torch

import vae_lib
from tools import measure


class WideEncoder(vae_lib.Encoder):
    """Its posteriors start about as wide as the prior, as they do in a textbook VAE."""

    def __init__(self, images, latent_dim, hidden):
        super().__init__(images, latent_dim, hidden)
        with torch.no_grad():
            self.net[-1].bias[latent_dim:] += 4


class PixelEncoder(vae_lib.Encoder):
    """It sees pixels, divided by one standard deviation for all of them."""

    def __init__(self, images, latent_dim, hidden):
        super().__init__(images, latent_dim, hidden)
        self.components = torch.eye(32 * 32) / images.std(0).mean()
        self.net[0] = torch.nn.Linear(32 * 32, hidden)


class DecoderWithoutWaves(vae_lib.Decoder):
    """Its network sees z itself in place of each wave."""

    def forward(self, z):
        x = self.pixels(vae_lib.SCALE * self.net(z.expand(-1, 2 * vae_lib.WAVES)))  # (N, 1024)
        with torch.no_grad():  # as vae_lib.Decoder does
            x.clamp_(0, 1)
        return x.unflatten(1, (1, 32, 32))


class CutOffDecoder(vae_lib.Decoder):
    """Pixels that were cut off get no gradient."""

    def forward(self, z):
        x = super().forward(z)
        return torch.where((x > 0) & (x < 1), x, x.detach())


def independent_noise(n, shape, generator=None):
    return torch.randn(n, *shape, generator=generator)


def mean_over_pixels(x, x_hat):
    return 0.5 * (x - x_hat).square().mean((-3, -2, -1))


def twenty_epochs(vae, images, epochs, *, seed, train=vae_lib.train):
    return train(vae, images, 20, seed=seed)


def from_a_half(progress):
    return 0.5 + 0.5 * min(1, 1.5 * progress)


def free_for_longer(progress):
    return min(1, max(0, (progress - 0.7) / 0.2))


PIXELS = {"vae_lib.Encoder": PixelEncoder}
LONGER = {"vae_lib.information_weight": free_for_longer}
WIDE = {"vae_lib.Encoder": WideEncoder}
CUT_OFF = {"vae_lib.Decoder": CutOffDecoder}
INDEPENDENT = {"vae_lib.even_noise": independent_noise}

CONTROLS = {  # of each subject
    "digits": {
        "this project": {},
        "the encoder sees pixels": PIXELS,
        "posteriors start as wide as the prior": WIDE,
    },
    "dimmed digits": {
        "this project": {},
        "the encoder sees pixels": PIXELS,
        "information weighs 0.5 at first": {"vae_lib.information_weight": from_a_half},
        "information is free for the first 70 %": LONGER,
        "posteriors start as wide as the prior": WIDE,
        "no gradient where a pixel was cut off": CUT_OFF,
    },
    "faces": {"this project": {}, "posteriors start as wide as the prior": WIDE},
    "text": {"this project": {}, "no gradient where a pixel was cut off": CUT_OFF},
    "photographs": {"this project": {}, "four draws independent of each other": INDEPENDENT},
    "mixed crops": {
        "this project": {},
        "the encoder sees pixels": PIXELS,
        "information is free for the first 70 %": LONGER,
        "four draws independent of each other": INDEPENDENT,
    },
}
EXERCISES = {  # of the notebook, which says what to change
    "1. two latent dimensions": {"vae_lib.VAE": partial(vae_lib.VAE, latent_dim=2)},
    "2. the mean over pixels in place of the sum": {
        "vae_lib.reconstruction_loss": mean_over_pixels
    },
    "3. z itself for the decoder, no waves": {"vae_lib.Decoder": DecoderWithoutWaves},
    "4. 20 epochs": {"vae_lib.train": twenty_epochs},
    "5. weights of KL that stay as they start": {
        "vae_lib.information_weight": lambda progress: 0,
        "vae_lib.marginal_weight": lambda progress: 11,
    },
}


TABLES = {
    "control": {
        f"{subject}: {control}": (subject, replaced)
        for subject, controls in CONTROLS.items()
        for control, replaced in controls.items()
    },
    "exercise": {row: ("digits", replaced) for row, replaced in EXERCISES.items()},
}


def train_row(what, row, epochs, draws):
    """Train and measure a row of a table: {column: number}."""
    subject, replaced = TABLES[what][row]
    images = measure.load_subject(subject)
    return measure.train_and_measure(images, epochs, measure.FIRST_SEED, draws, replaced)


def changes(options):
    """Two tables: details of the training, and the notebook's exercises."""
    tasks = {}
    for what, rows in TABLES.items():
        for row in rows:
            tasks[what, row] = (what, row, options.epochs, options.draws)
    measured = measure.side_by_side(train_row, tasks)
    columns = ["−ELBO", "best decoder's", "worst reconstruction", "iid, F", "latin, F"]
    tables = []
    for what, rows in TABLES.items():
        tables.append(measure.table(what, {row: [measured[what, row]] for row in rows}, columns))
    return tables
