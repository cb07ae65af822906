"""What a run does around its steps that differs on GPUs."""

import datetime
import gc
import sys
import types
from pathlib import Path

import forks
import pytest
import torch
from stage_trainer.errors import UserError
from stage_trainer.evaluation import retrieval
from stage_trainer.run import rendezvous
from stage_trainer.tasks.pools import PoolValidation
from stage_trainer.trainer import Trainer


def a_trainer(device, cache="auto"):
    trainer, said = Trainer.__new__(Trainer), []
    trainer.device, trainer.unplanned, trainer.say = torch.device(device), False, said.append
    trainer.stage = types.SimpleNamespace(gradient_cache=cache)
    return trainer, said


def test_a_fault_of_the_planner_costs_the_plan_and_not_a_run_on_gpus():
    def fails():
        raise ZeroDivisionError("no bandwidth")

    trainer, said = a_trainer("cuda")
    assert trainer._planned(fails) is trainer._planned(fails) is None
    (line,) = said
    assert line.startswith("warning: the planner failed (ZeroDivisionError: no bandwidth)")
    assert "gradient_cache: auto is GradientCache(images=32, tokens=8192)" in line
    assert trainer._planned(lambda: 3) == 3
    trainer, said = a_trainer("cpu")
    with pytest.raises(ZeroDivisionError):
        trainer._planned(fails)
    assert not said


def test_what_the_user_can_correct_is_no_fault_of_the_planner():
    def refuses():
        raise UserError("no such data")

    with pytest.raises(UserError, match="no such data"):
        a_trainer("cuda")[0]._planned(refuses)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_validation_computes_in_the_runs_precision(monkeypatch, precision):
    seen = []

    def embed(model, pool, **_):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        raise StopIteration

    monkeypatch.setattr(retrieval, "embed", embed)
    validation = PoolValidation.__new__(PoolValidation)
    validation.images, validation.pairs = {"pool": None}, {}
    objective = types.SimpleNamespace(model=torch.nn.Identity(), precision=precision)
    validation.engine = types.SimpleNamespace(
        objective=objective, device=torch.device("cpu"), forward_share=lambda: (0, 1)
    )
    with pytest.raises(StopIteration):
        validation.run(False, lambda: None)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]


@pytest.mark.parametrize(("backend", "calls"), [("nccl", ["barrier", "synchronize", "destroy"]), ("gloo", [])])
def test_nccl_is_ended_in_an_orderly_way(monkeypatch, backend, calls):
    done = []
    monkeypatch.setattr(rendezvous.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(rendezvous.dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(rendezvous.dist, "destroy_process_group", lambda: done.append("destroy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    rendezvous.leave_distributed()
    assert done == calls


def one_process(folder: str) -> None:
    """A stage whose resolution changes once."""
    import weakref

    from stage_trainer.recipe.read import load
    from stage_trainer.tasks.contrastive import ContrastiveTask
    from stage_trainer.trainer import train

    alive: list[weakref.ref] = []
    make_engine = ContrastiveTask.make_engine

    def watched(task, model, optimizer):
        assert [each() for each in alive] == [None] * len(alive), "the former engine's parameters are still there"
        engine = make_engine(task, model, optimizer)
        (states,) = ([value for state in engine.optimizer.state.values() for value in state.values()],)
        alive.extend(weakref.ref(each) for each in (*engine.parameters.values(), *states) if torch.is_tensor(each))
        assert len(alive) > 20
        return engine

    ContrastiveTask.make_engine = watched
    gc.disable()  # it is not by chance that they are gone
    drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
    settings = [
        f"output={folder}/run", f"corpus={folder}/corpus", f"model.tokenizer={folder}/corpus/tokenizer.model",
        "steps=4", "warmup_steps=1", "resolution=[[0, 32], [2, 40]]", "evaluation.every=0", "checkpoint.every=0",
        "optimizer.name=adamw", "deepspeed={zero_optimization: {stage: 1}}",
    ]  # fmt: skip
    train(load(drawn, settings, 1).recipe, 1)
    groups = torch.distributed.distributed_c10d._world.pg_map
    cpu = torch.device("cpu")
    waits = {group._get_backend(cpu).options._timeout for group in groups}
    assert waits == {rendezvous.LONGEST_WAIT} != {datetime.timedelta(minutes=30)}
    assert len(groups) > 1  # DeepSpeed has made one of its own


def test_the_former_engine_is_gone_before_the_next_is_made_and_its_groups_wait(tmp_path):
    made = [str(Path(sys.executable).with_name("data-prep")), "corpus", str(tmp_path / "corpus"), "--drawn"]
    for words in (made, [sys.executable, __file__, str(tmp_path)]):
        done = forks.run(words, tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


if __name__ == "__main__":
    one_process(sys.argv[1])
