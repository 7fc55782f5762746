"""This project beside others: the benchmark's sections `quality` and `distance`."""

import contextlib
import math
import subprocess
import sys
import time
import timeit
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import vae_lib
from tests.fid import frechet_distance, imagenet_features
from tools import ladder, measure

# Other models after equal times of training

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of which each tuned peer gets its best
SEEDS = (1000, 1001, 1002)


@dataclass(frozen=True)
class Peer:
    """A model to compare with, and how it is trained."""

    build: callable  # images, seed -> a model with loss(x) and sample(n, method, seed)
    loss: str
    batch_size: int = 100
    rate: float | None = None  # None: the best of RATES, falling along a cosine; else constant


class WithLoss(nn.Module):
    """A VAE of the library's parts with this project's objective."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.sample = vae.sample

    def loss(self, x):
        x_hat, mu, logvar = self.vae(x)
        kl = vae_lib.kl_divergence(mu, logvar).sum(1)
        return (vae_lib.reconstruction_loss(x, x_hat) + kl).mean()


class Convolutional(nn.Module):
    """A decoder of transposed convolutions that adds its output to the mean image."""

    def __init__(self, images):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 192),
            nn.SiLU(),
            nn.Linear(192, 512),
            nn.Unflatten(1, (32, 4, 4)),
            nn.SiLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),  # 4×4 => 8×8
            nn.SiLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),  # 8×8 => 16×16
            nn.SiLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),  # 16×16 => 32×32
        )
        self.mean = nn.Parameter(torch.logit((images.mean(0) + 0.1) / 1.2))  # (1, 32, 32)

    def forward(self, z):
        x = 1.2 * torch.sigmoid(self.net(z) + self.mean) - 0.1
        return x.clamp(0, 1)


def convolutional(images, seed):
    vae = vae_lib.VAE(images, latent_dim=2, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae.encoder.net = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1),  # 32×32 => 16×16
            nn.SiLU(),
            nn.Conv2d(8, 16, 4, 2, 1),  # 16×16 => 8×8
            nn.SiLU(),
            nn.Conv2d(16, 32, 4, 2, 1),  # 8×8 => 4×4
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(512, 4),
        )
        vae.decoder = Convolutional(images)
    return WithLoss(vae)


def pytorch_example(latent_dim):
    options = ladder.Options(latent_dim=latent_dim)

    def build(images, seed):
        return WithLoss(ladder.build(images, options, seed))

    return build


class Pythae(nn.Module):
    """pythae's VAE of its default layers, with its own loss."""

    def __init__(self, latent_dim):
        super().__init__()
        from pythae.models import VAE, VAEConfig

        self.model = VAE(VAEConfig(input_dim=(1, 32, 32), latent_dim=latent_dim))
        self.prior = vae_lib.Latent(latent_dim)

    def loss(self, x):
        return self.model({"data": x}).loss

    @torch.no_grad()
    def sample(self, n, method, seed):
        return self.model.decoder(self.prior.sample(n, method, seed)).reconstruction


def pythae(latent_dim):
    def build(images, seed):
        return Pythae(latent_dim)

    return build


OURS = "this project"
PEERS = {
    "small convolutional VAE, D = 2": Peer(convolutional, "ours"),
    "pytorch/examples VAE, D = 20": Peer(pytorch_example(20), "ours"),
    "pytorch/examples VAE, D = 2": Peer(pytorch_example(2), "ours"),
    "pythae VAE, defaults, D = 10": Peer(pythae(10), "its own", batch_size=64, rate=1e-4),
    "pythae VAE, D = 2": Peer(pythae(2), "its own"),
}


def train_peer(peer, images, rate, seconds, seed):
    """Train for some seconds, the rate falling along a cosine of the time: the model, epochs, and
    the seconds that it took."""
    torch.manual_seed(seed)  # pythae draws from the global generator; this process is ours
    model = peer.build(images, seed)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    start = time.perf_counter()
    epochs = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        if peer.rate is None:
            for group in optimiser.param_groups:
                group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * elapsed / seconds))
        for x in images[torch.randperm(len(images))].split(peer.batch_size):
            optimiser.zero_grad()
            model.loss(x).backward()
            optimiser.step()
        epochs += 1
    return model, epochs, elapsed


def train_ours(images, seconds, seed):
    """The library's training, of as many epochs as fit, by a short trial: the model, epochs, and
    the seconds that it took."""
    start = time.perf_counter()
    trial = 0
    for _ in vae_lib.train(vae_lib.VAE(images, seed=seed), images, measure.EPOCHS, seed=seed):
        trial += 1
        if time.perf_counter() - start > seconds / 10:
            break
    a_trial_epoch = (time.perf_counter() - start) / trial
    epochs = max(1, round(seconds / a_trial_epoch))
    vae = vae_lib.VAE(images, seed=seed)
    with measure.Stopwatch() as watch:
        measure.train(vae, images, epochs, seed)
    return vae, epochs, watch.seconds


