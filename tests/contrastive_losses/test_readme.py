import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "contrastive-losses" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
FOR_TORCHRUN = [example for example in EXAMPLES if example.startswith("# train.py")]


def test_readme_has_an_example_of_five_lines():
    assert len([line for line in EXAMPLES[0].splitlines() if line]) == 5


@pytest.mark.parametrize("example", [example for example in EXAMPLES if example not in FOR_TORCHRUN])
def test_readme_examples_run_as_they_stand(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.full
def test_the_example_for_torchrun_runs_on_two_ranks(tmp_path):
    (example,) = FOR_TORCHRUN
    script = tmp_path / "train.py"
    script.write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    for _ in range(3):
        run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
        # PyTorch's: a thread of gloo's that frees its last tensor while Python ends aborts, one time in twenty if busy.
        if "terminate called without an active exception" not in run.stderr:
            break
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+) of 32 pairs", run.stdout)]
    assert len(losses) == 3
