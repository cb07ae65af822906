"""Every attention library is handed the same problem, packed or not, and says so where it cannot be had."""

import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from vision_tower import PackedPatches, VisionTower, VisionTowerConfig, patch_keep_indices
from vision_tower.attention import PLAIN_ATTENTION_TOKENS, attend, choose_backend
from vision_tower.config import as_pair
from vision_tower.packed import ByLength

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def dense(q, k, v):
    """softmax(q k^T / sqrt(D)) v in float64, for `[N, T, H, D]`."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("class_only", [False, True])
def test_packed_attention_equals_each_image_by_itself(random, class_only):
    layout = ByLength((3, 5, 5, 9), CPU)
    q, k, v = (torch.randn(22, 2, 8, generator=random, dtype=torch.float64) for _ in range(3))
    rows = q[layout.class_rows] if class_only else q
    out = attend(rows, k, v, "sdpa", layout)
    ends = layout.cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(ends)):
        own = q[start : start + 1] if class_only else q[start:stop]
        expected = dense(own[None], k[None, start:stop], v[None, start:stop])[0]
        torch.testing.assert_close(out[i : i + 1] if class_only else out[start:stop], expected)


@pytest.mark.parametrize(("tokens", "dtype", "fused"), [
    (PLAIN_ATTENTION_TOKENS, torch.bfloat16, False),
    (PLAIN_ATTENTION_TOKENS, torch.float16, False),
    (PLAIN_ATTENTION_TOKENS + 1, torch.bfloat16, True),
    (8, torch.float32, True),
])  # fmt: skip
def test_on_a_cpu_short_sequences_in_16_bits_alone_take_plain_products(random, monkeypatch, tokens, dtype, fused):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    q, k, v = (torch.randn(1, tokens, 2, 8, generator=random).to(dtype) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v).double(), dense(q, k, v), rtol=0, atol=0.03)
    assert bool(calls) == fused


def test_a_layout_knows_its_runs_of_equal_length():
    layout = ByLength((3, 5, 5, 9), CPU)
    assert layout.groups == [
        (slice(0, 1), slice(0, 3), 3),
        (slice(1, 3), slice(3, 13), 5),
        (slice(3, 4), slice(13, 22), 9),
    ]
    assert layout.cu_seqlens.tolist() == [0, 3, 8, 13, 22]
    assert layout.class_rows.tolist() == [0, 3, 8, 13]
    assert layout.max_seqlen == 9


class BlockDiagonal:
    """What xFormers' BlockDiagonalMask.from_seqlens documents: block i lets queries i see keys i."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        mask = cls()
        mask.blocks = torch.block_diag(
            *(torch.ones(m, n, device=device) for m, n in zip(q_seqlen, kv_seqlen or q_seqlen, strict=True))
        )
        return mask


