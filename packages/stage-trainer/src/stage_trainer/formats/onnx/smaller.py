"""Graphs in 8 and 4 bits, by onnxruntime's own tools, from those in float32."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir


def int8(source: Path, scratch: Path) -> onnx_ir.Model:
    """Weights of products and tables in 8 bits; what they are multiplied with is brought to 8 bits at each run, with
    one range for the whole batch.

    Args:
        source: the graph in float32.
        scratch: a folder for what the tool writes.
    """
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # A range for each column. 7 bits: processors without VNNI add two products in 16 bits, and 8 would overflow them.
    options: dict[str, Any] = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    with _quiet():
        quantize_dynamic(source, scratch / "int8.onnx", use_external_data_format=True, **options)
    found: onnx_ir.Model = onnx_ir.from_proto(onnx.load(scratch / "int8.onnx"))
    return found


def q4(source: Path) -> onnx_ir.Model:
    """Weights of products in 4 bits, 32 of a column with one scale; tables and the rest stay in float32."""
    import onnx
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = ONNXModel(onnx.load(source))
    graph.replace_gemm_with_matmul()  # the next tool knows no other product
    with _quiet():
        quantizer = MatMulNBitsQuantizer(graph.model, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
    found: onnx_ir.Model = onnx_ir.from_proto(quantizer.model.model)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tools say of every product, on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
