"""The evaluator: Fréchet distance between two folders of 32×32 PNG images.

    python -m tests.fid data/train data/holdout                        the FID of two folders
    python -m tests.fid data/train data/holdout --features inception   by the Inception network
    python -m tests.fid --references data/train data/holdout           yardsticks to read it by

Two feature networks can be asked for by name, and their figures are not comparable:

- `inception`: the FID of the literature (Heusel et al. 2017), 2048 features of the 2015-12-05
  Inception network as torch-fidelity builds it. Its weights are the file that
  `FID_INCEPTION_WEIGHTS` names, else torch-fidelity's own, downloaded once to torch's hub folder.
- `digits`: the embedded network `digit_features.pth`, trained by `data/make_data.py` on MNIST
  digits that are in neither data/train nor data/holdout. Its unit: 100 fresh real digits drawn at
  random are 50 away from a balanced set of 100, on average; a copy is 0 away.
- `auto`: `inception` where its weights are there or can be fetched at once, else `digits`.
"""

import argparse
import functools
import hashlib
import http.client
import math
import os
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SIZE = 32  # height and width of every image, in pixels
DIGIT_WEIGHTS = Path(__file__).with_name("digit_features.pth")
INCEPTION_SHA256_PREFIX = "6726825d"  # the digits in the published file's name
FEATURES = ("auto", "digits", "inception")


# ---- images --------------------------------------------------------------------------------


def read_png(path):
    """One PNG file as grey, (32, 32) uint8: colour by ITU-R 601 weights, 16 bits scaled to 8.

    Raises ValueError, naming the file, for anything that is not a sound, opaque 32×32 PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:  # reads the header only: no bomb goes off
            size = image.size
            if size == (SIZE, SIZE):
                image.verify()  # the checksum of every chunk, which decoding alone does not look at
        if size == (SIZE, SIZE):
            with (
                Image.open(path, formats=["PNG"]) as image,
                Image.open(path, formats=["PNG"]) as again,
            ):
                again.im = Image.new(again.mode, size, 1).im  # not black where rows are missing
                if image.tobytes() != again.tobytes():
                    raise ValueError("its rows end early")
                deep = image.mode.startswith("I")  # 16-bit grey; convert("L") would clip it at 255
                flat = image.convert("RGBA") if image.has_transparency_data else image
                if flat is not image and (deep or flat.getextrema()[3][0] < 255):
                    raise ValueError("transparent pixels have no defined grey: flatten them")
                if deep:
                    return np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
                return np.asarray(flat.convert("L"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist or is a broken link: remove it or put it back"
        ) from None
    except Exception as error:  # Pillow raises over ten different types on damaged files
        raise ValueError(f"{path} is not a sound PNG ({error}): replace it") from error
    raise ValueError(f"{path} is {size[1]}×{size[0]}, expected {SIZE}×{SIZE}: pad or resize it")


def read_folder(folder):
    """All PNG files of a folder in name order, (n, 1, 32, 32) float32, k/255 for each pixel.

    Other files (`.gitkeep`, `Thumbs.db`, …) are passed over. Raises FileNotFoundError for a missing
    folder, ValueError for one of fewer than two images, which have no covariance.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name one of {SIZE}×{SIZE} PNG files")
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    paths = sorted(path for path in visible if path.suffix.lower() == ".png")
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} PNG files, a distance needs 2 or more")
    pixels = np.stack([read_png(path) for path in paths])  # (n, 32, 32)
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255  # (n, 1, 32, 32)


def check_images(images):
    if not torch.is_tensor(images) or images.shape[1:] != (1, SIZE, SIZE):
        got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"images are {got}, expected a tensor (n, 1, {SIZE}, {SIZE})")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            "images must be floating point with every pixel in [0, 1] and none of them NaN"
        )


# ---- distance ------------------------------------------------------------------------------


