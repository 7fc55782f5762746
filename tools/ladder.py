"""From a textbook VAE to this project's, one change at a time: the benchmark's section `ladder`.

A row is this project with some names of its library replaced by others: {name: replacement}.
"""

from functools import partial

import torch
from torch import nn

import vae_lib
from tools import measure


class TextbookEncoder(nn.Module):
    """As in pytorch/examples: one hidden layer of 400 ReLU units, images as they are."""

    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        layers = [nn.Linear(1024, 400), nn.ReLU(), nn.Linear(400, 2 * latent_dim)]
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x):
        return self.net(x).chunk(2, dim=1)


class TextbookDecoder(nn.Module):
    """As in pytorch/examples: one hidden layer of 400 ReLU units, a sigmoid."""

    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        layers = [nn.Linear(latent_dim, 400), nn.ReLU(), nn.Linear(400, 1024), nn.Sigmoid()]
        self.net = nn.Sequential(*layers, nn.Unflatten(1, (1, 32, 32)))

    def forward(self, z):
        return self.net(z)


class TextbookAdam(torch.optim.Adam):
    """Adam with its own betas and a rate of 1e-3."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, 1e-3)


class WideEncoder(vae_lib.Encoder):
    """Its posteriors start about as wide as the prior, as they do in a textbook VAE."""

    def __init__(self, images, latent_dim, hidden):
        super().__init__(images, latent_dim, hidden)
        with torch.no_grad():
            self.net[-1].bias[latent_dim:] += 4


class FrozenEncoder(vae_lib.Encoder):
    def __init__(self, images, latent_dim, hidden):
        super().__init__(images, latent_dim, hidden)
        self.requires_grad_(False)


class ConvolutionalEncoder(vae_lib.Encoder):
    def __init__(self, images, latent_dim, hidden):
        super().__init__(images, latent_dim, hidden)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1),  # 32×32 => 16×16
            nn.SiLU(),
            nn.Conv2d(8, 16, 4, 2, 1),  # 16×16 => 8×8
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * 8 * 8, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_dim),
        )


class DecoderWithoutWaves(vae_lib.Decoder):
    """Its network sees z itself in place of each wave."""

    def forward(self, z):
        x = torch.sigmoid(self.net(z.expand(-1, 2 * vae_lib.WAVES)))  # (N, 1024)
        x = (1 + 2 * vae_lib.STRETCH) * x - vae_lib.STRETCH
        x = x + (x.clamp(0, 1) - x).detach()  # gradients pass as if nothing were cut off
        return x.unflatten(1, (1, 32, 32))


class CutOffDecoder(vae_lib.Decoder):
    """Pixels that were cut off get no gradient."""

    def forward(self, z):
        x = super().forward(z)
        return torch.where((x > 0) & (x < 1), x, x.detach())


def always(value):
    return lambda progress: value


def weights(information, marginal):
    return {"vae_lib.information_weight": information, "vae_lib.marginal_weight": marginal}


def rising(progress):
    return min(1, progress / 0.9)


def mean_over_pixels(x, x_hat):
    return 0.5 * (x - x_hat).square().mean((-3, -2, -1))


def twenty_epochs(vae, images, epochs, *, seed, train=vae_lib.train):
    return train(vae, images, 20, seed=seed)


INFORMATION_1 = {"vae_lib.information_weight": always(1)}
INFORMATION_HALF = {"vae_lib.information_weight": lambda progress: 0.5 + 0.5 * rising(progress)}
WIDE = {"vae_lib.Encoder": WideEncoder}
CUT_OFF = {"vae_lib.Decoder": CutOffDecoder}
STAY = weights(always(vae_lib.information_weight(0)), always(vae_lib.marginal_weight(0)))

TEXTBOOK = "textbook VAE, 20 latent dimensions"
CHANGES = {  # each with what the rows above it have in its place
    "one latent dimension": {"vae_lib.VAE": partial(vae_lib.VAE, latent_dim=20)},
    "standardised inputs, SiLU, layers 128 wide, three in the decoder, which starts at the mean "
    "image and reaches black and white": {
        "vae_lib.Encoder": TextbookEncoder,
        "vae_lib.Decoder": TextbookDecoder,
    },
    "the decoder sees z through waves": {"vae_lib.Decoder": DecoderWithoutWaves},
    "rates that start higher and fall, the encoder's sooner; Adam forgets sooner": {
        "torch.optim.Adam": TextbookAdam,
        "vae_lib.encoder_rate": always(1),
        "vae_lib.decoder_rate": always(1),
    },
    "information and marginal KL have weights that fade": weights(always(1), always(1)),
    "four draws of z for each image a step": {"vae_lib.DRAWS": 1},
    "posteriors start narrow: **this project**": WIDE,
}
CONTROLS = {  # of each subject
    "digits": {
        "encoder frozen at its start": {"vae_lib.Encoder": FrozenEncoder},
        "a small convolutional encoder": {"vae_lib.Encoder": ConvolutionalEncoder},
        "one draw of z for each image a step": {"vae_lib.DRAWS": 1},
        "one weight for all of KL, rising from 0 to 1 over 90 %": weights(rising, rising),
    },
    "dimmed digits": {
        "this project": {},
        "posteriors start as wide as the prior": WIDE,
        "no gradient where a pixel was cut off": CUT_OFF,
        "information weighs 1 throughout": INFORMATION_1,
        "information weighs 0.5 at first, 1 from 90 % on": INFORMATION_HALF,
    },
    "faces": {"this project": {}, "posteriors start as wide as the prior": WIDE},
    "text": {"this project": {}, "no gradient where a pixel was cut off": CUT_OFF},
}
EXERCISES = {  # of the notebook, which says what to change
    "1. two latent dimensions": {"vae_lib.VAE": partial(vae_lib.VAE, latent_dim=2)},
    "2. the mean over pixels in place of the sum": {
        "vae_lib.reconstruction_loss": mean_over_pixels
    },
    "3. z itself for the decoder, no waves": {"vae_lib.Decoder": DecoderWithoutWaves},
    "4. 20 epochs": {"vae_lib.train": twenty_epochs},
    "5. weights of KL that stay as they start": STAY,
}


def ladder_rows():
    """{row: what is replaced}, from the textbook VAE, where all is, to this project."""
    rows = {}
    replaced = {}
    for change, textbook in reversed(CHANGES.items()):
        rows[change] = replaced
        replaced = replaced | textbook
    rows[TEXTBOOK] = replaced
    return dict(reversed(rows.items()))


TABLES = {"change": {row: ("digits", replaced) for row, replaced in ladder_rows().items()}}
TABLES["control"] = {
    f"{subject}: {control}": (subject, replaced)
    for subject, controls in CONTROLS.items()
    for control, replaced in controls.items()
}
TABLES["exercise"] = {row: ("digits", replaced) for row, replaced in EXERCISES.items()}


def train_row(what, row, epochs, draws):
    """Train and measure a row of a table: {column: number}."""
    subject, replaced = TABLES[what][row]
    images = measure.load_subject(subject)
    return measure.train_and_measure(images, epochs, measure.FIRST_SEED, draws, replaced)


def ladder(options):
    """Three tables: from a textbook VAE to this one, controls, the notebook's exercises."""
    tasks = {}
    for what, rows in TABLES.items():
        for row in rows:
            tasks[what, row] = (what, row, options.epochs, options.draws)
    measured = measure.side_by_side(train_row, tasks)
    columns = ["−ELBO", "best decoder's", "worst reconstruction", "iid, F", "latin, F", "seconds"]
    tables = []
    for what, rows in TABLES.items():
        tables.append(measure.table(what, {row: [measured[what, row]] for row in rows}, columns))
    return tables
