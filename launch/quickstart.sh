#!/usr/bin/env bash
# From a fresh clone to a trained multilingual text-image model, on two cores in about a quarter of an hour:
#   bash launch/quickstart.sh            the real corpus, from Debian packages (Debian, Ubuntu)
#   bash launch/quickstart.sh --drawn    a small drawn corpus, anywhere
# Run again, it does only what is missing. All that it makes is in .venv and runs/.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  "") name=laptop corpus=runs/corpus options=() ;;
  --drawn) name=drawn corpus=runs/corpus-drawn options=(--drawn) ;;
  *) echo "usage: bash launch/quickstart.sh [--drawn]" >&2; exit 2 ;;
esac
run=runs/$name recipe=launch/recipes/$name.yaml
part() { echo "== $1"; python launch/timed.py "$run/timings.json" "$1" -- "${@:2}"; }

bash launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"
python launch/timed.py "$run/timings.json" environment --took "$SECONDS"
part corpus data-prep corpus "$corpus" ${options[@]+"${options[@]}"}

# All GPUs if there are any; else two processes of one thread each, which beat one process of two threads.
if ! nvidia-smi -L >/dev/null 2>&1; then
  export DEEPSPEED_OPTIONS="--num_accelerators $(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1)) ${DEEPSPEED_OPTIONS:-}"
fi
trained=""  # a stage that was trained anew makes those after it out of date; they are moved aside
for stage in 1 2 3; do
  [ -n "$trained" ] || [ ! -e "$run/stage$stage/evaluation.json" ] || continue
  part "train stage $stage" bash "launch/stage$stage.sh" --recipe "$recipe" ${trained:+--start-over}
  part "evaluate stage $stage" stage-trainer evaluate "$run/stage$stage" "$corpus" --json "$run/stage$stage/evaluation.json"
  trained=yes
done
[ -z "$trained" ] || rm -rf "$run/model" "$run/search.png"
[ -e "$run/model" ] || part export stage-trainer export "$run/stage3" "$run/model"
[ -e "$run/search.png" ] || part search stage-trainer search "$run/model" "$corpus" --out "$run/search.png"

echo
stage-trainer report --recipe "$recipe"
cat <<TEXT

recall@5: the share of queries whose answer is among the first five found; "blind guess" is what chance would reach

the model:          $run/model   (stage_trainer.DualEncoder.from_pretrained("$run/model"))
what it finds:      $run/search.png
ask it yourself:    .venv/bin/stage-trainer search $run/model $corpus "a red flower" --out found.png
how it was trained: .venv/bin/tensorboard --logdir $run   (the page Custom Scalars has what matters)

next, the whole run as one page, and a page that searches:
  .venv/bin/stage-trainer report $run   # writes $run/report.html
  bash launch/demo.sh $run/model $corpus
TEXT
