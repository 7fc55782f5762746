"""Grade submissions with the rules and the images of this clone:

    python tests/grade.py SUBMISSION… [--csv FILE] [--time-limit SECONDS]

A submission is a folder or a .zip; vae_lib.py, the three .pth files, result.csv and samples.png lie
at its top or in one folder below, and nothing else of it is used. The last line is the grade; the
exit status is 0 if all passed, else 1. With --csv, a table has a row for each, and the report of
each stands beside it as a text file. FID_FEATURES (default: imagenet) chooses the features.

The submissions' code runs in processes of its own, isolated by bubblewrap where that works: the
first line says whether it does.
"""

import argparse
import contextlib
import csv
import filecmp
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

sys.dont_write_bytecode = True  # this clone may be read-only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import grading  # noqa: E402

COLUMNS = ("submission", "grade", "score", "FID", "F", "copies", "reason")
PROTECTED = ("tests/[!.]*.py", ".github/workflows/[!.]*.y*ml", "data/train/[!.]*.png")


def differences(submission):
    """What a submission has changed in or added to this clone's files, [sentence]."""
    found = {"changed": [], "added": []}
    for pattern in PROTECTED:
        for path in sorted(submission.glob(pattern)):
            ours = grading.ROOT / path.relative_to(submission)
            if not ours.is_file():
                found["added"].append(path.name)
            elif path.is_file() and not filecmp.cmp(ours, path, shallow=False):
                found["changed"].append(path.name)
    return [
        grading.plain(f"{kind} and not used: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
        for kind, names in found.items()
        if names
    ]


def report(source, graded):
    """The lines of a report, and the row of the table. The grade is the last line."""
    sentences = grading.verdict(graded)
    lines = [grading.isolation()[1]]
    if source.is_dir():
        lines += differences(source)
    printed = graded.log.splitlines()
    if printed:
        lines.append("what its code printed:")
        lines += [f"   | {grading.printable(line)[:500]}" for line in printed[-100:]]
    lines += [f"FAILED: {sentence}" for sentence in sentences]
    figures = graded.figures
    words = grading.in_words(figures) if figures else "the samples have no score"
    passed = bool(figures) and not sentences
    lines.append(f"GRADE {words}" if passed else "GRADE failed: " + "; ".join([*sentences, words]))
    row = {"grade": "passed" if passed else "failed", "reason": "; ".join(sentences)}
    if figures:
        row |= {"score": f"{figures['score']:.1f}", "FID": f"{figures['FID']:.1f}"}
        row |= {"F": f"{figures['FID'] / figures['F']:.2f}", "copies": figures["copies"]}
    return lines, row


def for_spreadsheets(text):
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def names_of(paths):
    """A name for each submission: its folder's or file's, or all of its path where two have one."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    names = [str(path) if names.count(n) > 1 else n for n, path in zip(names, paths, strict=True)]
    return [grading.plain(name) for name in names]


def grade_all(paths, time_limit, table):
    """Grade each submission and print it; the next one's code runs while one is scored. `table` is
    an open file or None. Returns whether all passed."""
    names = names_of(paths)
    stop = threading.Event()
    writer = csv.DictWriter(table, COLUMNS) if table else None
    if writer:
        writer.writeheader()
    all_passed = True
    with (
        tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder,
        ThreadPoolExecutor(1) as pool,
    ):

        def start(i):
            work = Path(folder, str(i), "work")
            return work, pool.submit(grading.run, paths[i], work, time_limit, stop)

        try:
            following = start(0)
            for i, (name, path) in enumerate(zip(names, paths, strict=True)):
                work, running = following
                wait([running])
                if i + 1 < len(paths):
                    following = start(i + 1)
                try:
                    graded = running.result()
                    lines, row = report(path, grading.finish(graded, work))
                except Exception as error:  # one submission must not keep the others from a grade
                    traceback.print_exc()
                    reason = grading.plain(f"grading it failed ({type(error).__name__}: {error})")
                    lines, row = [f"GRADE failed: {reason}"], {"grade": "failed", "reason": reason}
                shutil.rmtree(work.parent, ignore_errors=True)
                all_passed = all_passed and row["grade"] == "passed"
                if writer:
                    row = {"submission": name, **row}
                    row |= {key: for_spreadsheets(row[key]) for key in ("submission", "reason")}
                    writer.writerow(row)
                    table.flush()
                    text = Path(table.name).with_name(f"{name.replace('/', '_')}.txt")
                    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
                    lines = lines[-1:]
                if len(paths) > 1:
                    lines[-1] = f"[{i + 1}/{len(paths)}] {name}: {lines[-1]}"
                print("\n".join(lines), flush=True)
        finally:
            stop.set()
    return all_passed


def interrupt(number, _frame):
    """Let a signal end the grading as Ctrl-C does, so that nothing is left behind."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main():
    parser = argparse.ArgumentParser(description="Grade submissions with the rules of this clone.")
    parser.add_argument("submissions", type=Path, nargs="+", help="folders or .zip files")
    parser.add_argument("--csv", metavar="FILE", help="write a table, and reports beside it")
    limit = f"for each submission's code, in seconds (default: {grading.TIME_LIMIT})"
    seconds = {"type": float, "default": grading.TIME_LIMIT, "metavar": "SECONDS"}
    parser.add_argument("--time-limit", **seconds, help=limit)
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, interrupt)
    try:
        with contextlib.ExitStack() as stack:
            table = None
            if options.csv:  # with a mark by which spreadsheets know the encoding
                table = stack.enter_context(
                    open(options.csv, "w", encoding="utf-8-sig", newline="")
                )
            return 0 if grade_all(options.submissions, options.time_limit, table) else 1
    except KeyboardInterrupt as signalled:
        print(f"GRADE failed: ended by {signalled}")
    except OSError as error:  # a full disk, a table that may not be written
        print(f"GRADE failed: {grading.plain(error)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
