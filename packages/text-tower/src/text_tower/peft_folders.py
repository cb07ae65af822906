"""Adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors, one folder an adapter.

PEFT names modules as transformers' `JinaEmbeddingsV3Model` does, where queries, keys and values are three Linears, and
stores a table's adapter transposed: `lora_embedding_A` `[rank, rows]`, `lora_embedding_B` `[width, rank]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from text_tower.fields import shown
from text_tower.files import is_real, read_json, read_weights, write_json, write_weights
from text_tower.lora import AdaptedEmbedding, AdaptedLinear

if TYPE_CHECKING:
    from text_tower.tower import TextTower

TARGETS = ["word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
_TABLES = ("embeddings.word_embeddings", "embeddings.token_type_embeddings")

# Fields of adapter_config.json that shape the adapter, and are applied:
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Fields without influence: the adapter's origin, its modules (the weights show them), how PEFT trained it.
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
             "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
             "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}  # fmt: skip
# Fields that change what an adapter computes, or its base weights: only the values of plain LoRA are accepted. PiSSA,
# OLoRA, CorDA, LoftQ, LoRA-GA and the like train A and B with changed base weights.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "loftq_config": ({}, None),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "ensure_weight_tying"), (False, None)),
    **{
        name: (None, [], {})
        for name in (
            "modules_to_save", "megatron_config", "trainable_token_indices", "corda_config", "lora_ga_config",
            "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication", "target_parameters",
            "arrow_config", "kasa_config",
        )
    },
}  # fmt: skip


class Adapter(NamedTuple):
    """One adapter: {our module: (A, B)} as in text_tower.lora, and its scale."""

    modules: dict[str, tuple[Tensor, Tensor]]
    scale: float


def save_adapter(tower: TextTower, folder: str | Path, name: str | None = None) -> None:
    """Writes one adapter (None: the first) as a PEFT folder, for transformers' `load_adapter` and for PEFT.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: no such adapter.
    """
    if not tower.config.adapters or tower.config.positions != "rotary":
        raise ValueError("this tower has no adapter to save, or is JinaBERT, which PEFT's folders are not for")
    k = tower.config.adapters.index(name) if name in tower.config.adapters else None if name else 0
    if k is None:
        raise ValueError(f"there is no adapter {name!r}; this tower has {list(tower.config.adapters)}")
    modules = {
        name: (module.adapter(k)[0].detach(), module.adapter(k)[1].detach())
        for name, module in tower.named_modules()
        if isinstance(module, AdaptedLinear | AdaptedEmbedding)
    }
    write_adapter(modules, tower.config.lora_rank, tower.config.lora_alpha, Path(folder))


def write_adapter(modules: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float, folder: Path) -> None:
    """Writes one adapter into a new folder, as PEFT and transformers' `load_adapter` read it."""
    weights: dict[str, Tensor] = {}
    for name, (a, b) in modules.items():
        if name in _TABLES:
            weights |= {
                f"base_model.model.{name}.lora_embedding_A": a.T,
                f"base_model.model.{name}.lora_embedding_B": b.T,
            }
            continue
        theirs = name.removeprefix("encoder.").replace("mixer.out_proj", "self_attn.o_proj")
        parts = ("q_proj", "k_proj", "v_proj") if theirs.endswith("mixer.Wqkv") else ("",)
        for part, rows in zip(parts, b.chunk(len(parts)), strict=True):
            module = "base_model.model." + theirs.replace("mixer.Wqkv", f"self_attn.{part}")
            weights |= {f"{module}.lora_A.weight": a.clone(), f"{module}.lora_B.weight": rows}
    folder.mkdir(parents=True)
    write_weights(weights, folder / "adapter_model.safetensors")
    write_json(
        {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": TARGETS,
            "inference_mode": True,
            "use_dora": False,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "lora_bias": False,
        },
        folder / "adapter_config.json",
    )


