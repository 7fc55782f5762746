"""From a textbook VAE to this project's, one change at a time: the benchmark's section `ladder`.

A row is a set of switches, `Options`. `build` starts from the library's VAE and puts textbook parts
in the place of those that are switched off; `train` is the library's loop with the same switches.
With all of them on, both must equal the library, which `check_against_library` makes sure of.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist
from torch import nn

import vae_lib
from tools import measure

SIZE = vae_lib.SIZE
SEEDS = (1000, 1001, 1002)
TEXTBOOK_HIDDEN = 400  # as in pytorch/examples


@dataclass(frozen=True)
class Options:
    """The switches. As they stand here they describe the textbook VAE."""

    latent_dim: int = 20
    encoder_rate: float = 1e-3
    decoder_rate: float = 1e-3
    second_beta: float = 0.999  # of Adam, for the decoder
    encoder_schedule: str = "constant"  # of SCHEDULES, as the next one
    decoder_schedule: str = "constant"
    pairs: bool = False  # each draw z comes with 2 mu − z
    standardised: bool = False  # the encoder sees standardised pixels
    mean_start: bool = False  # the decoder starts at the mean image
    waves: bool = False  # the decoder sees z through waves
    own_layers: bool = False  # the library's layers: SiLU, its width, its depth
    stretched: bool = False  # outputs reach black and white
    wide: bool = False  # training keeps posteriors wide at first
    first_kl_weight: float = 1.0  # of the KL term, falling to 1 within 30 % of the epochs
    frozen_encoder: bool = False
    head_start: bool = False  # the images are laid on the line, not learnt


SCHEDULES = {  # what the first learning rate is multiplied by, in an epoch of so many
    "constant": lambda epoch, epochs: 1.0,
    "cosine": lambda epoch, epochs: 0.5 + 0.5 * math.cos(math.pi * epoch / epochs),
    "encoder's": vae_lib.encoder_factor,
    "decoder's": vae_lib.decoder_factor,
}
COSINE = {"encoder_schedule": "cosine", "decoder_schedule": "cosine"}
IN_TURN = {"encoder_schedule": "encoder's", "decoder_schedule": "decoder's"}

TEXTBOOK = Options()
CHANGES = [  # a row each: what is changed, to what
    ("two latent dimensions", {"latent_dim": 2}),
    ("one latent dimension", {"latent_dim": 1}),
    ("rates fall along a cosine", COSINE),
    ("standardised inputs, a start at the mean image", {"standardised": True, "mean_start": True}),
    ("the decoder sees z through waves", {"waves": True}),
    ("SiLU, two hidden layers in the decoder, 192 wide", {"own_layers": True}),
    ("outputs that reach black and white", {"stretched": True}),
    ("the decoder's rate 5e-3, the encoder's stays at a fifth of it", {"decoder_rate": 5e-3}),
    ("Adam averages the decoder's squared gradients over 20 steps", {"second_beta": 0.95}),
    ("each draw comes with its mirror image", {"pairs": True}),
    ("the encoder settles within 70 % of the training, and then the decoder", IN_TURN),
    ("posteriors are kept wide at first, from one place for all to one for each", {"wide": True}),
]
OURS = TEXTBOOK
for _, change in CHANGES:
    OURS = replace(OURS, **change)

CONTROLS = {
    "encoder frozen at its start": replace(OURS, frozen_encoder=True),
    "a KL weight that falls from 2.5 to 1, in place of wide posteriors": replace(
        OURS, wide=False, first_kl_weight=2.5
    ),
    "one draw a step": replace(OURS, pairs=False),
    "two latent dimensions": replace(OURS, latent_dim=2),
    "eight latent dimensions": replace(OURS, latent_dim=8),
    "head start: the order of scipy's optimal leaf ordering": replace(
        OURS,
        head_start=True,
        wide=False,  # the order is there already
        encoder_rate=7.5e-6,  # so slow that the images keep their places
    ),
}


class Decoder(nn.Module):
    """The library's decoder with switches for its waves and for the range of its outputs."""

    def __init__(self, options, net, frequencies):
        super().__init__()
        self.frequencies = nn.Parameter(frequencies, requires_grad=options.waves)  # (D, waves)
        self.net = net
        self.waves = options.waves
        self.stretched = options.stretched

    def forward(self, z):
        inputs = z  # (N, D)
        if self.waves:
            u = math.sqrt(3) * torch.erf(z / math.sqrt(2))  # (N, D)
            angle = u @ self.frequencies  # (N, waves)
            inputs = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1)  # (N, 2 · waves)
        x = torch.sigmoid(self.net(inputs))  # (N, 1024)
        if self.stretched:
            x = (1.2 * x - 0.1).clamp(0, 1)
        return x.unflatten(1, (1, SIZE, SIZE))


