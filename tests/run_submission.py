"""What run_test.py has the submission's code do, in a process of its own:

    python -P tests/run_submission.py OUTCOME

draws ten sets of 100 samples from the .pth files into data/sample, computes -ELBO of the training
images, trains a fresh model for ten epochs, and writes what it found to the JSON file OUTCOME. This
is the only process that imports vae_lib.py. A step that fails leaves the others to run.
"""

import hashlib
import json
import math
import shutil
import sys
import traceback
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))  # site-packages may hold `tests`

from tests import fid as evaluator  # noqa: E402
from tests.eval_test import EPOCHS, ROOT, SUBMISSION, WEIGHTS  # noqa: E402

TRAIN = ROOT / "data" / "train"
SAMPLE = SUBMISSION / "data" / "sample"


def sample_seeds():
    """A seed for each set of samples, from a hash of the weights: nobody sets them directly, and
    they are the same in each run."""
    paths = [SUBMISSION / name for name in WEIGHTS]
    weights = b"".join(path.read_bytes() for path in paths if path.is_file())
    digests = [hashlib.sha256(weights + bytes([i])).digest() for i in range(evaluator.DRAWS)]
    return [int.from_bytes(digest[:4], "big") for digest in digests]


@torch.no_grad()
def draw_samples(vae_lib, images):
    """Ten sets of 100 PNG files: data/sample itself, and its folders draw_1 to draw_9."""
    shutil.rmtree(SAMPLE, ignore_errors=True)  # an earlier run's
    vae = vae_lib.load(SUBMISSION).eval()
    for draw, seed in enumerate(sample_seeds()):
        folder = SAMPLE / f"draw_{draw}" if draw else SAMPLE
        folder.mkdir(parents=True)
        samples = evaluator.as_bytes(vae.sample(evaluator.SAMPLES, seed=seed))  # (100, 1, 32, 32)
        for i, pixels in enumerate(samples.squeeze(1).numpy()):
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return True


@torch.no_grad()
def negative_elbo(vae_lib, images):
    """-ELBO of the images (N, 1, 32, 32) in nats per image."""
    x = images.repeat(10, 1, 1, 1)  # (10 N, 1, 32, 32): ten draws of z for each image
    torch.manual_seed(0)
    x_hat, mu, logvar = vae_lib.load(SUBMISSION).eval()(x)
    reconstruction = 0.5 * (x - x_hat).square().flatten(1).sum(1)  # (10 N,)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)  # (10 N,)
    return (reconstruction + kl).mean().item()


def train_fresh_model(vae_lib, images):
    """The losses of ten epochs."""
    again = math.ceil(100 / len(images))  # an epoch of few images would be a step or two
    x = images.repeat(again, 1, 1, 1)
    epochs = vae_lib.train(vae_lib.VAE(images), x, EPOCHS, batch_size=5)  # 200 steps or more
    losses = [float(epoch.loss) for epoch in epochs]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"its losses are {losses}, expected finite numbers")
    return losses


def main(path):
    images = evaluator.read_folder(TRAIN)
    sys.path[0] = str(SUBMISSION)  # in place of this clone, whose modules are not the submission's
    import vae_lib

    outcome = {"problems": {}}
    steps = {"samples": draw_samples, "loss": negative_elbo, "losses": train_fresh_model}
    for name, step in steps.items():
        try:
            outcome[name] = step(vae_lib, images)
        except Exception as error:  # whatever the submission's code raises
            traceback.print_exc()
            outcome["problems"][name] = f"{type(error).__name__}: {error}"
        Path(path).write_text(json.dumps(outcome))  # after each step: the next one may be killed


if __name__ == "__main__":
    main(sys.argv[1])
