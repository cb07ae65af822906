#!/usr/bin/env bash
# Search a collection in a browser: bash launch/demo.sh MODEL DATA … (arguments as of `stage-trainer demo`).
# Gradio asks for an older Pillow than the one that the tests ran with, so it and what it needs lie beside the
# environment, in .venv/demo, where this command alone sees them.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/launch/environment.sh"
beside=$root/.venv/demo
want=$(cat "$root/launch/constraints.txt" "$0" | cksum | cut -d' ' -f1)
if [ ! -e "$beside/.$want" ]; then
  echo "installing gradio into .venv/demo (this happens once)" >&2
  rm -rf "$beside"
  grep -vE '^(pillow|tomlkit)==' "$root/launch/constraints.txt" >"$root/.venv/demo-constraints.txt"
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --target "$beside" \
    --constraint "$root/.venv/demo-constraints.txt" gradio==6.31.0
  touch "$beside/.$want"
fi
PYTHONPATH=$beside${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/stage-trainer" demo "$@"
