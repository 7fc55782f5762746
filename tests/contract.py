"""The contract between a vae_lib.py, the notebook and the grader: the calls that both make.

    VAE(images)                    images (n, 1, 32, 32), float32, pixels in [0, 1]
    train(vae, images, epochs)     yields an object for each epoch, with its .loss
    save(vae, folder), load(folder)    write the three .pth files; return the VAE in them
    vae(images)                    returns reconstruction (n, 1, 32, 32), mu (n, L), logvar (n, L)
    vae.sample(n, seed=0)          returns n samples, shaped like images

.loss is −ELBO in nats per image, without the likelihood's constant. `check` tries these calls in a
moment. Run as a script, this file is the process in which the grader has a submission's code do its
work. It stands alone: it imports nothing of this project but, there, the submission's vae_lib.py.
"""

import contextlib
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WEIGHTS = ("encoder.pth", "latent.pth", "decoder.pth")
EXPORTS = (*WEIGHTS, "result.csv", "samples.png")
FUNCTIONS = {"VAE": "images", "train": "vae, images, epochs", "save": "vae, folder"}
FUNCTIONS |= {"load": "folder"}
LOSS = (
    "½‖x − reconstruction‖² + KL(q(z|x) ‖ N(0, I)) in nats, summed over pixels and latent"
    " dimensions, the mean over images"
)


class ContractError(ValueError):
    """One sentence: which function of vae_lib.py breaks the contract, and what was expected."""


# Words for what was found


def in_words(found):
    """What a call returned, for people: `a tensor (3, 1024)`, `a float`."""
    if isinstance(found, torch.Tensor):
        return f"a tensor {tuple(found.shape)}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return "None" if found is None else f"an object of type {type(found).__name__}"


def in_full(error):
    """An exception's type and text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def calling(vae_lib, call):
    """Turn what the submission's code raises in a call into a sentence that says where."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        code = [(step.f_code, line) for step, line in traceback.walk_tb(error.__traceback__)]
        code = [found for found in code if found[0].co_filename == getattr(vae_lib, "__file__", "")]
        if isinstance(error, NotImplementedError) and code:
            what = f"{code[-1][0].co_qualname} in vae_lib.py has to be written"
            text = " ".join(str(error).split())
            if "vae_lib.py" in text:  # a stub's own sentence
                what, text = text, ""
            raise ContractError(f"{what}: {text}" if text else what) from None
        where = f" in {code[-1][0].co_qualname}, line {code[-1][1]} of vae_lib.py" if code else ""
        raise ContractError(f"{call} failed{where} ({in_full(error)})") from error


# The check


@contextlib.contextmanager
def random_state_kept():
    """Leave the random numbers of torch, NumPy and Python as they were."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002


def seed_all(seed):
    """Code that ignores the seed that it is given draws the same, too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def check(vae_lib, images):
    """Raise ContractError unless the module vae_lib keeps the contract, tried on the images
    (n, 1, 32, 32) with a model of its own. Files go to a temporary folder, random states stay as
    they were; it takes a fraction of a second."""
    images = images[:100]
    distance = (images - images[0]).flatten(1).norm(dim=1)
    two = images[[0, int(distance.argmax())]]  # one step for whatever size of batch
    with random_state_kept():
        seed_all(0)
        check_functions(vae_lib)
        with calling(vae_lib, "VAE(images)"):
            vae = vae_lib.VAE(images)
        if not isinstance(vae, torch.nn.Module):
            raise ContractError(f"VAE(images) is {in_words(vae)}, expected a torch.nn.Module")
        check_outputs(vae_lib, vae, images[:3])
        check_draws(vae, images[:3])
        check_training(vae_lib, vae, images, two)
        check_samples(vae_lib, vae)
        check_files(vae_lib, vae, two)
        try:
            check_large_weights(vae_lib, vae, two)
        except ContractError:
            raise
        except Exception:  # a model that does not bear large weights is left alone
            pass


