"""XLM-RoBERTa's tokenizer, `<s> text </s>`, from a sentencepiece model or a tokenizer.json; BERT's from the latter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from text_tower import tokenizer_files, wordpiece
from text_tower.config import whole_number
from text_tower.texts import listed
from text_tower.tokenizer_files import BOS, CONFIG_FILE, EOS, JSON_FILE, UNK

__all__ = ["BOS", "EOS", "UNK", "Tokenizer"]


class Tokenizer:
    """Turns texts into lists of token ids, those of transformers' AutoTokenizer for the same files.

    Sentencepiece's own ids are shifted as XLM-RoBERTa does: `<s>`=0 `<pad>`=1 `</s>`=2 `<unk>`=3, piece i from 3 on is
    i + 1, and `<mask>` comes last, before any added token. BERT's WordPiece, `[CLS] text [SEP]`, has its own ids. As in
    transformers, a special or added token that is spelled out in a text becomes that token. It can be pickled for
    worker processes; threads may share it.

    Attributes:
        vocab_size: number of ids, `<mask>` and added tokens included.
        model_max_length: most tokens of a text according to the files, None if not set; `__call__` ignores it.
        bos, eos, pad: ids of the first and the last token of a text, and of padding.
        sha256: of the file's bytes and of settings beside it; tokenizers with the same value give the same ids.
    """

    def __init__(self, files: Mapping[str, bytes], name: str = "the tokenizer"):
        """Use `from_file`. `files` are those of `tokenizer_files.read`; `name` serves error messages."""
        self._files, self._name = dict(files), name
        build = wordpiece.build if wordpiece.is_one(self._files, name) else tokenizer_files.build
        self._built = built = build(self._files, name)
        self._encoder, self.model_max_length, configured = built.encoder, built.model_max_length, built.configured
        self.bos, self.eos, self.pad = built.bos, built.eos, built.pad
        self.vocab_size: int = self._encoder.get_vocab_size(with_added_tokens=True)
        self._for_others: dict[str, str] | None = None
        beside = [self._files[n] for n in sorted(self._files) if n.endswith(".json")] if configured else []
        self.sha256 = hashlib.sha256(b"".join([next(iter(self._files.values())), *beside])).hexdigest()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a sentencepiece `.model`, a `tokenizer.json`, or a directory; settings beside the file are read too.

        In a directory with both, `tokenizer.json` decides, as in transformers.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is of another kind, its special tokens are not XLM-RoBERTa's, or it has settings that
                we do not know.
        """
        tokenizer = cls.in_directory(path)
        if tokenizer is None:
            raise FileNotFoundError(f"{path} holds no tokenizer; expected a sentencepiece .model or a tokenizer.json")
        return tokenizer

    @classmethod
    def in_directory(cls, path: str | Path) -> Tokenizer | None:
        """The directory's tokenizer, or None if it holds none."""
        found = tokenizer_files.read(Path(path))
        return None if found is None else cls(found[0], str(found[1]))

    def __call__(self, texts: Iterable[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each text, `<s> … </s>`.

        Args:
            texts: a list of strings, or anything that `TextTower.encode` takes; lone surrogates become U+FFFD.
            max_length: keep at most this many ids of a text, `</s>` among them; at least 2.

        Raises:
            ValueError: an entry that is no string (named by its index), or a max_length below 2.
        """
        keep = None if max_length is None else whole_number("max_length", max_length, 2) - 2  # for <s> and </s>
        # One at a time: a batch would start threads, and worker processes already use all cores.
        return [
            [self.bos, *self._encoder.encode(_characters(text), add_special_tokens=False).ids[:keep], self.eos]
            for text in listed(texts)
        ]

    def fits(self, rows: int) -> bool:
        """Whether a word table of so many rows is this tokenizer's; BERT's tables are filled up to a multiple of 8."""
        step = self._built.padded_to
        return rows in (self.vocab_size, -(-self.vocab_size // step) * step)

    def pieces(self) -> list[str]:
        """The piece of each id; `▁` begins a word after a space."""
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
        mask = self._encoder.token_to_id("<mask>")
        if mask is None:
            raise ValueError(
                f"{self._name} has no <mask>; expected XLM-RoBERTa's special tokens (masking knows no other words)"
            )
        return int(mask)

    def save(self, directory: str | Path) -> Path:
        """Writes the files byte for byte under their usual names; returns the path of the vocabulary's."""
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)
        return Path(directory) / next(iter(self._files))

    @property
    def fingerprint(self) -> str:
        """A hash of the pieces in the order of their ids: the same in whatever file a library writes them."""
        return hashlib.sha256("\0".join(self.pieces()).encode()).hexdigest()

    def save_for_others(self, directory: str | Path) -> None:
        """Writes what `save` does, with what other libraries want beside it: tokenizer.json, since they may lack
        sentencepiece, and the names of class and special tokens, without which transformers.js pads with nothing."""
        self.save(directory)
        if self._for_others is None:  # it takes a second, and checkpoints are many
            written = {CONFIG_FILE: json.dumps(self._built.for_others) + "\n"}
            if JSON_FILE not in self._files:
                written[JSON_FILE] = self._encoder.to_str()
            self._for_others = {name: text for name, text in written.items() if name not in self._files}
        for name, text in self._for_others.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")

    def __getstate__(self) -> tuple[dict[str, bytes], str]:
        return self._files, self._name

    def __setstate__(self, state: tuple[dict[str, bytes], str]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _characters(text: str) -> str:
    """Text that UTF-8 can hold: paired surrogates joined, lone ones replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
