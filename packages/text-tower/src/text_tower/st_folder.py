"""A sentence-transformers directory beside its transformer: pooling, further modules, prompts, lengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from text_tower.config import TextTowerConfig
from text_tower.fields import COUNT, TEXT, TEXT_OF_NAME, field, within
from text_tower.files import read_json, read_json_value, write_json
from text_tower.projector import denses

# In the order in which sentence-transformers looks for them.
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta",
                                                "xlnet")
)  # fmt: skip
_HARMLESS_TRANSFORMER = frozenset({"unpad_inputs"})
_ONLY_TRANSFORMER: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "do_lower_case": (False,),
}
MAX_LENGTH = 512
"""Tokens that sentence-transformers keeps of a text, as `encode` does unless told otherwise."""
_PROMPTS = {"query": "retrieval.query", "document": "retrieval.passage"}
"""The prompts of encode_query and encode_document, and the tasks whose instructions they are."""
_POOLING = frozenset({"embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt"})
_HARMLESS_MODEL = frozenset({"__version__", "model_type", "similarity_fn_name", "requirements"})


class Said(NamedTuple):
    """The settings of such a directory.

    Attributes:
        transformer: the directory of the transformer itself.
        max_length: most tokens of a text; None if not set.
        instructions: {prompt name: prompt}.
        truncate_dim: dims that `encode` keeps by default; None for all.
        is_one: whether the directory is sentence-transformers' at all.
        dense: the folders of its Dense modules (`projector`), in their order.
    """

    transformer: Path
    max_length: int | None = None
    instructions: Mapping[str, str] = {}
    truncate_dim: int | None = None
    is_one: bool = False
    dense: tuple[Path, ...] = ()


def read(path: Path) -> Said:
    """Reads modules.json and what it names.

    Raises:
        FileNotFoundError: a file that modules.json names is missing.
        ValueError: modules or settings with which embeddings are not the mean over tokens that this tower computes.
    """
    if not (path / "modules.json").is_file():
        return Said(path)
    modules = read_json_value(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m for m in modules):
        raise ValueError(f"{path / 'modules.json'} holds no list of modules; expected sentence-transformers'")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    # Jina's own Transformer pools by itself if no Pooling follows.
    custom = bool(modules) and modules[0]["type"] == "custom_st.Transformer"
    expected = ["Transformer"] if custom and "Pooling" not in kinds else ["Transformer", "Pooling"]
    expected += ["Dense"] * min(kinds.count("Dense"), 2)
    rest = kinds[len(expected) :]
    if kinds[: len(expected)] != expected or set(rest) - {"Normalize", "Dropout"}:
        raise ValueError(
            f"{path / 'modules.json'} has the modules {', '.join(kinds) or 'none'}; this tower is Transformer, Pooling "
            "(a mean over tokens) and, if wanted, one or two Dense and Normalize: another module would be left out of "
            "its embeddings"
        )
    if not custom and not all(str(m["type"]).startswith("sentence_transformers.") for m in modules):
        raise ValueError(f"{path / 'modules.json'} names code of its own, {[m['type'] for m in modules]}; expected "
                         "sentence-transformers' modules")  # fmt: skip
    places = [within(path, module.get("path", ""), path / "modules.json") for module in modules]
    dense = tuple(place for place, kind in zip(places, kinds, strict=True) if kind == "Dense")
    transformer = places[0]
    if "Pooling" in kinds:
        _check_pooling(places[1] / "config.json")
    instructions, truncate_dim = _model(path / "config_sentence_transformers.json")
    return Said(transformer, _transformer(transformer), instructions, truncate_dim, True, dense)


def _check_pooling(file: Path) -> None:
    config = read_json(file)
    legacy = {key: value for key, value in config.items() if key.startswith("pooling_mode_")}
    if unknown := sorted(config.keys() - _POOLING - legacy.keys()):
        raise ValueError(f"{file} has unknown keys {unknown}; expected sentence-transformers' Pooling")
    named = [key.removeprefix("pooling_mode_").removesuffix("_tokens") for key, on in legacy.items() if on]
    mode = config.get("pooling_mode", named or "mean")
    if mode not in ("mean", ["mean"]):
        raise ValueError(f"{file} has the pooling mode {mode!r}; this tower takes the mean over all tokens")
    if config.get("include_prompt", True) is not True:
        raise ValueError(f"{file} has include_prompt {config['include_prompt']!r}; this tower takes the mean over all "
                         "tokens, those of the prompt too")  # fmt: skip


def _transformer(directory: Path) -> int | None:
    """max_seq_length in the first settings file that is not empty."""
    files = [file for name in _TRANSFORMER_FILES if (file := directory / name).is_file()]
    file, config = next(((file, config) for file in files if (config := read_json(file))), (directory, {}))
    for key, value in config.items():
        if key == "max_seq_length" or key in _HARMLESS_TRANSFORMER:
            continue
        if value not in (None, {}, [], *_ONLY_TRANSFORMER.get(key, ())):
            raise ValueError(f"{file} has {key} {value!r}, with which texts become others than this tower makes of "
                             "them, or which it does not know; if neither, remove it from the file")  # fmt: skip
    length: int | None = field(config, "max_seq_length", COUNT, file, None)
    if length is not None and length < 2:
        raise ValueError(f"{file} has max_seq_length {length!r}; expected at least 2")
    return length


def _model(file: Path) -> tuple[dict[str, str], int | None]:
    """(prompts, truncate_dim) of config_sentence_transformers.json."""
    if not file.is_file():
        return {}, None
    config = read_json(file)
    known = _HARMLESS_MODEL | {"prompts", "default_prompt_name", "truncate_dim"}
    if unknown := sorted(k for k in config.keys() - known if config[k] not in (None, {}, [])):
        raise ValueError(f"{file} has {', '.join(f'{k} {config[k]!r}' for k in unknown)}, of which this tower does not "
                         "know what it means; if embeddings do not depend on it, remove it from the file")  # fmt: skip
    prompts = field(config, "prompts", TEXT_OF_NAME, file, {})
    default = field(config, "default_prompt_name", TEXT, file, None)
    if default is not None and prompts.get(default, "missing"):
        raise ValueError(
            f"{file} has default_prompt_name {default!r}, a prompt before every text that asks for none; this tower "
            f"puts one only where it is asked for: set it to null, and call encode(task={default!r})"
        )
    return prompts, field(config, "truncate_dim", COUNT, file, None)


def write(config: TextTowerConfig, directory: Path) -> None:
    """Makes a directory of transformers' form, whose weights have the first adapter of `config` merged in, one of
    sentence-transformers too: for `SentenceTransformer(directory)`."""
    products = [dense.folder for dense in denses(config)]  # `projector.write` fills them
    normalize = f"{2 + len(products)}_Normalize"
    kinds = {
        "": "base.modules.transformer.Transformer",
        "1_Pooling": "sentence_transformer.modules.pooling.Pooling",
        **dict.fromkeys(products, "base.modules.dense.Dense"),
        normalize: "base.modules.normalize.Normalize",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(modules, directory / "modules.json")
    write_json(model_settings(config), directory / "config_sentence_transformers.json")
    transformer = {key: values[0] for key, values in _ONLY_TRANSFORMER.items()}
    limit = {"max_seq_length": min(MAX_LENGTH, config.max_length)}
    write_json({**transformer, **limit}, directory / "sentence_bert_config.json")
    for path in ("1_Pooling", normalize):
        (directory / path).mkdir()
    pooling = {"embedding_dimension": config.width, "pooling_mode": "mean", "include_prompt": True}
    write_json(pooling, directory / "1_Pooling" / "config.json")
    one = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    write_json(one, directory / normalize / "config.json")


def model_settings(config: TextTowerConfig) -> dict[str, Any]:
    """config_sentence_transformers.json. Instructions are prompts; those for retrieval have the names under which
    `encode_query` and `encode_document` look for them, too. Those of adapters that are not merged in are left out."""
    config = config.merged(next(iter(config.adapters), None))
    known = {name: config.instructions[task] for name, task in _PROMPTS.items() if task in config.instructions}
    return {
        "model_type": "SentenceTransformer",
        "prompts": {**known, **config.instructions},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "requirements": {"transformers": ">=5.4"},  # the first with jina_embeddings_v3
        **({} if config.truncate_dim is None else {"truncate_dim": config.truncate_dim}),
    }


def without_ours(said: Said, config: TextTowerConfig) -> Said:
    """What such a directory says beyond what `write` wrote of `config`, its config.json's."""
    ours = model_settings(config)["prompts"]
    instructions = {name: text for name, text in said.instructions.items() if ours.get(name) != text}
    length = None if said.max_length == min(MAX_LENGTH, config.max_length) else said.max_length
    return said._replace(instructions=instructions, max_length=length or config.max_length)