def check_functions(vae_lib):
    """Check that the functions are there, with their arguments."""
    for name, arguments in FUNCTIONS.items():
        function = getattr(vae_lib, name, None)
        if not callable(function):
            raise ContractError(f"vae_lib.py has no {name}({arguments}): write it, by this name")
        check_arguments(function, name, arguments.split(", "))
    sample = getattr(vae_lib.VAE, "sample", None)
    if not callable(sample):
        raise ContractError("VAE in vae_lib.py has no sample(n, seed=0): write it, by this name")
    check_arguments(sample, "VAE.sample", ["self", "n"], seed=0)


def check_arguments(function, name, arguments, **options):
    """Check that a function can be called with these, names and {name: value}."""
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments, **options)
    except TypeError as error:
        expected = ", ".join([*arguments, *(f"{key}={value}" for key, value in options.items())])
        raise ContractError(
            f"{name}{signature} in vae_lib.py has to take ({expected}), and others only with a"
            f" default ({error})"
        ) from error


def check_outputs(vae_lib, vae, x):
    """Check vae(x); returns reconstruction, mu and logvar."""
    with calling(vae_lib, "vae(images)"), torch.no_grad():
        outputs = vae(x)
    if not isinstance(outputs, tuple | list) or len(outputs) != 3:
        found = in_words(outputs)
        raise ContractError(f"vae(images) returned {found}, expected reconstruction, mu, logvar")
    x_hat, mu, logvar = outputs
    check_images(x_hat, len(x), f"the reconstruction that vae(images) returns for {len(x)} images")
    for name, found in ("mu", mu), ("logvar", logvar):
        what = f"{name}, which vae(images) returns for {len(x)} images,"
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(x):
            raise ContractError(f"{what} is {in_words(found)}, expected a tensor ({len(x)}, L)")
        if not found.isfinite().all():
            raise ContractError(f"{what} holds NaN or infinite values, expected finite ones")
    if mu.shape != logvar.shape:
        shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
        raise ContractError(f"vae(images) returned mu, logvar {shapes}, expected equal shapes")
    return x_hat, mu, logvar


@torch.no_grad()
def check_draws(vae, x):
    """Where the model has a part that draws z by latent(mu, logvar), check what it gets for images
    x, and what it draws."""
    latent = getattr(vae, "latent", None)
    if not isinstance(latent, torch.nn.Module):
        return
    parameters = list(inspect.signature(latent.forward).parameters)
    if parameters[:2] != ["mu", "logvar"]:
        return
    inputs = []
    hook = latent.register_forward_pre_hook(lambda _, given: inputs.extend(given[:2]))
    try:
        _, mu, logvar = vae(x)
    finally:
        hook.remove()
    swapped = len(inputs) == 2 and torch.equal(inputs[0], logvar) and torch.equal(inputs[1], mu)
    if swapped and not torch.equal(mu, logvar):  # layers that start at 0 make them equal
        raise ContractError(
            "vae(images) returns mu and logvar in one order and gives them to Latent.forward in the"
            " other, expected mu before logvar in both"
        )
    mu = torch.full((10_000, 1), 3.0)
    for logvar in (2.0, -2.0):
        try:
            z = latent(mu, torch.full_like(mu, logvar))  # (10000, L)
        except Exception:  # of another form, which vae(images) has shown to work
            return
        mean, deviation = z.mean().item(), z.std().item()
        expected = math.exp(0.5 * logvar)
        if abs(mean - 3) > 0.2 or not 0.9 < deviation / expected < 1.1:
            raise ContractError(
                f"Latent.forward in vae_lib.py draws z with mean {mean:.2f} and standard deviation"
                f" {deviation:.2f} for mu 3 and logvar {logvar:g}, expected 3 and exp(½ logvar) ="
                f" {expected:.2f}"
            )


def check_images(found, n, what):
    """Check that images are float (n, 1, 32, 32) in [0, 1]."""
    shape = (n, 1, 32, 32)
    if not isinstance(found, torch.Tensor) or found.shape != shape or not found.is_floating_point():
        dtype = f" of {found.dtype}" if isinstance(found, torch.Tensor) else ""
        raise ContractError(f"{what}: found {in_words(found)}{dtype}, expected floats {shape}")
    if not ((found >= -1e-6) & (found <= 1 + 1e-6)).all():  # NaN, too; rounding may leave 1e-7
        values = f"{found.min().item():.3g} to {found.max().item():.3g}"
        raise ContractError(f"{what}: its pixels are {values}, expected them in [0, 1]")


