"""The same ids as XLM-RoBERTa's tokenizer, from either file."""

import hashlib
import json
import pickle
import shutil
import unicodedata

import pytest
from text_tower import Tokenizer
from transformers import AutoTokenizer, XLMRobertaTokenizer

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
def test_special_tokens_that_a_text_spells_are_those_of_transformers(kind, tokenizer, from_json, reference):
    ours = tokenizer if kind == "sentencepiece" else from_json
    assert ours([""]) == [[0, 2]]
    texts = ["a </s> <s> <mask> <pad> b", "<s>", "x<mask>y", "</ s>", "<unk>a", "<MASK>", "a<mask> <mask>"]
    assert ours(texts) == reference(texts)["input_ids"]
    assert {0, 1, 2, ours.vocab_size - 1} <= set(ours(texts)[0][1:-1])


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


# Directories as people have them, beside their vocabulary: {file: content}.
IMAGE = {
    "content": "[IMG]",
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "single_word": False,
    "special": False,
}
LOWER = {**IMAGE, "content": "human", "single_word": True}
MASK = {**IMAGE, "content": "<mask>", "lstrip": True, "normalized": False, "special": True}
PLAIN = {i: {**MASK, "content": t, "lstrip": False} for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
BESIDE = {
    "nothing": {},
    "the class": {"tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"}},
    "the fast class": {"tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizerFast"}},
    "added tokens": {
        "tokenizer_config.json": {"added_tokens_decoder": {**PLAIN, 481: MASK, 482: IMAGE, 483: LOWER}}
    },
    "extra special tokens": {"tokenizer_config.json": {"extra_special_tokens": ["[IMG]", "[Q]"]}},
    "additional special tokens": {"tokenizer_config.json": {"additional_special_tokens": ["[Q]"]}},
    "a mask that eats spaces": {"tokenizer_config.json": {"mask_token": {"__type": "AddedToken", **MASK}}},
    "a map of special tokens": {"special_tokens_map.json": {"mask_token": MASK, "additional_special_tokens": ["[Q]"]}},
    "older added tokens": {
        "added_tokens.json": {"[IMG]": 482}, "special_tokens_map.json": {"mask_token": MASK, "unk_token": "<unk>"},
    },
    "no space before": {"tokenizer_config.json": {"add_prefix_space": False}},
    "special tokens that are split": {"tokenizer_config.json": {"split_special_tokens": True}},
    "the general class": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
}  # fmt: skip
SPELLED = [
    "a [IMG] b[IMG]c",
    "[Q] why?",
    "a <mask> b",
    "</s> a <s>",
    "the human, humans",
    "<unk>",
    "[img]",
    "a\x85b",
    *ODD,
]


@pytest.mark.parametrize(
    ("files", "beside"),
    [
        (files, beside)
        for beside in BESIDE
        for files in ("model", "json", "both", "another json")
        if (files, beside) != ("model", "the general class")  # refused; see below
    ],
)
def test_ids_are_those_of_autotokenizer_for_the_same_directory(files, beside, spm_file, reference, sentences, tmp_path):
    if files != "json":
        shutil.copy(spm_file, tmp_path)
    if files != "model":
        reference.save_pretrained(tmp_path / "saved")
        stored = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
        if files == "another json":  # as another program might have written it, with tokens of its own
            stored["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, stored["normalizer"]]}
            stored["added_tokens"].append({"id": 482, **IMAGE})
            stored["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    for name, content in BESIDE[beside].items():
        (tmp_path / name).write_text(json.dumps(content))
    expected, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(tmp_path)
    texts = [unicodedata.normalize(form, s) for s in sentences.values() for form in ("NFC", "NFD", "NFKC", "NFKD")]
    theirs = [expected(text, truncation=False)["input_ids"] for text in [*texts, *SPELLED]]
    assert ours([*texts, *SPELLED]) == theirs
    assert ours.vocab_size == len(expected)
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    again = Tokenizer.from_file(tmp_path / "out")
    assert (again([*texts, *SPELLED]), again.sha256) == (theirs, ours.sha256)


def test_symbols_that_a_sentencepiece_model_keeps_apart_are_those_of_autotokenizer(sentences, tmp_path):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences.values()), model_prefix=str(tmp_path / "sentencepiece.bpe"), vocab_size=480,
        character_coverage=0.99, user_defined_symbols=["<sep>", "@@"], control_symbols=["<ctl>"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    texts = ["a<sep>b @@c", "a <ctl> b", *sentences.values()]
    expected = AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_file(tmp_path)(texts) == [expected(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class 'BertTokenizer'"),
        ({"bos_token": "[CLS]"}, r"bos_token '\[CLS\]'; expected '<s>'"),
        ({"truncation_side": "left"}, "truncation_side 'left'"),
        ({"add_eos_token": False}, "add_eos_token False"),
        ({"image_token": "[IMG]"}, r"image_token '\[IMG\]', of which this tower does not know"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder \[1\]; expected an object"),
        ({"added_tokens_decoder": {"5": 3}}, "added_tokens_decoder '5': 3; expected an id and a token"),
        ({"added_tokens_decoder": {"a": {"content": "b"}}}, "added_tokens_decoder 'a': .*; expected an id and a token"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex True, of which"),
        ({"model_specific_special_tokens": {"a": "b"}}, "model_specific_special_tokens .*, of which"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "needs a tokenizer.json; there is none"),
    ],
)
def test_settings_that_would_give_other_ids_are_refused_by_name(spm_file, tmp_path, config, message):
    shutil.copy(spm_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_file(tmp_path)


def test_settings_that_say_nothing_of_ids_are_passed_over(spm_file, tmp_path):
    shutil.copy(spm_file, tmp_path)
    expected = Tokenizer.from_file(tmp_path)(["a b"])
    nothing = {"from_slow": True, "return_token_type_ids": False, "fix_mistral_regex": False,
               "model_specific_special_tokens": {}, "fast_tokenizer_files": [], "padding": True, "truncation": True,
               "padding_side": "left", "truncation_side": None, "add_bos_token": None, "tokenize_chinese_chars": True,
               "later": None}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(nothing))
    assert Tokenizer.from_file(tmp_path)(["a b"]) == expected
