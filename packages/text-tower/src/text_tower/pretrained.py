"""Reading and writing model directories."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from text_tower import config_json, jina_bert, open_clip_folder, peft_folders, projector, st_folder
from text_tower.config import TextTowerConfig
from text_tower.files import (
    check_keys,
    read_json,
    read_shapes,
    read_weights,
    whole_directory,
    write_json,
    write_weights,
)
from text_tower.layouts import Layout
from text_tower.lora import (
    adapter_number,
    add_fresh_adapters,
    is_adapter,
    stacked,
    unstacked,
)
from text_tower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from text_tower.tower import TextTower

UNMERGED = "unmerged"  # .safetensors: base weights and adapters apart
LAYOUTS = ("transformers", "peft", "remote-code")
_WRITTEN_AS = {"rotary": (config_json.to_json, "transformers", "JinaEmbeddingsV3Model"),
               "alibi": (jina_bert.to_json, "jina-bert", "JinaBertModel")}  # fmt: skip
OVERRIDES = ("rope_theta", "max_length", "layer_norm_eps", "pad_id", "attention", "compile", "residual_in_fp32",
             *config_json.OURS, *config_json.PROJECTOR)  # fmt: skip


def load(
    cls: type[TextTower],
    /,
    path: str | Path,
    *,
    peft: str | Path | Mapping[str, str | Path] | None = None,
    **overrides: Any,
) -> TextTower:
    """Reads a tower, on the CPU in float32, with its tokenizer if the directory holds one.

    It reads what `save_pretrained` wrote, transformers' own `jina_embeddings_v3`, XLM-RoBERTa's, jina's remote-code
    layout, jina-embeddings-v2 (JinaBERT), and of jina-clip-v1 and -v2 and open_clip's with such a tower the text half.

    Args:
        path: directory with config.json and model.safetensors (or pytorch_model.bin, read with `weights_only=True`).
        peft: adapters for weights that have none: {name: folder that PEFT wrote}, the first being the default; or one
            folder, whose own name is the adapter's.
        overrides: fields of `TextTowerConfig` that are not the shape of the base weights: dropout, checkpointing,
            attention, compile, residual_in_fp32, instructions, truncate_dim, max_length, layer_norm_eps, pad_id,
            lora_rank, lora_alpha, adapters (some of the directory's, or new ones for a directory that has none),
            projector and projector_hidden (a new one for a directory that has none), and rope_theta for XLM-RoBERTa
            weights, which have none.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: another kind of model, or weights with missing, unexpected or mis-shaped keys (all are named).
    """
    path = Path(path)
    if unknown := set(overrides) - set(OVERRIDES):
        raise ValueError(f"{sorted(unknown)} cannot be set for weights that exist; what can: {list(OVERRIDES)}")
    tower, layout, _ = load_with_head(cls, path, peft, overrides)
    if layout.kind == "xlm-r":
        warnings.warn(
            f"{path} holds XLM-RoBERTa weights, which were trained with absolute positions; with rotary ones they are "
            "a damaged model until they get masked-language-model training (text_tower.MaskedLM)",
            stacklevel=2,
        )
    return tower


def load_with_head(
    cls: type[TextTower],
    path: Path,
    peft: str | Path | Mapping[str, str | Path] | None,
    overrides: dict[str, Any],
) -> tuple[TextTower, Layout, dict[str, Tensor]]:
    """The tower, the layout of its file, and the file's masked-language-model head (`lm_head.…`; empty without one)."""
    found = _Found.of(path, read_weights)
    path, stored, weights, layout, config = found.path, found.stored, found.weights, found.layout, found.config
    peft = {Path(peft).name: peft} if isinstance(peft, str | Path) else peft or {}
    folders = {name: Path(folder) for name, folder in peft.items()}
    ours = config_json.ours_of(stored, path / "config.json")
    head = {name: tensor for name, tensor in weights.items() if name.startswith("lm_head.")}
    weights = layout.without_the_rest(weights)

    if folders and config.adapters:
        raise ValueError(f"{path} has adapters, {list(config.adapters)}; peft= is for weights without any")
    if ours.get("adapters") and not found.unmerged:
        folders = {name: path / name for name in config.adapters}
        if not all((folder / "adapter_config.json").is_file() for folder in folders.values()):
            raise FileNotFoundError(
                f"{path} lacks its adapters; expected {UNMERGED}.safetensors, or a folder for each of {list(folders)}"
            )
    in_file = bool(config.adapters) and not folders
    adapters: dict[str, Tensor] = {}
    if folders:
        adapters, config = _from_folders(cls, folders, config)
    shapes = {name: list(tensor.shape) for name, tensor in stacked(_empty(cls, config).state_dict()).items()}
    shapes = {name: shape for name, shape in shapes.items() if not projector.is_projector(name)}
    expected = {name: shape for name, shape in shapes.items() if in_file or not is_adapter(name)}
    check_keys(layout.expected(expected), weights, f"{path} (it looks like {layout})")
    state = unstacked(layout.to_ours(expected, weights) | adapters)
    wanted = _overridden(config, overrides, path)
    state = _with_adapters_of(wanted, config, state)
    tower = _empty(cls, wanted)
    # Adapters that are neither in the file nor in folders are new, and so is a projector.
    settled = set(wanted.adapters) <= set(config.adapters) and wanted.projector == config.projector
    tower.load_state_dict(state | found.projector, assign=True, strict=settled)
    add_fresh_adapters(tower)
    projector.add_fresh(tower)
    if config.positions == "rotary" and str(stored.get("_name_or_path", "")).startswith("jinaai/"):
        warnings.warn(
            f"{stored['_name_or_path']} is published under CC-BY-NC-4.0: not for commercial use", stacklevel=3
        )
    try:
        tower.tokenizer = found.tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tower, layout, head


def read_config(path: str | Path) -> tuple[TextTowerConfig, frozenset[str]]:
    """The configuration of the tower in a directory, without reading its weights, and the fields that the weights leave
    open: `rope_theta` for XLM-RoBERTa's, which were trained without rotary positions. Errors as `load`."""
    found = _Found.of(Path(path), read_shapes)
    return found.config, frozenset({"rope_theta"} if found.layout.kind == "xlm-r" else ())


@dataclass(frozen=True)
class _Found:
    """The content of a directory: `path` is where the transformer itself is, `unmerged` whether a separate file has
    weights and adapters apart, `config` what all its files say together, and `projector` its weights."""

    path: Path
    stored: dict[str, Any]
    weights: dict[str, Tensor]
    unmerged: bool
    layout: Layout
    config: TextTowerConfig
    tokenizer: Tokenizer | None
    projector: dict[str, Tensor]

    @classmethod
    def of(cls, path: Path, reader: Callable[..., dict[str, Tensor]]) -> _Found:
        directory, said = path, st_folder.read(path)
        path = said.transformer
        open_clip = open_clip_folder.read(path)
        stored = read_json(path / "config.json")
        if (path / "adapter_config.json").is_file():  # transformers would add it to the weights
            raise ValueError(
                f"{path} holds adapter_config.json, an adapter beside the weights that it is for; merge it into them, "
                "or move it and its weights into a folder of their own, and give that as peft="
            )
        ours = config_json.ours_of(stored, path / "config.json")
        unmerged = bool(ours.get("adapters")) and (path / f"{UNMERGED}.safetensors").is_file()
        weights = reader(path, *(open_clip_folder.STEMS if open_clip else [UNMERGED] if unmerged else []))
        layout = Layout.of(weights)
        if open_clip and layout.kind != "open-clip":
            raise ValueError(f"{path} has {layout} as open_clip's text tower; expected {Layout('open-clip')}")
        reads = jina_bert if layout.kind.startswith("jina-bert") else config_json
        config = reads.from_json(stored, weights, layout, path / "config.json")
        tokenizer = Tokenizer.in_directory(path)
        wanted = config_json.tokenizer_of(stored, path / "config.json")
        if tokenizer is not None and wanted is not None and tokenizer.fingerprint != wanted:
            raise ValueError(
                f"{path} has another tokenizer than the one that was saved with its weights; put that back, or, "
                f"if this one is meant, remove {config_json.TOKENIZER_KEY} from config.json"
            )
        if layout.is_half and layout.kind == "remote-code" and not config.adapters:
            layout, weights = layout.without_merged(weights)
        if open_clip:
            config = open_clip.applied(config)
        config, projecting = projector.read(config, directory, said.dense if said.is_one else None, reader)
        said = st_folder.without_ours(said, config) if said.is_one and ours else said
        # A tokenizer's limit is not jina-clip's: its encode_text cuts at 512, whatever the tokenizer says.
        config = _with_what_else_is_said(config, said, None if layout.is_half else tokenizer)
        return cls(path, stored, weights, unmerged, layout, config, tokenizer, projecting)


def _empty(cls: type[TextTower], config: TextTowerConfig) -> TextTower:
    with torch.device("meta"):
        return cls(config)


def _overridden(config: TextTowerConfig, overrides: Mapping[str, Any], path: Path) -> TextTowerConfig:
    """With other settings; the instructions of adapters that are left out go too."""
    if config.adapters and "adapters" in overrides:
        chosen = tuple(overrides["adapters"])
        if strangers := [name for name in chosen if name not in config.adapters]:
            raise ValueError(f"{path} has the adapters {list(config.adapters)}; {strangers} are none of them")
        left_out = set(config.adapters) - set(chosen)
        instructions = {task: text for task, text in config.instructions.items() if task not in left_out}
        overrides = {"instructions": instructions, **overrides, **({} if chosen else {"lora_rank": 0})}
        if (rank := overrides.get("lora_rank", config.lora_rank)) != config.lora_rank and chosen:
            raise ValueError(f"lora_rank is {rank}, but the adapters {list(chosen)} have {config.lora_rank}")
    for name in config_json.PROJECTOR if config.projector else ():
        if overrides.get(name, getattr(config, name)) != getattr(config, name):
            raise ValueError(f"{name} is {overrides[name]}, but {path} has a projector with {getattr(config, name)}")
    return replace(config, **overrides)


def _with_adapters_of(
    wanted: TextTowerConfig, config: TextTowerConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict with the adapters that are wanted, in their new order."""
    numbers = {k: wanted.adapters.index(name) for k, name in enumerate(config.adapters) if name in wanted.adapters}
    result = {}
    for name, tensor in state.items():
        k = adapter_number(name)
        if k is None:
            result[name] = tensor
        elif k in numbers:
            result[f"{name.rpartition('_')[0]}_{numbers[k]}"] = tensor
    return result


def _with_what_else_is_said(
    config: TextTowerConfig, said: st_folder.Said, tokenizer: Tokenizer | None
) -> TextTowerConfig:
    """What a sentence-transformers directory adds to config.json."""
    if not said.is_one:
        return config
    limits = [config.max_length, said.max_length or (tokenizer.model_max_length if tokenizer else None)]
    contradicted = {t: p for t, p in said.instructions.items() if config.instructions.get(t, p) != p}
    if contradicted:
        task, prompt = next(iter(contradicted.items()))
        raise ValueError(
            f"{said.transformer} says that the instruction of {task!r} is {config.instructions[task]!r} in its "
            f"config.json, and {prompt!r} in config_sentence_transformers.json; make them agree"
        )
    if said.truncate_dim is not None and said.truncate_dim > config.output_width:
        raise ValueError(
            f"{said.transformer}: in config_sentence_transformers.json truncate_dim is {said.truncate_dim}; "
            f"expected 1 to {config.output_width}"
        )
    return replace(
        config,
        max_length=min(limit for limit in limits if limit is not None),
        instructions={**config.instructions, **said.instructions},
        truncate_dim=config.truncate_dim if said.truncate_dim is None else said.truncate_dim,
    )


def _from_folders(
    cls: type[TextTower], folders: Mapping[str, Path], config: TextTowerConfig
) -> tuple[dict[str, Tensor], TextTowerConfig]:
    """Adapters from PEFT's folders, and the configuration of a tower that has them."""
    plain = _empty(cls, replace(config, adapters=(), lora_rank=0))
    shapes = {
        name.removesuffix(".weight"): list(p.shape)
        for name, p in plain.named_parameters()
        if name.endswith(".weight") and p.dim() == 2 and not projector.is_projector(name)
    }
    adapters = [peft_folders.read_adapter(folder, shapes) for folder in folders.values()]
    weights, rank, alpha = peft_folders.stack(adapters, shapes)
    if (tuple(folders), rank) == (config.adapters, config.lora_rank):
        return weights, config  # our own folders: config.json has the exact alpha, without a division
    return weights, replace(config, adapters=tuple(folders), lora_rank=rank, lora_alpha=alpha)


def save(tower: TextTower, path: str | Path, *, merge: bool = False, layout: str = "transformers") -> None:
    """Writes a directory that `TextTower.from_pretrained` and others read.

    Args:
        path: a directory that does not exist yet, or is empty. It appears whole or not at all.
        merge: add the default adapter (the first) to the weights for good: what is written has no adapters.
        layout: how adapters are stored, and for whom.

            - "transformers": model.safetensors is what `AutoModel.from_pretrained` loads without remote code, with the
              default adapter added, so that embeddings are the same. If there are adapters, weights and adapters are
              also stored apart and exactly in unmerged.safetensors, from which our own reader continues training. With
              a tokenizer the directory is sentence-transformers' too. AutoModel has a pooler that embeddings do not
              use: it is in the file as zeros, since it would be random else.
            - "peft": model.safetensors is what `AutoModel.from_pretrained` loads, without adapters; each adapter is a
              PEFT folder named after it, for `load_adapter`.
            - "remote-code": jina's own layout, adapters as parametrizations.
            - A JinaBERT tower has the first alone, as jina-embeddings-v2: transformers needs `trust_remote_code=True`.

    Raises:
        FileExistsError: `path` exists and is not empty.
        ValueError: an unknown layout, or one that has no place for what the tower is.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {list(LAYOUTS)}")
    if tower.config.positions != "rotary" and layout != "transformers":
        raise ValueError(f"layout is {layout!r}, and a JinaBERT tower is written as 'transformers' only")
    if tower.config.projector and layout == "remote-code":
        raise ValueError("jina's remote code has no place for a projector; save the tower as 'transformers' or 'peft'")
    save_with_head(tower.merged() if merge else tower, path, layout, {})


def save_with_head(tower: TextTower, path: str | Path, layout: str, head: Mapping[str, Tensor]) -> None:
    """Writes a tower and, if `head` is not empty, a masked-language-model head under transformers' names."""
    config, state, target = tower.config, stacked(projector.without_projector(tower.state_dict())), Path(path)
    dtype = str(next(tower.parameters()).dtype).removeprefix("torch.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another path, or remove it first")
    with whole_directory(target) as directory:
        fingerprint = None
        if tower.tokenizer is not None:
            fingerprint = tower.tokenizer.fingerprint
            tower.tokenizer.save_for_others(directory)
            if layout == "transformers" and not head and config.positions == "rotary":
                st_folder.write(config, directory)
        if layout == "remote-code":
            write_json(config_json.to_remote_json(config, dtype), directory / "config.json")
            weights = Layout("remote-code", "roberta.").from_ours(state)
        else:
            to_json, named, kind = _WRITTEN_AS[config.positions]
            named_for = "JinaEmbeddingsV3ForMaskedLM" if head else kind
            write_json(to_json(config, dtype, named_for, fingerprint), directory / "config.json")
            weights = projector.without_projector(tower.merged_state_dict("none" if layout == "peft" else None))
            if head:
                weights = {**{f"roberta.{name}": tensor for name, tensor in weights.items()}, **head}
            else:  # AutoModel makes a pooler, a random one unless the file has it
                bias = torch.zeros_like(weights["emb_ln.bias"])
                weights |= {"pooler.dense.weight": bias.repeat(config.width, 1), "pooler.dense.bias": bias}
            weights = Layout(named).from_ours(weights)
        write_weights(weights, directory / "model.safetensors")
        projector.write(config, tower.state_dict(), directory)
        if config.adapters and layout == "transformers":
            write_weights(state, directory / f"{UNMERGED}.safetensors")
        if config.adapters and layout == "peft":
            for name in config.adapters:
                peft_folders.save_adapter(tower, directory / name, name)
