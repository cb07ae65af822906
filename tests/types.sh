#!/usr/bin/env bash
# mypy over the packages, and over the scripts beside them, which nothing else runs for months.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
mypy || status=1
for folder in packages/*/benchmarks data_prep/benchmarks tests/gpu; do  # one by one: their modules have the same names
    MYPYPATH="$folder:packages/contrastive-losses/benchmarks" mypy "$folder" || status=1
done
exit "$status"
