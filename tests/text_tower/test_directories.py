"""What a directory says beside its weights: computed as transformers and sentence-transformers do, or refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from text_tower import MaskedLM, TextTower
from transformers import AutoModel, JinaEmbeddingsV3Config, XLMRobertaConfig, XLMRobertaModel

LENGTHS = [2, 9, 40, 100]


@pytest.fixture
def tower(make_tower, tokenizer):
    return make_tower(vocab_size=482, tokenizer=tokenizer)


@pytest.fixture
def rewritten(tower, tmp_path):
    """A native directory whose config.json says other things: {key: value}; ... takes a key away."""
    tower.save_pretrained(tmp_path / "model")

    def rewrite(changes):
        file = tmp_path / "model" / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("trilith", "rope_parameters")}
        file.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...}))
        return tmp_path / "model"

    return rewrite


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 20000),
        ({"rope_theta": 500.0}, 500),
        ({"rope_theta": 500}, 500),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, 300),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}, 77),
        ({"rope_parameters": {"rope_theta": 300.0}, "rope_theta": 77.0}, 300),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 9.0}, "rope_theta": 77.0}, 9),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 77.0}, 77),
        ({"rope_scaling": None, "rope_theta": 40.0}, 40),
    ],
)
def test_the_rotary_base_is_the_one_of_transformers(rewritten, pack, padded_mean, changes, theta):
    path = rewritten(changes)
    reference = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    tower = TextTower.from_pretrained(path)
    assert tower.config.rope_theta == theta
    packed = pack(LENGTHS, vocab_size=482)
    with torch.no_grad():
        ours, theirs = tower(packed), padded_mean(reference, packed)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 5.0, "factor": 2.0}}, r"\['factor'\] among its rotary settings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_theta": None}, "rope_theta None; expected a number"),
        ({"rope_theta": "big"}, "rope_theta 'big'; expected a number"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"type_vocab_size": 2}, "type_vocab_size 2"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type 'absolute'"),
        ({"head_dim": 4}, "head_dim 4; this tower knows 8 only"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"pad_token_id": None}, "pad_token_id None; expected a number"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads '4'; expected a number"),
        ({"truncate_dim": 99}, "truncate_dim is 99; expected 1 to 32"),
        ({"max_position_embeddings": None}, "max_position_embeddings None; expected a whole number"),
        ({"max_position_embeddings": "66"}, "max_position_embeddings '66'; expected a whole number"),
        ({"trilith": [1]}, r"trilith \[1\]; expected an object"),
        ({"sliding_window": 64}, "sliding_window 64, of which this tower does not know .* remove it from the file"),
    ],
)
def test_a_config_that_a_tower_cannot_be_is_refused_by_name(rewritten, changes, message):
    with pytest.raises(ValueError, match=message):
        TextTower.from_pretrained(rewritten(changes))


def test_every_key_that_transformers_writes_is_known(tmp_path, tower):
    """Those of the native class with its defaults, and of XLM-RoBERTa."""
    shape = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 66, "num_labels": 3, "torch_dtype": "float32",
    }  # fmt: skip
    AutoModel.from_config(JinaEmbeddingsV3Config(**shape)).save_pretrained(tmp_path / "native")
    XLMRobertaModel(XLMRobertaConfig(**shape, type_vocab_size=1)).save_pretrained(tmp_path / "xlm-r")
    full = JinaEmbeddingsV3Config(**shape).to_dict()
    (tmp_path / "native/config.json").write_text(
        json.dumps({**full, "dtype": "float32", "export_model_type": "transformer", "later": None})
    )
    assert TextTower.from_pretrained(tmp_path / "native").config.width == 32
    with pytest.warns(UserWarning, match="absolute positions"):
        TextTower.from_pretrained(tmp_path / "xlm-r")
    file = tmp_path / "xlm-r/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key'; this tower knows 'absolute' only"):
        TextTower.from_pretrained(tmp_path / "xlm-r")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved True"),
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base 512"),
        ({"rotary_emb_dim": 4}, "rotary_emb_dim 4; this tower knows 8 only"),
        ({"window_size": [128, 128]}, r"window_size \[128, 128\]"),
        ({"use_qk_norm": True}, "use_qk_norm True"),
        ({"emb_pooler": "cls"}, "emb_pooler 'cls'; this tower knows 'mean' only"),
        ({"rope_theta": 5.0}, "rope_theta 5.0, of which this tower does not know"),
        ({"lora_adaptations": "query"}, "lora_adaptations 'query'; expected a list of names"),
    ],
)
def test_jinas_own_settings_are_honoured_or_refused(make_tower, lora, tower, tmp_path, changes, message):
    if "lora_adaptations" in changes:
        tower = make_tower(**lora, vocab_size=482, tokenizer=tower.tokenizer)
    tower.save_pretrained(tmp_path / "remote", layout="remote-code")
    file = tmp_path / "remote/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_flash_attn": True, "emb_pooler": "mean", "truncate_dim": 16}))
    assert TextTower.from_pretrained(tmp_path / "remote").encode(["a"]).shape == (1, 16)
    file.write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        TextTower.from_pretrained(tmp_path / "remote")


def sentence_transformer(path, tower, modules=(), pooling="mean", **options):
    """A directory that sentence-transformers wrote of a tower, and the model that wrote it."""
    tower.save_pretrained(path / "plain")
    first = [Transformer(str(path / "plain")), Pooling(tower.config.width, pooling_mode=pooling)]
    model = SentenceTransformer(modules=[*first, *modules], device="cpu", **options)
    model.save(str(path / "st"))
    return path / "st"


def test_a_sentence_transformers_directory_gives_its_rows(tower, sentences, tmp_path):
    prompts = {"query": "all human beings: ", "passage": ""}
    path = sentence_transformer(tmp_path, tower, [Normalize()], prompts=prompts, truncate_dim=12)
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": False}))
    reference, ours = SentenceTransformer(str(path), device="cpu"), TextTower.from_pretrained(path)
    assert (ours.config.max_length, ours.config.truncate_dim) == (9, 12)
    texts = list(sentences.values())
    for task in (None, "query", "passage"):
        theirs = reference.encode(texts, prompt_name=task, normalize_embeddings=True)
        np.testing.assert_allclose(ours.encode(texts, task=task), theirs, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(
        TextTower.from_pretrained(tmp_path / "again").encode(texts, task="query"), ours.encode(texts, task="query")
    )
    # What is asked for on reading goes before what the directory says.
    assert TextTower.from_pretrained(path, max_length=50, truncate_dim=None).encode(["a"]).shape == (1, 32)


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("cls", "mean")])
def test_another_pooling_is_refused_by_name(tower, tmp_path, mode):
    path = sentence_transformer(tmp_path, tower, pooling=mode)
    with pytest.raises(ValueError, match=f"pooling mode .*{mode if isinstance(mode, str) else 'cls'}.*takes the mean"):
        TextTower.from_pretrained(path)


def test_a_further_module_is_refused_by_name(tower, tmp_path):
    path = sentence_transformer(tmp_path, tower, [Normalize(), Dense(32, 16)])
    with pytest.raises(ValueError, match="has the modules Transformer, Pooling, Normalize, Dense; this tower is"):
        TextTower.from_pretrained(path)


@pytest.mark.parametrize("first", [[], [Dense(32, 40, bias=False, activation_function=torch.nn.GELU())]])
def test_dense_modules_without_biases_are_a_projector(tower, sentences, tmp_path, first):
    last = Dense(40 if first else 32, 16, bias=False, activation_function=torch.nn.Identity())
    path = sentence_transformer(tmp_path, tower, [*first, last, Normalize()], truncate_dim=12)
    ours, texts = TextTower.from_pretrained(path), list(sentences.values())
    assert (ours.config.projector, ours.config.projector_hidden) == (16, 40 if first else 0)
    theirs = SentenceTransformer(str(path), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(texts), theirs, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    theirs = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(texts), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([Dense(32, 16)], "has bias True; a projector knows False only"),
        ([Dense(32, 16, bias=False)], "activation_function .*Tanh.*; expected 32 and torch.nn.modules.linear.Identity"),
        ([Dense(32, 32, bias=False, activation_function=None, use_residual=True)], "use_residual True"),
    ],
)
def test_dense_modules_that_are_no_projector_are_refused_by_name(tower, tmp_path, modules, message):
    path = sentence_transformer(tmp_path, tower, modules)
    with pytest.raises(ValueError, match=message):
        TextTower.from_pretrained(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "mode .*cls"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt False"),
        ("1_Pooling/config.json", {"window": 3}, r"unknown keys \['window'\]"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case True"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length 32"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length '9'"),
        ("config_sentence_transformers.json", {"prompts": {"q": "x"}, "default_prompt_name": "q"}, "_name 'q'"),
        ("config_sentence_transformers.json", {"quantization": "int8"}, "quantization 'int8', of which"),
        ("config_sentence_transformers.json", {"truncate_dim": 64}, "truncate_dim is 64; expected 1 to 32"),
        ("modules.json", [{"type": "a.b.Router", "path": ""}], "has the modules Router"),
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}], "own"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}], "own"),
    ],
)
def test_what_such_a_directory_may_say_otherwise_is_refused_by_name(tower, tmp_path, file, content, message):
    path = sentence_transformer(tmp_path, tower)
    (path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        TextTower.from_pretrained(path)


def test_the_first_settings_of_a_transformer_that_say_something_are_read(tower, tmp_path):
    path = sentence_transformer(tmp_path, tower)
    (path / "sentence_bert_config.json").unlink()
    for name, length in (("sentence_xlm-roberta_config.json", 7), ("sentence_roberta_config.json", 9)):
        (path / name).write_text(json.dumps({"max_seq_length": length}))
        assert TextTower.from_pretrained(path).config.max_length == length
        assert SentenceTransformer(str(path), device="cpu").max_seq_length == length
    (path / "sentence_bert_config.json").write_text("{}")
    assert TextTower.from_pretrained(path).config.max_length == 9


def test_an_adapter_beside_the_weights_is_refused_by_name(make_tower, lora, tmp_path):
    tower = make_tower(**lora)
    tower.save_pretrained(tmp_path, layout="peft")
    for file in (tmp_path / "separation").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(ValueError, match="holds adapter_config.json, an adapter beside .* give that as peft="):
        TextTower.from_pretrained(tmp_path)


def test_the_older_form_of_mean_pooling_is_read(tower, tmp_path):
    path = sentence_transformer(tmp_path, tower)
    older = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
             "pooling_mode_max_tokens": False, "include_prompt": True}  # fmt: skip
    (path / "1_Pooling/config.json").write_text(json.dumps(older))
    np.testing.assert_array_equal(TextTower.from_pretrained(path).encode(["a b"]), tower.encode(["a b"]))


def test_a_head_that_is_not_tied_is_refused(tmp_path, tower):
    model = MaskedLM(tower)
    model.save_pretrained(tmp_path / "model")
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model/model.safetensors")
    weights["lm_head.decoder.weight"] = tower.embeddings.word_embeddings.weight.detach() + 1
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not the word table"):
        MaskedLM.from_pretrained(tmp_path / "model")
