"""Queries, keys and values, and SwiGLU's gate and value, are one product each in 16 bits."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vision_tower import PackedPatches
from vision_tower.blocks import products


class Products(TorchDispatchMode):
    """Counts matrix products with weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def counted(run):
    with Products() as seen:
        run()
    return seen.count


def hook_into_linears(tower):
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)


def in_bf16(tower, images):
    with torch.autocast("cpu", torch.bfloat16):
        return tower(images)


@pytest.mark.parametrize("attention_norm", [False, True])
def test_a_block_takes_four_products_in_16_bits_and_seven_in_32(make_tower, config, images, attention_norm):
    tower = make_tower(replace(config, attention_norm=attention_norm))
    blocks = len(tower.blocks)
    # And one for the patches. In the last block the class token alone has queries, which are a product of their own.
    assert counted(lambda: tower(images)) == 1 + 7 * blocks
    assert counted(lambda: in_bf16(tower, images)) == 1 + 4 * blocks + 1
    tower.bfloat16()
    assert counted(lambda: tower(images.bfloat16())) == 1 + 4 * blocks + 1


def test_one_product_holds_no_more_memory_than_three(make_tower, config, images):
    """Its queries and keys are not needed once they are turned, and must not live on as neighbours of the values."""

    def held(tower):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = in_bf16(tower, images)
        assert out.requires_grad
        return sum(storages.values())

    config = replace(config, mlp_width=168)  # no row needs zeros at its end
    tower, apart = make_tower(config), make_tower(config)
    hook_into_linears(apart)
    assert held(tower) <= held(apart)


class Rows(TorchDispatchMode):
    """Whether each row, or column, of what is multiplied begins 16 bytes or a multiple of them after the one before."""

    def __init__(self):
        super().__init__()
        self.aligned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.aligned += [max(each.stride()) % 8 == 0 for each in args[-2:]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_every_product_are_whole_16_bytes_long(make_tower, config, images, packed):
    """Also of SwiGLU's odd width: 2,730 in L/14, whose products were two fifths of the tower's time on an H200."""
    assert config.mlp_width % 8
    tower = make_tower(config)
    given = PackedPatches.from_images(list(images), config.patch) if packed else images
    with Rows() as rows:
        gradients(tower, given)
    assert len(rows.aligned) > 20 * config.layers
    assert all(rows.aligned)


def gradients(tower, images):
    tower.zero_grad()
    out = in_bf16(tower, images)
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return [out.detach(), *(p.grad for p in tower.parameters())]


def error(found, exact):
    off = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return float(off / sum(b.square().sum() for b in exact)) ** 0.5


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_no_less_exact_than_by_products_of_their_own(make_tower, config, images, packed):
    def given(dtype):
        if not packed:
            return images.to(dtype)
        return PackedPatches.from_images([*images.to(dtype)[:2], images.to(dtype)[2, :, :24]], config.patch)

    tower, apart, exact = (make_tower(config) for _ in range(3))
    hook_into_linears(apart)
    expected = exact.double()(given(torch.float64))
    (expected * torch.linspace(-1, 1, expected.shape[1])).sum().backward()
    right = [expected.detach(), *(p.grad for p in exact.parameters())]
    ours, theirs = (error(gradients(each, given(torch.float32)), right) for each in (tower, apart))
    assert 1e-3 < ours < 1.05 * theirs
    assert all(p.grad.dtype == torch.float32 for p in tower.parameters())


def test_each_linear_keeps_its_width_and_its_bias_or_none():
    linears = [nn.Linear(6, 4).bfloat16(), nn.Linear(6, 5, bias=False).bfloat16(), nn.Linear(6, 3).bfloat16()]
    x = torch.randn(7, 6, dtype=torch.bfloat16)
    found = products(x, *linears)
    assert [each.shape[-1] for each in found] == [4, 5, 3]
    for ours, linear in zip(found, linears, strict=True):
        torch.testing.assert_close(ours, linear(x), rtol=2**-7, atol=2**-7)


def test_whoever_hooks_into_a_linear_or_replaces_it_gets_its_call(make_tower, config, images):
    """As ZeRO 3 does, under which a weight is empty outside of its module's call, and adapters or quantizers do."""
    tower, calls = make_tower(config), []

    class Other(nn.Linear):
        def forward(self, x):
            calls.append("replaced")
            return super().forward(x)

    attention = tower.blocks[0].attn
    attention.k_proj.register_forward_pre_hook(lambda *_: calls.append("hooked"))
    other = Other(config.width, config.mlp_width)
    other.load_state_dict(tower.blocks[1].mlp.fc1_x.state_dict())
    tower.blocks[1].mlp.fc1_x = other
    in_bf16(tower, images)
    assert calls == ["hooked", "replaced"]


def test_names_of_weights_stay(make_tower, config, make_timm, images):
    tower = make_tower(config)
    before = list(tower.state_dict())
    in_bf16(tower, images)
    assert list(tower.state_dict()) == before == list(make_timm(tower).state_dict())
