"""From a textbook VAE to this project's, one change at a time: the benchmark's section `ladder`.

A row of the table is a set of parts that are missing. `build` puts textbook parts in their places,
and `train` is the library's own, with some of its names replaced meanwhile.
"""

import math
import time
from unittest import mock

import torch
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist
from torch import nn

import vae_lib
from tools import measure

# The parts that the textbook VAE lacks, in the order in which the ladder adds them.
PARTS = {
    "one dimension": "one latent dimension",
    "standardised": "standardised inputs, a start at the mean image",
    "waves": "the decoder sees z through waves",
    "layers": "SiLU, layers 128 wide, three in the decoder; outputs that reach black and white",
    "rates": "rates that start higher and fall, the encoder's sooner; Adam forgets sooner",
    "weights": "information and gaps have weights that fade",
    "draws": "four draws of z for each image a step",
    "narrow": "posteriors start narrow: **this project**",
}
CONTROLS = (
    "encoder frozen at its start",
    "one weight for all of KL, rising from 0 to 1 over 90 %",
    "information weighs 1 throughout",
    "information weighs 0 at first",
    "one draw of z for each image a step",
    "a small convolutional encoder",
    "places given: scipy's optimal leaf ordering",
    "no gradient where a pixel was cut off",
    "this project, on text",
    "no gradient where a pixel was cut off, on text",
    "this project, on faces",
    "information weighs 1 throughout, on faces",
    "posteriors that start as wide as the prior, on faces",
)
EXERCISES = (  # of the notebook, which says what to change
    "1. two latent dimensions",
    "2. the mean over pixels in place of the sum",
    "3. z itself for the decoder, no waves",
    "4. 20 epochs",
    "5. weights of KL that stay as they start",
)


class Waves(nn.Module):
    """The inputs of the library's decoder: z (N, L) -> sines and cosines (N, 2 · WAVES)."""

    def __init__(self, waves):
        super().__init__()
        self.register_buffer("waves", waves)  # (L, WAVES)

    def forward(self, z):
        angle = 2 * math.pi * torch.special.ndtr(z) @ self.waves  # (N, WAVES)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def textbook_decoder(inputs, first):
    """As in pytorch/examples: one hidden layer of 400, ReLU, a sigmoid."""
    return nn.Sequential(
        first,
        nn.Linear(inputs, 400),
        nn.ReLU(),
        nn.Linear(400, 1024),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 32, 32)),
    )


def feed_with_z(decoder):
    """Let the network of the library's decoder see z (N, 1) itself in place of each wave."""
    seen = []
    decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    decoder.net.register_forward_pre_hook(
        lambda module, inputs: seen.pop().expand(-1, 2 * vae_lib.WAVES)
    )


def stop_at_the_edge(decoder, inputs, x):
    """A hook: what the decoder gives, without gradients of pixels that were cut off."""
    return torch.where((x > 0) & (x < 1), x, x.detach())


