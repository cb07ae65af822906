"""Several machines: the example job for Slurm, a launcher on each, each with a run folder of its own."""

import os
import shutil
import sys
from pathlib import Path

import pytest

QUICK = ("steps=8", "warmup_steps=2", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]")
LAUNCH = Path(__file__).parents[2] / "launch"
# Of Slurm what the job asks of it. Both machines are this one, in the folders node0 and node1.
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\nlocalhost\\n'\n"
SRUN = f"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in 0 1; do
    (mkdir -p node$node && cd node$node && ln -sfn {LAUNCH} launch && SLURM_NODEID=$node exec "$@") &
    tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait "$task" || exit 1; done
"""


@pytest.fixture
def slurm(run, tmp_path, drawn_corpus, port):
    """Runs launch/slurm.sh as on two machines; returns what it printed."""
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": port}

    def execute(*settings: str) -> str:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        corpus = f"corpus={drawn_corpus}", f"model.tokenizer={drawn_corpus}/tokenizer.model"
        recipe = LAUNCH / "recipes/drawn.yaml"
        done = run("/bin/bash", LAUNCH / "slurm.sh", "1", "--recipe", recipe, "output=run", *corpus, *settings,
                   env={**job, "PATH": path})  # fmt: skip
        return done.stdout

    return execute


def test_two_machines_with_folders_of_their_own_give_one_process_curve(slurm, train, scalars, tmp_path):
    """The second machine gets a copy of the checkpoint that only the first has, and they go on from it."""
    options = (*QUICK, "checkpoint={every: 4, keep: 2}")
    train(1, *options)
    slurm(*options)
    first, second = tmp_path / "node0/run/stage1", tmp_path / "node1/run/stage1"
    assert [path.name for path in second.glob("step-*")] == ["step-0000008"], "the end, where the next stage begins"
    for stage in (first, second):
        shutil.rmtree(stage / "step-0000008")
    assert slurm(*options).count("stage 1 of drawn is complete") == 1
    assert scalars("node0/run/stage1", "loss/text") == pytest.approx(scalars("run/stage1", "loss/text"), rel=1e-5)
    for name in ("state.json", "optimizer.safetensors", "model/vision/model.safetensors"):
        assert (second / "step-0000004" / name).read_bytes() == (first / "step-0000004" / name).read_bytes()
