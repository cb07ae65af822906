"""What `save_pretrained` writes for sentence-transformers and transformers, and that it comes back as it was."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from text_tower import TextTower, Tokenizer
from transformers import AutoModel, AutoTokenizer

SAID = {
    "instructions": {"retrieval.query": "find: ", "retrieval.passage": "read: ", "separation": "apart: "},
    "max_length": 900,
}


@pytest.fixture
def tower(make_tower, tokenizer, lora):
    return make_tower(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer, **SAID, **lora)


def test_sentence_transformers_opens_a_saved_tower(tower, sentences, tmp_path):
    tower.save_pretrained(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [*sentences.values(), " ".join(sentences.values())]
    found = {None: model.encode(texts), "retrieval.query": model.encode_query(texts)}
    for task, rows in found.items():
        assert np.abs(rows - tower.encode(texts, task=task)).max() < 1e-6
    assert model.max_seq_length == 512
    # "separation" is an adapter that is not in the weights that others read.
    assert {name for name, prompt in model.prompts.items() if prompt} == {
        "query", "retrieval.query", "document", "retrieval.passage"
    }  # fmt: skip


@pytest.mark.parametrize("adapters", [(), ("retrieval.query", "separation"), ("another",)])
@pytest.mark.parametrize("length", [900, 512, 100])
def test_a_saved_tower_has_the_configuration_that_it_had(length, adapters, make_tower, tokenizer, lora, tmp_path):
    lora = {**lora, "adapters": adapters} if adapters else {}
    said = {**SAID, "max_length": length, "truncate_dim": 8}
    tower = make_tower(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer, **said, **lora)
    tower.save_pretrained(tmp_path / "model")
    assert TextTower.from_pretrained(tmp_path / "model").config == tower.config


def test_what_was_changed_for_sentence_transformers_is_followed_here_too(tower, tmp_path):
    tower.save_pretrained(tmp_path / "model")
    for name, changes in (
        ("sentence_bert_config.json", {"max_seq_length": 64}),
        ("config_sentence_transformers.json", {"prompts": {"mine": "a: "}, "truncate_dim": 4}),
    ):
        file = tmp_path / "model" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    config = TextTower.from_pretrained(tmp_path / "model").config
    assert (config.max_length, config.truncate_dim) == (64, 4)
    assert config.instructions == {**tower.config.instructions, "mine": "a: "}
    file.write_text(json.dumps({"prompts": {"separation": "other: "}}))
    with pytest.raises(ValueError, match="instruction of 'separation' is 'apart: ' .* and 'other: '"):
        TextTower.from_pretrained(tmp_path / "model")


def test_no_weight_of_transformers_model_is_missing_or_left_over(tower, tmp_path):
    tower.save_pretrained(tmp_path / "model")
    model, said = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(said.values()), said
    assert not model.pooler.dense.weight.any()


def test_tokenizer_json_gives_the_ids_without_sentencepiece(tower, sentences, tmp_path):
    tower.save_pretrained(tmp_path / "model")
    texts = [*sentences.values(), "<s> a <mask>b </s>  c", "", "ﬁ ½ ｱ"]
    expected = tower.tokenizer(texts)
    assert Tokenizer.from_file(tmp_path / "model" / "tokenizer.json")(texts) == expected
    assert Tokenizer.from_file(tmp_path / "model")(texts) == expected
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import sys, json; sys.modules['sentencepiece'] = None\nfrom transformers import AutoTokenizer\n"
        "ids = AutoTokenizer.from_pretrained('model')(json.load(open('texts.json'))).input_ids\n"
        "json.dump(ids, open('ids.json', 'w'))"
    )
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "ids.json").read_text()) == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(texts).input_ids == expected


def test_a_merged_tower_knows_its_own_task_and_not_the_other_adapters(tower, tmp_path):
    """Else the instruction of one adapter would go with the weights of another."""
    texts = ["a small house"]
    for name, others in (("separation", "retrieval.query"), ("retrieval.query", "separation")):
        merged = tower.merged(name)
        assert np.abs(merged.encode(texts, task=name) - tower.encode(texts, task=name)).max() < 1e-6
        assert merged.config.instructions[name] == SAID["instructions"][name]
        with pytest.raises(ValueError, match=f"unknown task '{others}'"):
            merged.encode(texts, task=others)
    assert set(tower.merged("none").config.instructions) == {"retrieval.passage"}


def test_a_tokenizer_of_another_model_is_refused_though_it_has_as_many_ids(tower, sentences, tmp_path):
    from sentencepiece import SentencePieceTrainer

    tower.save_pretrained(tmp_path / "model")
    (tmp_path / "other").mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text[::-1] for text in sentences.values()] * 3),
        model_prefix=str(tmp_path / "other/m"), vocab_size=480, character_coverage=0.995, minloglevel=2,
    )  # fmt: skip
    other = Tokenizer.from_file(tmp_path / "other/m.model")
    assert other.vocab_size == tower.tokenizer.vocab_size
    other.save_for_others(tmp_path)
    (tmp_path / "tokenizer.json").replace(tmp_path / "model/tokenizer.json")
    with pytest.raises(
        ValueError, match=r"model has another tokenizer than .* remove tokenizer_fingerprint from config"
    ):
        TextTower.from_pretrained(tmp_path / "model")


def test_a_tokenizer_says_its_special_tokens_and_has_the_same_ids(tower, sentences, tmp_path):
    """transformers.js knows no defaults of the class: it would pad with nothing."""
    tower.tokenizer.save_for_others(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [said[f"{name}_token"] for name in ("bos", "pad", "eos", "unk")] == ["<s>", "<pad>", "</s>", "<unk>"]
    texts = [*sentences.values(), "a <mask> b", "a<pad>b </s>"]
    for back in (Tokenizer.from_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        ids = back(texts)
        assert (ids if isinstance(ids, list) else ids.input_ids) == tower.tokenizer(texts)