def read_adapter(folder: Path, shapes: Mapping[str, list[int]]) -> Adapter:
    """Reads one folder.

    PEFT's separate adapters for queries, keys and values become one of three times the rank: exact, because the parts
    of B that would mix them are zero.

    Args:
        shapes: {our module: shape of its weight}, of every module that can have an adapter.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no plain LoRA, an unknown field, or keys that do not fit (all are named).
    """
    config = read_json(folder / "adapter_config.json")
    _check_config(config, folder / "adapter_config.json")
    standard = _scale(config, config["r"], config["lora_alpha"])
    found = _halves(folder, config, standard, shapes)
    pairs = {
        name: (ab["A"].T, ab["B"].T) if name in _TABLES else (ab["A"], ab["B"])
        for name, ab in found.items()
    }  # fmt: skip
    wrong = []
    for name, (a, b) in pairs.items():
        whole, _, part = name.partition(":")
        rows, columns = shapes[whole]
        expected = [rows // 3 if part else rows, columns]
        if _shape(name, a, b) != expected or (part and whole in pairs):
            wrong.append(f"{name} A {list(a.shape)}, B {list(b.shape)} for a weight {expected}")
    if wrong:
        raise ValueError(f"the adapter in {folder} has {len(wrong)} mis-shaped modules: {'; '.join(wrong)}")
    modules = {name: pair for name, pair in pairs.items() if ":" not in name}
    for name in sorted({name.partition(":")[0] for name in found if ":" in name}):
        modules[name] = _fused([found.get(f"{name}:{part}") for part in "qkv"], shapes[name])
    return Adapter(modules, standard)


def _halves(
    folder: Path, config: Mapping[str, Any], standard: float, shapes: Mapping[str, list[int]]
) -> dict[str, dict[str, Tensor]]:
    """{our module: {"A": …, "B": …}} of a folder's weights; B brings scales to the standard one."""
    found: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in read_weights(folder, "adapter_model", "adapter_model").items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(?:roberta\.)?(.+?)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key
        )
        module = _our_module(match[1]) if match else ""
        if match is None or module.partition(":")[0] not in shapes or match[2] in found.get(module, {}):
            unexpected.append(key)
            continue
        if tensor.dim() != 2 or not is_real(tensor):
            found_there = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{folder}: {key} is {found_there}; expected two dimensions of floating point")
        tensor = tensor.to(torch.float32, copy=True)
        if match[2] == "B":
            theirs = key.removeprefix("base_model.model.").partition(".lora_")[0]
            rank = _of_pattern(config, "rank_pattern", theirs, config["r"])
            if rank != (held := tensor.shape[-1]):
                raise ValueError(f"{folder}: {theirs} has rank {held}, but adapter_config.json says {rank}")
            scale = _scale(config, rank, _of_pattern(config, "alpha_pattern", theirs, config["lora_alpha"]))
            tensor = tensor if scale == standard else tensor * (scale / standard)
        found.setdefault(module, {})[match[2]] = tensor
    unpaired = [f"{module}.lora_{half}" for module, ab in found.items() for half in "AB" if half not in ab]
    if unexpected or unpaired or not found:
        lines = [f"  {len(names)} {kind}: {'; '.join(sorted(names))}"
                 for kind, names in (("unexpected", unexpected), ("missing", unpaired)) if names]  # fmt: skip
        raise ValueError(
            "\n".join([f"the adapter in {folder} (it looks like PEFT's) does not fit this tower:", *lines])
        )
    return found


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """That every field of an adapter_config.json is known and means plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} is of an adapter of type {config.get('peft_type')!r}; expected 'LORA'")
    if missing := sorted({"r", "lora_alpha"} - config.keys()):
        raise ValueError(f"{file} lacks {missing}")
    for field in ("r", "lora_alpha"):
        _check_number(field, config[field], file)
    for field, of in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        _check_pattern(field, config.get(field), of, file)
    if config.get("use_rslora") not in (None, True, False):
        raise ValueError(f"{file} has use_rslora {config['use_rslora']!r}; expected true or false")
    if unknown := sorted(config.keys() - _HONOURED - _HARMLESS - _PLAIN.keys()):
        raise ValueError(
            f"{file} has {', '.join(f'{k} {config[k]!r}' for k in unknown)}, of which this tower does not know what it "
            "means; if the adapter is the same without, remove it from the file"
        )
    variants = {k: config[k] for k, plain in _PLAIN.items() if k in config and config[k] not in plain}
    if variants:
        raise ValueError(
            f"{file} has {', '.join(f'{k} {v!r}' for k, v in variants.items())}; this tower reads plain LoRA, added to "
            "unchanged base weights. Let PEFT merge it (merge_and_unload, then save_pretrained) or convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion, for PiSSA, OLoRA and CorDA)"
        )


def _check_number(field: str, value: Any, file: Path, of: str | None = None) -> None:
    """That a rank (`r`) is a whole number above 0, or an alpha (`lora_alpha`) a number above 0."""
    kinds, words = (int, "a whole number") if (of or field) == "r" else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not 1e-9 <= value <= 1e9:
        raise ValueError(f"{file} has {field} {shown(value)}; expected {words} above 0")


def _check_pattern(field: str, patterns: Any, of: str, file: Path) -> None:
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"{file} has {field} {patterns!r}; expected an object, of patterns of modules' names")
    for pattern, value in (patterns or {}).items():
        # Others' expressions are matched against every name: one that repeats a repetition would take for ever.
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"\)\s*[*+{]", pattern):
            raise ValueError(
                f"{file} has {field} {shown(pattern)}; expected at most 200 characters, at most four of *, + and {{ "
                "among them, and none of these after a group: write out the names"
            )
        try:
            re.compile(_of_end(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{file} has {field} {pattern!r}, which is no regular expression ({error})") from error
        _check_number(f"{field} {pattern!r}:", value, file, of)


def _of_end(pattern: str) -> str:
    """PEFT's regular expression for a pattern, which matches the end of a name."""
    return rf"(.*\.)?({pattern})$"


