"""Where the optimizer's tensors are: under FakeTensorMode, which knows CUDA's devices without having one. Fused AdamW
reads its count of steps on the GPU; one in main memory would be an illegal access there."""

import contextlib

import pytest
import torch
from stage_trainer.engine import deepspeed_private
from stage_trainer.engine.partitioned import MOMENTS, PartitionedEngine, Zero3Engine
from stage_trainer.engine.plain import PlainEngine
from stage_trainer.optim.build import build_optimizer
from stage_trainer.recipe import OptimizerConfig
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_cuda():
    with FakeTensorMode():
        yield


def engine_of(kind, name, *parameters):
    """An engine as DeepSpeed leaves it: of ZeRO, each group is one tensor."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    groups = [
        {"params": [p], "names": [f"p{n}"], "tower": "text", "lr": 1.0, "weight_decay": 0.1, "muon": p.ndim == 2}
        for n, p in enumerate(parameters)
    ]
    engine = kind.__new__(kind)
    engine.optimizer = build_optimizer(groups, OptimizerConfig(name=name), "bf16")
    engine.parameters, engine.device, engine._engine = {f"p{n}": p for n, p in enumerate(parameters)}, GPU, None
    return engine


def on_the_gpu(engine, keys):
    for parameter in engine.parameters.values():
        state = engine.optimizer.state[parameter]
        assert {key: value.device for key, value in state.items()} == dict.fromkeys(state, GPU)
        assert set(state) in keys


def loaded_from_main_memory(shape):
    return {"step": torch.tensor(3.0), **{key: torch.empty(shape) for key in MOMENTS}}


def test_the_state_of_a_partition_is_beside_it_fresh_trained_and_loaded(fake_cuda, monkeypatch):
    engine = engine_of(PartitionedEngine, "adamw", *(torch.nn.Parameter(torch.empty(6, device=GPU)) for _ in range(2)))
    monkeypatch.setattr(deepspeed_private, "link_states", lambda _: None)
    set_to = []
    monkeypatch.setattr(engine, "_set", lambda parameter, value, key: set_to.append(value.device), raising=False)
    keys = [{"step", *MOMENTS}]
    engine._prepare()
    on_the_gpu(engine, keys)
    engine.optimizer.step()
    on_the_gpu(engine, keys)
    engine._load_states({f"p0|{key}": value for key, value in loaded_from_main_memory(6).items()})
    engine.optimizer.step()
    on_the_gpu(engine, keys)
    assert set_to == [GPU] * len(MOMENTS)


def test_a_partition_in_main_memory_keeps_its_state_there(fake_cuda, monkeypatch):
    """Offloaded: the fused step runs on the CPU."""
    engine = engine_of(PartitionedEngine, "adamw", torch.nn.Parameter(torch.empty(6)))
    monkeypatch.setattr(deepspeed_private, "link_states", lambda _: None)
    engine._prepare()
    state = engine.optimizer.state[engine.parameters["p0"]]
    assert {value.device.type for value in state.values()} == {"cpu"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_zero_what_a_checkpoint_or_another_stage_left_is_beside_its_parameter(fake_cuda, name):
    matrix, vector = (torch.nn.Parameter(torch.empty(shape, device=GPU)) for shape in ((6, 4), (6,)))
    keys = [{"step", *MOMENTS}, {"momentum_buffer"}]
    engine = engine_of(PlainEngine, name, matrix, vector)
    engine.optimizer.step()
    on_the_gpu(engine, keys)
    of_matrix = loaded_from_main_memory((6, 4)) if name == "adamw" else {"momentum_buffer": torch.empty(6, 4)}
    saved = {f"p0|{key}": value for key, value in of_matrix.items()}
    saved |= {f"p1|{key}": value for key, value in loaded_from_main_memory(6).items()}
    again = engine_of(PlainEngine, name, matrix, vector)
    again._load_states(saved)
    on_the_gpu(again, keys)
    again.optimizer.step()
    on_the_gpu(again, keys)


@pytest.mark.parametrize("kind", [PlainEngine, PartitionedEngine, Zero3Engine])
def test_what_ranks_exchange_is_on_the_gpu(fake_cuda, monkeypatch, kind):
    """NCCL takes no other tensors, gloo does."""
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: sent.append(tensor.device))
    engine = engine_of(kind, "adamw", torch.nn.Parameter(torch.empty(6, device=GPU)))
    engine.world = 2
    engine.sum_over_ranks(torch.tensor(3))
    for exchange in (engine._without_gradient, lambda: engine.forward_passes(3)):
        with contextlib.suppress(DataDependentOutputException):  # the result, which nobody has computed, is read
            exchange()
    assert sent == [GPU] * (3 if kind is Zero3Engine else 2)
