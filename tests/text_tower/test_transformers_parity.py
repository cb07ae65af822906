"""transformers' padded JinaEmbeddingsV3Model and our packed tower are one function."""

import warnings

import pytest
import torch
from text_tower import TextTower
from transformers import (
    AutoModel,
    AutoTokenizer,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

LENGTHS = [*range(1, 13), 5, 5, 33, 64, 97, 128, 512]


def load(path, **options):
    model, report = AutoModel.from_pretrained(path, output_loading_info=True, **options)
    assert isinstance(model, JinaEmbeddingsV3Model)
    assert not report["unexpected_keys"]
    assert all(key.startswith("pooler.") for key in report["missing_keys"])
    return model.eval()


def under_our_names(model):
    """{our parameter name: gradient}."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.replace("embeddings.LayerNorm", "emb_ln").replace("self_attn.o_proj", "mixer.out_proj")
            name = name.replace("post_attention_layernorm", "norm1").replace("post_mlp_layernorm", "norm2")
            grads[f"encoder.{name}" if name.startswith("layers.") else name] = parameter.grad
    for name in [n for n in grads if "self_attn.q_proj" in n]:
        parts = [grads.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        grads[name.replace("self_attn.q_proj", "mixer.Wqkv")] = torch.cat(parts)
    return grads


@pytest.mark.parametrize("theta", [20000.0, 10000.0])
def test_embeddings_and_every_gradient_agree_in_float32(make_tower, pack, tmp_path, theta, padded_mean):
    tower = make_tower(rope_theta=theta)
    tower.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    packed = pack(LENGTHS)
    ours, theirs = tower(packed), padded_mean(model, packed)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    direction = torch.randn(ours.shape)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    expected = under_our_names(model)
    assert expected.keys() == dict(tower.named_parameters()).keys()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad - expected[name]).norm() / expected[name].norm() < 1e-5, name


def test_adapted_tower_loads_in_transformers_with_the_same_embeddings(make_tower, pack, tmp_path, lora, padded_mean):
    tower = make_tower(**lora)
    tower.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        ours, theirs = tower(pack(LENGTHS)), padded_mean(load(tmp_path / "model"), pack(LENGTHS))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_transformers_directories_load_with_the_same_embeddings(pack, tmp_path, padded_mean):
    shape = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = JinaEmbeddingsV3Config(**shape, intermediate_size=48, max_position_embeddings=514, initializer_range=0.3)
    model = JinaEmbeddingsV3Model(config).eval()
    model.save_pretrained(tmp_path / "model")
    tower = TextTower.from_pretrained(tmp_path / "model")
    assert tower.config.max_length == 512
    with torch.no_grad():
        torch.testing.assert_close(tower(pack(LENGTHS)), padded_mean(model, pack(LENGTHS)), rtol=1e-4, atol=1e-5)


@pytest.fixture
def xlm_r():
    config = XLMRobertaConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    return XLMRobertaForMaskedLM(config)


@pytest.mark.parametrize("kind", ["masked LM", "encoder", "pickle"])
def test_xlm_r_directories_load_weight_for_weight_with_a_warning(xlm_r, pack, tmp_path, kind):
    model = XLMRobertaModel(xlm_r.config) if kind == "encoder" else xlm_r
    model.save_pretrained(tmp_path / "model")
    if kind == "pickle":
        torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
        (tmp_path / "model/model.safetensors").unlink()
    with pytest.warns(UserWarning, match="masked-language-model training"):
        tower = TextTower.from_pretrained(tmp_path / "model")
    encoder = (model.roberta if hasattr(model, "roberta") else model).eval()
    theirs = {n: p for n, p in encoder.state_dict().items() if not n.startswith(("embeddings.position", "pooler"))}
    # Nothing is lost or made up: as many numbers, of the same sum. Then each kind is where it belongs.
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in theirs.values())
    total = sum(p.double().abs().sum() for p in theirs.values())
    torch.testing.assert_close(sum(p.double().abs().sum() for p in tower.parameters()), total)
    block, layer = tower.encoder.layers[1], encoder.encoder.layer[1]
    attention = layer.attention.self
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    torch.testing.assert_close(block.mixer.Wqkv.weight, torch.cat(parts), rtol=0, atol=0)
    h = torch.randn(5, 32)
    mlp = layer.output(layer.intermediate(h), h)
    torch.testing.assert_close(block.norm2(h + block.mlp(h, 0)), mlp)
    torch.testing.assert_close(block.mixer.out_proj(h), layer.attention.output.dense(h))
    torch.testing.assert_close(block.norm1(h), layer.attention.output.LayerNorm(h))
    torch.testing.assert_close(tower.emb_ln(h), encoder.embeddings.LayerNorm(h))


def test_xlm_r_weights_become_a_rotary_model_that_transformers_confirms(xlm_r, pack, tmp_path, padded_mean):
    xlm_r.save_pretrained(tmp_path / "xlm-r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tower = TextTower.from_pretrained(tmp_path / "xlm-r", rope_theta=10000.0)
    tower.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        theirs = padded_mean(load(tmp_path / "ours"), pack(LENGTHS))
        torch.testing.assert_close(tower(pack(LENGTHS)), theirs, rtol=1e-4, atol=1e-5)


def test_a_saved_directory_gives_transformers_the_same_tokens(make_tower, tokenizer, sentences, tmp_path):
    make_tower(vocab_size=482, tokenizer=tokenizer).save_pretrained(tmp_path / "model")
    texts = list(sentences.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(texts)["input_ids"] == tokenizer(texts)
