#!/bin/sh
# Clear what an earlier self-test left: result_autograding.csv and data/sample. Runs from any folder.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
rm -f "$root/result_autograding.csv"
rm -rf "$root/data/sample"
mkdir -p "$root/data/sample"
