"""A directory of ONNX graphs, with the files beside them that transformers.js opens.

    README.md                                  the model card
    config.json                                as jina-clip-v2's, without weights of PyTorch
    preprocessor_config.json, tokenizer*.json  how inputs are made
    onnx/text_model.onnx                       texts alone
    onnx/vision_model.onnx                     images alone
    onnx/model.onnx                            both, with the published signature
    onnx/…_fp16.onnx, …_int8.onnx, …_q4.onnx   the same in fewer bits

Each graph holds its weights, or has them in a file beside it (`….onnx_data`) where they are more than protobuf allows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from text_tower.files import write_json
from vision_tower import VisionTowerConfig
from vision_tower.foreign import processor_values

from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.errors import UserError
from stage_trainer.files import whole_directory
from stage_trainer.formats import jina_clip, jina_clip_v1
from stage_trainer.formats.common import Adapters, check_tokenizer
from stage_trainer.formats.jina_clip_layout import TASK
from stage_trainer.formats.onnx import PRECISIONS, check_installed, smaller
from stage_trainer.formats.onnx.graphs import OUTPUTS, Modules, save, trace
from stage_trainer.formats.onnx.parity import check

FOLDER = "onnx"


def write(
    model: DualEncoder,
    out: str | Path,
    *,
    task: str | None = None,
    precisions: Sequence[str] = tuple(PRECISIONS),
    card: Callable[[Adapters], str],
) -> Adapters:
    """Writes the directory, completely or not at all; each graph has then run in onnxruntime beside the model.

    Args:
        model: is set to inference; a tower is replaced if an adapter is merged into it.
        out: a directory that does not exist.
        task: the adapter that is added to the text tower's weights, which a graph cannot choose; None for the first,
            if there is one; "none" for the bare weights.
        precisions: some of `PRECISIONS`.
        card: gives README.md, from what became of the adapters.

    Raises:
        UserError: `out` exists, a package is missing, there is no such adapter, transformers.js has no word for
            something that the model is, or a graph's vectors are not the model's in the wanted precision.
    """
    check_installed()
    names = model.text.config.adapters
    merged = [name for name in names if task in (None, name)][:1]
    if task not in (None, "none", *names):
        raise UserError(f"there is no adapter {task!r} to merge; the text tower has {', '.join(names) or 'none'}")
    tokenizer = check_tokenizer(model.text)
    if (pad := model.text.config.pad_id) != tokenizer.pad:
        raise UserError(f"the text tower's pad_id is {pad}, and its tokenizer pads with {tokenizer.pad}")
    processor = _processor(model.vision.config)
    if names:
        model.text = model.text.merged(task)
    model.vision = model.vision.merged()
    adapters = Adapters(merged=tuple(merged), left_out=tuple(name for name in names if name not in merged))
    with whole_directory(out) as directory:
        (directory / FOLDER).mkdir()
        beside = _write_graphs(Modules.of(model.text, model.vision), directory / FOLDER, precisions)
        layout = {"rotary": jina_clip, "alibi": jina_clip_v1}[model.text.config.positions]
        config = layout.config_json(model, model.text, merged[0] if merged else TASK, "float32")
        config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(beside, True)}
        write_json(config, directory / "config.json")
        write_json(processor, directory / "preprocessor_config.json")
        jina_clip.write_tokenizer(tokenizer, directory)
        (directory / "README.md").write_text(card(adapters), encoding="utf-8")
    return adapters


def _write_graphs(modules: Modules, folder: Path, precisions: Sequence[str]) -> list[str]:
    """Writes and checks every graph; returns the names of those whose weights stand in a file beside them."""
    beside = []
    for precision, name, graph in _graphs(modules, precisions, folder):
        file = folder / f"{name}{PRECISIONS[precision]}.onnx"
        if save(graph, file):
            beside.append(file.name)
        check(file, modules, name, precision)
    return beside


def _graphs(modules: Modules, precisions: Sequence[str], folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(precision, name, graph), one after another, since each has all weights; `folder` takes what lies between."""
    half = modules.half() if "float16" in precisions else None
    for name in OUTPUTS:
        if {"float32", "int8", "q4"} & {*precisions}:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                graph = trace(modules, name)
                if "float32" in precisions:
                    yield "float32", name, graph
                if {"int8", "q4"} & {*precisions}:
                    source = Path(scratch) / f"{name}.onnx"
                    save(graph, source)
                    if "int8" in precisions:
                        yield "int8", name, smaller.int8(source, Path(scratch))
                    if "q4" in precisions:
                        yield "q4", name, smaller.q4(source)
        if half:
            yield "float16", name, trace(half, name)


def _processor(config: VisionTowerConfig) -> dict[str, Any]:
    """preprocessor_config.json: the published one's keys, or CLIP's for a crop of a larger picture."""
    found = jina_clip.misfits(config)
    for inside in ("rope_theta", "layer_norm_eps"):  # of the graph
        found.pop(inside, None)
    if not found:
        return jina_clip.processor_json(config)
    values = processor_values(config)
    if values is None or config.interpolation not in ("bicubic", "bilinear") or "resolution" in found:
        key, expected = next((key, words) for key, words in found.items() if key != "crop_pct")
        raise UserError(f"the vision tower has {key} {getattr(config, key)}, and transformers.js knows {expected} only")
    return {**values, "processor_class": jina_clip.PROCESSOR}
