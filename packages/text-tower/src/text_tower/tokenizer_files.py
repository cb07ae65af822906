"""A directory's tokenizer files, and the tokenizer that transformers' AutoTokenizer makes of them.

`tokenizer.json` has priority over `sentencepiece.bpe.model`. From either, transformers takes vocabulary and normalizer
and adds XLM-RoBERTa's own splitting into words, unless `tokenizer_config.json` names the general class only. Added
tokens come from `tokenizer_config.json`, or else from older files beside it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from text_tower.fields import Kind, field, parse, read_bytes, shown

BOS, PAD, EOS, UNK = 0, 1, 2, 3
# The names under which other libraries look for them.
SENTENCEPIECE_FILE, JSON_FILE = "sentencepiece.bpe.model", "tokenizer.json"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WORDS_FILE = "vocab.txt"  # beside a WordPiece tokenizer.json

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
          "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
# tokenizer_config.json of a tokenizer that has none. Each library knows by itself which blanks a mask takes with it.
FOR_OTHERS = {"tokenizer_class": "XLMRobertaTokenizer", **{k: v for k, v in _NAMED.items() if k != "mask_token"}}
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_REBUILT = ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
_AS_IT_IS = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_HONOURED = frozenset({*_NAMED, *_EXTRA, "tokenizer_class", "added_tokens_decoder", "add_prefix_space",
                       "split_special_tokens", "model_max_length", "truncation_side"})  # fmt: skip
# Keys of tokenizer_config.json without influence on ids under transformers 5.
HARMLESS = frozenset([
    "name_or_path", "is_local", "local_files_only", "backend", "unk_id", "vocab_file", "tokenizer_file",
    "special_tokens_map_file", "clean_up_tokenization_spaces", "padding_side", "pad_to_multiple_of",
    "pad_token_type_id", "max_length", "stride", "truncation_strategy", "sp_model_kwargs", "model_input_names",
    "chat_template", "processor_class", "legacy", "use_fast", "do_lower_case", "keep_accents", "init_inputs",
    "trust_remote_code", "auto_map", "_commit_hash", "verbose", "from_slow", "return_token_type_ids",
    "tokenize_chinese_chars", "padding", "truncation",
])  # fmt: skip


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = {key: flag for key, flag in value.items() if key not in ("content", "id", "__type")}
    known = flags.keys() <= {"single_word", "lstrip", "rstrip", "normalized", "special"}
    return isinstance(value.get("content"), str) and known and all(isinstance(flag, bool) for flag in flags.values())


TOKEN = Kind("a token: a text, or an object of its content and flags", _is_token)
_TOKENS = Kind("a list of tokens", lambda value: isinstance(value, list) and all(map(_is_token, value)))
_ID = Kind("the token's id, a whole number", lambda value: isinstance(value, int) and 0 <= value < 2**31)
_LARGEST = 2**27
"""Bytes of a file; XLM-RoBERTa's tokenizer.json has 17 million."""


class Built(NamedTuple):
    """A `tokenizers.Tokenizer`, the most tokens of a text according to its files (None if not set), whether any file
    but the vocabulary's influences its ids, its special ids, and tokenizer_config.json where there is none."""

    encoder: Any
    model_max_length: int | None
    configured: bool
    bos: int = BOS
    eos: int = EOS
    pad: int = PAD
    for_others: Mapping[str, object] = FOR_OTHERS
    padded_to: int = 1