@torch.no_grad()
def negative_elbo(vae, images, draws=10):
    """The mean reconstruction term and mean KL of images (n, 1, 32, 32), in nats per image; and
    what some take for KL: that with mu and logvar swapped, and its mean over latent dimensions.
    Each image has so many draws of z."""
    x = images.repeat(draws, 1, 1, 1)  # (draws · n, 1, 32, 32)
    x_hat, mu, logvar = vae(x)
    reconstruction = 0.5 * (x - x_hat).square().flatten(1).sum(1).mean()
    kls = [
        0.5 * (a.square() + b.exp() - 1 - b).sum(1).mean() for a, b in ((mu, logvar), (logvar, mu))
    ]
    return [x.double().item() for x in (reconstruction, *kls, kls[0] / mu.shape[1])]


def first_loss(vae_lib, vae, images):
    """The .loss of the first of 100 epochs."""
    call = "train(vae, images, epochs)"
    expected = "expected it to yield an object for each epoch, with its .loss"
    with calling(vae_lib, call):
        epochs = vae_lib.train(vae, images, 100)
        if not hasattr(type(epochs), "__iter__") or isinstance(epochs, torch.Tensor | dict):
            raise ContractError(f"{call} returned {in_words(epochs)}, {expected}")
        epoch = next(iter(epochs), None)
        if hasattr(epochs, "close"):
            epochs.close()
    if epoch is None:
        raise ContractError(f"{call} yielded nothing, {expected}")
    if not hasattr(epoch, "loss"):
        raise ContractError(f"{call} yielded {in_words(epoch)}, {expected}")
    try:
        loss = float(epoch.loss)
    except (TypeError, ValueError, RuntimeError):
        found = in_words(epoch.loss)
        raise ContractError(f"the .loss that train yields is {found}, expected a number") from None
    if not math.isfinite(loss):
        raise ContractError(f"the .loss that train yields is {loss}, expected a finite number")
    return loss


def check_training(vae_lib, vae, images, two):
    """Check what train yields first. On two images an epoch is one step, and what it yields −ELBO
    before that. Training may fail on so few, or drop them as less than a batch: then on all."""

    def minus_elbo(some):
        seed_all(0)
        return sum(negative_elbo(vae, some)[:2])

    for some in (two, images):
        before = minus_elbo(some)
        try:
            loss = first_loss(vae_lib, vae, some)
        except ContractError:
            if some is images:
                raise
            continue
        after = minus_elbo(some)
        low, high = min(before, after) / 1.5 - 5, max(before, after) * 1.5 + 5
        if low < loss < high:
            return
        if after != before:
            break
    raise ContractError(
        f"train yields .loss {loss:.4g} for {len(some)} images whose −ELBO is {before:.4g} in a"
        f" model that has learnt nothing: expected {LOSS}"
    )


def check_samples(vae_lib, vae):
    """Check that samples are images."""
    with calling(vae_lib, "vae.sample(5, seed=0)"), torch.no_grad():
        samples = vae.eval().sample(5, seed=0)
    check_images(samples, 5, "the samples of vae.sample(5, seed=0)")


