"""The towers as ONNX graphs: traced by torch.export with any number of texts, tokens and images."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from text_tower import TextTower
from text_tower.padded import PaddedTower
from torch import Tensor, nn
from vision_tower import VisionTower
from vision_tower.config import as_pair

if TYPE_CHECKING:
    import onnx_ir

TEXT, VISION, BOTH = "text_model", "vision_model", "model"
IDS, PIXELS = "input_ids", "pixel_values"
OUTPUTS = {
    TEXT: ("text_embeddings", "l2norm_text_embeddings"),
    VISION: ("image_embeddings", "l2norm_image_embeddings"),
    BOTH: ("text_embeddings", "image_embeddings", "l2norm_text_embeddings", "l2norm_image_embeddings"),
}
"""Of each graph, in their order: the published model.onnx has those of `BOTH`."""
_DYNAMIC = {IDS: {0: "texts", 1: "tokens"}, PIXELS: {0: "images"}}
MOST_BYTES = 2**31 - 2**26
"""Of weights within a graph's file, which protobuf limits to 2 GiB; more stand in a file beside it."""


class TextGraph(nn.Module):
    """`input_ids` int64 `[N, L]` -> float32 `[N, width]`, and the same at length one (zeros for padding alone)."""

    def __init__(self, tower: PaddedTower):
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        raw: Tensor = self.tower(input_ids)
        return raw, F.normalize(raw, dim=-1)


class VisionGraph(nn.Module):
    """`pixel_values` float32 `[N, 3, H, W]` -> float32 `[N, width]`, and the same at length one."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixel_values.to(self.tower.pos_embed.dtype)
        raw: Tensor = self.tower(pixels, attend=F.scaled_dot_product_attention)
        return raw, F.normalize(raw, dim=-1)


class BothGraph(nn.Module):
    """The published signature: both halves in one graph, which do not depend on each other."""

    def __init__(self, text: TextGraph, vision: VisionGraph):
        super().__init__()
        self.text, self.vision = text, vision

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        text, image = self.text(input_ids), self.vision(pixel_values)
        return text[0], image[0], text[1], image[1]


class _Alone(nn.Linear):
    """A Linear of which the vision tower takes the product by itself. In 16 bits it joins the weights of some for the
    call (`vision_tower.blocks.products`), which a graph would do at every run."""


class Modules(NamedTuple):
    """What the graphs are traced from."""

    text: TextGraph
    vision: VisionGraph

    @classmethod
    def of(cls, text: TextTower, vision: VisionTower) -> Modules:
        """Of towers on the CPU, which are set to inference; a compiled block could not be traced."""
        text.configure(compile=False)
        vision.configure(compile=False)
        return cls(TextGraph(text.padded()), VisionGraph(vision.eval()))

    def half(self) -> Modules:
        """Copies with weights in float16, as the towers compute with such: angles, LayerNorm and means in float32."""
        text, vision = copy.deepcopy(self.text).half(), copy.deepcopy(self.vision).half()
        for module in vision.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Alone
        return Modules(text, vision)

    def named(self, name: str) -> nn.Module:
        """The module of one of `OUTPUTS`."""
        return {TEXT: self.text, VISION: self.vision}.get(name) or BothGraph(self.text, self.vision)

    def inputs(self, name: str, texts: int, tokens: int, images: int) -> dict[str, Tensor]:
        """Inputs of a graph of that name; every text but the first ends in padding, if there is room."""
        draw = torch.Generator().manual_seed(0)
        found = {}
        if name != VISION:
            config = self.text.tower.config
            ids = torch.randint(4, max(5, config.vocab_size), (texts, tokens), generator=draw)
            found[IDS] = ids % config.vocab_size
            found[IDS][1:, max(1, tokens // 2) :] = config.pad_id
        if name != TEXT:
            found[PIXELS] = torch.randn(images, 3, *as_pair(self.vision.tower.config.resolution), generator=draw)
        return found


def trace(modules: Modules, name: str) -> onnx_ir.Model:
    """One of `OUTPUTS` as a graph; its weights are the modules', not copies."""
    import onnx_ir.passes.common

    inputs = modules.inputs(name, texts=3, tokens=7, images=2)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            modules.named(name),
            kwargs=inputs,
            dynamic_shapes={key: _DYNAMIC[key] for key in inputs},
            output_names=OUTPUTS[name],
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # as it would be for the exporter without dynamo
    # What the exporter notes of each node has paths of this machine, and outweighs the graph.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return program.model


def save(graph: onnx_ir.Model, file: Path) -> bool:
    """Writes a graph, and says whether its weights stand in `file`_data, since they are too many for one file."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    beside = size > MOST_BYTES
    onnx_ir.save(graph, file, external_data=f"{file.name}_data" if beside else None)
    return beside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision and of opset versions, which no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
