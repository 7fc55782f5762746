"""The rules of grading, in one place. run_test.py and grade.py both come here.

collect(source, work)     copies the six files that count into a folder of their own
run_code(work)            has the submission's code do its work there, in its own process
score(work)               judges the PNG files that it drew
verdict(graded)           one sentence for each check that fails
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests import contract
from tests import fid as evaluator

SETS = 10  # of samples; the score is 100 less their mean FID
SAMPLES = evaluator.SAMPLES  # in each set
EPOCHS = 50  # of a fresh model, which must learn something in them
COPY = 1.0  # a sample so near to a training image is a copy: Euclidean distance over the pixels
LOSS_MAY_DIFFER = 1, 0.25  # nats, and a share: the last loss in result.csv from that of the weights
TIME_LIMIT = 600  # seconds for a submission's code
BYTES = 500_000_000  # that it may write and print in all
FILE_BYTES = 100_000_000  # of each file handed in

ROOT = Path(__file__).absolute().parent.parent
TRAIN = ROOT / "data" / "train"
TAKEN = ("vae_lib.py", *contract.EXPORTS)  # all that counts of a submission
AGAIN = "run assignment_09.ipynb to the end, and hand in the five files that it writes together"
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Graded:
    """What was found of a submission."""

    files: str = ""  # what is wrong with its files, a sentence
    result: str = ""  # what is wrong with result.csv
    losses: list = field(default_factory=list)  # in result.csv
    outcome: dict = field(default_factory=dict)  # what its code did, see contract.main
    unscored: str = ""  # why its samples have no figures
    figures: dict = field(default_factory=dict)  # of its samples, see score
    log: str = ""  # what its code printed


def plain(text, length=400):
    """A stranger's text as one line of printable characters."""
    text = printable(" ".join(str(text).split()))
    return text if len(text) <= length else text[:length] + "..."


