"""JinaBERT, the tower: values and gradients against the published arithmetic, and what it can do with its blocks."""

import importlib.machinery
import itertools
import math
import sys
import types

import pytest
import torch
from published_jina_bert import SHAPE, Published, published_weights, slopes_of_bloom, write
from safetensors.torch import load_file
from text_tower import MaskedLM, TextTower, TextTowerConfig, Tokenizer, WholeWordMasking, attention
from text_tower.attention import Attention, choose_backend
from text_tower.packed import ByLength
from text_tower.positions import ALiBi

LENGTHS = [*range(1, 10), 5, 5, 33, 97, 300]


@pytest.fixture
def published(tmp_path):
    def make(name="v2", **options):
        return write(tmp_path / name, **options)

    return make


def grads_under_our_names(model):
    """{our name: gradient}, by the published table of names."""
    table = (("embeddings.LayerNorm", "emb_ln"), ("encoder.layer.", "encoder.layers."), ("mlp.layernorm", "norm2"),
             ("attention.output.dense", "mixer.out_proj"), ("attention.output.LayerNorm", "norm1"))  # fmt: skip
    grads = {}
    for name, tensor in model.w.items():
        if tensor.grad is None or "attention.self.key" in name or "attention.self.value" in name:
            continue
        parts = [name]
        if "attention.self.query" in name:
            parts = [name.replace("query", part) for part in ("query", "key", "value")]
            name = name.replace("attention.self.query", "mixer.Wqkv")
        for theirs, ours in table:
            name = name.replace(theirs, ours)
        grads[name] = torch.cat([model.w[part].grad for part in parts])
    return grads


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32])
def test_slopes_are_those_of_alibis_authors(heads):
    found = ALiBi(heads, torch.device("cpu")).slopes
    torch.testing.assert_close(found.double(), slopes_of_bloom(heads), rtol=1e-6, atol=0)
    if heads == 12:  # as published.md has them: eight of 8, and every second of 16
        assert found.tolist() == pytest.approx([2.0**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)])


def test_embeddings_and_every_gradient_are_the_published_arithmetics(published, pack):
    tower = TextTower.from_pretrained(published())
    packed = pack(LENGTHS, vocab_size=48)
    direction = torch.randn(len(packed), 48, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float64, torch.float32):
        theirs = Published(published_weights(), 6, dtype)
        tower.zero_grad()
        ours, expected = tower(packed), theirs(packed)
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-5
        (ours * direction).sum().backward()
        (expected * direction.to(dtype)).sum().backward()
        grads = grads_under_our_names(theirs)
        assert grads.keys() == dict(tower.named_parameters()).keys()
        for name, parameter in tower.named_parameters():
            error = (parameter.grad - grads[name]).norm() / grads[name].norm()
            assert error < 1e-5, name


def test_the_base_model_has_the_published_number_of_parameters():
    """jina-clip-v1's text half: 136,777,728 (published.md, B5)."""
    with torch.device("meta"):
        tower = TextTower(TextTowerConfig(**{**SHAPE, "vocab_size": 30528, "width": 768, "layers": 12, "heads": 12,
                                             "mlp_width": 3072}))  # fmt: skip
    assert sum(p.numel() for p in tower.parameters()) == 136_777_728


def padded(packed):
    return torch.nn.utils.rnn.pad_sequence(packed.ids.split(list(packed.lengths)), batch_first=True)


@pytest.mark.parametrize("adapter", [None, "separation", "none"])
def test_padded_is_packed_to_the_last_digits_of_float64(make_tower, pack, lora, adapter):
    tower, packed = make_tower(**SHAPE, **lora).double(), pack((3, 40, 1, 17), vocab_size=48)
    with torch.no_grad():
        assert (tower.padded(adapter)(padded(packed)) - tower(packed, adapter=adapter)).abs().max() < 1e-7


def test_torch_export_takes_any_number_of_texts_and_tokens(make_tower, pack):
    from torch.export import Dim, export

    tower = make_tower(**SHAPE)
    example = padded(pack((5, 2), vocab_size=48))
    program = export(tower.padded(), (example,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)).module()
    packed = pack((3, 11, 1), vocab_size=48)
    torch.testing.assert_close(program(padded(packed)), tower(packed), rtol=0, atol=1e-5)


def test_many_short_texts_attend_as_few_do(pack):
    texts, length, heads = 40, 5, 8
    assert texts * heads >= attention.PLAIN_TEXTS_TIMES_HEADS_FROM > 4 * heads
    q, k, v = torch.randn(3, texts * length, heads, 8, dtype=torch.float64)
    slopes = ALiBi(heads, torch.device("cpu")).slopes

    def attended(at_once):
        parts = zip(*(x.split(at_once * length) for x in (q, k, v)), strict=True)
        layout = ByLength.of(pack([length] * at_once))
        return torch.cat([attention.sdpa(*part, layout, slopes=slopes) for part in parts])

    torch.testing.assert_close(attended(texts), attended(4), rtol=0, atol=1e-12)


