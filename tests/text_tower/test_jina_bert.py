"""JinaBERT as jina-embeddings-v2-base is published: names, arithmetic and files written out here in plain PyTorch, so
that the tower is compared with something else. (transformers has no such model without remote code.)"""

import importlib.machinery
import itertools
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from text_tower import MaskedLM, PackedTokens, TextTower, TextTowerConfig, Tokenizer, WholeWordMasking, attention
from text_tower.attention import Attention, choose_backend
from text_tower.packed import ByLength
from text_tower.positions import ALiBi
from tokenizers import Tokenizer as Words
from tokenizers import models, normalizers, pre_tokenizers, processors

SHAPE = {"vocab_size": 48, "width": 48, "layers": 2, "heads": 6, "mlp_width": 40, "token_types": 2, "pad_id": 0,
         "layer_norm_eps": 1e-12, "positions": "alibi", "mlp": "geglu", "max_length": 8192}  # fmt: skip
LENGTHS = [*range(1, 10), 5, 5, 33, 97, 300]
SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
           "mask_token": "[MASK]"}  # fmt: skip


def published_config(**changes):
    """config.json of jina-embeddings-v2-base-en, in a small shape."""
    return {
        "_name_or_path": "jinaai/jina-bert-implementation", "architectures": ["JinaBertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": None, "emb_pooler": "mean",
        "feed_forward_type": "geglu", "gradient_checkpointing": False, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 40,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 8192, "model_max_length": 8192, "model_type": "bert",
        "num_attention_heads": 6, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "alibi",
        "torch_dtype": "float32", "transformers_version": "4.26.0", "type_vocab_size": 2, "use_cache": True,
        "vocab_size": 48, **changes,
    }  # fmt: skip


def published_weights(hidden=48, ff=40, vocab=48, layers=2, seed=0):
    """Every tensor under its published name."""
    shapes = {"embeddings.word_embeddings.weight": [vocab, hidden],
              "embeddings.token_type_embeddings.weight": [2, hidden], "embeddings.LayerNorm.weight": [hidden],
              "embeddings.LayerNorm.bias": [hidden], "pooler.dense.weight": [hidden, hidden],
              "pooler.dense.bias": [hidden]}  # fmt: skip
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{name}.weight": [hidden, hidden], f"{layer}{name}.bias": [hidden]}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{layer}{name}.weight": [hidden], f"{layer}{name}.bias": [hidden]}
        shapes |= {f"{layer}mlp.gated_layers.weight": [2 * ff, hidden], f"{layer}mlp.wo.weight": [hidden, ff],
                   f"{layer}mlp.wo.bias": [hidden]}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) + ("ayer" in name.split(".")[-2] and "weight" in name)
            if "orm" in name else 0.3 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()}  # fmt: skip


