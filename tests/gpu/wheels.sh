#!/usr/bin/env bash
# Wheels for a machine without a network that has PyTorch: what our packages need and such an image lacks.
#   bash tests/gpu/wheels.sh DIR [PYTHON VERSION, by default 3.12]
# Versions are those of launch/constraints.txt. DeepSpeed is published as source alone; nothing of it is compiled.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?name a folder for the wheels}
version=${2:-3.12}
python=${PYTHON:-.venv/bin/python}
platforms=()
for n in 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
pinned() { grep -i "^${1//_/-}==" launch/constraints.txt; }
wanted=()
for name in hjson msgpack py-cpuinfo pydantic pydantic-core annotated-types typing-inspection webdataset braceexpand \
  open-clip-torch ftfy wcwidth; do
  wanted+=("$(pinned "$name")")
done
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$out" "$(pinned deepspeed)"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --dest "$out" "${wanted[@]}"
ls "$out"
