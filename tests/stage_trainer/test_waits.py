"""How often a step reads numbers that a GPU computes: its host waits for each. `tests/gpu.sh` counts them there."""

import json
import sys
from collections import Counter
from pathlib import Path

import forks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

OURS = str(Path(__file__).parents[2] / "packages")
BUDGET = {
    "PlainEngine.step": 1,  # the norms of both towers' gradients
    "ContrastiveObjective.figures": 2,  # the accuracies of each loss
    "ContrastiveObjective.temperatures": 1,
    "UpdateNorms.after": 4,  # of each tower, parameters and update
}
"""Of a step that is logged; of any other the first alone."""
OF_A_CPU = {
    "TextTower._check_ids", "problem_with_scalar",  # values are checked on a CPU alone
    "_shared_shift", "_is_within_window", "_Tiles._same_ids",  # of PyTorch's tiles; a GPU has Triton's
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts reads of tensors, by the function of ours that leads to them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_caller: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        if frame:
            self.by_caller[frame.f_code.co_qualname.partition(".<locals>")[0]] += 1

    def __enter__(self):
        tolist = torch.Tensor.tolist

        def noted(tensor):  # on a CPU it does not go through the dispatcher
            self.note()
            return tolist(tensor)

        self.tolist, torch.Tensor.tolist = tolist, noted
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.Tensor.tolist = self.tolist
        super().__exit__(*error)


def one_process() -> None:
    from stage_trainer.recipe.read import load
    from stage_trainer.run.rendezvous import initialize_distributed
    from stage_trainer.tasks.contrastive import forward_backward
    from test_step import BOTH, PlainEngine, deepspeed_engine, make_batch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_distributed()
    drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
    settings = ["optimizer.name=adamw", "loss={dims: [32, 16]}"]
    engine = deepspeed_engine(PlainEngine(dtype=torch.float32).objective, load(drawn, settings, 1).recipe)
    batch, objective = make_batch(), engine.objective
    with Reads() as reads:
        losses = forward_backward(engine, batch, pairs=BOTH)
        engine.update_norms.before()
        assert engine.step()
        objective.after_step(engine)
        objective.figures(engine, losses)
        engine.update_norms.after()
    print(json.dumps(reads.by_caller))


def test_the_host_waits_for_a_device_no_more_often_than_it_must():
    done = forks.run([sys.executable, __file__], ".")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {caller: times for caller, times in found.items() if caller not in OF_A_CPU} == BUDGET


if __name__ == "__main__":
    one_process()
