#!/usr/bin/env bash
# The tests: bash tests/run.sh (the everyday suite), bash tests/run.sh --full (also what takes longer).
# Further arguments go to pytest: bash tests/run.sh -k recall
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE  # or each of hundreds of processes compiles all that it imports
selection=(-m "not full")
if [ "${1:-}" = --full ]; then selection=(); shift; fi
ruff check .
ruff format --check .
# Beside the tests: without mypy's cache it takes more than a minute of one core. What it says comes after theirs.
said=$(mktemp)
bash tests/types.sh >"$said" 2>&1 &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
# Two cores or more: as many test processes, one thread each. Files stay whole, so their fixtures are made once, and come
# in their order: else those of few tests, which train for minutes, would come last, and all but one process would wait.
status=0
OMP_NUM_THREADS=1 pytest -n auto --dist loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"} "$@" || status=$?
wait "$types" || status=$?
cat "$said"
exit "$status"
