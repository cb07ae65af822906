#!/usr/bin/env bash
# The paper's findings at laptop scale: trains and compares every variant, with three seeds.
#   bash launch/ablations.sh                                   within five hours on two cores; run again, it goes on
#   bash launch/ablations.sh --seeds 1 --steps-scale 0.25      a first look
# Further arguments go to packages/stage-trainer/benchmarks/ablations.py. Runs stay in runs/ablations.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"
data-prep corpus runs/corpus
exec python packages/stage-trainer/benchmarks/ablations.py --corpus runs/corpus \
  --pictures packages/stage-trainer/pictures "$@"