def frechet_distance(real, fake):
    """Fréchet distance between the Gaussians fitted to two sets of features, (n, d) and (m, d).

        d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½   (Dowson & Landau 1982; Heusel et al. 2017)

    Returns d², the figure that is called FID. With A and B the centred features divided by √(n−1)
    and √(m−1), Σ₁ = AᵀA and Σ₂ = BᵀB, and the eigenvalues of Σ₁Σ₂ are the squared singular values
    of A Bᵀ: the last trace is the sum of these singular values. An n×m problem in float64 takes the
    place of a d×d matrix square root, and nothing is iterated, regularised or complex. Sets of more
    than d rows are first reduced to their triangular factor, d×d, which has the same AᵀA.
    Raises ValueError for unequal widths, fewer than two rows or features that are not finite.
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
    """The R of a QR decomposition of a (n, d), n > d, but for signs: (d, d) with RᵀR = aᵀa.

    Cholesky's takes a third of the time, and is as exact where the columns are far from dependent.
    """
    factor, failed = torch.linalg.cholesky_ex(a.T @ a, upper=True)  # (d, d)
    diagonal = factor.diagonal()
    if failed or not diagonal.min() > 1e-3 * diagonal.max():
        factor = torch.linalg.qr(a, mode="r").R
    return factor


# ---- features ------------------------------------------------------------------------------


class DigitNet(nn.Module):
    """A small convolutional classifier of digits; its penultimate activations are the features."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 128)
        self.digit = nn.Linear(128, 10)
        self.register_buffer("scale", torch.ones(()))  # makes 50 the distance of fresh real digits

    def features(self, x):  # (n, 1, 32, 32)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (n, 16, 16, 16)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (n, 32, 8, 8)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # (n, 32, 4, 4)
        return F.relu(self.hidden(x.flatten(1)))  # (n, 128)

    def forward(self, x):
        return self.digit(self.features(x))  # (n, 10)


