#!/usr/bin/env bash
# mypy over the packages, and over the scripts beside them, which nothing else runs for months.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
check() {
    mypy "$@" &
    trap "kill $!; exit 1" TERM  # of run.sh, when the tests are interrupted
    wait $! || status=1
}
check
for folder in packages/*/benchmarks data_prep/benchmarks tests/gpu; do  # one by one: their modules have the same names
    MYPYPATH="$folder:packages/contrastive-losses/benchmarks" check "$folder"
done
exit "$status"