def _of_pattern(config: Mapping[str, Any], field: str, module: str, otherwise: Any) -> Any:
    """A module's rank or alpha: of the first pattern that matches the end of its name, as in PEFT."""
    patterns = config.get(field) or {}
    return next((v for k, v in patterns.items() if re.match(_of_end(k), module)), otherwise)


def _scale(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def stack(adapters: list[Adapter], shapes: Mapping[str, list[int]]) -> tuple[dict[str, Tensor], int, float]:
    """(our tensors `<module>.lora_A` and `.lora_B`, rank, alpha) of several adapters.

    A tower has one rank and one scale: smaller ranks are padded with zeros, other scales are multiplied into B, and
    modules that an adapter lacks get zeros.
    """
    rank = max(a.shape[1 if name in _TABLES else 0] for adapter in adapters for name, (a, _) in adapter.modules.items())
    scale = adapters[0].scale
    weights: dict[str, Tensor] = {}
    for name, (rows, columns) in shapes.items():
        table = name in _TABLES
        a = _zeros(len(adapters), *((rows, rank) if table else (rank, columns)))
        b = _zeros(len(adapters), *((rank, columns) if table else (rows, rank)))
        for i, adapter in enumerate(adapters):
            if name in adapter.modules:
                part_a, part_b = adapter.modules[name]
                part_b = part_b if adapter.scale == scale else part_b * (adapter.scale / scale)
                a[i, : part_a.shape[0], : part_a.shape[1]] = part_a
                b[i, : part_b.shape[0], : part_b.shape[1]] = part_b
        weights |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    return weights, rank, scale * rank


def _zeros(*shape: int) -> Tensor:
    """As weights are read: float32 on the CPU, whatever PyTorch's defaults are."""
    return torch.zeros(*shape, dtype=torch.float32, device="cpu")


def _our_module(theirs: str) -> str:
    """Our name of a module of theirs; a third of Wqkv is `….Wqkv:q`, `:k` or `:v`."""
    name = re.sub(r"^(?:encoder\.)?layers\.", "encoder.layers.", theirs)
    name = name.replace("self_attn.o_proj", "mixer.out_proj")
    return re.sub(r"self_attn\.([qkv])_proj$", r"mixer.Wqkv:\1", name)


def _fused(parts: list[Any], shape: list[int]) -> tuple[Tensor, Tensor]:
    """One (A, B) for queries, keys and values, of which any may have no adapter."""
    third = shape[0] // 3
    present = [part for part in parts if part]
    if all(torch.equal(part["A"], present[0]["A"]) for part in present):
        a = present[0]["A"]
        return a, torch.cat([part["B"] if part else _zeros(third, len(a)) for part in parts])
    empty = {"A": _zeros(0, shape[1]), "B": _zeros(third, 0)}
    filled = [part or empty for part in parts]
    return torch.cat([part["A"] for part in filled]), cast(Any, torch.block_diag)(*(part["B"] for part in filled))


def _shape(name: str, a: Tensor, b: Tensor) -> list[int] | None:
    """The shape of the weight that A and B adapt; None if they do not fit each other."""
    first, second = (a, b) if name in _TABLES else (b, a)
    return [first.shape[0], second.shape[1]] if first.shape[1] == second.shape[0] else None
