"""Models of the Hugging Face hub as local directories."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stage_trainer.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""Of a repository, OWNER/MODEL."""
_FILES = ["*.json", "*.safetensors", "*.model"]
_OTHER_FORMS = ["onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*"]  # of the same weights, each as large


def is_name(path: str | Path) -> bool:
    """Whether it is the name of a repository rather than of something on this machine."""
    return isinstance(path, str) and NAME.fullmatch(path) is not None and not Path(path).exists()


def local(name: str | Path) -> Path:
    """A directory or file on this machine itself, or else the downloaded directory of a repository of the hub: its
    weights and JSON files, nothing that runs. What was downloaded before is not asked for again without network.

    Raises:
        UserError: there is neither.
    """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=_FILES, ignore_patterns=_OTHER_FORMS))
        if older := [*_older_forms(folder)]:
            folder = Path(snapshot_download(str(name), allow_patterns=[*_FILES, *older], ignore_patterns=_OTHER_FORMS))
    except (OSError, ValueError) as error:  # the hub's own, and those of a name that none can have
        raise UserError(
            f"there is no {name} here, and the Hugging Face hub did not give it ({_first_line(error)}). Where there is "
            f"network, fetch it with `hf download {name} --local-dir FOLDER`, and name FOLDER instead"
        ) from error
    return folder


def _older_forms(folder: Path) -> Iterator[str]:
    """Patterns of weights in PyTorch's own format: of the model, and of sentence-transformers' Dense modules beside it,
    wherever there are no others."""
    if all(path.parent.name.endswith("_Dense") for path in folder.rglob("*.safetensors")):
        yield "*.bin"
    for dense in folder.glob("*_Dense"):
        if not any(dense.glob("*.safetensors")):
            yield f"{dense.name}/*.bin"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
