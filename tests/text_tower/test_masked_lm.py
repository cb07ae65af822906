"""Masked-language-model training is transformers' in its numbers, and leaves a directory that everybody reads."""

import json
import warnings

import pytest
import torch
from text_tower import MaskedLM, MaskedTokens, PackedTokens, TextTower, WholeWordMasking, masked_lm
from transformers import AutoModel, AutoModelForMaskedLM, XLMRobertaConfig, XLMRobertaForMaskedLM

LENGTHS = [12, 1, 5, 5, 80, 33]


@pytest.fixture
def make_model(make_tower):
    def make(**changes):
        model = MaskedLM(make_tower(**changes))
        with torch.no_grad():
            for name, parameter in model.lm_head.named_parameters():
                parameter.normal_(float(name == "layer_norm.weight"), 0.3)
        return model

    return make


@pytest.fixture
def masked(pack):
    packed = pack(LENGTHS)
    places = torch.arange(2, len(packed.ids), 5)
    labels = torch.randint(4, 600, places.shape, generator=torch.Generator().manual_seed(5))
    return MaskedTokens(packed, places, labels)


def theirs_under_our_names(model):
    grads = {}
    for name, parameter in model.named_parameters():
        name = name.replace("lm_head.decoder.weight", "tower.embeddings.word_embeddings.weight")  # one and the same
        name = name.replace("embeddings.LayerNorm", "emb_ln").replace("self_attn.o_proj", "mixer.out_proj")
        name = name.replace("post_attention_layernorm", "norm1").replace("post_mlp_layernorm", "norm2")
        name = name.replace("roberta.layers", "roberta.encoder.layers").replace("roberta.", "tower.")
        grads[name] = parameter.grad
    for name in [n for n in grads if "self_attn.q_proj" in n]:
        parts = [grads.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        grads[name.replace("self_attn.q_proj", "mixer.Wqkv")] = torch.cat(parts)
    return grads


@pytest.mark.parametrize("most_logits", [2**27, 600 * 7])
def test_loss_and_every_gradient_agree_with_transformers(make_model, masked, tmp_path, monkeypatch, most_logits):
    monkeypatch.setattr(masked_lm, "MAX_LOGITS", most_logits)  # in one piece, and in many
    ours = make_model()
    ours.save_pretrained(tmp_path / "model")
    theirs, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs.eval()
    packed = masked.packed
    sequences = packed.ids.split(list(packed.lengths))
    labels = torch.full_like(packed.ids, -100).index_copy(0, masked.places, masked.labels).split(list(packed.lengths))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = pad(sequences, True, 1), pad(labels, True, -100)
    mask = torch.arange(ids.shape[1]) < torch.tensor(packed.lengths)[:, None]
    expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    loss = ours(masked)
    assert loss.tokens == len(masked.labels)
    assert abs(loss.mean - expected) / expected < 1e-5
    loss.mean.backward()
    expected.backward()
    gradients = theirs_under_our_names(theirs)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).norm() / gradients[name].norm() < 1e-5, name


def test_a_trained_directory_is_read_by_everybody(make_model, pack, tokenizer, tmp_path, padded_mean):
    model, packed = make_model(vocab_size=482), pack(LENGTHS, vocab_size=482)
    model.tower.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    back = MaskedLM.from_pretrained(tmp_path / "model", dropout=0.1)
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert back.tower.config.dropout == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower = TextTower.from_pretrained(tmp_path / "model", adapters=("a",), lora_rank=2)
    expected = model.tower(packed)
    torch.testing.assert_close(tower(packed), expected, rtol=0, atol=0)
    with torch.no_grad():
        theirs = padded_mean(AutoModel.from_pretrained(tmp_path / "model"), packed)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    texts = ["One small text", "Ein kleiner <mask> Text"]
    assert tower.tokenizer(texts) == tokenizer(texts)


@pytest.mark.parametrize("pickle", [False, True])
def test_the_head_of_an_xlm_r_directory_is_kept(tmp_path, pickle, masked):
    config = XLMRobertaConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    theirs = XLMRobertaForMaskedLM(config).eval()
    torch.nn.init.normal_(theirs.lm_head.bias)
    theirs.save_pretrained(tmp_path / "xlm-r")
    if pickle:  # an older file, which spells the tied weights out
        torch.save(theirs.state_dict(), tmp_path / "xlm-r/pytorch_model.bin")
        (tmp_path / "xlm-r/model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this is the training that such weights need
        model = MaskedLM.from_pretrained(tmp_path / "xlm-r")
    states = torch.randn(9, 32)
    labels = torch.arange(9)
    expected = torch.nn.functional.cross_entropy(theirs.lm_head(states), labels, reduction="sum")
    torch.testing.assert_close(model.lm_head(states, labels, model.tower.embeddings.word_embeddings.weight), expected)


def test_a_head_that_does_not_fit_is_named(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    del weights["lm_head.dense.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match="with a head.*\n.*1 missing: lm_head.dense.bias"):
        MaskedLM.from_pretrained(tmp_path / "model")
    assert TextTower.from_pretrained(tmp_path / "model").config.width == 32
    assert "JinaEmbeddingsV3ForMaskedLM" in json.loads((tmp_path / "model/config.json").read_text())["architectures"]


def test_training_learns_to_predict_and_moves_every_parameter(make_tower, tokenizer, sentences):
    torch.manual_seed(0)
    model = MaskedLM(TextTower(make_tower(vocab_size=482, dropout=0.1).config))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    masking, packed = WholeWordMasking(tokenizer), PackedTokens.from_lists(tokenizer(list(sentences.values())))
    losses = []
    for step in range(25):
        seeds = torch.arange(30) + 1000 * step
        loss = model.train()(masking(packed, seeds), sample_seeds=seeds).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(6.18, abs=0.3)  # ln 482
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_nothing_hidden_costs_nothing(make_model, pack):
    none = torch.zeros(0, dtype=torch.int64)
    loss = make_model()(MaskedTokens(pack([3]), none, none))
    assert (loss.total.item(), loss.tokens, loss.mean.item()) == (0.0, 0, 0.0)
    loss.mean.backward()


def test_depths_cover_every_parameter_and_adapters_are_refused(make_model, make_tower, lora):
    model = make_model()
    depths = model.layer_ids()
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert {depth for name, depth in depths.items() if name.startswith("lm_head.")} == {model.num_layers} == {3}
    with pytest.raises(ValueError, match="the tower has the adapters"):
        MaskedLM(make_tower(**lora))
