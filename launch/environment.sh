#!/usr/bin/env bash
# Makes .venv at the root of the checkout (all five packages and the test tools, versions from constraints.txt) when it
# is missing or out of date: bash launch/environment.sh
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/trilith-$(cat launch/constraints.txt pyproject.toml packages/*/pyproject.toml data_prep/pyproject.toml | cksum | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0

for candidate in python3.13 python3.12 python3.11 python3 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "${python:-}" ]; then
  echo "Python 3.11 or newer is needed and none was found on PATH; install one (https://www.python.org) and start again" >&2
  exit 2
fi
echo "making .venv with $("$python" --version) (PyTorch alone is some gigabytes; this happens once)"
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
  rm -rf .venv  # half of one would pass for a whole one the next time
  echo "could not make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2
  exit 2
fi
.venv/bin/python -m pip install --quiet uv
. launch/certificates.sh
.venv/bin/uv pip install --quiet --python .venv/bin/python --constraint launch/constraints.txt --group dev \
  -e packages/contrastive-losses -e packages/text-tower -e 'packages/vision-tower[jpeg]' \
  -e 'packages/stage-trainer[onnx,parquet,report,mteb,webdataset]' \
  -e 'data_prep[corpus,parquet,datasets,pdf,ray,captions,curation,negatives,test]'
# Of what CLIP_benchmark asks for, only its measure of written captions needs what is not here: 100 MB of Java.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --constraint launch/constraints.txt clip-benchmark
# Python keeps what it compiles of a module that it imports, but not under PYTHONDONTWRITEBYTECODE, which many containers
# set: there each process would spend half of its start on compiling.
env -u PYTHONDONTWRITEBYTECODE DS_ACCELERATOR=cpu .venv/bin/python -W ignore -c \
  'import deepspeed, open_clip, peft, sentence_transformers, timm, torch._dynamo, torch._inductor, torch.utils.tensorboard'
rm -f .venv/trilith-*
touch "$stamp"
