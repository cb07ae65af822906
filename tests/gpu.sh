#!/usr/bin/env bash
# All that a GPU alone can tell, in one run of at most nine minutes: bash tests/gpu.sh [--out DIR] [--only PART,PART]
#   --cpu          the same in a tiny size on the CPU: two and a half minutes of processor time
#   --wheels DIR   installs the wheels there (tests/gpu/wheels.sh makes them) into a folder that this run alone sees
#   PYTHON=…       the Python to use (default: .venv's if there is one, else python3)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      site=$(mktemp -d)
      trap 'rm -rf "$site"' EXIT
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
      export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
      shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
"$python" tests/gpu/run.py ${arguments[@]+"${arguments[@]}"}
