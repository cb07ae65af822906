#!/usr/bin/env bash
# An example of a Slurm job: one stage on several machines, each with a launcher of its own, so ssh is not needed.
#   sbatch launch/slurm.sh 1 --recipe my-recipe.yaml [key=value …]        (1: the stage)
# from the root of the checkout, which stands at the same path on every machine, as environment and data do.
#SBATCH --job-name=trilith
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
# Two minutes before the time is over the run saves and ends with exit code 75; submitted again, it goes on.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

srun --kill-on-bad-exit=1 bash -c '
    stage=$1; shift
    hosts=$(mktemp)
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=${SLURM_GPUS_ON_NODE:-1}/" > "$hosts"
    first=$(head -n 1 "$hosts") port=$((20000 + SLURM_JOB_ID % 10000))
    export DEEPSPEED_OPTIONS="--hostfile $hosts --no_ssh --node_rank $SLURM_NODEID --master_addr ${first%% *} --master_port $port"
    exec bash "launch/stage$stage.sh" "$@"
' slurm "$@"