def read(path: Path) -> tuple[dict[str, bytes], Path] | None:
    """({usual name: content}, the vocabulary's file) of a directory's tokenizer, or of a file and the settings beside
    it; the vocabulary comes first. None if a directory has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: several sentencepiece models, or a file of another kind.
    """
    file = _find(path) if path.is_dir() else path
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; expected a sentencepiece .model or a {JSON_FILE}")
    if file.suffix not in (".model", ".json"):
        raise ValueError(f"{file} ends in {file.suffix!r}; expected a sentencepiece .model or a {JSON_FILE}")
    files = {JSON_FILE if file.suffix == ".json" else SENTENCEPIECE_FILE: read_bytes(file, _LARGEST)}
    beside = [CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, *([SENTENCEPIECE_FILE, WORDS_FILE] if path.is_dir() else [])]
    there = [name for name in beside if name not in files and (file.parent / name).is_file()]
    return files | {name: read_bytes(file.parent / name, _LARGEST) for name in there}, file


def _find(directory: Path) -> Path | None:
    for name in (JSON_FILE, SENTENCEPIECE_FILE):
        if (directory / name).is_file():
            return directory / name
    models = sorted(directory.glob("*.model"))
    if len(models) > 1:
        raise ValueError(f"{directory} holds {[m.name for m in models]}; expected one .model file: give its own path")
    return models[0] if models else None


def build(files: Mapping[str, bytes], name: str) -> Built:
    """The tokenizer that transformers builds from such files.

    Raises:
        ValueError: files of another kind, special tokens that are not XLM-RoBERTa's, or unknown settings.
    """
    with guarded(f"{name} and the files beside it make no tokenizer"):
        return _build(files, name)


@contextmanager
def guarded(found: str) -> Iterator[None]:
    """What tokenizers and Rust below it raise for values that they do not expect (plain Exception, panics), as
    ValueError; ValueErrors, which are ours, stay."""
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{found} ({error}); restore it, or download it again") from error
        raise


def _build(files: Mapping[str, bytes], name: str) -> Built:
    config = json_of(files, CONFIG_FILE, name)
    _check(config, name)
    kind = config.get("tokenizer_class") or _REBUILT[0]
    if kind in _AS_IT_IS and JSON_FILE not in files:
        raise ValueError(f"{name}: {CONFIG_FILE} names the class {kind!r}, which needs a {JSON_FILE}; there is none")
    stored = json_of(files, JSON_FILE, name) if JSON_FILE in files else None
    if stored is None:
        encoder, extra = _from_sentencepiece(files[SENTENCEPIECE_FILE], config, name)
    else:
        encoder, extra = _from_json(files[JSON_FILE], stored, config, kind in _REBUILT, name), []
    tokens = _added_tokens(files, config, stored, extra, name)
    of_the_file = _added_tokens({}, {}, stored, extra, name)
    encoder.add_tokens(tokens)
    encoder.encode_special_tokens = bool(config.get("split_special_tokens", False))
    special = [encoder.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    if special != [BOS, PAD, EOS, UNK]:
        raise ValueError(f"{name} has <s>, <pad>, </s>, <unk> at {special}; expected [0, 1, 2, 3], as XLM-RoBERTa")
    plain = encoder.encode("a", add_special_tokens=False).ids
    if encoder.encode("a").ids != [BOS, *plain, EOS]:
        raise ValueError(f"{name} puts {encoder.encode('a').tokens} around a text; expected <s> and </s>")
    plain = not config.get("split_special_tokens") and config.get("add_prefix_space", True) and kind in _REBUILT
    configured = not plain or set(map(repr, tokens)) != set(map(repr, of_the_file))
    return Built(encoder, length_of(config, name), configured)


def length_of(config: Mapping[str, Any], name: str) -> int | None:
    """`model_max_length` of tokenizer_config.json, if it is set."""
    length = config.get("model_max_length") or 0
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ValueError(f"{name}: {CONFIG_FILE} has model_max_length {shown(length)}; expected a number")
    return int(length) if 2 <= length < 1e9 else None  # larger values are transformers' "not set"


def _check(config: Mapping[str, Any], name: str) -> None:
    here = f"{name}: {CONFIG_FILE} has"
    if (kind := config.get("tokenizer_class")) not in (None, *_REBUILT, *_AS_IT_IS):
        raise ValueError(f"{here} tokenizer_class {kind!r}; expected {_REBUILT[0]!r}")
    if config.get("truncation_side") not in (None, "right"):
        raise ValueError(
            f"{here} truncation_side {config['truncation_side']!r}; this tokenizer keeps a text's beginning"
        )
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key) not in (None, True):
            raise ValueError(f"{here} {key} {config[key]!r}; this tower expects <s> … </s>")
    for key, expected in _NAMED.items():
        if (found := _content(field(config, key, TOKEN, f"{name}: {CONFIG_FILE}", None))) not in (expected, None):
            raise ValueError(f"{here} {key} {found!r}; expected {expected!r}, as XLM-RoBERTa")
    unknown = sorted(config.keys() - _HONOURED - HARMLESS - {"add_bos_token", "add_eos_token"})
    if config.get("fix_mistral_regex") is False:
        unknown.remove("fix_mistral_regex")
    if unknown := [key for key in unknown if config[key] not in (None, {}, [])]:
        raise ValueError(
            f"{here} {', '.join(f'{k} {config[k]!r}' for k in unknown)}, of which this tower does not know what it "
            "means; if ids do not depend on it, remove it from the file"
        )