def check_files(vae_lib, vae, x):
    """Check that load returns what save wrote."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that a fresh model from the same seed is another one
        for weights in vae.parameters():
            weights.add_(0.05 * torch.randn(weights.shape, generator=generator).to(weights))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "saved")
        elsewhere = Path(temporary, "elsewhere")
        folder.mkdir()
        elsewhere.mkdir()
        with contextlib.chdir(elsewhere):  # a save that ignores its folder must not write here
            with calling(vae_lib, "save(vae, folder)"):
                vae_lib.save(vae, folder)
            for name in WEIGHTS:
                check_file(folder / name)
            with calling(vae_lib, "load(folder), of what save(vae, folder) wrote,"):
                again = vae_lib.load(folder)
    if not isinstance(again, torch.nn.Module):
        raise ContractError(f"load(folder) returned {in_words(again)}, expected the VAE")
    found = []
    for model in (vae.eval(), again.eval()):
        seed_all(0)
        _, mu, logvar = check_outputs(vae_lib, model, x)
        with calling(vae_lib, "vae.sample(5, seed=0)"), torch.no_grad():
            found.append([mu, logvar, model.sample(5, seed=0)])
    for name, ours, theirs in zip(("mu", "logvar", "samples"), *found, strict=True):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ContractError(
                f"load(folder) returns another model than save(vae, folder) wrote: its {name}"
                " differ, expected all weights in the three files, and all of them loaded"
            )


def check_file(path):
    """Check that save wrote this file, and that it holds numbers only."""
    if not path.is_file():
        expected = f"expected {', '.join(WEIGHTS)} in the folder that it is given"
        raise ContractError(f"save(vae, folder) wrote no {path.name}: {expected}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common type for what it refuses
        part = path.stem
        expected = f"expected numbers only, as of torch.save(vae.{part}.state_dict(), …)"
        raise ContractError(
            f"save(vae, folder) wrote {path.name} so that it cannot be loaded without running code"
            f" that lies in it: {expected}"
        ) from error


def check_large_weights(vae_lib, vae, two):
    """In a model of large weights KL dwarfs the rest, so that a mistake in it shows. Only what can
    be nothing else is said."""
    vae.train()
    for _ in range(20):
        with torch.no_grad():
            for weights in vae.parameters():
                weights.mul_(1.2)
        reconstruction, kl, swapped, mean = negative_elbo(vae, two)
        if not 1e4 < kl < 1e7:
            continue
        noise = negative_elbo(vae, two)[1] != kl  # dropout changes KL from call to call
        try:
            loss = first_loss(vae_lib, vae, two)
        except ContractError:
            return
        if loss < 0:
            raise ContractError(
                f"train yields .loss {loss:.4g}, but squares and KL are never negative: expected"
                f" {LOSS} (is KL's sign wrong?)"
            )
        if noise or kl / 1.5 < loss < 1.5 * (kl + reconstruction):
            continue
        for wrong, sentence in (
            (swapped, "vae(images) returned logvar before mu, expected reconstruction, mu, logvar"),
            (mean, f"train takes the mean of KL over latent dimensions, expected {LOSS}"),
        ):
            if abs(loss - wrong - reconstruction) < 0.1 * wrong + 600:  # squares differ by draws
                raise ContractError(sentence)


def reconstruct(vae, images):
    """Reconstructions of images (n, 1, 32, 32): by the model's own `reconstruct` if it has one,
    else of one draw of z each."""
    if hasattr(vae, "reconstruct"):
        return vae.reconstruct(images)
    return vae(images)[0]


# What the grader has a submission's code do


def sample_seeds(folder, sets):
    """A seed for each set of samples, from a hash of the weights: nobody sets them directly, and
    they are the same in each run."""
    paths = [Path(folder, name) for name in WEIGHTS]
    weights = b"".join(path.read_bytes() for path in paths if path.is_file())
    digests = [hashlib.sha256(weights + bytes([i])).digest() for i in range(sets)]
    return [int.from_bytes(digest[:4], "big") for digest in digests]


def load_weights(vae_lib, folder="."):
    """The VAE of the three .pth files in a folder, in evaluation mode. ContractError names those
    that are missing, or what `load` raised."""
    missing = [name for name in WEIGHTS if not Path(folder, name).is_file()]
    if missing:
        raise ContractError(f"{', '.join(missing)} missing")
    with calling(vae_lib, "load(folder), of the .pth files handed in,"):
        return vae_lib.load(Path(folder).absolute()).eval()


def write_samples(vae_lib, vae, folder, n, seed):
    """Write n samples to a new folder, as PNG files of 32×32 pixels in 8 bits. ContractError if
    they are no images in [0, 1]."""
    seed_all(seed)
    with calling(vae_lib, f"vae.sample({n}, seed={seed})"), torch.no_grad():
        samples = vae.sample(n, seed=seed)
    check_images(samples, n, f"the samples of vae.sample({n}, seed={seed})")
    Path(folder).mkdir(parents=True)
    pixels = (255 * samples.cpu().float().clamp(0, 1)).round().byte().squeeze(1).numpy()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(Path(folder, f"{i:03d}.png"))


def zeroed(state):
    """A state dictionary with zeros in place of its numbers, whatever else is in it."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state) if state.is_floating_point() else state
    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    return state


