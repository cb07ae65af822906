"""The planner's backward pass against PyTorch's engine."""

import pytest
import torch
from stage_trainer.plan.backward import run_backward
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch.autograd.graph import get_gradient_edge
from vision_tower import VisionTower, VisionTowerConfig

TEXT = {"vocab_size": 50, "width": 32, "layers": 3, "heads": 2, "mlp_width": 80}
VISION = {"resolution": 32, "patch": 8, "width": 32, "layers": 3, "heads": 2}


def towers(checkpointing):
    text = TextTower(TextTowerConfig(**TEXT, lora_rank=4, adapters=("a",), checkpointing=checkpointing)).train()
    packed = PackedTokens.from_lists([[7, 8, 9], [1], [5, 6, 7]])
    vision = VisionTower(VisionTowerConfig(**VISION, checkpointing=checkpointing))
    images = torch.randn(3, 3, 32, 32)
    return (text, lambda: text(packed)), (vision, lambda: vision(images))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_planners_backward_pass_gives_the_engines_gradients(checkpointing, precision):
    for tower, forward in towers(checkpointing):
        found, learned = {}, []
        for engine in (True, False):
            tower.zero_grad()
            for _ in range(2):  # the second time gradients are there, and are added to
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    out = forward()
                gradient = torch.arange(float(out.numel())).view_as(out)
                if engine:
                    out.backward(gradient)
                    continue
                graph = [get_gradient_edge(out).node]
                run_backward(graph, gradient, before=lambda _: None, learned=learned.append)
                assert not graph
            found[engine] = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
        assert found[True].keys() == found[False].keys()
        assert len(learned) == 2 * len(found[True])
        for name, expected in found[True].items():
            assert torch.equal(found[False][name], expected), name


def test_what_a_node_has_saved_is_let_go_when_it_is_done():
    weight = torch.ones(3, requires_grad=True)
    alive = set()

    class Token:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Token, lambda token: token.tensor):
        out = weight
        for _ in range(4):
            out = out.sin()  # saves its input
    graph, counts, gradient = [get_gradient_edge(out).node], [], torch.ones_like(out)
    del out
    run_backward(graph, gradient, before=lambda _: counts.append(len(alive)), learned=None)
    assert counts == [4, 3, 2, 1, 0]
