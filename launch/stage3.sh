#!/usr/bin/env bash
""":"
# Trains stage 3; bash and `deepspeed` (which runs this file as Python) both take it:
#   bash launch/stage3.sh [--recipe FILE] [key=value …]
#   deepspeed -q --num_gpus 8 launch/stage3.sh [--recipe FILE] [key=value …]
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/../.venv/bin:$PATH"
exec python3 -m stage_trainer.run.launcher ${DEEPSPEED_OPTIONS:-} "$0" ${RECIPE:+--recipe "$RECIPE"} "$@"
":"""

from stage_trainer.cli import launch

launch(stage=3)