@pytest.fixture
def fake_libraries(monkeypatch):
    """The documented calls of xFormers and flash-attn, computed by plain torch: it is the arguments that are tested."""

    def memory_efficient_attention(query, key, value, attn_bias=None):
        bias = None if attn_bias is None else attn_bias.blocks.log()
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)).transpose(
            1, 2
        )

    def flash_attn_func(q, k, v):
        return dense(q, k, v).to(q.dtype)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.diff().max() == max_seqlen_q
        assert cu_seqlens_k.diff().max() == max_seqlen_k
        parts = zip(
            q.split(cu_seqlens_q.diff().tolist()),
            k.split(cu_seqlens_k.diff().tolist()),
            v.split(cu_seqlens_k.diff().tolist()),
            strict=True,
        )
        return torch.cat([dense(*(t[None] for t in part))[0] for part in parts]).to(q.dtype)

    def module(name, **members):
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    module("xformers")
    module("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    module("xformers.ops.fmha")
    module("xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonal)
    module("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("backend", ["xformers", "flash-attn"])
@pytest.mark.parametrize("class_only", [False, True])
def test_other_libraries_get_what_they_document(random, fake_libraries, backend, class_only):
    q, k, v = (torch.randn(2, 7, 2, 8, generator=random).bfloat16() for _ in range(3))
    first = q[:, :1] if class_only else q
    torch.testing.assert_close(attend(first, k, v, backend), attend(first, k, v), rtol=0, atol=0.03)
    layout = ByLength((3, 5, 5, 9), CPU)
    q, k, v = (torch.randn(22, 2, 8, generator=random).bfloat16() for _ in range(3))
    rows = q[layout.class_rows] if class_only else q
    expected = attend(rows, k, v, "sdpa", layout)
    torch.testing.assert_close(attend(rows, k, v, backend, layout), expected, rtol=0, atol=0.03)


def test_a_library_is_taken_only_where_it_can_be_had(monkeypatch, fake_libraries):
    assert choose_backend("sdpa", CPU) == choose_backend("auto", CPU) == choose_backend("sdpa", GPU) == "sdpa"
    assert choose_backend("xformers", GPU) == choose_backend("auto", GPU) == "xformers"
    assert choose_backend("flash-attn", GPU) == "flash-attn"
    for name in ("xformers", "flash-attn"):
        with pytest.raises(ValueError, match=rf"'{name}', which runs on GPUs, and the tower is on the cpu.*'sdpa'"):
            choose_backend(name, CPU)
    for module in ("xformers.ops", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert choose_backend("auto", GPU) == "sdpa"
    for name, package in (("xformers", "pip install xformers"), ("flash-attn", "pip install flash-attn")):
        with pytest.raises(ImportError, match=rf"'{name}'.*cannot be imported; {package}"):
            choose_backend(name, GPU)


def test_a_caller_may_bring_what_computes_attention(make_tower, config, images):
    tower = make_tower(config)
    packed = PackedPatches.from_images(list(images), config.patch)
    expected, asked = (tower(images), tower(packed)), []

    def kernel(q, k, v):
        asked.append(q.shape)
        return dense(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).to(q.dtype)

    for given, wanted in zip((images, packed), expected, strict=True):
        torch.testing.assert_close(tower(given, attend=kernel), wanted)
    assert len(asked) == 2 * config.layers


def test_flash_attention_in_32_bits_is_refused(fake_libraries):
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"16 bits and got torch\.float32"):
        attend(q, q, q, "flash-attn")


def test_a_tower_that_was_told_to_use_a_gpu_library_says_so_on_a_cpu(config, images, fake_libraries, tmp_path):
    tower = VisionTower(VisionTowerConfig(**{**vars(config), "attention": "xformers"}))
    with pytest.raises(ValueError, match="which runs on GPUs"):
        tower(images)
    tower.save_pretrained(tmp_path)  # the choice belongs to the machine and stays behind
    assert VisionTower.from_pretrained(tmp_path).config.attention == "sdpa"
    assert VisionTower.from_pretrained(tmp_path, attention="auto").config.attention == "auto"


def test_compiled_blocks_have_no_graph_break_and_the_same_numbers(make_tower, config, images, compile_with):
    """Through the tracer and a backend that runs the graph as it is; Inductor's own code is a matter of `full`."""
    tower = make_tower(config)
    keep = torch.arange(20).repeat(len(images), 1)
    expected = [tower(images), tower(images, keep=keep)]
    expected[0].square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in tower.parameters()]
    tower.zero_grad()
    names = list(tower.state_dict())
    compile_with(backend="aot_eager", fullgraph=True)
    tower.configure(compile=True)
    assert list(tower.state_dict()) == names
    found = [tower(images), tower(images, keep=keep)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found[0].square().sum().backward()
    for parameter, gradient in zip(tower.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_a_course_of_training_stays_compiled(make_tower, config, compile_with):
    """Patch dropout, gradient caching's chunks with a smaller last one, evaluation, other resolutions."""
    compile_with(backend="eager", fullgraph=True)
    tower, compiled = make_tower(config), make_tower(replace(config, compile=True))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for resolution in (48, 72, (40, 64)):
            patches = tower.set_resolution(resolution).config.num_patches
            compiled.set_resolution(resolution)
            for count, rate, grad in ((4, 0.5, False), (4, 0.5, True), (3, 0.5, True), (5, 0, False), (2, 0, True)):
                keep = patch_keep_indices(range(count), patches, rate) if rate else None
                images = torch.randn(count, 3, *as_pair(resolution))
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(compiled(images, keep=keep), tower(images, keep=keep))


def test_compiled_blocks_take_packed_images(make_tower, config, compile_with):
    compile_with(backend="eager", fullgraph=True)
    tower, compiled = make_tower(config), make_tower(replace(config, compile=True))
    for sizes in (((48, 48), (16, 40)), ((24, 24), (24, 24), (56, 8))):
        packed = PackedPatches.from_images([torch.randn(3, *size) for size in sizes], config.patch)
        torch.testing.assert_close(compiled(packed), tower(packed))


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductors_blocks_have_the_same_numbers(make_tower, config, images, checkpointing):
    tower = make_tower(VisionTowerConfig(**{**vars(config), "checkpointing": checkpointing}))
    expected = tower(images)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in tower.parameters()]
    tower.zero_grad()
    tower.configure(compile=True)
    found = tower(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found.square().sum().backward()
    for parameter, gradient in zip(tower.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