def textbook_encoder(latent_dim):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIZE * SIZE, TEXTBOOK_HIDDEN),
        nn.ReLU(),
        nn.Linear(TEXTBOOK_HIDDEN, 2 * latent_dim),
    )


def textbook_decoder(inputs):
    return nn.Sequential(
        nn.Linear(inputs, TEXTBOOK_HIDDEN),
        nn.ReLU(),
        nn.Linear(TEXTBOOK_HIDDEN, SIZE * SIZE),
    )


@torch.no_grad()
def build(images, options, seed):
    """A VAE with these switches, untrained."""
    dim = options.latent_dim
    vae = vae_lib.VAE(images, dim, seed=seed)
    frequencies = vae.decoder.frequencies.detach().clone()  # (D, waves)
    decoder_net = vae.decoder.net
    if not options.own_layers:
        inputs = 2 * frequencies.shape[1] if options.waves else dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae.encoder.net = textbook_encoder(dim)
            decoder_net = textbook_decoder(inputs)
    vae.decoder = Decoder(options, decoder_net, frequencies)
    if not options.standardised:
        vae.encoder.mean.zero_()
        vae.encoder.deviation.fill_(1)
    if options.own_layers and not options.wide:
        vae.encoder.net[-1].bias[dim:] += 2  # posteriors start as wide as the prior
    if options.mean_start:
        mean = images.mean(0).flatten().clamp(0.01, 0.99)  # (1024,), as a sigmoid never is 0 or 1
        if options.stretched:
            mean = (images.mean(0).flatten() + 0.1) / 1.2
        decoder_net[-1].bias.copy_(torch.logit(mean))
    if options.head_start:
        lay_out(vae, images)
    if options.frozen_encoder:
        vae.encoder.requires_grad_(False)
    return vae


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
    hidden_layers = vae.encoder.net[:-1]
    last = vae.encoder.net[-1]
    standardised = (images - vae.encoder.mean) / vae.encoder.deviation
    hidden = hidden_layers(standardised)  # (N, hidden)
    with_one = torch.cat([hidden, torch.ones(len(images), 1)], dim=1)
    fit = torch.linalg.lstsq(with_one, goal, driver="gelsd").solution  # (hidden + 1, 2)
    last.weight.copy_(fit[:-1].T)
    last.bias.copy_(fit[-1])


def train(vae, images, epochs, options, seed):
    """The library's loop with these switches, all images in each step: −ELBO of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(
        [
            {"params": vae.encoder.parameters(), "lr": options.encoder_rate},
            {
                "params": vae.decoder.parameters(),
                "lr": options.decoder_rate,
                "betas": (0.9, options.second_beta),
            },
        ]
    )
    encoder_factor = SCHEDULES[options.encoder_schedule]
    decoder_factor = SCHEDULES[options.decoder_schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        [lambda epoch: encoder_factor(epoch, epochs), lambda epoch: decoder_factor(epoch, epochs)],
    )
    losses = []
    for epoch in range(epochs):
        kl_weight = options.first_kl_weight ** max(0, 1 - epoch / (0.3 * epochs))
        x = images[torch.randperm(len(images), generator=generator)]
        mu, logvar = vae.encoder(x)  # (N, D) each
        places = vae_lib.number_of_places(epoch, epochs, len(images))
        if options.wide and places < len(images):
            logvar = vae_lib.widen(mu, logvar, places ** (1 / options.latent_dim))  # (N, D)
        z = vae.latent(mu, logvar, generator)  # (N, D)
        copies = 1
        if options.pairs:
            z = torch.cat([z, 2 * mu - z])  # (2N, D)
            copies = 2
        target = x.repeat(copies, 1, 1, 1)
        reconstruction = vae_lib.reconstruction_loss(target, vae.decoder(z)).mean()
        kl = vae_lib.kl_divergence(mu, logvar).sum(1).mean()
        loss = reconstruction + kl_weight * kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append((reconstruction + kl).item())
    return losses


def check_against_library(images, epochs=6, seed=0):
    """RuntimeError unless all switches together train as the library does."""
    vae = vae_lib.VAE(images, seed=seed)
    expected = [epoch.loss for epoch in vae_lib.train(vae, images, epochs, seed=seed)]
    found = train(build(images, OURS, seed), images, epochs, OURS, seed)
    if not np.allclose(found, expected, rtol=1e-4):
        what = "tools/ladder.py no longer trains as vae_lib.py does"
        raise RuntimeError(f"{what}: −ELBO {found}, expected {expected}; adapt its switches")


def run_row(options, seed, epochs, draws):
    """What a training with these switches gives; with options None, the library's own."""
    images = vae_lib.load_images(measure.TRAIN)
    with measure.Stopwatch() as watch:
        if options is None:
            vae = vae_lib.VAE(images, seed=seed)
            losses = measure.train(vae, images, epochs, seed)
        else:
            vae = build(images, options, seed)
            losses = train(vae, images, epochs, options, seed)
    loss = measure.final_loss(losses)
    run = {"seconds": watch.seconds, "loss": loss, "best": math.nan, "iid": math.nan}
    if math.isfinite(loss):
        run["best"] = measure.best_loss(vae, images)
        run["iid"] = float(np.mean(measure.Judge(images).draws(vae, "iid", draws)))
    return run