def slopes_of_bloom(heads):
    """The slopes of transformers' BLOOM, whose own code is ALiBi's authors'."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)  # [heads, 1, 2], positions 0 and 1
    return alibi[:, 0, 1]


class Published:
    """The published arithmetic on a padded batch, for weights under published names."""

    def __init__(self, weights, heads, dtype=torch.float64):
        self.w = {name: tensor.to(dtype).requires_grad_() for name, tensor in weights.items()}
        self.heads = heads

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-12)

    def __call__(self, packed):
        rows = packed.ids.split(list(packed.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        keep = torch.arange(ids.shape[1]) < torch.tensor(packed.lengths)[:, None]
        x = F.embedding(ids, self.w["embeddings.word_embeddings.weight"])
        x = self.norm(x + self.w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        places = torch.arange(ids.shape[1])
        distance = (places[:, None] - places[None]).abs()
        bias = -slopes_of_bloom(self.heads).to(x.dtype)[:, None, None] * distance
        for i in range(1 + max(int(name.split(".")[2]) for name in self.w if name.startswith("encoder"))):
            layer = f"encoder.layer.{i}."
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            mixed = scores.masked_fill(~keep[:, None, None], -1e9).softmax(-1) @ v
            mixed = self.linear(mixed.transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
            x = self.norm(x + mixed, f"{layer}attention.output.LayerNorm")
            hidden = self.linear(x, f"{layer}mlp.gated_layers")
            half = hidden.shape[-1] // 2
            gated = F.gelu(hidden[..., :half]) * hidden[..., half:]
            x = self.norm(x + self.linear(gated, f"{layer}mlp.wo"), f"{layer}mlp.layernorm")
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def words():
    """BERT's tokenizer in small; 45 words, as the table has 48 rows."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##s", "##ing", "the",
                  "dog", "run", "cafe", "##e", "##a", ",", ".", "!", "##x", "##y", "red"]  # fmt: skip
    built = Words(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    built.add_special_tokens(list(SPECIAL.values()))
    return built


TOKENIZER_CONFIG = {**SPECIAL, "do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 8192,
                    "strip_accents": None, "tokenize_chinese_chars": True, "do_basic_tokenize": True,
                    "never_split": None, "clean_up_tokenization_spaces": True}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    """Writes a directory as jina-embeddings-v2-base-en is, with changed keys of its JSON files."""

    def write(name="v2", tokenizer=None, weights=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        save_file(weights or published_weights(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(published_config(**changes)))
        built = words()
        built.save(str(folder / "tokenizer.json"))
        listed = sorted(built.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in listed))
        (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENIZER_CONFIG, **(tokenizer or {})}))
        (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
        return folder

    return write


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


def test_a_directory_comes_back_bit_for_bit_under_its_own_names(published, tmp_path):
    folder = published()
    tower = TextTower.from_pretrained(folder)
    assert tower.config == TextTowerConfig(**SHAPE)
    tower.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or name.startswith("pooler"), name  # which the mean does not use
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    config = json.loads((tmp_path / "again/config.json").read_text())
    shared = {k: v for k, v in published_config().items() if k in config and k != "hidden_dropout_prob"}
    assert {k: config[k] for k in shared} == {**shared, "architectures": ["JinaBertModel"]}
    back = TextTower.from_pretrained(tmp_path / "again")
    assert back.config == tower.config
    torch.testing.assert_close(dict(back.state_dict()), dict(tower.state_dict()), rtol=0, atol=0)


def test_sentence_transformers_and_masked_lm_directories_are_read(published):
    """jina-embeddings-v2-base-en is a sentence-transformers directory; JinaBertForMaskedLM has a prefix and a head."""
    weights = {f"bert.{n}": t for n, t in published_weights().items()}
    folder = published(weights={**weights, "cls.predictions.bias": torch.ones(48)})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(kinds.items())]  # fmt: skip
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = {"max_seq_length": 500, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    tower = TextTower.from_pretrained(folder)
    assert tower.config.max_length == 500
    ids = [2, 9, 10, 3]
    expected = Published(published_weights(), 6)(PackedTokens.from_lists([ids]))
    torch.testing.assert_close(tower(PackedTokens.from_lists([ids])).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type 'absolute'.*'alibi'"),
        ({"position_embedding_type": None}, "position_embedding_type None; expected 'alibi'"),
        ({"feed_forward_type": "reglu"}, "feed_forward_type 'reglu'.*'geglu'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"emb_pooler": "cls"}, "emb_pooler 'cls'"),
        ({"model_type": "xlm-roberta"}, "model_type 'xlm-roberta', but .*named as in JinaBERT"),
        ({"gamma": 3}, "gamma 3, of which this tower does not know"),
        ({"vocab_size": 50}, r"word_embeddings.weight \[48, 48\], expected \[50, 48\]"),
        ({"intermediate_size": 41}, r"gated_layers.weight \[80, 48\], expected \[82, 48\]"),
        ({"num_attention_heads": "6"}, "num_attention_heads '6'; expected a number"),
        ({"type_vocab_size": 1}, r"token_type_embeddings.weight \[2, 48\], expected \[1, 48\]"),
        ({"trilith": {"surprise": 1}}, "unknown keys \\['surprise'\\]"),
    ],
)
def test_another_model_is_refused_by_name(published, changes, words):
    with pytest.raises(ValueError, match=words):
        TextTower.from_pretrained(published(**changes))


def test_ids_are_those_of_transformers_for_the_same_files(published):
    from transformers import AutoTokenizer

    folder = published()
    ours, theirs = Tokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The dogs, running!", "", "Café CAFÉ", "中 x", "[MASK] dog [SEP]", "q" * 300, "red\tdog\n!"]
    assert ours(texts) == theirs(texts)["input_ids"]
    assert ours(texts, max_length=5) == theirs(texts, max_length=5, truncation=True)["input_ids"]
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad) == (len(theirs), 2, 3, 0)
    assert ours.model_max_length == 8192
    assert [ours.fits(rows) for rows in (45, 48, 46, 56)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"do_lower_case": False}, "do_lower_case False, and tokenizer.json lowercase True.*make them agree"),
        ({"strip_accents": True}, "strip_accents True, and tokenizer.json strip_accents None"),
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class 'RobertaTokenizer'; expected 'BertTokenizer'"),
        ({"cls_token": "<s>"}, "cls_token '<s>'; expected '.CLS.'"),
        ({"truncation_side": "left"}, "truncation_side 'left'"),
        ({"added_tokens_decoder": {"9": {"content": "new"}}}, "other added tokens than tokenizer.json"),
        ({"gamma": 3}, "gamma 3, of which this tower does not know"),
    ],
)
def test_a_tokenizer_that_says_two_things_is_refused(published, tokenizer, words):
    with pytest.raises(ValueError, match=words):
        TextTower.from_pretrained(published(tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored.update(normalizer={"type": "Lowercase"}), "normalizer.type 'Lowercase'; expected"),
        (lambda stored: stored.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.type 'Whitespace'"),
        (lambda stored: stored["model"].update(continuing_subword_prefix="@@"), "continuing_subword_prefix '@@'"),
        (lambda stored: stored.update(post_processor=None), r"puts \['a'\] around a text"),
    ],
)
def test_a_word_piece_that_is_not_berts_is_refused(published, change, words):
    folder = published()
    stored = json.loads((folder / "tokenizer.json").read_text())
    change(stored)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_file(folder)


def test_a_list_of_other_words_beside_it_is_refused(published):
    folder = published()
    for content in (b"[PAD]\nother\n", b"\xff\xfe"):
        (folder / "vocab.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"vocab.txt beside it lists other words"):
            Tokenizer.from_file(folder)


# The tower's own abilities, with the new block.


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
