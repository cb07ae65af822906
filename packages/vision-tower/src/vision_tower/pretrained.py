"""Reading and writing towers: our directory, which is a timm directory too, timm's models, and others' files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vision_tower.checkpoints import infer_config, read_image_half, to_timm_names
from vision_tower.config import OF_THE_MACHINE, PREPROCESSING, Resolution, VisionTowerConfig, as_pair
from vision_tower.errors import WeightsError
from vision_tower.fields import OBJECT, field, read_json
from vision_tower.files import whole_directory, write_json, write_weights
from vision_tower.foreign import (
    OPEN_CLIP_NAME,
    PROCESSOR_NAME,
    jina_settings,
    open_clip_settings,
    processor_settings,
    processor_values,
    timm_keys,
)
from vision_tower.projector import add_fresh, brought, with_projector, without_projector, write_dense
from vision_tower.timm_models import (
    DIRECTORY_KEYS,
    check_stated,
    config_of,
    directory_config,
    preprocessing_of,
)

if TYPE_CHECKING:
    from vision_tower.tower import VisionTower

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_NAMES = (WEIGHTS_NAME, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OUR_KEY = "trilith"  # of our own fields in config.json, whose other keys are timm's and transformers'
MODEL_TYPE = "trilith_vision_tower"
_FOR_TIMM = ("architecture", "num_classes", "model_args", "pretrained_cfg")


def save(tower: VisionTower, path: str | PathLike[str], *, apart: bool = False) -> None:
    """Writes `config.json`, `preprocessor_config.json` and `model.safetensors` (timm's names, the parameters' dtype)
    into the directory `path`.

    They are on disk before anything in `path` changes: a full disk or a process killed while it writes leaves what was
    there. Other files in `path` stay.

    timm loads it with the same output, preprocessing included: `timm.create_model("local-dir:" + path,
    pretrained=True)`, or from the file `timm.create_model("eva02_large_patch14_clip_224", checkpoint_path=…,
    **tower.config.timm_arguments())`. So do transformers' AutoModel (`pooler_output`) and AutoImageProcessor; see
    `foreign.processor_values` for the images. A `layer_norm_eps` that is not timm's warns, and the directory is then
    for VisionTower alone.

    Args:
        apart: write a projector beside the weights, as sentence-transformers' Dense modules (`1_Dense`, `2_Dense`): the
            others then load the tower without it. Otherwise a directory with a projector is for VisionTower alone.

    Raises:
        FileExistsError: `path` is a file, or, for a projector apart, a directory that is not empty.
    """
    target, config = Path(path), tower.config
    apart = apart and config.projector > 0
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; save_pretrained needs a directory, new or existing")
    if apart and target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; a projector apart needs a new directory")
    timms = config.layer_norm_eps == VisionTowerConfig.layer_norm_eps
    if not timms:
        warnings.warn(
            f"layer_norm_eps is {config.layer_norm_eps:g} and timm always takes "
            f"{VisionTowerConfig.layer_norm_eps:g}: what is saved is for VisionTower alone",
            stacklevel=2,
        )
    # timm has no adapters, for which there is `VisionTower.merged`, and no projector.
    timms = timms and not config.lora_rank and (apart or not config.projector)
    lacking = *(() if config.lora_rank else ("lora",)), *(() if config.projector else ("projector",))
    ours = {k: v for k, v in asdict(config).items() if k not in OF_THE_MACHINE and not k.startswith(lacking)}
    processor = processor_values(config) if timms else None
    content = {"model_type": MODEL_TYPE} if not timms else timm_keys(config, with_processor=processor is not None)
    with whole_directory(target) as directory:
        weights = tower.state_dict()
        if apart:
            write_dense(config, weights, directory)
        write_weights(without_projector(weights) if apart else weights, directory / WEIGHTS_NAME)
        if processor is not None:
            write_json(processor, directory / PROCESSOR_NAME)
        write_json({**content, OUR_KEY: ours}, directory / CONFIG_NAME)
    if processor is None:  # of a tower that stood here before
        (target / PROCESSOR_NAME).unlink(missing_ok=True)


def load(
    cls: type[VisionTower],
    /,
    path: str | PathLike[str],
    *,
    resolution: Resolution | None = None,
    num_classes: int | None = None,
    global_pool: str | None = None,
    **stated: Any,
) -> VisionTower:
    """Reads a tower, on the CPU in float32, from a directory or a file of weights.

    What a directory says of its model and of its images is followed, or refused by name. From a bare file only the
    encoder is taken, without a head.

    Args:
        path: a directory that `save` wrote, or one of timm (config.json with an `architecture`), of jina-clip-v2 (only
            its image half is read) or of open_clip; or a file: EVA-CLIP's `.pt` of CLIP or of masked-image training, an
            open_clip checkpoint of EVA02, safetensors of any of these.
        resolution: set after loading, as `set_resolution` does.
        num_classes: 0 takes a model with a head without its head.
        global_pool: "token" takes the class token, with the final norm, of a model that averages its patches.
        stated: `checkpointing`, `attention`, `compile` and `residual_in_fp32`; for files that do not say them `heads`,
            `reference_grid`, `rope_theta` and `layer_norm_eps`; and `mean`, `std`, `crop_pct`, `crop_mode` and
            `interpolation` to override a directory's. See `VisionTowerConfig`.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: a configuration that is not of an EVA02 tower.
        WeightsError: weights that cannot be read safely or do not fit.
    """
    check_stated(num_classes, global_pool)
    stated = {k: v for k, v in stated.items() if v is not None or k not in ("checkpointing", "attention")}
    source, values = find(Path(path))
    in_directory = source != Path(path)
    processor = processor_settings(source.parent, crop_mode=stated.get("crop_mode")) if in_directory else {}
    config = _stated_config(source, values, stated, in_directory, num_classes, global_pool)
    weights = read_image_half(source)
    if config is None:
        config = _inferred_config(source, values, weights, {"resolution": resolution, **processor}, stated)
    _check_agreement(config, processor, stated, source.with_name(PROCESSOR_NAME))
    if "fc_norm.weight" in weights and "architecture" not in values and global_pool != "token":
        raise WeightsError(
            f"{source} has fc_norm, the norm of a model that averages its patches, and a VisionTower gives the class "
            "token; state global_pool='token' to take its weights all the same, to train on"
        )
    said = values.get(OUR_KEY, values)
    if isinstance(said, dict) and said.get("projector"):  # or folders of one would be another tower's
        weights = with_projector(config, weights, source)
    tower = _with_weights(cls, config, to_timm_names(weights), str(source))
    return tower if resolution is None else tower.set_resolution(resolution)


def _stated_config(
    source: Path,
    values: Mapping[str, Any],
    stated: Mapping[str, Any],
    in_directory: bool,
    num_classes: int | None,
    global_pool: str | None,
) -> VisionTowerConfig | None:
    """The configuration in a directory's JSON files; None if it is to be inferred from the weights."""
    file = source.with_name(CONFIG_NAME)
    open_clip = source.with_name(OPEN_CLIP_NAME)
    if in_directory and open_clip.is_file() and (not values or source.name.startswith("open_clip_")):
        found = open_clip_settings(read_json(open_clip), open_clip, values, num_classes=num_classes)
        return VisionTowerConfig.from_dict({**found, **stated})
    if OUR_KEY in values or values.get("model_type") == MODEL_TYPE:
        return _own_config(values, file, stated)
    if "architecture" in values:
        return directory_config(values, file, num_classes=num_classes, global_pool=global_pool).changed(stated)
    if values.get("model_type") not in (None, "jina_clip"):
        raise ValueError(
            f"{file} describes a {values['model_type']!r}; expected {MODEL_TYPE!r}, "
            "'jina_clip', or timm's architecture. To infer the shape all the same, name the file of weights itself"
        )
    return None