def try_rate(name, rate, seconds, draws):
    """The mean iid figure of a peer trained on the holdout images, which no other section uses."""
    images = vae_lib.load_images(measure.HOLDOUT)
    model, _, _ = train_peer(PEERS[name], images, rate, seconds, seed=0)
    return float(np.mean(measure.Judge(images).draws(model, "iid", draws)))


def compare(name, rate, seconds, seed, draws):
    """What a training gives: {iid: mean figure, latin: mean figure, epochs, seconds}."""
    images = vae_lib.load_images(measure.TRAIN)
    if name == OURS:
        model, epochs, taken = train_ours(images, seconds, seed)
    else:
        model, epochs, taken = train_peer(PEERS[name], images, rate, seconds, seed)
    judge = measure.Judge(images)
    run = {"epochs": epochs, "seconds": taken}
    for method in ("iid", "latin"):
        run[method] = float(np.mean(judge.draws(model, method, draws)))
    return run


def quality(options):
    """Other models after equal times of training"""
    seconds, rates, seeds, draws = 30, RATES, SEEDS, 5
    if options.quick:
        seconds, rates, seeds, draws = 1, RATES[1:2], SEEDS[:1], 1
    trials = {}
    for name, peer in PEERS.items():
        if peer.rate is None:
            for rate in rates:
                trials[name, rate] = (name, rate, seconds / 3, min(3, draws))
    tried = dict(measure.side_by_side(try_rate, trials))
    chosen = {}
    for name, peer in PEERS.items():
        chosen[name] = peer.rate
        if peer.rate is None:
            figures = {rate: tried[name, rate] for rate in rates}
            chosen[name] = min(figures, key=figures.get)
    tasks = {}
    for name in (OURS, *PEERS):
        for seed in seeds:
            tasks[name, seed] = (name, chosen.get(name), seconds, seed, draws)
    runs = dict(measure.side_by_side(compare, tasks))
    rows = []
    for name in (OURS, *PEERS):
        ours = name == OURS
        of_name = [runs[name, seed] for seed in seeds]
        row = [name, "ours" if ours else PEERS[name].loss]
        row.append("the library's" if ours else f"{chosen[name]:.0e}")
        for method in ("iid", "latin"):
            row.append(measure.mean_and_range([run[method] for run in of_name]))
        row.append(f"{np.mean([run['epochs'] for run in of_name]):,.0f}")
        row.append(f"{np.mean([run['seconds'] for run in of_name]):.1f}")
        rows.append(row)
    rows.append(["a memoriser", "–", "–", "1.00", "0.00", "–", "–"])
    judge = measure.Judge(vae_lib.load_images(measure.TRAIN))
    holdout = judge(vae_lib.load_images(measure.HOLDOUT))
    tried_rates = ", ".join(f"{rate:.0e}" for rate in rates)
    header = ["model", "loss", "rate", "iid, F", "latin, F", "epochs", "seconds"]
    return [
        """Memorisation is what this score rewards, and it is no peer's aim: the table says which
model copies 100 images best in equal time, not which is the better model.""",
        measure.table(header, rows),
        f"""Mean (range) over {len(seeds)} runs from seed {seeds[0]} on, each the mean of {draws}
draws; the holdout images have {holdout:.2f} F. {seconds} s of training on one thread, two at a
time. Each peer's rate falls along a cosine and is the best of {tried_rates},
chosen by iid draws after a third of the time on the holdout digits; pythae's defaults stay as they
are (a constant rate, batches of 64). This project trains with its own defaults, its number of
epochs planned by a trial of a tenth of the time, which is not counted. Loss: pythae's own has the
same formula as ours; the example's is ours in place of its cross-entropy, with its sigmoid. The
convolutional VAE is our own: 8, 16, 32 channels, SiLU, the mean image added to its output, and
outputs that reach black and white.""",
    ]


# The Fréchet distance of other libraries

LIMIT = 10  # seconds; a library that took longer is not asked for more images


def by_torchmetrics(mu1, sigma1, mu2, sigma2):
    from torchmetrics.image.fid import _compute_fid

    moments = [torch.from_numpy(moment) for moment in (mu1, sigma1, mu2, sigma2)]
    return float(_compute_fid(*moments))


def by_torch_fidelity(mu1, sigma1, mu2, sigma2):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first = {"mu": mu1, "sigma": sigma1}
    second = {"mu": mu2, "sigma": sigma2}
    return fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]


def by_pytorch_fid(mu1, sigma1, mu2, sigma2):
    from pytorch_fid.fid_score import calculate_frechet_distance

    return calculate_frechet_distance(mu1, sigma1, mu2, sigma2)


