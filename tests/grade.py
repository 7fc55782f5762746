"""Grade a submission with the tests and the images of this clone:

    python tests/grade.py SUBMISSION [--time-limit SECONDS]

Of the submission only vae_lib.py, the three .pth files, result.csv and samples.png are used. They
are copied to a temporary folder, where run_submission.py runs the submission's code. Once every
process of that has ended, run_test.py scores the PNG files that were drawn, in a process that
imports nothing of the submission, and eval_test.py judges. The last line is the grade; the exit
status is 0 if nothing failed, else 1.

FID_FEATURES (default: imagenet) chooses the features. The submission's code runs with your rights:
grade strangers' work in a container.
"""

import argparse
import contextlib
import filecmp
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve() if Path(__file__).is_symlink() else Path(__file__).absolute()
ROOT = SCRIPT.parent.parent
sys.dont_write_bytecode = True  # this clone may be read-only
sys.path.insert(0, str(ROOT))

from tests.eval_test import in_words, read_result  # noqa: E402
from tests.run_test import how_it_ended  # noqa: E402

TAKEN = ("vae_lib.py", "encoder.pth", "latent.pth", "decoder.pth", "result.csv", "samples.png")
PROTECTED = (
    "tests/[!.]*.py",
    "tests/[!.]*.sh",
    ".github/workflows/[!.]*.y*ml",
    "data/train/[!.]*.png",
)


def differences(submission):
    """What differs in the submission's protected files, [sentence]; nothing of it is used."""
    sentences = []
    for pattern in PROTECTED:
        kinds = {"changed": [], "added": [], "removed": [], "links": []}
        names = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        names |= {path.relative_to(submission) for path in submission.glob(pattern)}
        for name in sorted(names):
            ours, theirs = ROOT / name, submission / name
            if theirs.is_symlink():
                kinds["links"].append(name.name)
            elif not theirs.is_file():
                kinds["removed"].append(name.name)
            elif not ours.is_file():
                kinds["added"].append(name.name)
            elif not filecmp.cmp(ours, theirs, shallow=False):
                kinds["changed"].append(name.name)
        for kind, found in kinds.items():
            if found:
                shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
                sentences.append(f"{len(found)} {kind} in {Path(pattern).parent}: {shown}")
    return sentences


def digest():
    """SHA-256 of this clone's tests and training images."""
    found = hashlib.sha256()
    for folder in (ROOT / "tests", ROOT / "data" / "train"):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                found.update(str(path).encode() + path.read_bytes())
    return found.digest()


def prepare(submission, work):
    """Copy what is graded to the folder `work`; returns the names of files that are missing."""
    (work / "data" / "train").mkdir(parents=True)
    (work / "data" / "sample").mkdir()
    for path in (ROOT / "data" / "train").iterdir():
        if path.is_file():
            shutil.copyfile(path, work / "data" / "train" / path.name)
    missing = []
    for name in TAKEN:
        path = submission / name
        if path.is_symlink() or not path.is_file():
            missing.append(f"{name} is missing or no regular file")
        else:
            shutil.copyfile(path, work / name)
    return missing


def end(process):
    """End a process with all that it started and left behind."""
    if os.name == "nt":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended already
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(script, arguments, work, time_limit):
    """Run a script of this clone on the copy and show what it says, indented. Returns why it
    failed, [sentence], or []."""
    print(f"== {script}", flush=True)
    ours = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # more spin, and slow others
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "VAE_SUBMISSION": str(work),
        "VAE_OUTCOME": str(work.parent / "outcome.json"),
    }
    with open(work.parent / "log", "w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", ROOT / "tests" / script, *arguments],
            cwd=work,
            env=os.environ | ours,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, which ends as a whole
        )
        problems = []
        try:
            if process.wait(time_limit) != 0:
                problems = [how_it_ended(script, process.returncode)]
        except subprocess.TimeoutExpired:
            problems = [f"{script} had not ended after {time_limit:g} s (--time-limit)"]
        finally:
            end(process)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))  # a loop may have written without end
        for line in log.read().decode("utf-8", errors="replace").splitlines():
            print(f"   {line}")
    return problems


def grade(submission, time_limit):
    """The last line's words, and whether nothing failed."""
    print(f"== What differs in {submission} (none of it is used)")
    print("\n".join(f"   {line}" for line in differences(submission) or ["nothing"]))
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        work = Path(folder, "work")
        problems = prepare(submission, work)
        before = digest()
        outcome = str(work.parent / "outcome.json")
        problems += run("run_submission.py", [outcome], work, time_limit)
        if digest() != before:
            return f"tests or images of {ROOT} changed meanwhile: look at them, start again", False
        for script in ("run_test.py", "eval_test.py"):
            problems += run(script, [], work, time_limit)
        try:
            figures, _ = read_result(work / "result_autograding.csv", ("F", "limit", "files"))
        except (OSError, ValueError):
            return "; ".join([*problems, "the samples have no figure"]), False
        draws = 1 + len(list((work / "data" / "sample").glob("draw_*")))
    words = f"score {figures['score']:.1f} ({in_words(figures)}, mean of {draws} draws)"
    if problems:
        return f"{'; '.join(problems)}; the samples have {words}", False
    return words, True


def stop(number, _frame):
    """Let a signal end the grading as Ctrl-C does, so that nothing is left behind."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main():
    parser = argparse.ArgumentParser(description="Grade a submission with the tests of this clone.")
    parser.add_argument("submission", type=Path, help="folder of the submission")
    limit = "for each step, in seconds (default: 1800)"
    parser.add_argument("--time-limit", type=float, default=1800, metavar="SECONDS", help=limit)
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    try:
        if not options.submission.is_dir():
            words, passed = f"{options.submission} is no folder", False
        else:
            words, passed = grade(options.submission.resolve(), options.time_limit)
    except KeyboardInterrupt as signalled:
        words, passed = f"ended by {signalled}", False
    except OSError as error:  # a full disk, a file that may not be read
        words, passed = str(error), False
    print(f"GRADE {words}" if passed else f"GRADE failed: {words}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