def _inferred_config(
    source: Path,
    values: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Any],
    stated: Mapping[str, Any],
) -> VisionTowerConfig:
    """The configuration of a bare file, or of a jina-clip directory, whose config.json says only part of it.
    `wanted` gives way to config.json, and that to `stated`."""
    known = jina_settings(values, source.with_name(CONFIG_NAME))
    config = infer_config(weights, str(source), **{**wanted, **known, **stated})
    if config.resolution != known.get("resolution", config.resolution):
        raise WeightsError(
            f"{source} has positions for {config.grid[0]}x{config.grid[1]} patches of {config.patch}, and its "
            f"{CONFIG_NAME} an image_size of {known['resolution']}; correct that, and give resolution= to change it"
        )
    return config


def _check_agreement(
    config: VisionTowerConfig, others: Mapping[str, Any], stated: Mapping[str, Any], source: Path
) -> None:
    """That two files of one directory do not contradict each other."""
    if not others:
        return
    try:
        ours, theirs = asdict(config), asdict(config.changed(others))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for key in others:
        # A crop_pct matters only by the size that it gives with the resolution.
        same = ours[key] == theirs[key] or (
            key == "crop_pct" and _whole_sides(config, ours) == _whole_sides(config, theirs)
        )
        if key not in stated and not same:
            raise ValueError(
                f"{source}: {key} is {theirs[key]!r}, and the tower's {ours[key]!r}; make them agree"
                + (f", or state {key}=" if key != "resolution" else ", and give resolution= to change it after loading")
            )


def _whole_sides(config: VisionTowerConfig, values: Mapping[str, Any]) -> list[int]:
    """The size to which `preprocess` resizes an image before it cuts out the centre."""
    return [math.floor(side / values["crop_pct"]) for side in as_pair(config.resolution)]