def printable(text):
    """The text with "?" for what could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


# A submission's files


def collect(source, work):
    """Copy the six files of a submission, a folder or a .zip, into the folder `work`. They lie at
    its top or in one folder below. ValueError says what is missing or cannot be read, or that it is
    not clear where the files lie."""
    work.mkdir(parents=True)
    if source.is_dir():
        return copy_files(place_of(source, source), work)
    if source.suffix.lower() != ".zip" or not source.is_file():
        raise ValueError(f"{source} is no folder and no .zip: give one of these")
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                entry.filename = entry.filename.replace("\\", "/")  # as some programs write it
                parts = entry.filename.split("/")
                if ".." in parts or parts[0] == "" or ":" in parts[0]:
                    name = f"{source} holds the name {entry.filename}"
                    raise ValueError(f"{name}, which leads out of its folder: zip it again")
            archive.NameToInfo = {entry.filename: entry for entry in archive.infolist()}
            return copy_files(place_of(zipfile.Path(archive), source), work)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{source} cannot be unpacked ({error}): zip it again") from error


def place_of(top, source):
    """The folder that holds vae_lib.py: the top, or the only one below."""

    def has(folder):
        return (folder / "vae_lib.py").is_file()

    below = [path for path in top.iterdir() if path.is_dir() and path.name != "__MACOSX"]
    below = [] if has(top) else sorted(filter(has, below), key=lambda path: path.name)
    if len(below) > 1:
        names = ", ".join(path.name for path in below[:5])
        raise ValueError(f"{source} holds more than one submission, {names}: grade one of them")
    return below[0] if below else top


def copy_files(place, work):
    """Copy the six files from a folder, or one in a .zip, to the folder `work`. ValueError names
    those that are missing, links or too large."""
    missing = []
    for name in TAKEN:
        path = place / name
        if (isinstance(path, Path) and path.is_symlink()) or not path.is_file():
            missing.append(name)
            continue
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            megabytes = f"{FILE_BYTES / 1e6:.0f} MB"
            raise ValueError(f"{name} has more than {megabytes}: hand in a smaller one")
        (work / name).write_bytes(data)
    if missing:
        raise ValueError(f"{', '.join(missing)} missing, or no regular file: {AGAIN}")


def look_at_files(graded, source, work):
    """What is wrong with the files, before its code can change them."""
    try:
        collect(source, work)
        with Image.open(work / "samples.png", formats=["PNG"]) as picture:
            picture.verify()
    except ValueError as error:
        graded.files = plain(error)
    except Exception as error:  # Pillow has no common type for what damaged files raise
        graded.files = f"samples.png is no picture ({plain(error, 100)}): {AGAIN}"
    try:
        graded.losses = read_result(work / "result.csv")[1]
    except (OSError, ValueError) as error:
        graded.result = "" if graded.files else f"{error}: {AGAIN}"
        return
    losses = graded.losses
    if len(losses) < 2 or not losses[-1] < losses[0]:
        expected = "expected two or more that fall"
        graded.result = f"result.csv holds {len(losses)} losses, {expected}: {AGAIN}"


def read_result(path):
    """result.csv or result_autograding.csv as ({key: number}, [loss of each epoch]). ValueError
    names the line that cannot be read, or the keys that are missing."""
    path = Path(path)
    figures, losses = {}, []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            key, value = line.split(",")
            value = float(value)
            if not math.isfinite(value):
                raise ValueError
        except ValueError:
            expected = "expected a key and a finite number, such as loss,5.1"
            what = f"{path.name}, line {number} is {plain(line, 60)!r}"
            raise ValueError(f"{what}: {expected}") from None
        if key == "loss":
            losses.append(value)
        else:
            figures[key] = value
    for key in ("FID", "score"):
        if key not in figures:
            raise ValueError(f"{path.name} has no row {key}, expected FID, score, and loss rows")
    return figures, losses


def write_result(path, figures, losses):
    """Write rows `key,number` as in result.csv: FIDs, score, F, limit, losses in nats an image."""
    rows = [f"{key},{figures[key]}" for key in ("FID", "score", "F", "limit")]
    rows.insert(1, f"FID_{figures['features']},{figures['FID']}")
    rows += [f"loss,{loss}" for loss in losses]
    Path(path).write_text("\n".join(rows) + "\n")


# Its code


@functools.cache
def isolation():
    """How a submission's code is kept apart: the beginning of a command, and a sentence."""
    bwrap = shutil.which("bwrap")
    risk = "or grade in a container without a network: a submission's code has your rights"
    if bwrap is None:
        return (), f"NOT ISOLATED: bwrap is missing, install bubblewrap (on Linux), {risk}"
    command = [bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    command += ["--remount-ro", "/proc", "--tmpfs", "/run", "--unshare-all", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session"]
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(
            [*command, "--bind", folder, folder, sys.executable, "-c", f"open({__file__!r})"],
            capture_output=True,
            text=True,
            check=False,
        )
    if tried.returncode != 0:
        why = plain(tried.stderr, 100)
        return (), f"NOT ISOLATED: bwrap fails ({why}), allow it user namespaces, {risk}"
    return tuple(command), "isolated by bwrap: no network, and one folder that can be written to"


def environment(work):
    """All variables that a submission's code sees."""
    home, temporary = work / "home", work / "tmp"
    home.mkdir(exist_ok=True)
    temporary.mkdir(exist_ok=True)
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "MPLBACKEND": "Agg",  # plt.show() opens no window, and waits for nobody
        "OMP_NUM_THREADS": "1",  # more of them spin, and slow others
        "PYTHONPATH": str(work),  # vae_lib, for the processes that it starts, too
        "PYTHONUSERBASE": site.getuserbase(),  # where `pip install --user` puts packages
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # what it printed is there if it is killed
        "PYTHONUTF8": "1",
    }


def run_code(work, time_limit=TIME_LIMIT, stop=None):
    """Have the submission's code in `work` do what contract.main asks for. Returns the outcome, see
    there, with a sentence under "problems" for each step that is missing, and what it printed.

    It ends after `time_limit` seconds, after BYTES, or when the event `stop` is set, with every
    process that it started."""
    work = work.resolve()
    job = {"sets": SETS, "samples": SAMPLES, "epochs": EPOCHS, "bytes": BYTES}
    command = [sys.executable, "-P", contract.__file__, json.dumps(job)]
    prefix, _ = isolation()
    if prefix:
        command = [*prefix, "--bind", work, work, "--chdir", work, *command]
    problem = "the submission's code ended early, see what it printed"
    with tempfile.TemporaryFile() as images, tempfile.TemporaryFile() as log:
        np.save(images, evaluator.as_bytes(evaluator.read_folder(TRAIN)).numpy())
        images.seek(0)
        before = adopt_orphans()
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment(work),
            stdin=images,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        start = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - start > time_limit:
                    problem = f"the submission's code had not ended after {time_limit:g} s"
                    problem += " (--time-limit)"
                    break
                if os.fstat(log.fileno()).st_size + size_of(work) > BYTES:
                    problem = f"the submission's code wrote or printed over {BYTES / 1e6:.0f} MB"
                    break
                if stop is not None and stop.is_set():
                    break
            else:
                if process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
                    problem = "the submission's code was killed by SIGKILL: if memory was short"
                    problem += " (grading takes about 900 MB), give it more"
        finally:
            end(process, before)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
        printed = log.read().decode("utf-8", errors="replace")
    return read_outcome(work / "outcome.json", problem), printed


def size_of(folder):
    """Bytes of all files below a folder, and a block for each."""
    total = 0
    for place, folders, files in os.walk(folder):
        total += 4096 * (len(folders) + len(files))
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def adopt_orphans():
    """Make this process the parent of what its children leave (on Linux); returns the children that
    it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return children()


def children():
    """The ids of this process's children, as far as /proc tells."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(int(path.parent.name))
    return found


def end(process, before):
    """End a process with all that it started, what it detached, too: that is this one's by now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while (left := children() - before) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def read_outcome(path, problem):
    """What the submission's process wrote, which may be anything; `problem` says why it did not get
    to the end."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1_000_000:
            raise ValueError
        outcome = json.loads(path.read_text(encoding="utf-8"))
        said = {key: plain(words) for key, words in outcome["problems"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        outcome, said = {}, {}
    if not outcome.get("done"):
        said["ended"] = problem
    return outcome | {"problems": said}


# The score


@functools.cache
def yardsticks(folder, features):
    """What every submission is compared with: the training images and their features, the mean FID
    of a memoriser (F), and the FID that samples must stay below to be samples of these images at
    all, that of 100 copies of the mean image or of noise, whichever is lower."""
    images = evaluator.read_folder(folder)
    noise = torch.rand(SAMPLES, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    others = torch.cat([images.mean(0, keepdim=True), noise])
    found = evaluator.extract(torch.cat([images, others]), features)
    real, mean_image, noise = np.split(found, [len(images), len(images) + 1])
    sets = mean_image.repeat(SAMPLES, axis=0), noise
    limit = min(evaluator.frechet_distance(real, fake) for fake in sets)
    return images, real, evaluator.memoriser_fid(real)[0], limit


def score(work):
    """The figures of the PNG files in data/sample: SETS folders of SAMPLES each, and `zeroed`, the
    first of them again without the decoder's weights. ValueError if they cannot be scored."""
    features = os.environ.get("FID_FEATURES") or "imagenet"
    images, real, memoriser, limit = yardsticks(TRAIN, features)
    sets = []
    for draw in range(SETS):
        folder = work / "data" / "sample" / str(draw)
        sets.append(evaluator.read_folder(folder))
        if len(sets[-1]) != SAMPLES:
            raise ValueError(f"{folder.name} holds {len(sets[-1])} samples, expected {SAMPLES}")
    every = evaluator.extract(torch.cat(sets), features)  # (SETS · SAMPLES, d)
    distances = [evaluator.frechet_distance(real, fake) for fake in np.split(every, SETS)]
    mean = float(np.mean(distances))
    nearest = evaluator.nearest(torch.cat(sets), images)[0]
    return {
        "FID": mean,
        "score": 100 - mean,
        "F": memoriser,
        "limit": limit,
        "features": features,
        "copies": int((nearest < COPY).sum()),
        "of": SETS * SAMPLES,
        "from_decoder": samples_change(sets[0], work / "data" / "sample" / "zeroed"),
    }


def samples_change(samples, folder):
    """Whether samples are others where the decoder's weights are 0. A network then draws one and
    the same image c. For any c, the mean square distance to it is that to the samples' mean or
    more, so less than a quarter of that means that they do not come from the weights."""
    if not folder.is_dir():
        return True
    without = evaluator.read_folder(folder)
    if without.shape != samples.shape:
        return True
    change = (without - samples).square().sum()
    return not change < 0.25 * (samples - samples.mean(0)).square().sum()


def in_words(figures):
    """The score, for people."""
    multiple = f"{figures['FID'] / figures['F']:.2f} F"
    what = f"FID {figures['FID']:.1f}, {multiple}, {figures['features']} features"
    copies = f"{figures['copies']} of {figures['of']} samples are copies"
    return f"score {figures['score']:.1f} ({what}, {copies})"


def run(source, work, time_limit=TIME_LIMIT, stop=None):
    """Collect a submission in `work` and run its code. `finish` scores it: two steps, so that the
    next one's code can run while one is scored."""
    graded = Graded()
    look_at_files(graded, source, work)
    if (work / "vae_lib.py").is_file():
        graded.outcome, graded.log = run_code(work, time_limit, stop)
    return graded


def finish(graded, work):
    """Score the samples in the folder `work`, if there are any; returns the completed `Graded`."""
    if graded.outcome.get("samples"):
        try:
            graded.figures = score(work)
        except (OSError, ValueError) as error:
            graded.unscored = plain(f"the samples could not be scored: {error}")
    return graded


# The checks: each returns a sentence, or nothing


def files_are_there(graded):
    return graded.files


def result_is_sound(graded):
    return graded.result


def contract_is_kept(graded):
    problems = graded.outcome.get("problems", {})
    return problems.get("vae_lib") or problems.get("contract") or problems.get("ended")


def failed(graded, step):
    """Why a step of the submission's code failed, unless that is said already."""
    if graded.files or contract_is_kept(graded):
        return None
    return graded.outcome.get("problems", {}).get(step)


def samples_are_drawn(graded):
    if graded.figures and not graded.figures["from_decoder"]:
        return "samples do not come from decoder.pth: they stay the same when its weights are 0"
    return failed(graded, "samples") or graded.unscored


def encoder_belongs_to_the_rest(graded):
    """Samples need no encoder: −ELBO of the training images does."""
    if graded.outcome.get("loss") is None or not graded.losses:
        said = failed(graded, "loss")
        return said and f"−ELBO of the training images: {said}"
    loss, last = graded.outcome["loss"], graded.losses[-1]
    nats, share = LOSS_MAY_DIFFER
    if abs(loss - last) < nats + share * abs(last):
        return None
    return (
        f"the .pth files' −ELBO is {loss:.4g} nats per image, but the last loss in result.csv is"
        f" {last:.4g}: losses have to be −ELBO, and of the training that wrote the .pth files;"
        f" {AGAIN}"
    )


def fresh_model_learns(graded):
    if not graded.outcome.get("fresh"):
        return failed(graded, "fresh")
    (rec, kl), (rec_after, kl_after) = (graded.outcome["fresh"][key] for key in ("before", "after"))
    free = rec_after < 0.9 * rec and kl_after < 1000  # KL may cost nothing at first
    if rec_after + kl_after < rec + kl or free:
        return None
    return (
        f"train(VAE(images), images, {EPOCHS}), with its own defaults, took −ELBO from"
        f" {rec + kl:.4g} to {rec_after + kl_after:.4g} nats per image, expected it to fall: look"
        " at train in vae_lib.py"
    )


def samples_beat_noise(graded):
    figures = graded.figures
    if not figures or figures["FID"] < figures["limit"]:
        return None
    return (
        f"the samples have FID {figures['FID']:.1f}, no better than 100 copies of the mean image or"
        f" noise ({figures['limit']:.1f}): look at samples.png and at train in vae_lib.py, or train"
        " longer"
    )


CHECKS = (
    files_are_there,
    result_is_sound,
    contract_is_kept,
    samples_are_drawn,
    encoder_belongs_to_the_rest,
    fresh_model_learns,
    samples_beat_noise,
)


def verdict(graded):
    """A sentence for each check that fails."""
    return [sentence for check in CHECKS if (sentence := check(graded))]
