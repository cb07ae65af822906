"""The same ids as XLM-RoBERTa's tokenizer, from either file."""

import hashlib
import pickle

import pytest
from text_tower import Tokenizer
from transformers import XLMRobertaTokenizer

ODD = ["", " ", "a  b\tc\nd", "漢字\u3000かな\u00a0z\u200by", "ﬁ ① ½ e\u0301", "a\u0000b", "😀 👍🏽", "x" * 3000]


@pytest.fixture(scope="module")
def reference(spm_file):
    return XLMRobertaTokenizer.from_pretrained(spm_file.parent)


@pytest.fixture(scope="module")
def from_json(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    reference.save_pretrained(folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_ids_are_those_of_transformers_in_thirty_languages(kind, tokenizer, from_json, reference, sentences):
    ours = tokenizer if kind == "sentencepiece" else from_json
    assert len(sentences) == 30
    texts = [*sentences.values(), *(s.upper() for s in sentences.values()), *ODD]
    expected = reference(texts)["input_ids"]
    assert any(3 in ids for ids in expected)  # <unk> is among what is compared
    assert ours(texts) == expected
    assert ours.vocab_size == len(reference) == 482


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_special_tokens_come_from_us_and_never_from_the_text(kind, tokenizer, from_json):
    ours = tokenizer if kind == "sentencepiece" else from_json
    assert ours([""]) == [[0, 2]]
    (ids,) = ours(["a </s> <s> <mask> <pad> b"])
    assert ids[0] == 0
    assert ids[-1] == 2
    assert not {0, 1, 2, ours.vocab_size - 1} & set(ids[1:-1])


def test_truncation_keeps_the_end_of_sequence(tokenizer, sentences):
    (full,) = tokenizer([sentences["en"]])
    assert tokenizer([sentences["en"], "a"], max_length=6) == [[*full[:5], 2], *tokenizer(["a"])]
    assert tokenizer([sentences["en"]], max_length=2) == [[0, 2]]
    assert tokenizer([sentences["en"]], max_length=len(full)) == [full]


def test_lone_surrogates_are_replaced_and_pairs_joined(tokenizer):
    assert tokenizer(["a \ud800 b", "\ud83d\ude00"]) == tokenizer(["a \ufffd b", "😀"])


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_a_tokenizer_travels_and_is_known_by_its_hash(kind, tokenizer, from_json, sentences, tmp_path):
    ours = tokenizer if kind == "sentencepiece" else from_json
    file = ours.save(tmp_path)
    assert ours.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for copy in (Tokenizer.from_file(file), Tokenizer.from_file(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert copy.sha256 == ours.sha256
        assert copy(list(sentences.values())) == ours(list(sentences.values()))
    assert tokenizer.sha256 != from_json.sha256


def test_what_is_no_list_of_strings_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"texts\[1\] is None, a NoneType"):
        tokenizer(["a", None])
    with pytest.raises(ValueError, match="single string"):
        tokenizer("a")
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer(["a"], max_length=1)


def test_files_that_are_no_tokenizer_are_refused(tmp_path, spm_file):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Tokenizer.from_file(tmp_path / "a.model")
    for name, message in (
        ("a.model", "no sentencepiece model"),
        ("b.json", "no tokenizer.json"),
        ("c.txt", "ends in '.txt'"),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_file(tmp_path / name)
    (tmp_path / "d.model").write_bytes(spm_file.read_bytes())
    with pytest.raises(ValueError, match=r"\['a.model', 'd.model'\]; expected one"):
        Tokenizer.from_file(tmp_path)


def test_a_model_with_other_special_ids_is_refused(tmp_path, sentences):
    from sentencepiece import SentencePieceTrainer

    prefix = str(tmp_path / "other")
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences.values()), model_prefix=prefix, vocab_size=480, pad_id=0, unk_id=1, bos_id=2,
        eos_id=3, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"at \[1, 2, 3, 0\]; expected \[0, 1, 2, -1\]"):
        Tokenizer.from_file(prefix + ".model")
