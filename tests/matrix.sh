#!/usr/bin/env bash
# The tests that a version of PyTorch can break, under the oldest that we support, the newest, and the pinned one:
#   bash tests/matrix.sh [2.11 newest pin] [-- ARGUMENTS OF PYTEST]     (default: all three; some gigabytes and half an
#   hour each; `bash tests/matrix.sh 2.11 -- -k sdpa` for some tests)
# Each has a virtual environment of its own in .cache/matrix/, which a second run uses again. PyTorch decides on the versions
# of what hangs on it (triton, torchvision, CUDA's libraries); all else is launch/constraints.txt's.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/environment.sh
. launch/certificates.sh
uv=$PWD/.venv/bin/uv
hang_on_torch='^(torch|torchvision|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*|sympy|setuptools|fsspec|filelock|networkx)=='
tests=(
  tests/contrastive_losses/test_fused.py tests/contrastive_losses/test_triton_compiles.py tests/contrastive_losses/test_ranks.py
  tests/text_tower/test_tower.py tests/text_tower/test_attention.py tests/text_tower/test_lora.py
  tests/text_tower/test_compiled.py tests/vision_tower/test_compiled.py
  tests/vision_tower/test_tower.py tests/vision_tower/test_attention.py tests/vision_tower/test_blocks.py
  tests/stage_trainer/test_optimizer.py tests/stage_trainer/test_step.py tests/stage_trainer/test_rest.py
  tests/stage_trainer/test_loader.py tests/stage_trainer/test_checkpoint.py tests/stage_trainer/plan
  tests/integration/test_gpu_command.py
)
failed=() versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#versions[@]} -gt 0 ] || versions=(2.11 newest pin)
for version in "${versions[@]}"; do
  case $version in
    newest) torch=torch ;;
    pin) torch=$(grep '^torch==' launch/constraints.txt) ;;
    [0-9]*.[0-9]*) torch="torch==$version.*" ;;
    *) echo "unknown version $version; expected 2.11 or the like, newest, or pin" >&2; exit 2 ;;
  esac
  folder=.cache/matrix/$version
  mkdir -p .cache/matrix
  if [ "$version" = pin ]; then cp launch/constraints.txt "$folder.txt"
  else grep -Ev "$hang_on_torch" launch/constraints.txt >"$folder.txt"; fi
  [ -x "$folder/bin/python" ] || "$uv" venv --quiet --python .venv/bin/python "$folder"
  "$uv" pip install --quiet --python "$folder/bin/python" --constraint "$folder.txt" --upgrade-package torch --group dev "$torch" \
    -e packages/contrastive-losses -e packages/text-tower -e packages/vision-tower -e packages/stage-trainer \
    -e 'data_prep[corpus,parquet,negatives,test]'
  echo "== $version: torch $("$folder/bin/python" -c 'import torch; print(torch.__version__)')"
  PATH="$PWD/$folder/bin:$PATH" OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q -n auto --dist loadfile -m "not full" \
    -p no:cacheprovider "${tests[@]}" "$@" || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed under: ${failed[*]}" >&2; exit 1; }