@torch.no_grad()
def build(images, missing, seed):
    """A VAE without the `missing` parts, untrained."""
    dim = 20 if "one dimension" in missing else 1
    vae = vae_lib.VAE(images, dim, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "layers" in missing:
            layers = [nn.Linear(1024, 400), nn.ReLU(), nn.Linear(400, 2 * dim)]
            vae.encoder.net = nn.Sequential(nn.Flatten(), *layers)
            if "waves" in missing:
                vae.decoder = textbook_decoder(dim, nn.Identity())
            else:
                vae.decoder = textbook_decoder(2 * vae_lib.WAVES, Waves(vae.decoder.waves))
            if "standardised" not in missing:
                mean = images.mean(0).flatten().clamp(0.01, 0.99)  # a sigmoid is never 0 or 1
                vae.decoder[3].bias.copy_(torch.logit(mean))
    if "standardised" in missing:
        vae.encoder.mean.zero_()
        vae.encoder.deviation.fill_(1)
    if "narrow" in missing and "layers" not in missing:
        start_wide(vae)
    return vae


@torch.no_grad()
def start_wide(vae):
    """Let posteriors start about as wide as the prior, as they do in a textbook VAE."""
    vae.encoder.net[-1].bias[len(vae.latent.prior_mu) :] += 4


def train(vae, images, epochs, missing, seed, **replaced):
    """The library's training without the `missing` parts; `replaced` names of it are others."""
    options = {}
    if "rates" in missing:
        options["learning_rate"] = 1e-3
        replaced["encoder_rate"] = replaced["decoder_rate"] = lambda progress: 1.0
    if "draws" in missing:
        replaced["DRAWS"] = 1
    if "weights" in missing:
        replaced["information_weight"] = replaced["gaps_weight"] = lambda progress: 1.0
    adam = torch.optim.Adam

    def forgetful_or_not(groups, lr, betas, **more):
        return adam(groups, lr, betas=(0.9, 0.999) if "rates" in missing else betas, **more)

    with (
        mock.patch.dict(vars(vae_lib), replaced),
        mock.patch.object(torch.optim, "Adam", forgetful_or_not),
    ):
        measure.train(vae, images, epochs, seed, **options)


def build_control(images, title, seed):
    """The VAE of a control, untrained, and what is replaced in its training."""
    vae = vae_lib.VAE(images, 2 if "two latent dimensions" in title else 1, seed=seed)
    replaced = {}
    if title.startswith("encoder frozen"):
        vae.encoder.requires_grad_(False)
    if title.startswith("no gradient"):
        vae.decoder.register_forward_hook(stop_at_the_edge)
    if title.startswith("posteriors that start"):
        start_wide(vae)
    if title.startswith("one weight"):
        replaced["information_weight"] = lambda progress: min(1, progress / 0.9)
        replaced["gaps_weight"] = replaced["information_weight"]
    if title.startswith("information weighs 1"):
        replaced["information_weight"] = lambda progress: 1.0
    if title.startswith("information weighs 0"):
        replaced["information_weight"] = lambda progress: min(1, progress / 0.9)
    if title.startswith("one draw"):
        replaced["DRAWS"] = 1
    if "convolutional" in title:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae.encoder.net = convolutional()
    if title.startswith("places given"):
        lay_out(vae, images)
        replaced["information_weight"] = replaced["gaps_weight"] = lambda progress: 1.0
        replaced["encoder_rate"] = lambda progress: 0.0015  # images keep their places
    if "mean over pixels" in title:
        replaced["reconstruction_loss"] = lambda x, x_hat: (
            0.5 * (x - x_hat).square().mean((-3, -2, -1))
        )
    if "no waves" in title:
        feed_with_z(vae.decoder)
    if "stay as they start" in title:
        replaced["information_weight"] = lambda progress: 0.5
        replaced["gaps_weight"] = lambda progress: 11.0
    return vae, replaced


def convolutional():
    """mu and logvar of one latent dimension from standardised images (N, 1, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1),  # 32×32 => 16×16
        nn.SiLU(),
        nn.Conv2d(8, 16, 4, 2, 1),  # 16×16 => 8×8
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 128),
        nn.SiLU(),
        nn.Linear(128, 2),
    )


@torch.no_grad()
def lay_out(vae, images):
    """Fit the encoder so that the images lie in the order of scipy's optimal leaf ordering, at the
    middles of equal shares of the prior, six standard deviations to a share."""
    x = images.flatten(1).numpy()
    distances = pdist(x)
    order = leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))
    rank = torch.from_numpy(order.argsort())  # of each image, (N,)
    mu = torch.special.ndtri((rank + 0.5) / len(images))  # (N,)
    density = torch.exp(-0.5 * mu.square()) / math.sqrt(2 * math.pi)
    share = 1 / (len(images) * density)  # the width of a share, (N,)
    goal = torch.stack([mu, 2 * torch.log(share / 6)], dim=1).float()  # mu and logvar, (N, 2)
    standardised = (images - vae.encoder.mean) / vae.encoder.deviation
    hidden = vae.encoder.net[:-1](standardised)  # (N, hidden)
    with_one = torch.cat([hidden, torch.ones(len(images), 1)], dim=1)
    fit = torch.linalg.lstsq(with_one, goal, driver="gelsd").solution  # (hidden + 1, 2)
    vae.encoder.net[-1].weight.copy_(fit[:-1].T)
    vae.encoder.net[-1].bias.copy_(fit[-1])


def run_row(title, missing, seed, epochs, draws):
    """What a training gives: of the ladder, or of a control or an exercise if `title` is one."""
    subject = title.split(", on ")[1] if ", on " in title else "digits"
    images = measure.load_subject(subject)
    start = time.perf_counter()
    if title in CONTROLS + EXERCISES:
        epochs = 20 if "20 epochs" in title else epochs
        vae, replaced = build_control(images, title, seed)
        train(vae, images, epochs, (), seed, **replaced)
    else:
        vae = build(images, missing, seed)
        train(vae, images, epochs, missing, seed)
    seconds = time.perf_counter() - start
    loss, best = measure.final_losses(vae, images)
    return {"loss": loss, "best": best, "seconds": seconds} | measure.figures(vae, images, draws)


def ladder(options):
    """Three tables: from a textbook VAE to this one, controls, the notebook's exercises."""
    missing = list(PARTS)
    rows = {"textbook VAE, 20 latent dimensions": tuple(missing)}
    for title in PARTS.values():
        missing = missing[1:]
        rows[title] = tuple(missing)
    steps = list(rows)
    rows |= dict.fromkeys(CONTROLS + EXERCISES, ())
    tasks = {}
    for title, parts in rows.items():
        tasks[title] = (title, parts, measure.FIRST_SEED, options.epochs, options.draws)
    runs = measure.side_by_side(run_row, tasks)

    def table_of(titles, what):
        lines = []
        for title in titles:
            cells = [f"{runs[title][key]:.2f}" for key in ("loss", "best", "iid", "latin")]
            lines.append([title, *cells, f"{runs[title]['seconds']:.0f}"])
        header = [what, "−ELBO", "best decoder's", "iid, F", "latin, F", "seconds"]
        return measure.table(header, lines)

    tables = {"change": steps, "control": CONTROLS, "exercise": EXERCISES}
    return [table_of(titles, what) for what, titles in tables.items()]
