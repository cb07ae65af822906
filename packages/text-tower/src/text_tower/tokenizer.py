"""XLM-RoBERTa's tokenizer: `<s> text </s>`, from a sentencepiece model or a tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOS, PAD, EOS, UNK = 0, 1, 2, 3
# The names under which other libraries look for them.
SENTENCEPIECE_FILE, JSON_FILE = "sentencepiece.bpe.model", "tokenizer.json"


class Tokenizer:
    """Turns texts into lists of token ids. Picklable, so it may travel to worker processes.

    Sentencepiece's own ids are shifted as XLM-RoBERTa does: `<s>`=0 `<pad>`=1 `</s>`=2 `<unk>`=3, piece i from 3 on is
    i + 1, and `<mask>` comes last. Special tokens that are spelled out in a text do not become special tokens.

    Attributes:
        vocab_size: number of ids, `<mask>` included.
        sha256: of the file's bytes; two tokenizers with the same value give the same ids.
    """

    def __init__(self, content: bytes, kind: str, name: str = "the tokenizer"):
        """Use `from_file`. `kind` is "sentencepiece" or "json"; `name` serves error messages."""
        self._content, self._kind, self._name = content, kind, name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._encoder: Any
        if kind == "sentencepiece":
            self._encoder = _load_sentencepiece(content, name)
            self.vocab_size = self._encoder.get_piece_size() + 2
        else:
            self._encoder = _load_json(content, name)
            self.vocab_size = self._encoder.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a sentencepiece `.model`, a `tokenizer.json`, or a directory that holds one of them.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is of another kind, or its special tokens are not XLM-RoBERTa's.
        """
        path = Path(path)
        file = _find(path) if path.is_dir() else path
        if file is None:
            raise FileNotFoundError(f"{path} holds no tokenizer; expected a sentencepiece .model or a {JSON_FILE}")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; expected a sentencepiece .model or a {JSON_FILE}")
        if file.suffix not in (".model", ".json"):
            raise ValueError(f"{file} ends in {file.suffix!r}; expected a sentencepiece .model or a {JSON_FILE}")
        return cls(file.read_bytes(), "json" if file.suffix == ".json" else "sentencepiece", str(file))

    @classmethod
    def in_directory(cls, path: str | Path) -> Tokenizer | None:
        """The directory's tokenizer, or None if it holds none."""
        return cls.from_file(path) if _find(Path(path)) else None

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text, `<s> … </s>`.

        Args:
            texts: a list of strings; lone surrogates, which are no characters, become U+FFFD.
            max_length: keep at most this many ids of a text, `</s>` among them; at least 2.

        Raises:
            ValueError: an entry that is no string (named by its index), or a max_length below 2.
        """
        if isinstance(texts, str):
            raise ValueError("texts is a single string; expected a list of strings")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; expected at least 2, for <s> and </s>")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}] is {text!r}, a {type(text).__name__}; expected a string")
        keep = None if max_length is None else max_length - 2
        return [[BOS, *ids[:keep], EOS] for ids in self._ids([_characters(text) for text in texts])]

    def pieces(self) -> list[str]:
        """What each id stands for; `▁` begins a word that follows a space."""
        if self._kind == "sentencepiece":
            ordinary = [self._encoder.id_to_piece(i) for i in range(3, self._encoder.get_piece_size())]
            return ["<s>", "<pad>", "</s>", "<unk>", *ordinary, "<mask>"]
        pieces = [""] * self.vocab_size
        for piece, i in self._encoder.get_vocab(with_added_tokens=True).items():
            pieces[i] = piece
        return pieces

    @property
    def mask_id(self) -> int:
        """The id of `<mask>`.

        Raises:
            ValueError: a tokenizer.json that has none.
        """
        if self._kind == "sentencepiece":
            return self.vocab_size - 1
        mask = self._encoder.token_to_id("<mask>")
        if mask is None:
            raise ValueError(f"{self._name} has no <mask>; expected XLM-RoBERTa's special tokens")
        return mask

    def save(self, directory: str | Path) -> Path:
        """Writes the file, byte for byte, under its usual name, and returns its path."""
        path = Path(directory) / (SENTENCEPIECE_FILE if self._kind == "sentencepiece" else JSON_FILE)
        path.write_bytes(self._content)
        return path

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._kind == "json":
            # A tokenizer.json has the special tokens among its pieces, so that a text could spell them.
            special = {BOS, PAD, EOS, self._encoder.token_to_id("<mask>")}
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
            return [[UNK if i in special else i for i in e.ids] for e in encodings]
        # One thread: worker processes already share the cores among them.
        pieces = self._encoder.encode(texts, out_type=int, num_threads=1)
        return [[i + 1 if i else UNK for i in ids] for ids in pieces]

    def __getstate__(self) -> tuple[bytes, str, str]:
        return self._content, self._kind, self._name

    def __setstate__(self, state: tuple[bytes, str, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _characters(text: str) -> str:
    """Text that UTF-8 can hold: paired surrogates joined, lone ones replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _find(directory: Path) -> Path | None:
    if (directory / SENTENCEPIECE_FILE).is_file():
        return directory / SENTENCEPIECE_FILE
    models = sorted(directory.glob("*.model"))
    if len(models) > 1:
        raise ValueError(f"{directory} holds {[m.name for m in models]}; expected one .model file: give its own path")
    if models:
        return models[0]
    return directory / JSON_FILE if (directory / JSON_FILE).is_file() else None


def _load_sentencepiece(content: bytes, name: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{name} is no sentencepiece model ({error})") from error
    special = [model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()]
    if special != [0, 1, 2, -1]:
        raise ValueError(
            f"{name} has <unk>, <s>, </s>, <pad> at {special}; expected [0, 1, 2, -1], the defaults of "
            "SentencePieceTrainer, because the tower's ids are a fixed shift of them"
        )
    return model


def _load_json(content: bytes, name: str) -> Any:
    from tokenizers import Tokenizer as JsonTokenizer

    try:
        model = JsonTokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{name} is no tokenizer.json ({error})") from error
    special = [model.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    if special != [BOS, PAD, EOS, UNK]:
        raise ValueError(f"{name} has <s>, <pad>, </s>, <unk> at {special}; expected [0, 1, 2, 3], as XLM-RoBERTa")
    model.no_truncation()
    model.no_padding()
    return model