@functools.cache
def digit_network():
    """The embedded DigitNet with its trained weights, on the CPU."""
    network = DigitNet()
    network.load_state_dict(torch.load(DIGIT_WEIGHTS, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def digit_features(images):
    """Features (n, 128) of images (n, 1, 32, 32) in [0, 1], rounded to 8 bits; unit as above.

    LeNet features are usual for digits: ImageNet features say little of them (Bińkowski et al.
    2018).
    """
    check_images(images)
    network = digit_network()
    images = (255 * images.detach().cpu().float()).round() / 255  # what a PNG file would hold
    with torch.inference_mode():
        features = torch.cat([network.features(batch) for batch in images.split(500)])  # (n, 128)
        return (network.scale * features).numpy()


def inception_weights_path():
    """Where the Inception weights are, or will be after a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    named = os.environ.get("FID_INCEPTION_WEIGHTS")
    published = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    return Path(named) if named else published


def download_inception_weights(path):
    """Fetch the published file; raises OSError where none comes or another one does."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without a byte; torch.hub sets none of its own
    try:
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256_PREFIX
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: a wrong hash
        raise OSError(
            f"{URL_INCEPTION_V3} can't be had ({error}): download it by other means and name it in"
            " FID_INCEPTION_WEIGHTS, or ask for digits features"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


@functools.lru_cache(maxsize=1)
def inception_network(path, modified):
    """torch-fidelity's Inception network with the weights at `path`, last changed at `modified`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(
        INCEPTION_SHA256_PREFIX
    ):  # it is about to be unpickled: nothing else may pass
        raise ValueError(
            f"{path} has SHA-256 {found[:8]}…, expected {INCEPTION_SHA256_PREFIX}…: it is not the"
            " published Inception file and was not opened; download it again"
        )
    return FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(path)
    )


def inception_features(images):
    """Inception pool features (n, 2048) of images (n, 1, 32, 32) in [0, 1].

    Each image is rounded to 8 bits, resized to 299×299 by Pillow (bilinear, antialiased, 8-bit) and
    repeated to three channels. Raises ValueError if the weights file is not the published one,
    OSError if it cannot be had.
    """
    check_images(images)
    path = inception_weights_path()
    if not path.is_file():
        if os.environ.get("FID_INCEPTION_WEIGHTS"):
            raise FileNotFoundError(f"FID_INCEPTION_WEIGHTS names {path}, which is not a file")
        download_inception_weights(path)
    network = inception_network(path, path.stat().st_mtime_ns)
    grey = (255 * images.detach().cpu().float()).round().byte().numpy()[:, 0]  # (n, 32, 32)
    features = []
    for start in range(0, len(grey), 25):
        small = [Image.fromarray(image) for image in grey[start : start + 25]]
        large = [image.resize((299, 299), Image.Resampling.BILINEAR) for image in small]
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in large]))  # (25, 299, 299)
        with torch.inference_mode():
            features.append(network(batch.unsqueeze(1).repeat(1, 3, 1, 1))[0])  # (25, 2048)
    return torch.cat(features).numpy()


def choose_features(features="auto", wait=2.5):
    """Resolve `auto` to (`inception` or `digits`, reason); asks the host for `wait` seconds."""
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}: choose one of {', '.join(FEATURES)}")
    if features != "auto":
        return features, "as asked"
    path = inception_weights_path()
    if path.is_file() or os.environ.get("FID_INCEPTION_WEIGHTS"):
        return "inception", f"weights at {path}"
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    answer = []

    def ask():
        try:
            request = urllib.request.Request(URL_INCEPTION_V3, method="HEAD")
            with urllib.request.urlopen(request, timeout=wait) as reply:
                answer.append(reply.status)
        except (OSError, http.client.HTTPException):
            pass

    # In a thread, since no time-out covers the name look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(wait)
    if answer:
        return "inception", "weights can be downloaded"
    return "digits", "no Inception weights here, and their host does not answer"


def extract(images, features):
    """Features of images (n, 1, 32, 32) in [0, 1] by the network `digits` or `inception`."""
    return {"digits": digit_features, "inception": inception_features}[features](images)


def fid(real_folder, fake_folder, features="auto"):
    """Fréchet distance of two folders of PNG files by `auto`, `digits` or `inception` features."""
    name, reason = choose_features(features)
    if features == "auto":
        print(f"FID features: {name} ({reason})")
    real, fake = read_folder(real_folder), read_folder(fake_folder)
    return frechet_distance(extract(real, name), extract(fake, name))


# ---- yardsticks ----------------------------------------------------------------------------


def memoriser_floor(real, draws=200, seed=0, size=100):
    """Mean and standard deviation of the FID of `draws` sets, each of `size` rows of the real
    features (n, d) drawn with replacement.

    It is what a perfect memoriser of the training images gets when it draws independently.
    """
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(real), size=(draws, size))
    distances = [frechet_distance(real, real[row]) for row in rows]
    return float(np.mean(distances)), float(np.std(distances))


def references(train_folder, holdout_folder=None, features="digits", seed=0):
    """Yardsticks for a FID against the training images: {what: (FID, spread or None)}."""
    train = read_folder(train_folder)
    real = extract(train, features)
    generator = torch.Generator().manual_seed(seed)
    rows = {"draws from the training images": memoriser_floor(real, seed=seed)}
    others = {} if holdout_folder is None else {"holdout images": read_folder(holdout_folder)}
    others["training images blurred 3×3"] = F.avg_pool2d(train, 3, stride=1, padding=1)
    others["mean image"] = train.mean(0, keepdim=True).repeat(len(train), 1, 1, 1)
    others["uniform noise"] = torch.rand(train.shape, generator=generator)
    for name, images in others.items():
        rows[name] = (frechet_distance(real, extract(images, features)), None)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m tests.fid", description=__doc__.split("\n")[0])
    parser.add_argument("real", help="folder of real images, such as data/train")
    parser.add_argument("fake", nargs="?", help="folder of images to judge")
    parser.add_argument("--features", default="auto", help=f"one of {', '.join(FEATURES)}")
    parser.add_argument(
        "--references", action="store_true", help="print yardsticks for REAL instead"
    )
    options = parser.parse_args(arguments)
    try:
        name, reason = choose_features(options.features)
        if options.features == "auto":
            print(f"FID features: {name} ({reason})")
        if options.references:
            for what, (mean, spread) in references(options.real, options.fake, name).items():
                print(
                    f"{mean:8.2f}{'' if spread is None else f' ± {spread:.2f}':8} {what} ({name})"
                )
        elif options.fake is None:
            raise ValueError("give two folders, the real images and the ones to judge")
        else:
            print(f"FID {fid(options.real, options.fake, name):.4f} ({name} features)")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
