"""How much a block does: operators and bytes of its forward and backward pass, held within 5 % of stored figures.

On a GPU what is not a matrix product is bound by the bytes that it moves, and small products by launches: a cast, a
copy or a mask more in each block shows here, where there is no GPU. Counted as an H100 under bfloat16 autocast runs it,
without a compiler, on tensors without data. A change of these figures is a decision; a failing test prints new ones.
"""

import warnings

import pytest
import torch
from stage_trainer.plan.backward import run_backward
from stage_trainer.plan.devices import DEVICES
from stage_trainer.plan.target import Target
from text_tower import PackedTokens, TextTowerConfig
from text_tower.attention import Attention
from text_tower.blocks import Block as TextBlock
from text_tower.packed import ByLength, on_device
from text_tower.positions import scheme
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vision_tower import VisionTowerConfig
from vision_tower.blocks import Block as ImageBlock

TARGET = Target.of(DEVICES["h100-80gb"], "bf16")
# Of forward and backward together: operators, and bytes of a token (what operators read and write).
STORED = {
    "text": (73, 514_744),
    "text, adapters": (93, 563_992),
    "text, JinaBERT": (54, 493_744),
    "images": (117, 584_829),
    "text, residual in 16 bits": (75, 432_827),
    "images, residual in 16 bits": (119, 502_912),
}


class Work(TorchDispatchMode):
    """Operators that compute or move something, and the bytes of their operands and results; views are neither."""

    operators = size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([t for t in tree_leaves(each) if isinstance(t, torch.Tensor)] for each in ((args, kwargs), out))
        there = {t.untyped_storage()._cdata for t in given}
        if func._schema.is_mutable or any(t.untyped_storage()._cdata not in there for t in made):
            self.operators += 1
            self.size += sum(t.numel() * t.element_size() for t in (*given, *made))
        return out


def work(block, x, forward):
    with Work() as seen, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available", UserWarning)
        with torch.autocast("cuda", torch.bfloat16):
            TARGET.switch_autocast()
            out = forward(x)
        gradient = torch.empty_like(out)
        run_backward([get_gradient_edge(out).node], gradient, before=lambda node: None, learned=None)
    return seen.operators, seen.size / (x.numel() / x.shape[-1])


def of_texts(dtype=torch.float32, **settings):
    config, length = TextTowerConfig(**settings), 64
    packed = PackedTokens.from_lists([[5] * length] * 128)
    with torch.device("meta"):
        block = TextBlock(config)
    layout = ByLength.of(packed)  # planned on the host, with numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cuda")
        layout = on_device(layout, "cuda")
        positions = scheme(config, layout.positions)
        attention = Attention(layout, positions, TARGET.attend_texts())
        x = torch.empty(len(packed.ids), config.width, device="cuda", dtype=dtype, requires_grad=True)
        return work(block, x, lambda x: block(x, attention, 0, None))


def of_images(dtype=torch.float32):
    config = VisionTowerConfig()
    with torch.device("meta"):
        block = ImageBlock(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cuda")
        x = torch.empty(64, 129, config.width, device="cuda", dtype=dtype, requires_grad=True)
        rotary = torch.empty(64, 129, 1, config.head_dim // 2, 2, device="cuda")
        return work(block, x, lambda x: block(x, rotary, TARGET.attend_images()))


@pytest.mark.parametrize("name", STORED)
def test_operators_and_bytes_of_a_token_are_the_stored_ones(name):
    ways = {
        "text": of_texts,
        "text, adapters": lambda: of_texts(adapters=("a",), lora_rank=4),
        "text, JinaBERT": lambda: of_texts(positions="alibi", mlp="geglu"),
        "images": of_images,
        "text, residual in 16 bits": lambda: of_texts(torch.bfloat16),
        "images, residual in 16 bits": lambda: of_images(torch.bfloat16),
    }
    operators, size = ways[name]()
    print(f"{name}: ({operators}, {size:.0f})")
    assert (operators, size) == pytest.approx(STORED[name], rel=0.05)
