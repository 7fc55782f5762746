#!/bin/sh
# Grade a submission with the tests and the images of this clone:
#
#     tests/grade.sh SUBMISSION        from any folder; PYTHON names the interpreter
#
# Of the submission only vae_lib.py, the three .pth files, result.csv and samples.png are used. Its
# code runs in a temporary copy, in the assignment's three steps. The figure that counts is computed
# afterwards, from the PNG files drawn there, by a process that imports nothing of the submission.
# The last line is the grade; the exit status is 0 if nothing failed, else 1.
#
# FID_FEATURES (default: imagenet) chooses the features. The submission's code runs with your rights:
# grade strangers' work in a container.
set -u
unset PYTHONSAFEPATH # the steps import from their own folder
export LC_ALL=C PYTHONUTF8=1 FID_FEATURES="${FID_FEATURES:-imagenet}"

stop() {
    echo "GRADE failed: $1"
    exit 1
}

here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
[ $# -eq 1 ] || stop "say which folder: tests/grade.sh SUBMISSION"
[ -d "$1" ] || stop "$1 is no folder"
submission=$(CDPATH= cd -- "$1" && pwd) || exit 1
python=$(command -v "${PYTHON:-python}") || stop "there is no ${PYTHON:-python}: name one in PYTHON"
case $python in
/*) ;;
*) python=$PWD/$python ;;
esac

copy=$(mktemp -d) || exit 1
trap 'rm -rf "$copy"' EXIT
failed=""
fail() {
    failed="$failed${failed:+; }$1"
}

digest() { # of what the figure depends on: this clone's tests and images
    find "$here/tests" "$here/data/train" -name __pycache__ -prune -o -type f -exec cksum {} + | cksum
}
before=$(digest)

echo "== What differs in $submission (none of it is used)"
"$python" -I -X utf8 "$here/tests/protected.py" --root "$submission" 2>&1 | sed 's/^/   /'

work=$copy/work
mkdir -p "$work/data"
cp -R "$here/tests" "$work/tests"
find "$work/tests" -name __pycache__ -type d -prune -exec rm -rf {} +
cp -R "$here/data/train" "$work/data/train"
for name in vae_lib.py encoder.pth latent.pth decoder.pth result.csv samples.png; do
    if [ -f "$submission/$name" ] && [ ! -L "$submission/$name" ]; then
        cp "$submission/$name" "$work/$name"
    else
        fail "$name is missing or no regular file"
    fi
done

step() { # TITLE COMMAND…: run it in the copy and show what it says, indented
    title=$1
    shift
    echo "== $title"
    (cd "$work" && "$@") >"$copy/log" 2>&1 </dev/null || fail "$title failed"
    sed 's/^/   /' "$copy/log"
}
step prepare_test.sh sh tests/prepare_test.sh
step run_test.py "$python" -m unittest tests/run_test.py
step eval_test.py "$python" -m unittest tests/eval_test.py

[ "$(digest)" = "$before" ] || stop "the submission's code changed tests or images of $here"
echo "== The figure that counts"
figures=$copy/figures.csv
if ! "$python" -I -X utf8 "$here/tests/fid.py" --draws "$here/data/train" "$work/data/sample" \
    --features "$FID_FEATURES" >"$figures" 2>"$copy/log" </dev/null; then
    sed 's/^/   /' "$copy/log"
    stop "${failed:+$failed; }the samples have no figure"
fi
sed 's/^/   /' "$figures"
value() { # KEY: the number beside it
    sed -n "s/^$1,//p" "$figures"
}
is_true() { # EXPRESSION with numbers
    awk "BEGIN { exit !($1) }"
}
fid=$(value FID)
said=""
if [ -f "$work/result_autograding.csv" ]; then
    said=$(sed -n 's/^FID,\([0-9][0-9.e+-]*\)$/\1/p' "$work/result_autograding.csv" | head -n 1)
fi
if [ -z "$said" ] || ! is_true "($said - $fid)^2 < 0.0001"; then
    fail "result_autograding.csv says FID ${said:-nothing}, but it is $fid"
fi
is_true "$fid < $(value limit)" || fail "the samples are no better than the mean image or noise"
if [ "$(value copies)" -gt 0 ]; then
    echo "   $(value copies) of $(value samples) samples are training images, pixel for pixel:" \
        "read vae_lib.py"
fi

if is_true "$(value floor) > 0.01"; then
    multiple=$(awk "BEGIN { printf \"%.2f F\", $fid / $(value floor) }")
else
    multiple="F is 0"
fi
features=$(sed -n 's/^FID_\([a-z]*\),.*/\1/p' "$figures")
grade=$(printf 'score %.1f (FID %.1f, %s, %s features, mean of %d draws)' \
    "$(value score)" "$fid" "$multiple" "$features" "$(value draws)")
[ -z "$failed" ] || stop "$failed; the samples have $grade"
echo "GRADE $grade"