def find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and the content of config.json beside it; {} if there is none or `path` is a file."""
    if path.is_file():
        return path, {}
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; expected a directory or a file of weights (for timm's names use "
            "VisionTower.from_timm)"
        )
    config = path / CONFIG_NAME
    values = read_json(config) if config.is_file() else {}
    for name in WEIGHTS_NAMES:
        if (path / name).is_file():
            return path / name, values
    raise FileNotFoundError(
        f"{path} has none of {', '.join(WEIGHTS_NAMES)}; expected a directory written by VisionTower.save_pretrained, "
        "or one of timm or jina-clip-v2"
    )


def _own_config(values: Mapping[str, Any], source: Path, stated: Mapping[str, Any]) -> VisionTowerConfig:
    ours = field(values, OUR_KEY, OBJECT, source, None)
    if ours is None:  # Older directories have our fields at the top, and `mlp_width` under the name of `hidden`.
        renamed = {"mlp_width" if key == "hidden" else key: value for key, value in values.items()}
        ours = {key: value for key, value in renamed.items() if key not in ("model_type", *_FOR_TIMM)}
    elif unknown := sorted(key for key in values.keys() - {OUR_KEY} - DIRECTORY_KEYS if values[key] is not None):
        raise ValueError(f"{source}: {', '.join(unknown)} is not known here; remove what has no bearing on the model")
    try:
        config = VisionTowerConfig.from_dict(ours)
        for_timm = field(values, "pretrained_cfg", OBJECT, source, {})
        both = {key: for_timm[key] for key in PREPROCESSING if key in for_timm}
        _check_agreement(config, both, stated, source.with_name(f"{CONFIG_NAME}, pretrained_cfg"))
        return config.changed(stated)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def from_timm(cls: type[VisionTower], /, name: str, **options: Any) -> VisionTower:
    """A tower with the shape, preprocessing and weights of `timm.create_model(name, num_classes=0, **options)`, on the
    CPU in float32.

    Args:
        name: an EVA02 model of B or L size, of CLIP or of MIM training. MIM models average patches:
            `global_pool="token"` takes their weights and final norm for a tower of the class token.
        options: timm's. `pretrained=True` downloads its weights; `img_size` then changes the resolution after loading,
            with EVA's resampling rather than timm's.

    Raises:
        ValueError: any other model.
    """
    import timm

    resolution = options.pop("img_size", None) if options.get("pretrained") else None
    # A MIM model has the norm of its average: it is built that way, and then read for the class token.
    global_pool = options.pop("global_pool") if options.get("global_pool") == "token" else None
    try:
        with _float32_on_the_cpu():
            model = timm.create_model(name, **{"num_classes": 0, **options})
    except RuntimeError as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise
        raise ValueError(
            f"timm knows no {name!r} ({error}); timm.list_models('eva02*', pretrained=True) lists those that fit"
        ) from error
    config = config_of(model, name, options, num_classes=None, global_pool=global_pool)
    config = config.changed(preprocessing_of(model))
    tower = _with_weights(cls, config, to_timm_names(model.state_dict()), f"timm's {name}")
    return tower if resolution is None else tower.set_resolution(resolution)


@contextmanager
def _float32_on_the_cpu() -> Iterator[None]:
    """Whatever PyTorch's defaults are: another default dtype would round weights on creation."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


def _with_weights(
    cls: type[VisionTower], config: VisionTowerConfig, weights: Mapping[str, Tensor], source: str
) -> VisionTower:
    """Builds the tower around the weights: none is initialised first, or held twice."""
    with torch.device("meta"):
        tower = cls(config)
    expected = brought(tower, weights)
    shapes = {key: (list(weights[key].shape), list(expected[key].shape)) for key in expected.keys() & weights.keys()}
    wrong = {f"{key} {found} where {wanted} is needed" for key, (found, wanted) in shapes.items() if found != wanted}
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    odd = {f"{key} {value.dtype}" for key, value in weights.items() if not value.is_floating_point()}
    problems = [
        f"{kind}: {', '.join(sorted(keys)[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        for kind, keys in (
            ("missing", missing),
            ("not known", unknown),
            ("of another shape", wrong),
            ("of numbers that are no weights", odd),
        )
        if keys
    ]
    if problems:
        height, width = config.grid
        raise WeightsError(
            f"{source} does not fit a tower of width {config.width}, {config.layers} layers, patch {config.patch} and "
            f"a {height}x{width} grid. {'; '.join(problems)}. Use the config.json that was written with these weights"
        )
    # Copies: the tensors of a file may be mapped from it.
    copies = {key: weights[key].to(torch.float32, copy=True) for key in expected}
    tower.load_state_dict(copies, strict=False, assign=True)  # what may be missing is added new
    add_fresh(tower)
    return tower
