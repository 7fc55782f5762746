"""The files that a submission must leave alone: tests/ and .github/workflows/.

    python -m tests.protected            name each file that differs from .github/protected.sha256
    python -m tests.protected --renew    renew that list, for maintainers
    python tests/protected.py --root SUBMISSION    compare another folder with this one

The last also compares data/train, and names compiled files, which Python may run in place of their
source. It reads the submission and executes nothing of it.
"""

import argparse
import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FOLDERS = ("tests", ".github/workflows")
IMAGES = "data/train"
LIST = Path(".github/protected.sha256")


def digests(root, folders=FOLDERS):
    """SHA-256 of each file in the folders below `root`, {relative path: hexadecimal digest}; a link
    has the digest "link", a pipe or the like "no file"."""
    found = {}
    for folder in folders:
        for path in (root / folder, *sorted((root / folder).rglob("*"))):
            name = path.relative_to(root).as_posix()
            if path.is_symlink():
                found[name] = "link"
            elif path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif path.exists() and not path.is_dir():
                found[name] = "no file"
    return found


def without_caches(found):
    """The files that Python and macOS do not write by themselves."""
    return {
        name: digest
        for name, digest in found.items()
        if "__pycache__" not in name.split("/") and not name.endswith("/.DS_Store")
    }


def differences(expected, found):
    """One sentence for each file that was changed, added or removed, or is a link."""
    sentences = [f"{name} was removed" for name in expected if name not in found]
    for name, digest in found.items():
        if digest in ("link", "no file"):
            sentences.append(f"{name} is a {digest}" if digest == "link" else f"{name} is no file")
        elif name not in expected:
            sentences.append(f"{name} was added")
        elif digest != expected[name]:
            sentences.append(f"{name} was changed")
    return sentences


def read_list(path):
    """{relative path: hexadecimal digest} of a list that --renew wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(reversed(line.split("  ", 1)) for line in lines)


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m tests.protected", description="Name changed files.")
    parser.add_argument("--root", type=Path, help="another folder, to compare with this one")
    parser.add_argument("--list", type=Path, default=HERE / LIST, help="the list to check against")
    parser.add_argument("--renew", action="store_true", help="write the list anew")
    options = parser.parse_args(arguments)
    here = without_caches(digests(HERE))
    if options.renew:
        lines = [f"{digest}  {name}\n" for name, digest in here.items()]
        options.list.write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines)} files listed in {options.list}")
        return
    if options.root is None:
        found = differences(read_list(options.list), here)
    else:
        folders = (*FOLDERS, IMAGES)
        found = differences(without_caches(digests(HERE, folders)), digests(options.root, folders))
    if found:
        sys.exit("\n".join([*found, "A submission must not change these files: put them back."]))
    print("no protected file was changed")


if __name__ == "__main__":
    main()
