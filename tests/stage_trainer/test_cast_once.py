"""Weights that are cast once for all passes of a step, with the bits of casting them in each."""

import contextlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from bare_engine import CHUNKS, LORA, VISION, WAYS, Engine, make_batch
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.tasks.contrastive import forward_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """Counts casts of float32 matrices, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].dtype == torch.float32 != out.dtype:
            self.shapes[tuple(args[0].shape)] += 1
        return out


@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_bits_of_casting_in_each_pass(way):
    (losses, found), (expected_losses, expected) = (Engine(**WAYS[way], once=once).step() for once in (True, False))
    assert torch.equal(torch.stack(losses), torch.stack(expected_losses))
    trained = {name for name, parameter in expected.items() if parameter.grad is not None}
    assert {name for name, parameter in found.items() if parameter.grad is not None} == trained
    assert any("lora_B_0" in name for name in trained) == (way != "plain")
    for name in sorted(trained):
        assert found[name].grad.dtype == torch.float32
        assert torch.equal(found[name].grad, expected[name].grad), name
    assert all(isinstance(parameter, nn.Parameter) for parameter in found.values())


@pytest.mark.parametrize("way", ["adapters", "checkpointing"])
def test_no_pass_casts_a_weight(way):
    engine = Engine(**WAYS[way])
    matrices = [m.weight for m in engine.objective.model.modules() if isinstance(m, nn.Linear)]
    with Casts() as seen:
        engine.step()
    wanted = Counter(tuple(weight.shape) for weight in matrices)
    assert {shape: seen.shapes[shape] for shape in wanted} == wanted


def test_compiled_blocks_take_the_casts_and_no_graph_for_each_step(monkeypatch):
    from functools import partial

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    text, vision = replace(LORA, compile=True), replace(VISION, compile=True)
    engine, expected = Engine(text, vision), Engine(once=False).step()[1]
    graphs = []
    for _ in range(3):
        engine.objective.model.zero_grad()
        found = engine.step()[1]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2], graphs
    for name, parameter in expected.items():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[name].grad, parameter.grad, rtol=0.1, atol=0.05 * float(parameter.grad.abs().max())
            )


def test_afterwards_the_parameters_are_back_whatever_happened():
    engine = Engine()
    before = dict(engine.objective.named_parameters())
    with pytest.raises(KeyError), cast_once(engine.objective):
        raise KeyError
    assert all(parameter is before[name] for name, parameter in engine.objective.named_parameters())
    assert len(before) == len(dict(engine.objective.named_parameters()))
    engine.forward(make_batch())


def test_meanwhile_another_adapter_is_refused():
    engine = Engine()
    packed = make_batch().texts
    with cast_once(engine.objective), pytest.raises(RuntimeError, match="holds adapter 0"):
        engine.objective.model.text(packed, adapter="b", sample_seeds=torch.arange(16))


@pytest.mark.parametrize("stages", ["01", pytest.param("23", marks=pytest.mark.full)])
def test_under_deepspeed_updates_have_the_bits_of_casting_in_each_pass(stages):
    """Under ZeRO 0 to 3; under 3 weights are whole too short a time, and are cast in each pass."""
    support = Path(__file__).parents[1] / "support"
    done = forks.run([sys.executable, __file__, stages], ".", PYTHONPATH=str(support))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def under_deepspeed(stages: str) -> None:
    from unittest import mock

    from stage_trainer.engine import base, make_engine
    from stage_trainer.recipe.read import load
    from stage_trainer.run.rendezvous import initialize_distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_distributed()
    drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
    for zero in map(int, stages):
        bucket = ", reduce_bucket_size: 100000" if zero else ""
        config = f"deepspeed={{zero_optimization: {{stage: {zero}{bucket}}}}}"
        settings = ["optimizer.name=adamw", "loss={dims: [32, 16]}", "precision=bf16", "device=cpu", config]
        recipe = load(drawn, settings, 1).recipe
        stage, ends, entered = recipe.stage(1), [], []
        for once in (True, False):
            objective = Engine().objective
            objective.set_trainable(stage)
            groups = objective.parameter_groups(stage, recipe.optimizer)
            engine = make_engine(objective, groups, recipe.optimizer, precision="bf16", deepspeed=stage.deepspeed)
            engine.train()

            def entering(model, once=once, entered=entered):
                entered.append(once)
                return cast_once(model) if once else contextlib.nullcontext()

            with mock.patch.object(base, "cast_once", entering):
                for _ in range(2):
                    forward_backward(engine, make_batch(), pairs=("image_text", "text"), cache=CHUNKS)
                    assert engine.step()
            ends.append(engine.copy_of_weights())
            engine.close()
        assert entered == ([] if zero == 3 else [True, True, False, False])
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), (zero, name)
        started = Engine().objective.model.state_dict()
        assert not torch.equal(
            ends[0]["text.encoder.layers.0.mlp.fc1.weight"], started["text.encoder.layers.0.mlp.fc1.weight"]
        )


if __name__ == "__main__":
    under_deepspeed(sys.argv[1])