def _from_sentencepiece(content: bytes, config: Mapping[str, Any], name: str) -> tuple[Any, list[Any]]:
    """The tokenizer of a sentencepiece model, and the model's own control and user-defined tokens."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb
    from tokenizers import AddedToken

    try:
        model = pb.ModelProto.FromString(content)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise ValueError(f"{name} is no sentencepiece model ({error})") from error
    trained, pieces = model.trainer_spec, model.pieces
    if not pieces:
        raise ValueError(f"{name} is no sentencepiece model (it has no pieces)")
    if trained.model_type != trained.UNIGRAM:
        raise ValueError(f"{name} is of type {trained.ModelType.Name(trained.model_type)}; expected UNIGRAM")
    special = [trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id]
    if special != [0, 1, 2, -1]:
        raise ValueError(
            f"{name} has <unk>, <s>, </s>, <pad> at {special}; expected [0, 1, 2, -1], the defaults of "
            "SentencePieceTrainer, because the tower's ids are a fixed shift of them"
        )
    vocabulary = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary += [(piece.piece, piece.score) for piece in pieces[3:]] + [("<mask>", 0.0)]
    apart = [AddedToken(p.piece, normalized=False, special=p.type == p.CONTROL)
             for p in pieces if p.type in (p.CONTROL, p.USER_DEFINED)]  # fmt: skip
    return _xlm_roberta(vocabulary, model.normalizer_spec.precompiled_charsmap, config), apart


def _from_json(content: bytes, stored: Mapping[str, Any], config: Mapping[str, Any], rebuilt: bool, name: str) -> Any:
    from tokenizers import Tokenizer

    with guarded(f"{name} is no tokenizer.json"):
        encoder = Tokenizer.from_str(content.decode())
    if rebuilt:
        model = stored["model"]
        if model.get("type") != "Unigram":
            raise ValueError(f"{name} has a model of type {model.get('type')!r}; expected 'Unigram', as XLM-RoBERTa's")
        normalizer = stored.get("normalizer") or {}
        steps = normalizer.get("normalizers", [normalizer])
        charsmap = next((s["precompiled_charsmap"] for s in steps if s.get("type") == "Precompiled"), "")
        before = encoder.post_processor
        vocabulary = [(piece, score) for piece, score in model["vocab"]]
        encoder = _xlm_roberta(vocabulary, base64.b64decode(charsmap), config)
        encoder.post_processor = before or encoder.post_processor
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _xlm_roberta(vocabulary: list[tuple[str, float]], charsmap: bytes, config: Mapping[str, Any]) -> Any:
    """A tokenizer as transformers' XLMRobertaTokenizer builds it around a vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    if not all(math.isfinite(score) for _, score in vocabulary):
        raise ValueError("pieces have scores that are no numbers; expected those of a trained model")
    encoder = Tokenizer(models.Unigram(vocabulary, unk_id=UNK, byte_fallback=False))
    if charsmap:
        encoder.normalizer = normalizers.Precompiled(charsmap)
    scheme = "always" if config.get("add_prefix_space", True) else "never"
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)]
    )
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return encoder