def test_adapters_are_saved_beside_the_weights_and_merge(make_tower, pack, lora, tmp_path):
    tower, packed = make_tower(**SHAPE, **lora), pack((9, 4), vocab_size=48)
    tower.save_pretrained(tmp_path / "model")
    back = TextTower.from_pretrained(tmp_path / "model")
    assert back.config == tower.config
    torch.testing.assert_close(dict(back.state_dict()), dict(tower.state_dict()), rtol=0, atol=0)
    # model.safetensors has the first adapter added, as the published arithmetic takes it.
    theirs = Published(load_file(tmp_path / "model/model.safetensors"), 6)
    torch.testing.assert_close(tower(packed).double(), theirs(packed), rtol=0, atol=1e-5)
    tower.set_trainable("adapters")
    tower(packed).sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is not None} == {
        n for n, _ in tower.named_parameters() if "lora_" in n and n.endswith("_0")
    }


def test_checkpointing_and_dropout_change_no_gradient_of_the_same_seeds(make_tower, pack):
    packed, found = pack((9, 30, 2), vocab_size=48), []
    for checkpointing in (False, True):
        tower = make_tower(**SHAPE, dropout=0.2, checkpointing=checkpointing)
        tower(packed, sample_seeds=torch.arange(3)).square().sum().backward()
        found.append([p.grad for p in tower.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn as its documentation has it: alibi_slopes are float32, and the bias is −slope · |i − j|."""

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, alibi_slopes=None):
        assert alibi_slopes.dtype == torch.float32
        assert alibi_slopes.shape == (q.shape[1],)
        out = []
        for start, end in itertools.pairwise(cu_q.tolist()):
            qs, ks, vs = (x[start:end].transpose(0, 1) for x in (q, k, v))
            places = torch.arange(end - start)
            bias = -alibi_slopes[:, None, None] * (places[:, None] - places).abs()
            scores = qs @ ks.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias.to(q.dtype)
            out.append((scores.softmax(-1) @ vs).transpose(0, 1))
        return torch.cat(out)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_flash_attn_is_handed_the_slopes(pack, flash):
    layout, positions = ByLength.of(pack((7, 1, 30, 7))), ALiBi(3, torch.device("cpu"))
    qkv = torch.randn(45, 3, 3, 8, dtype=torch.float64)
    expected = Attention(layout, positions, "sdpa")(qkv)
    torch.testing.assert_close(Attention(layout, positions, "flash-attn")(qkv), expected)


def test_kernels_without_alibi_are_passed_over_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choose_backend.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", "cuda", torch.bfloat16, 64, True) == "sdpa"
    choose_backend.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_backend("auto", "cuda", torch.bfloat16, 64, True) == "flash-attn"
    for name in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=f"attention='{name}' cannot run here: it has no ALiBi"):
            choose_backend(name, "cuda", torch.bfloat16, 64, True)
    choose_backend.cache_clear()


def test_a_compiled_block_breaks_at_sdpa_alone_and_not_at_flash_attn(make_tower, pack, monkeypatch):
    import functools

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    packed = pack((9, 4, 30), vocab_size=48)
    eager, compiled = make_tower(**SHAPE), make_tower(**SHAPE, compile=True)
    torch.testing.assert_close(compiled(packed), eager(packed), rtol=0, atol=1e-6)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "torch.compiler.disable" in reason
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # A kernel that the tracer sees through, as it does flash-attn's operator: slopes and all in one graph.
    monkeypatch.setitem(attention._ATTEND, "flash-attn", lambda q, k, v, layout, slopes: v * slopes[:, None])
    monkeypatch.setattr(TextTower, "_backend", lambda self, device: "flash-attn")
    torch.testing.assert_close(compiled(packed), eager(packed), rtol=0, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_what_the_kind_does_not_have_is_refused_by_name(make_tower, published, lora, tmp_path):
    tower = make_tower(**SHAPE, **lora)
    for layout in ("peft", "remote-code"):
        with pytest.raises(
            ValueError, match=f"layout is '{layout}', and a JinaBERT tower is written as 'transformers'"
        ):
            tower.save_pretrained(tmp_path / layout, layout=layout)
    with pytest.raises(ValueError, match="JinaBERT, which PEFT's folders are not for"):
        tower.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="positions 'alibi'; masked-language-model training is for rotary"):
        MaskedLM(make_tower(**SHAPE))
    with pytest.raises(ValueError, match="has no <mask>"):
        WholeWordMasking(Tokenizer.from_file(published()))
    with pytest.raises(ValueError, match=r"positions is 'alibi' and mlp 'gelu'; expected rotary with gelu .*JinaBERT"):
        TextTowerConfig(positions="alibi")
    with pytest.raises(ValueError, match="rope_theta is 10000, and positions 'alibi' have none; leave it out"):
        TextTowerConfig(positions="alibi", mlp="geglu", rope_theta=10_000)
    with pytest.raises(ValueError, match=r"mlp is 'swiglu'; expected one of \['gelu', 'geglu'\]"):
        TextTowerConfig(mlp="swiglu")
