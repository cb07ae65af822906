"""Whatever computes attention, it is asked for by one name and gives one answer."""

import functools
import importlib.machinery
import itertools
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from text_tower import attention
from text_tower.attention import Attention, choose_backend
from text_tower.packed import ByLength
from text_tower.positions import Rotary

LENGTHS = [7, 1, 30, 7, 3]


@pytest.fixture(autouse=True)
def _forget():
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and every package, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_auto_takes_the_fastest_that_fits(gpu, monkeypatch):
    assert choose_backend("auto", "cuda", torch.bfloat16, 64) == "flash-attn"
    assert choose_backend("auto", "cuda", torch.float32, 64) == "sdpa"
    assert choose_backend("auto", "cuda", torch.bfloat16, 12) == "sdpa"
    assert choose_backend("auto", "cpu", torch.bfloat16, 64) == "sdpa"
    choose_backend.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", "cuda", torch.bfloat16, 64) == "varlen"
    choose_backend.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_backend("auto", "cuda", torch.float16, 64) == "sdpa"


def test_any_backend_can_be_forced(gpu):
    for name in ("flash-attn", "varlen", "xformers", "sdpa"):
        assert choose_backend(name, "cuda", torch.bfloat16, 64) == name
    assert choose_backend("xformers", "cuda", torch.float32, 12) == "xformers"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("varlen", "needs a CUDA device, found cpu"),
        ("flash-attn", "flash_attn is not installed"),
        ("xformers", "xformers is not installed"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(make_tower, pack, name, reason):
    with pytest.raises(ValueError, match=f"attention='{name}' cannot run here: .*{reason}.*or set attention='auto'"):
        make_tower(attention=name)(pack(LENGTHS))
    assert make_tower(attention="sdpa")(pack(LENGTHS)).isfinite().all()


def test_kernels_refuse_what_they_cannot_compute_by_name(gpu):
    with pytest.raises(ValueError, match=r"needs bfloat16 or float16, found torch.float32 \(run under torch.autocast"):
        choose_backend("varlen", "cuda", torch.float32, 64)
    with pytest.raises(ValueError, match="heads of 8, 16, … or 256 channels, found 12"):
        choose_backend("flash-attn", "cuda", torch.bfloat16, 12)


def test_the_choice_is_logged_once(make_tower, pack, caplog):
    with caplog.at_level(logging.INFO, "text_tower"):
        tower = make_tower()
        tower(pack(LENGTHS))
        tower(pack(LENGTHS[:2]))
    (record,) = caplog.records
    assert record.message.startswith("attention for float32 on cpu: sdpa; flash-attn: ")


def _by_sequence(q, k, v, bounds):
    """A variable-length kernel in plain PyTorch, one sequence after another."""
    out = [
        F.scaled_dot_product_attention(*(x[start:end].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(out)


def _varlen_like(q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal=False, **options):
    """The contract of flash-attn and of PyTorch's varlen_attn, whose signatures differ after the seventh argument."""
    assert q.shape == k.shape == v.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert not is_causal
    assert not options
    bounds = cu_q.tolist()
    assert longest_q == longest_k == max(b - a for a, b in itertools.pairwise(bounds))
    return _by_sequence(q, k, v, bounds)


def _modules(monkeypatch):
    """flash-attn, xformers and varlen_attn, standing in with the contracts that their documentation gives."""
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", _varlen_like)

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, lengths):
            mask = cls()
            mask.bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            return mask

    def memory_efficient_attention(q, k, v, attn_bias):
        assert q.shape[0] == 1  # [1, T, heads, d] with a block diagonal mask
        return _by_sequence(q[0], k[0], v[0], attn_bias.bounds)[None]

    for name, members in {
        "flash_attn": {"flash_attn_varlen_func": _varlen_like},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("backend", ["varlen", "flash-attn", "xformers"])
def test_every_backend_is_handed_what_its_documentation_asks_for(pack, monkeypatch, backend):
    _modules(monkeypatch)
    layout = ByLength.of(pack(LENGTHS))
    positions = Rotary(layout.positions, 8, 100.0)
    qkv = torch.randn(sum(LENGTHS), 3, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = Attention(layout, positions, "sdpa")(qkv)
    torch.testing.assert_close(Attention(layout, positions, backend)(qkv), expected)


def test_many_short_texts_attend_as_few_do(pack):
    """On a CPU plain products take the place of the kernel that the same texts, a few at a time, go through."""
    texts, length, heads = 40, 5, 8
    assert texts * heads >= attention.PLAIN_TEXTS_TIMES_HEADS_FROM > 4 * heads
    q, k, v, wanted = torch.randn(4, texts * length, heads, 8, dtype=torch.float64)

    def attended(texts_at_once):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        parts = zip(*(x.split(texts_at_once * length) for x in leaves), strict=True)
        layout = ByLength.of(pack([length] * texts_at_once))
        out = torch.cat([attention.sdpa(*part, layout) for part in parts])
        out.backward(wanted)
        return out, *(x.grad for x in leaves)

    for one, other in zip(attended(texts), attended(4), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_whole_tower_runs_through_a_variable_length_kernel(make_tower, pack, monkeypatch):
    _modules(monkeypatch)
    tower, packed = make_tower(), pack(LENGTHS)
    expected = tower(packed)
    monkeypatch.setattr(attention, "_obstacle", lambda name, *_: None if name == "varlen" else "absent")
    choose_backend.cache_clear()
    torch.testing.assert_close(tower(packed), expected)


def test_a_caller_may_bring_what_computes_attention(make_tower, pack, monkeypatch):
    tower, packed = make_tower(), pack(LENGTHS)
    expected, blocks = tower(packed), []

    def kernel(*qkv):
        blocks.append(qkv[0].shape)
        return attention._plain(*qkv)

    monkeypatch.setattr(tower, "_backend", None)  # nobody asks the device
    own = tower(packed, attend=functools.partial(attention.sdpa, kernel=kernel))
    torch.testing.assert_close(own, expected)
    assert len(blocks) == tower.config.layers * len(set(LENGTHS))


def test_torchs_own_varlen_attn_takes_our_call():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention.varlen import varlen_attn

    with FakeTensorMode():
        qkv = torch.empty(48, 3, 4, 64, dtype=torch.bfloat16)
        cu = torch.empty(6, dtype=torch.int32)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = varlen_attn(*qkv.unbind(1), cu, cu, 30, 30)
    assert out.shape == (48, 4, 64)


def test_rotary_turns_queries_by_their_place_alone():
    positions = torch.tensor([0, 1, 5])
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotary = Rotary(positions, 8, 50.0)
    turned_q, turned_k = rotary(torch.stack([q, k]).expand(3, 2, 8)[:, :, None]).squeeze(2).unbind(1)
    shifted = Rotary(positions + 7, 8, 50.0)
    shifted_q, shifted_k = shifted(torch.stack([q, k]).expand(3, 2, 8)[:, :, None]).squeeze(2).unbind(1)
    assert torch.equal(turned_q[0], q)
    torch.testing.assert_close(turned_q @ turned_k.T, shifted_q @ shifted_k.T, rtol=1e-5, atol=1e-5)
    assert (turned_q[1] - q).abs().max() > 1e-2
