"""Counts tokens, and records the tokenizer's hash, so that a limit can be reproduced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, needs

_FILES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")


class TokenCounter:
    """Counts tokens as training will: a sentencepiece model (`.model`) or a `tokenizer.json`, or a folder with one.

    Attributes:
        path: the file; sha256: its hash, which manifests record.

    Raises:
        UserError: no such file, not a tokenizer, or its library is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in _FILES if (path / name).exists()]
            if not found:
                raise UserError(f"{path} holds no tokenizer; expected one of {', '.join(_FILES)}")
            path = found[0]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a tokenizer") from error
        self.path, self.sha256 = path, hashlib.sha256(data).hexdigest()
        self._json = path.suffix == ".json"
        try:
            if self._json:
                tokenizers = needs("tokenizers", extra="curation", what="reading tokenizer.json")
                self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
                self._tokenizer.no_truncation()
                self._tokenizer.no_padding()
            else:
                sentencepiece = needs("sentencepiece", extra="curation", what="counting tokens")
                self._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=data)
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise UserError(
                f"{path}: not a tokenizer ({error}); give a sentencepiece model or tokenizer.json"
            ) from error

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, `<s>` and `</s>` included."""
        if self._json:
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        return [len(ids) + 2 for ids in self._tokenizer.encode(list(texts))]