def _added_tokens(
    files: Mapping[str, bytes], config: dict[str, Any], stored: Mapping[str, Any] | None, extra: list[Any], name: str
) -> list[Any]:
    """`AddedToken`s in the order in which transformers adds them: those with an id, the named ones, the others."""
    from tokenizers import AddedToken

    config = dict(config)
    by_id: dict[int, Any] = {}
    if "added_tokens_decoder" in config:
        by_id = _decoder(config["added_tokens_decoder"], f"{name}: {CONFIG_FILE}")
    else:
        for key, value in json_of(files, SPECIAL_FILE, name).items():
            if key not in (*_NAMED, *_EXTRA):
                raise ValueError(f"{name}: {SPECIAL_FILE} names {key!r}, which XLM-RoBERTa does not have")
            if key == "additional_special_tokens" and stored is None:
                continue  # transformers replaces them by the sentencepiece model's own
            if value is not None:
                config[key] = field({key: value}, key, _TOKENS if key in _EXTRA else TOKEN, f"{name}: {SPECIAL_FILE}")
        specials = {_content(config.get(key)) for key in _NAMED} | {_content(t) for t in _extra(config, name) or []}
        added = json_of(files, ADDED_FILE, name)
        for token in added:
            special, i = token in specials, field(added, token, _ID, f"{name}: {ADDED_FILE}")
            by_id[i] = AddedToken(token, normalized=not special, special=special)
        for token in field(stored or {}, "added_tokens", _TOKENS, name, []):
            by_id[field(token, "id", _ID, f"{name}: added_tokens")] = _token(token)
    known = {token.content: token for token in by_id.values()}
    tokens = [by_id[i] for i in sorted(by_id)]
    named = [config.get(key, default) for key, default in _NAMED.items()]
    others = _extra(config, name)
    for token in [*named, *(extra if others is None else others)]:
        if token is not None and _content(token) not in known:
            known[_content(token)] = made = _token(token)
            tokens.append(made)
    names = {_content(token) for token in named if token}
    for token in tokens:
        token.special = token.special or token.content in names
    return tokens


def _decoder(stored: Any, where: str) -> dict[int, Any]:
    if not isinstance(stored, dict):
        raise ValueError(f"{where} has added_tokens_decoder {shown(stored)}; expected an object, of ids and tokens")
    for i, token in stored.items():
        if not (i.isascii() and i.isdecimal() and len(i) < 10) or not isinstance(token, dict) or not _is_token(token):
            found_there = f"{where} has added_tokens_decoder {i!r}: {shown(token)}"
            raise ValueError(f"{found_there}; expected an id and a token")
    return {int(i): _token(token) for i, token in stored.items()}


def _extra(config: Mapping[str, Any], name: str) -> list[Any] | None:
    key = next((key for key in _EXTRA if config.get(key)), None)
    if key is None:
        return [] if config.get(_EXTRA[0]) is not None else None
    tokens: list[Any] = field(config, key, _TOKENS, name)
    return tokens


def _token(token: Any) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, dict):
        options = {key: value for key, value in token.items() if key not in ("__type", "id")}
        return AddedToken(**options)
    return token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)


def _content(token: Any) -> Any:
    if isinstance(token, dict):
        return token.get("content")
    return getattr(token, "content", token)


def json_of(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    if file not in files:
        return {}
    content = parse(files[file], name if file == JSON_FILE else f"{name}: {file}")
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {file} holds a {type(content).__name__}; expected a JSON object")
    return content
