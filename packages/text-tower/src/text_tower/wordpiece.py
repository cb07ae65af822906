"""BERT's tokenizer, `[CLS] text [SEP]`, from a WordPiece tokenizer.json (jina-embeddings-v2-base-en, jina-clip-v1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from text_tower.fields import OBJECT, field, shown
from text_tower.tokenizer_files import (
    CONFIG_FILE,
    HARMLESS,
    JSON_FILE,
    WORDS_FILE,
    Built,
    guarded,
    json_of,
    length_of,
)

CLS, SEP, PAD, UNK, MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
_NAMED = {"cls_token": CLS, "sep_token": SEP, "pad_token": PAD, "unk_token": UNK, "mask_token": MASK}
_CLASSES = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# tokenizer_config.json's names of the normalizer's settings, which transformers 4 and 5 take from there.
_NORMALIZER = {"do_lower_case": "lowercase", "tokenize_chinese_chars": "handle_chinese_chars",
               "strip_accents": "strip_accents"}  # fmt: skip
_DEFAULTS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_APPLIED = {*_NAMED, *_NORMALIZER, "tokenizer_class", "model_max_length", "added_tokens_decoder"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "truncation_side": ("right",),
    "do_basic_tokenize": (True,),
    "never_split": ([],),
    "split_special_tokens": (False,),
    "additional_special_tokens": ([],),
    "extra_special_tokens": ([], {}),
}


def is_one(files: Mapping[str, bytes], name: str) -> bool:
    """Whether a directory's tokenizer (files as `tokenizer_files.read` gives them) is a WordPiece one."""
    if b'"WordPiece"' not in files.get(JSON_FILE, b""):  # most are not, and parsing takes a while
        return False
    model = json_of(files, JSON_FILE, name).get("model")
    return isinstance(model, dict) and model.get("type") == "WordPiece"


def build(files: Mapping[str, bytes], name: str) -> Built:
    """The tokenizer that transformers builds from such files.

    Raises:
        ValueError: another model, normalizer or splitting than BERT's, or settings beside it that say something else.
    """
    with guarded(f"{name} and the files beside it make no tokenizer"):
        from tokenizers import Tokenizer

        stored, config = json_of(files, JSON_FILE, name), json_of(files, CONFIG_FILE, name)
        encoder = Tokenizer.from_str(files[JSON_FILE].decode())
        encoder.no_truncation()
        encoder.no_padding()
        _check_model(stored, name)
        _check_config(config, stored, name)
        _check_words(files, encoder, name)
        vocabulary = encoder.get_vocab(with_added_tokens=True)
        ids = {token: vocabulary.get(token, -1) for token in (CLS, SEP, PAD, UNK)}
        if missing := [token for token, i in ids.items() if i < 0]:
            raise ValueError(f"{name} has no {', '.join(missing)}; expected BERT's special tokens")
        plain = encoder.encode("a", add_special_tokens=False).ids
        if encoder.encode("a").ids != [ids[CLS], *plain, ids[SEP]]:
            raise ValueError(f"{name} puts {encoder.encode('a').tokens} around a text; expected {CLS} and {SEP}")
        lower = {"do_lower_case": bool(stored["normalizer"].get("lowercase"))}
        for_others = {"tokenizer_class": "BertTokenizer", **lower, **_NAMED}
        length = length_of(config, name)
        return Built(encoder, length, False, ids[CLS], ids[SEP], ids[PAD], for_others, padded_to=8)


def _check_model(stored: Mapping[str, Any], name: str) -> None:
    """That tokenizer.json is what transformers' BertTokenizer makes of its vocabulary."""
    model = stored["model"]
    expected = {
        "model.unk_token": (model.get("unk_token"), UNK),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), "##"),
        "model.max_input_chars_per_word": (model.get("max_input_chars_per_word", 100), 100),
        "normalizer.type": (_type(stored, "normalizer"), "BertNormalizer"),
        "pre_tokenizer.type": (_type(stored, "pre_tokenizer"), "BertPreTokenizer"),
    }
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{name} has {key} {shown(found)}; expected {wanted!r}, as BERT's")
    if stored["normalizer"].get("clean_text", True) is not True:
        raise ValueError(f"{name} has normalizer.clean_text {shown(stored['normalizer']['clean_text'])}; expected true")


def _type(stored: Mapping[str, Any], key: str) -> Any:
    part = stored.get(key)
    return part.get("type") if isinstance(part, dict) else part


def _check_config(config: Mapping[str, Any], stored: Mapping[str, Any], name: str) -> None:
    """That tokenizer_config.json says what tokenizer.json does: other libraries read the one or the other."""
    here = f"{name}: {CONFIG_FILE} has"
    if (kind := config.get("tokenizer_class")) not in (None, *_CLASSES):
        raise ValueError(f"{here} tokenizer_class {shown(kind)}; expected {_CLASSES[0]!r}")
    for key, expected in _NAMED.items():
        found = config.get(key)
        content = found.get("content") if isinstance(found, dict) else found
        if content not in (None, expected):
            raise ValueError(f"{here} {key} {shown(content)}; expected {expected!r}, as BERT")
    for key, theirs in _NORMALIZER.items():
        built = stored["normalizer"].get(theirs)
        if (found := config.get(key, _DEFAULTS[key] if config else built)) != built:
            raise ValueError(
                f"{here} {key} {shown(found)}, and tokenizer.json {theirs} {shown(built)}; transformers takes the "
                "one, others the other: make them agree"
            )
    for key, values in _ONLY.items():
        if (found := config.get(key)) is not None and found not in values:
            raise ValueError(f"{here} {key} {shown(found)}; this tokenizer knows {values[0]!r} only")
    added = {str(t.get("id")): t.get("content") for t in stored.get("added_tokens") or [] if isinstance(t, dict)}
    decoder = field(config, "added_tokens_decoder", OBJECT, f"{name}: {CONFIG_FILE}", {})
    said = {i: t.get("content") if isinstance(t, dict) else t for i, t in decoder.items()}
    if said not in ({}, added):
        raise ValueError(f"{here} other added tokens than tokenizer.json ({shown(said)}, {shown(added)}); expected the "
                         "same")  # fmt: skip
    unknown = sorted(k for k in config.keys() - _APPLIED - _ONLY.keys() - HARMLESS if config[k] not in (None, {}, []))
    if unknown:
        raise ValueError(
            f"{here} {', '.join(f'{k} {shown(config[k])}' for k in unknown)}, of which this tower does not know what "
            "it means; if ids do not depend on it, remove it from the file"
        )


def _check_words(files: Mapping[str, bytes], encoder: Any, name: str) -> None:
    """That vocab.txt, which other libraries read instead, lists the same words."""
    if WORDS_FILE not in files:
        return
    words = files[WORDS_FILE].decode("utf-8", "replace").split("\n")
    words = words[:-1] if words[-1] == "" else words
    listed = {word.rstrip("\r"): i for i, word in enumerate(words)}
    if listed != encoder.get_vocab(with_added_tokens=False):
        raise ValueError(f"{name}: {WORDS_FILE} beside it lists other words; take the two files from one model")
