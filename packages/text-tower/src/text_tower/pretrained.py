"""Reading and writing model directories."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_tower.config import TextTowerConfig
from text_tower.lora import add_fresh_adapters, is_adapter
from text_tower.tokenizer import Tokenizer
from text_tower.tower import TextTower

WEIGHTS, UNMERGED, PICKLE = "model.safetensors", "unmerged.safetensors", "pytorch_model.bin"
# Our field -> the name in config.json that transformers knows; the other fields stand under OUR_KEY.
COMMON = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_id": "pad_token_id",
}
OUR_KEY = "trilith"
OURS = ("dropout", "lora_rank", "lora_alpha", "adapters", "instructions", "checkpointing")
OVERRIDES = ("rope_theta", "max_length", *OURS)

NATIVE = "jina_embeddings_v3, as transformers writes it"
XLM_R = "XLM-RoBERTa"
XLM_R_NAMES = (  # in this order: the more special first
    ("embeddings.LayerNorm.", "emb_ln."),
    ("encoder.layer.", "encoder.layers."),
    ("attention.self.", "mixer."),
    ("attention.output.dense.", "mixer.out_proj."),
    ("attention.output.LayerNorm.", "norm1."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("output.LayerNorm.", "norm2."),
)


def read(path: str | Path, **overrides: Any) -> TextTower:
    """Loads a tower, in float32 on the CPU, with its tokenizer if the directory holds one.

    Understands what `save_pretrained` wrote, transformers' own `jina_embeddings_v3` directories, and XLM-RoBERTa ones.

    Args:
        path: directory with config.json and model.safetensors (or pytorch_model.bin, read with `weights_only=True`).
        overrides: fields of `TextTowerConfig` that are not the shape of the base weights: dropout, checkpointing,
            instructions, max_length, lora_rank, lora_alpha, adapters (fresh ones, for a directory that has none), and
            rope_theta for XLM-RoBERTa weights, which know none.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: another kind of model, or weights with missing, unexpected or mis-shaped keys (all are named).
    """
    path = Path(path)
    unknown = set(overrides) - set(OVERRIDES)
    if unknown:
        raise ValueError(f"{sorted(unknown)} cannot be set for weights that exist; what can: {list(OVERRIDES)}")
    try:
        stored = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {path / 'config.json'}; expected a saved model's directory") from error
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not JSON ({error})") from error
    config = _config(stored, path)
    unmerged = bool(config.adapters)
    config = replace(config, **overrides)
    weights, layout = _plain(_load(path, unmerged), path, stored.get("model_type"))
    with torch.device("meta"):
        tower = TextTower(config)
    expected = {name: list(tensor.shape) for name, tensor in tower.state_dict().items()}
    fresh = bool(config.adapters) and not unmerged
    if fresh:
        expected = {name: shape for name, shape in expected.items() if not is_adapter(name)}
    _check_keys(expected, weights, f"{path} (it looks like {layout})")
    # Copies, because what safetensors gives may be a map of the file.
    weights = {name: weights.pop(name).to(torch.float32, copy=True) for name in expected}
    tower.load_state_dict(weights, assign=True, strict=not fresh)
    if fresh:
        add_fresh_adapters(tower)
    if layout == XLM_R:
        warnings.warn(
            f"{path} holds XLM-RoBERTa weights, which were trained with absolute positions; with rotary ones they are "
            "a damaged model until they get masked-language-model training",
            stacklevel=3,
        )
    tower.tokenizer = Tokenizer.in_directory(path)
    return tower


def write(tower: TextTower, path: str | Path, *, merge: bool = False) -> None:
    """Writes a directory that `TextTower.from_pretrained` and transformers' `AutoModel.from_pretrained` both load.

    `model.safetensors` holds plain weights, with the default adapter (the first) added. If there are adapters, base
    weights and adapters also go, apart and exact, into `unmerged.safetensors`, from which our own reader goes on
    training; with `merge=True` that file is left out and the result is a tower without adapters.

    Args:
        path: a directory that does not exist yet, or is empty. It appears whole or not at all.

    Raises:
        FileExistsError: `path` exists and is not empty.
    """
    from safetensors.torch import save_file

    config = tower.config
    unmerged = bool(config.adapters) and not merge
    if not unmerged:
        config = replace(config, lora_rank=0, adapters=())
    with _whole_directory(Path(path)) as directory:
        metadata = {"format": "pt"}
        (directory / "config.json").write_text(json.dumps(_to_json(config, tower), indent=2, ensure_ascii=False) + "\n")
        save_file(_host(tower.merged_state_dict()), directory / WEIGHTS, metadata)
        if unmerged:
            save_file(_host(tower.state_dict()), directory / UNMERGED, metadata)
        if tower.tokenizer is not None:
            tower.tokenizer.save(directory)
            (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}\n')


def _host(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _to_json(config: TextTowerConfig, tower: TextTower) -> dict[str, Any]:
    ours = asdict(config)
    return {
        "architectures": ["JinaEmbeddingsV3Model"],
        "model_type": "jina_embeddings_v3",
        **{theirs: ours[name] for name, theirs in COMMON.items()},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_length + 2,  # theirs counts two positions that XLM-RoBERTa never used
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": str(next(tower.parameters()).dtype).removeprefix("torch."),
        OUR_KEY: {name: ours[name] for name in OURS},
    }


def _config(stored: dict[str, Any], path: Path) -> TextTowerConfig:
    kind = stored.get("model_type")
    if kind not in ("jina_embeddings_v3", "xlm-roberta"):
        raise ValueError(
            f"{path / 'config.json'} has model_type {kind!r}; expected 'jina_embeddings_v3' or 'xlm-roberta'"
        )
    missing = sorted(theirs for theirs in COMMON.values() if theirs not in stored)
    if missing:
        raise ValueError(f"{path / 'config.json'} lacks {missing}")
    rope = stored.get("rope_parameters") or {}
    for key, found, expected in (
        ("hidden_act", stored.get("hidden_act", "gelu"), "gelu"),
        ("type_vocab_size", stored.get("type_vocab_size", 1), 1),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if found != expected:
            raise ValueError(f"{path / 'config.json'} has {key} {found!r}; this tower can only do {expected!r}")
    values = {ours: stored[theirs] for ours, theirs in COMMON.items()}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if "max_position_embeddings" in stored:
        values["max_length"] = stored["max_position_embeddings"] - 2
    values |= stored.get(OUR_KEY, {})
    known = {f.name for f in fields(TextTowerConfig)}
    if not set(values) <= known:
        raise ValueError(f"{path / 'config.json'} has unknown keys {sorted(set(values) - known)} under {OUR_KEY!r}")
    return TextTowerConfig(**values)


def _load(path: Path, unmerged: bool) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / (UNMERGED if unmerged else WEIGHTS)
    if file.is_file():
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file, or is cut short ({error})") from error
    file = path / PICKLE
    if unmerged or not file.is_file():
        expected = UNMERGED if unmerged else f"{WEIGHTS} (or {PICKLE})"
        raise FileNotFoundError(f"{path} holds no weights; expected {expected} beside config.json")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file that is not its own
        raise ValueError(f"{file} is no plain file of tensors, and only those are read ({error})") from error


def _plain(weights: dict[str, Tensor], path: Path, model_type: str | None) -> tuple[dict[str, Tensor], str]:
    """Weights under our names, and the layout that they were in. Heads that this tower does not have are dropped."""
    weights = {name.removeprefix("roberta."): t for name, t in weights.items()}
    weights = {n: t for n, t in weights.items() if not n.startswith(("pooler.", "lm_head.", "classifier."))}
    if any(".parametrizations." in name for name in weights):
        raise ValueError(f"{path} is in jina's remote-code layout (parametrizations); expected {NATIVE}, or {XLM_R}")
    native = any(".mixer." in name for name in weights)
    if native != (model_type == "jina_embeddings_v3"):
        raise ValueError(
            f"{path}: config.json says {model_type!r}, but the weights are named as in {NATIVE if native else XLM_R}; "
            "expected them to agree"
        )
    return (weights, NATIVE) if native else (_from_xlm_r(weights), XLM_R)


def _from_xlm_r(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in weights.items():
        if name.startswith(("embeddings.position_embeddings.", "embeddings.position_ids")):
            continue
        for theirs, ours in XLM_R_NAMES:
            name = name.replace(theirs, ours)
        named[name] = tensor
    for name in [n for n in named if n.endswith(("mixer.query.weight", "mixer.query.bias"))]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[name.replace("query", "Wqkv")] = torch.cat([named.pop(part) for part in parts])
    return named


def _check_keys(expected: dict[str, list[int]], weights: dict[str, Tensor], where: str) -> None:
    shared = expected.keys() & weights.keys()
    wrong = {n: (list(weights[n].shape), expected[n]) for n in shared if list(weights[n].shape) != expected[n]}
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "mis-shaped": [f"{n} {found}, expected {want}" for n, (found, want) in sorted(wrong.items())],
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {kind}: {_capped(names)}" for kind, names in problems.items() if names]
        raise ValueError("\n".join([f"the weights in {where} do not fit its config.json:", *lines]))


def _capped(names: list[str], most: int = 20) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def _whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes its name only once it is complete."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another path, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}.partial")
    building.mkdir()
    try:
        yield building
        building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
