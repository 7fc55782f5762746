"""Do the tests find faults? Each of twenty is put into a copy of the project; tests run there.

python -m tests.campaign                  all of them
python -m tests.campaign --share 0.1      every tenth
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ".git", ".venv", ".ruff_cache", "__pycache__", "benchmark", "*.html"

# (file, test module that must fail): rows (what is wrong, text that occurs once, text in its place)
TABLE = {
    ("vae_lib.py", "vae_test"): [
        ("a sign in KL", "- mu.square())", "+ mu.square())"),
        ("factor ½ lost", "0.5 * (x_hat - x)", "(x_hat - x)"),
        ("log σ² taken for log σ", "mu + torch.exp(0.5 * logvar)", "mu + torch.exp(logvar)"),
        ("prior's mean ignored", "return self.prior_mu +", "return"),
        ("KL counts by half", "(reconstruction + kl)", "(reconstruction + 0.5 * kl)"),
        ("last batch dropped", ".split(size):", ".split(size)[: n // size]:"),
        ("seed ignored", "Generator(device).manual_seed(seed)", "Generator(device).manual_seed(0)"),
        ("lattice of two columns", "(math.sqrt(5) - 1) / 2", "1 / 2"),
        ("512 log 2π lost", "- 512 * math.log(", "- 0 * math.log("),
        ("pixels beyond 0 and 1", "nn.functional.hardtanh(x, 0, 1)", "x"),
        ("images in another order", "for path in paths]", "for path in paths[::-1]]"),
        ("16 bits clipped", 'image.mode.startswith("I")', "False"),
    ],
    ("vae_lib.py", "export_test"): [
        ("other model's file let in", "weights_only=True))", "weights_only=True), False)"),
        ("pickles executed", "weights_only=True", "weights_only=False"),
        ("losses lost", "for epoch in losses)", "for epoch in losses[:1])"),
        ("score is FID", "{100 - fid}", "{fid}"),
    ],
    ("tests/fid.py", "fid_test"): [
        ("covariance divided by n", "math.sqrt(len(x) - 1)", "math.sqrt(len(x))"),
        ("means ignored", "(mu1 - mu2).square()", "(mu1 - mu1).square()"),
        ("features unscaled", "IMAGENET_SCALE * torch", "torch"),
        ("hash not compared", "if found != sha256:", "if False:"),
    ],
}
FAULTS = [(*key, *row) for key, rows in TABLE.items() for row in rows]


def passes(folder, module):
    """Whether a module's tests pass in this copy of the project."""
    command = [sys.executable, "-m", "unittest", "--failfast", f"tests/{module}.py"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if (run.returncode == 0) == ("FAILED" in run.stderr):
        sys.exit(f"error: {module} neither passed nor failed:\n{run.stderr}")
    return run.returncode == 0


def main():
    parser = argparse.ArgumentParser("python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the faults, evenly spread")
    faults = FAULTS[:: max(1, round(1 / parser.parse_args().share))]
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in TABLE}
    wrong = [f"{old!r} in {file}" for file, _, _, old, _ in FAULTS if texts[file].count(old) != 1]
    if wrong:
        sys.exit(f"error: expected exactly once, rewrite these rows of TABLE: {', '.join(wrong)}")
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for module in dict.fromkeys(module for _, module, *_ in faults):
            if not passes(folder, module):
                sys.exit(f"error: {module} fails before any fault is put in: mend that first")
        for file, module, name, old, new in faults:
            changed = texts[file].replace(old, new)
            compile(changed, file, "exec")
            (folder / file).write_text(changed, encoding="utf-8")
            found = not passes(folder, module)
            (folder / file).write_text(texts[file], encoding="utf-8")
            missed += not found
            print(f"{'found' if found else 'NOT FOUND':9} by {module}: {name}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults found")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