def list_rows():
    """The options of each row of both tables, {title: options}: the ladder, the controls."""
    ladder = {"textbook VAE, 20 latent dimensions": TEXTBOOK}
    options = TEXTBOOK
    for title, change in CHANGES[:-1]:
        options = replace(options, **change)
        ladder[title] = options
    ladder[f"{CHANGES[-1][0]}: **this project**"] = None
    return ladder, CONTROLS


def ladder(options):
    """From a textbook VAE to this one, a change at a time"""
    check_against_library(vae_lib.load_images(measure.TRAIN))
    steps, controls = list_rows()
    epochs, draws, seeds = measure.EPOCHS, 10, SEEDS
    if options.quick:
        epochs, draws, seeds = 20, 1, SEEDS[:1]
        first, *_, last = steps  # enough to see that it works
        steps = {first: steps[first], last: steps[last]}
        *_, last = controls
        controls = {last: controls[last]}
    everything = steps | {f"control: {title}": row for title, row in controls.items()}
    tasks = {}
    for title, row in everything.items():
        for seed in seeds:
            tasks[f"{title}, seed {seed}"] = (row, seed, epochs, draws)

    def code():
        files = ("vae_lib.py", "tools/measure.py", "tools/ladder.py")
        return f"{measure.fingerprint(*files)} {epochs}"

    def print_line(name, run):
        return f"{name}: −ELBO {run['loss']:.2f}, {run['seconds']:.0f} s"

    path = options.folder / "ladder.jsonl"
    runs = measure.resumable(path, code, run_row, tasks, print_line)

    def figures(title, key):
        return [runs[f"{title}, seed {seed}"][key] for seed in seeds]

    def table_of(titles, what):
        rows = []
        for title in titles:
            rows.append(
                [
                    title.removeprefix("control: "),
                    measure.mean_and_range(figures(title, "loss")),
                    measure.mean_and_range(figures(title, "best")),
                    measure.mean_and_range(figures(title, "iid")),
                    f"{np.mean(figures(title, 'seconds')):.0f}",
                ]
            )
        return measure.table([what, "−ELBO", "best decoder's", "iid, F", "seconds"], rows)

    titles = list(everything)
    note = f"""Each row keeps the changes above it. The textbook VAE: one hidden layer of
{TEXTBOOK_HIDDEN} ReLU units in the encoder and in the decoder, as in pytorch/examples; a sigmoid;
Adam with rate 1e-3; one draw a step; this project's objective. {epochs:,} epochs of all 100 digits
a step, {len(seeds)} seeds from {seeds[0]} on: mean (range) over runs; a run's iid is the mean of
{draws} draws. Best decoder's: −ELBO with the best of all decoders for the run's own posteriors. One
thread each, two runs at a time. The last row is the library's own `train`."""
    controls_note = """Controls: this project with one thing changed. The head start fits the
encoder to the order of scipy's `optimal_leaf_ordering` before training, six standard deviations to
an equal share of the prior; then its rate is 7.5e-6, and posteriors are its own throughout."""
    paragraphs = [
        note,
        table_of(titles[: len(steps)], "change"),
        controls_note,
        table_of(titles[len(steps) :], "control"),
    ]
    frozen = "control: encoder frozen at its start"
    if frozen in titles:
        cost = np.mean(figures(frozen, "loss")) - np.mean(figures(titles[len(steps) - 1], "loss"))
        verdict = "kept" if cost >= 2 else "**not kept**"
        paragraphs.append(
            f"""What the encoder learns is worth {cost:.1f} nats, the frozen one's −ELBO less ours;
bound set beforehand: 2 or more, {verdict}."""
        )
    return paragraphs