def draw_samples(vae_lib, images, job):
    """The sets of samples, data/sample/0, 1 and so on; and the first of them again, from a decoder
    whose weights are 0: data/sample/zeroed. If that cannot be loaded, its samples do change."""
    vae = load_weights(vae_lib)
    seeds = sample_seeds(".", job["sets"])
    for draw, seed in enumerate(seeds):
        write_samples(vae_lib, vae, f"data/sample/{draw}", job["samples"], seed)
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
        for name in WEIGHTS:
            state = torch.load(name, map_location="cpu", weights_only=True)
            state = zeroed(state) if name == "decoder.pth" else state
            torch.save(state, Path(folder, name))
        vae = load_weights(vae_lib, folder)
        write_samples(vae_lib, vae, "data/sample/zeroed", job["samples"], seeds[0])
    return True


def loss_of_weights(vae_lib, images, job):
    """−ELBO of the images in nats per image, by the .pth files."""
    vae = load_weights(vae_lib)
    seed_all(0)
    check_outputs(vae_lib, vae, images[:3])
    return sum(negative_elbo(vae, images)[:2])


def train_fresh_model(vae_lib, images, job):
    """Reconstruction term and KL of a fresh model before and after its training, and the losses
    that were yielded."""
    epochs = job["epochs"]
    call = f"train(VAE(images), images, {epochs})"
    seed_all(0)
    with calling(vae_lib, call):
        vae = vae_lib.VAE(images)
        before = negative_elbo(vae.eval(), images)[:2]
        found = vae_lib.train(vae.train(), images, epochs)
        losses = [float(epoch.loss) for epoch in itertools.islice(found, epochs + 1)]
        seed_all(0)
        after = negative_elbo(vae.eval(), images)[:2]
    if len(losses) != epochs or not all(0 <= loss < math.inf for loss in losses):
        few = ", ".join(f"{loss:.4g}" for loss in losses[-3:])
        expected = f"expected {epochs} finite ones, none negative"
        raise ContractError(f"{call} yielded {len(losses)} losses, the last {few}: {expected}")
    return {"before": before, "after": after, "losses": losses}


def main(job):
    """Do each step of the work in this folder, and write what was found to outcome.json."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], job["bytes"]))  # of each file
    images = torch.from_numpy(np.load(sys.stdin.buffer)).float() / 255
    outcome = {"problems": {}}

    def do(name, step, *arguments):
        done = None
        try:
            done = step(*arguments)
        except (Exception, SystemExit) as error:  # whatever the submission's code raises
            if not isinstance(error, ContractError) or error.__cause__:
                traceback.print_exc()
            said = str(error) if isinstance(error, ContractError) else in_full(error)
            outcome["problems"][name] = said
        return done

    def import_it():
        try:
            return importlib.import_module("vae_lib")
        except (Exception, SystemExit) as error:
            raise ContractError(f"vae_lib.py cannot be imported ({in_full(error)})") from error

    vae_lib = do("vae_lib", import_it)
    if vae_lib is not None:
        do("contract", check, vae_lib, images)
    steps = {"samples": draw_samples, "loss": loss_of_weights, "fresh": train_fresh_model}
    for name, step in (steps | {"done": lambda *_: True}).items():
        if vae_lib is not None or name == "done":
            outcome[name] = do(name, step, vae_lib, images, job)
        part = Path("outcome.part")  # written after each step: the next one may be killed
        part.write_text(json.dumps(outcome))
        part.replace("outcome.json")
    sys.stdout.flush()
    os._exit(0)  # whatever threads and handlers the submission leaves


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
