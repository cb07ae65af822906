"""Whether a graph opens in onnxruntime, and gives a model's vectors there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from stage_trainer.formats.onnx.graphs import Modules

FARTHEST = 1e-4
"""Of a float32 graph's vectors, at length one, from torch's: a number of theirs."""
LEAST_COSINE = {"float16": 0.99, "int8": 0.5, "q4": 0.5}
"""To torch's. It is noise that is encoded here, so the bound only tells a model from a broken one; what becomes of
recall has to be measured on data."""


def check_opens(file: Path) -> None:
    """UserError if a graph is damaged, or its weights are not beside it."""
    import onnxruntime

    try:
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{file} does not open in onnxruntime ({said[0][:300]}); export the model again") from error


def check(file: Path, modules: Modules, name: str, precision: str) -> None:
    """Runs a graph with other numbers of texts, tokens and images than it was traced with.

    Raises:
        UserError: its vectors are not those of `modules`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for sizes in ((1, 2, 1), (2, 17, 3)):
        inputs = modules.inputs(name, *sizes)
        with torch.no_grad():
            wanted = modules.named(name)(**inputs)
        found = map(torch.from_numpy, session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()}))
        for (output, vectors), like in zip(zip(_names(session), found, strict=True), wanted, strict=True):
            if problem := _problem(vectors, like, precision) if output.startswith("l2norm") else None:
                others = "leave it out, with --dtype float32" if precision != "float32" else "report this"
                raise UserError(f"{file.name} gives other vectors than the model ({output} {problem}); {others}")


def _names(session: object) -> list[str]:
    return [output.name for output in session.get_outputs()]  # type: ignore[attr-defined]


def _problem(found: Tensor, wanted: Tensor, precision: str) -> str | None:
    """What is wrong with vectors of length one; None if nothing is."""
    if found.shape != wanted.shape:
        return f"has shape {list(found.shape)}, expected {list(wanted.shape)}"
    if not bool(found.isfinite().all()):
        return f"is not finite: {precision} does not hold numbers as large as this model's"
    if precision == "float32":
        farthest = float((found - wanted).abs().max())
        return f"is off by {farthest:.1e}, expected at most {FARTHEST:g}" if farthest > FARTHEST else None
    cosine = float((found * wanted).sum(-1).min())
    bound = LEAST_COSINE[precision]
    return f"has a cosine of {cosine:.3f} to the model's, expected at least {bound}" if cosine < bound else None
