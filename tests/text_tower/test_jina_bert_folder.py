"""Directories of JinaBERT, as jina-embeddings-v2-base is published, and their tokenizer."""

import json

import pytest
import torch
from published_jina_bert import SHAPE, Published, published_config, published_weights, write
from safetensors.torch import load_file
from text_tower import PackedTokens, TextTower, TextTowerConfig, Tokenizer


@pytest.fixture
def published(tmp_path):
    def make(name="v2", **options):
        return write(tmp_path / name, **options)

    return make


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
