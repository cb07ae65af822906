"""`--format onnx`: the model as graphs for ONNX Runtime and transformers.js.

Nothing heavy is imported here: `export` asks for the packages before it loads a model.
"""

from importlib.util import find_spec
from pathlib import Path

from stage_trainer.errors import UserError

PRECISIONS = {"float32": "", "float16": "_fp16", "int8": "_int8", "q4": "_q4"}
"""What the graphs can be written in, and what transformers.js expects of their files' names."""


def check_installed() -> None:
    """UserError that names what is missing and brings it."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "`pip install onnx onnxscript onnxruntime` brings all it needs (the extra [onnx] of stage-trainer)"
        )


def graphs_in(folder: Path) -> list[Path]:
    """The graphs of a directory that this format wrote; none if it holds a model in PyTorch's weights."""
    of_pytorch = [file for name in ("model.safetensors", "pytorch_model.bin", "*/model.safetensors")
                  for file in folder.glob(name)]  # fmt: skip
    return [] if of_pytorch else sorted(folder.glob("onnx/*.onnx"))