def by_clean_fid(mu1, sigma1, mu2, sigma2):
    from cleanfid.fid import frechet_distance as clean_distance

    return clean_distance(mu1, sigma1, mu2, sigma2)


LIBRARIES = {
    "torchmetrics": by_torchmetrics,
    "torch-fidelity": by_torch_fidelity,
    "pytorch-fid": by_pytorch_fid,
    "clean-fid": by_clean_fid,
}


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def by_turns(first, second):
    """Median seconds and results of two functions, called in turns of 0.2 s until the second has
    had half a second: slow spells of the machine then meet both."""
    functions = (first, second)
    times = ([], [])
    results = [None, None]
    while sum(times[1]) < 0.5:
        for i, function in enumerate(functions):
            time.sleep(0.05)  # threads of the libraries that the other one used still spin
            end = time.perf_counter() + 0.2
            while time.perf_counter() < end:
                start = time.perf_counter()
                results[i] = function()
                times[i].append(time.perf_counter() - start)
    return np.median(times[0]), np.median(times[1]), results


def compare_distance(real, fake, library):
    """Seconds of ours and of the library's, and their relative disagreement."""

    def ours():
        return frechet_distance(real, fake)

    def theirs():
        return LIBRARIES[library](*moments(real), *moments(fake))

    with contextlib.redirect_stdout(None):  # some print warnings
        LIBRARIES[library](*moments(real[:, :8]), *moments(fake[:, :8]))  # imports what it needs
        own_seconds, seconds, (own, other) = by_turns(ours, theirs)
    return own_seconds, seconds, abs(other / own - 1)


EVALUATOR = """import sys, time
start = time.perf_counter()
from tests.fid import fid
middle = time.perf_counter()
fid(*sys.argv[1:], "imagenet")
print(middle - start, time.perf_counter() - middle)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""


def evaluator_note(repeats):
    """A paragraph on how long the whole evaluator takes, in new processes."""
    command = [sys.executable, "-c", EVALUATOR, str(measure.TRAIN), str(measure.HOLDOUT)]
    outputs = []
    for _ in range(repeats):
        outputs.append(subprocess.check_output(command, cwd=measure.ROOT).split())
    imports, whole, kibibytes = np.median(np.array(outputs, dtype=float), axis=0)
    images = vae_lib.load_images(measure.TRAIN)
    imagenet_features(images)  # loads the network
    features = np.median(timeit.repeat(lambda: imagenet_features(images), number=1))
    return f"""`fid('data/train', 'data/holdout', 'imagenet')`, 200 PNG files: {whole:.2f} s in a
new process after {imports:.1f} s of imports, peak memory {kibibytes * 1024 / 1e6:.0f} MB; medians
of {repeats}. Features of 100 images on {torch.get_num_threads()} threads in steady state:
{features:.2f} s."""


def distance(options):
    """The Fréchet distance of other libraries, and the whole evaluator"""
    widths, counts, repeats = (128, 1280, 2048), (100, 500, 2000), 3
    if options.quick:
        widths, counts, repeats = (128,), (100, 500), 1
    generator = np.random.default_rng(0)
    rows = []
    ratios = {}
    for d in widths:
        slow = set()
        for n in counts:
            noise = generator.standard_normal((2, n, d))
            real = np.maximum(noise[0] + 0.1, 0)  # (n, d), as features are after a ReLU
            fake = np.maximum(noise[1] - 0.1, 0)
            own_times = []
            cells = []
            ratios[d, n] = []
            for library in LIBRARIES:
                if library in slow:
                    cells.append("–")
                    continue
                own, seconds, off = compare_distance(real, fake, library)
                own_times.append(1e3 * own)
                ratios[d, n].append(seconds / own)
                cells.append(f"{1e3 * seconds:,.1f} ms ({seconds / own:,.1f}×), {off:.0e}")
                if seconds > LIMIT:
                    slow.add(library)
            ours = f"{min(own_times):.3g}–{max(own_times):.3g} ms"
            rows.append([d, f"{n:,}", ours, *cells])
    few = ratios[widths[-1], counts[0]]
    many = []
    for d in widths:
        many += ratios[d, counts[-1]]
    sentence = f"""With {counts[0]} images and {widths[-1]:,} features the others take
{min(few):,.0f} to {max(few):,.0f} times as long as ours, with {counts[-1]:,} images only
{min(many):.1f} to {max(many):.1f} times: the gain is one of small sets."""
    note = f"""Two sets of n synthetic features of width d in float64; the others' time includes
means and covariances, which ours does not need. Ours: the range over the turns with the others.
Theirs: time (multiple of ours), relative disagreement; medians of the calls in half a second, by
turns with ours, or of one call. A dash: fewer images took over {LIMIT} s."""
    table = measure.table(["d", "n", "ours", *LIBRARIES], rows)
    return [sentence, table, note, evaluator_note(repeats)]
