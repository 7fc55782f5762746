"""The files that a submission must leave alone: tests/ and .github/workflows/.

    python -m tests.protected            name each file that differs from .github/protected.sha256
    python -m tests.protected --renew    renew that list, for maintainers

A grader compares another folder with the list of this one: --root SUBMISSION --list LIST.
"""

import argparse
import hashlib
import sys
from pathlib import Path

FOLDERS = ("tests", ".github/workflows")
LIST = Path(".github/protected.sha256")


def digests(root):
    """SHA-256 of each protected file below `root`, {relative path: hexadecimal digest}."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*"))]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


def differences(root, listed):
    """One sentence for each protected file that was changed, added or removed."""
    expected = dict(reversed(line.split("  ", 1)) for line in listed.read_text().splitlines())
    found = digests(root)
    return (
        [f"{name} was removed" for name in expected if name not in found]
        + [f"{name} was added" for name in found if name not in expected]
        + [f"{n} was changed" for n in found if n in expected and found[n] != expected[n]]
    )


def main(arguments=None):
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(
        "python -m tests.protected", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=here, help="the folder to check")
    parser.add_argument("--list", type=Path, default=here / LIST, help="the list to check against")
    parser.add_argument("--renew", action="store_true", help="write the list anew")
    options = parser.parse_args(arguments)
    if options.renew:
        lines = [f"{digest}  {name}\n" for name, digest in digests(options.root).items()]
        options.list.write_text("".join(lines))
        print(f"{len(lines)} files listed in {options.list}")
        return
    found = differences(options.root, options.list)
    if found:
        sys.exit("\n".join([*found, "Put these files back: a submission must not change them."]))
    print("no protected file was changed")


if __name__ == "__main__":
    main()
