"""Reading and writing towers: our directory, which is a timm directory too, timm's own models, and foreign files."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import infer_config, read_image_half, to_timm_names
from .config import Resolution, VisionTowerConfig, as_pair
from .errors import WeightsError
from .foreign import OPEN_CLIP_NAME, PROCESSOR_NAME, jina_settings, open_clip_settings, processor_settings, read_json
from .timm_models import TIMM_ENTRY, check_stated, config_of, directory_config

if TYPE_CHECKING:
    from .tower import VisionTower

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_NAMES = (WEIGHTS_NAME, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_TYPE = "trilith_vision_tower"
_PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
_FOR_TIMM = ("architecture", "num_classes", "model_args", "pretrained_cfg")


def save(tower: VisionTower, path: str | PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors` (timm's names, the parameters' dtype) into the directory `path`.

    Both files are complete on disk in a temporary directory beside `path` before anything there changes: a full disk or
    a process killed while it writes leaves what was there. Other files in `path` stay.

    timm loads it with the same output, preprocessing included: `timm.create_model("local-dir:" + path,
    pretrained=True)`, or from the file `timm.create_model("eva02_large_patch14_clip_224", checkpoint_path=…,
    **tower.config.timm_arguments())`. (But for a `layer_norm_eps` that is not timm's, of which it warns: such a
    directory does not say that it is timm's.)
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; save_pretrained needs a directory, new or existing")
    timms = tower.config.layer_norm_eps == VisionTowerConfig.layer_norm_eps
    if not timms:
        warnings.warn(
            f"layer_norm_eps is {tower.config.layer_norm_eps:g} and timm always takes "
            f"{VisionTowerConfig.layer_norm_eps:g}: what is saved is for VisionTower alone",
            stacklevel=3,
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # for its owner alone
    try:
        staging = scratch / target.name
        staging.mkdir()  # and this as the umask wants it
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
        (staging / WEIGHTS_NAME).touch()
        mode = (staging / WEIGHTS_NAME).stat().st_mode
        save_file(weights, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        (staging / WEIGHTS_NAME).chmod(mode)  # safetensors makes files that their owner alone may read
        config = {"model_type": MODEL_TYPE, **asdict(tower.config), **(_for_timm(tower.config) if timms else {})}
        del config["attention"]  # the machine's, not the weights'
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with (staging / name).open("rb+") as file:
                os.fsync(file.fileno())
        if target.exists():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (staging / name).replace(target / name)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _for_timm(config: VisionTowerConfig) -> dict[str, Any]:
    """What timm reads of a config.json."""
    arguments = config.timm_arguments()
    return {
        "architecture": TIMM_ENTRY,
        "num_classes": arguments.pop("num_classes"),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, *as_pair(config.resolution)],
            **{name: getattr(config, name) for name in _PREPROCESSING},
            "num_classes": 0,
        },
    }


def load(
    path: str | PathLike[str],
    *,
    resolution: Resolution | None = None,
    checkpointing: bool | None = None,
    attention: str | None = None,
    num_classes: int | None = None,
    global_pool: str | None = None,
    **stated: Any,
) -> VisionTower:
    """A tower on the CPU, in float32, from a directory or a file of weights.

    path           a directory that `save` wrote, one of timm (config.json with an `architecture`), of jina-clip-v2
                   (whose image half alone is read) or of open_clip, or a file: EVA-CLIP's `.pt` of CLIP or of
                   masked-image training, an open_clip checkpoint of EVA02, safetensors of any of these
    resolution     to be set after loading, as `set_resolution` does
    checkpointing, attention  see `VisionTowerConfig`; None keeps what was saved, or the default
    num_classes    0 takes a model whose configuration says that it has a head, without that head
    global_pool    "token" takes the class token of a model that averages its patches, with its final norm
    stated         settings that a foreign file does not tell, if they are not EVA's usual ones: `heads`,
                   `reference_grid`, `rope_theta`, `layer_norm_eps` (`checkpoints.infer_config`); and what is wanted
                   otherwise than a directory says: `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`

    What a directory says of its model and of its images is followed, or refused by name. Of a bare file the encoder
    alone is taken, without a head. Raises FileNotFoundError for a missing file, ValueError for a configuration that is
    not of an EVA02 tower, and WeightsError for weights that cannot be read safely or do not fit.
    """
    check_stated(num_classes, global_pool)
    stated |= {k: v for k, v in {"checkpointing": checkpointing, "attention": attention}.items() if v is not None}
    source, values = _find(Path(path))
    config_file = source.with_name(CONFIG_NAME)
    in_directory = source != Path(path)
    processor = processor_settings(source.parent, crop_mode=stated.get("crop_mode")) if in_directory else {}
    timms = global_pool
    if values.get("model_type") == MODEL_TYPE:
        config, weights = _own_config(values, config_file, stated), read_image_half(source)
    elif "architecture" in values:
        config = directory_config(values, config_file, num_classes=num_classes, global_pool=global_pool)
        config, weights, timms = _with(config, stated), read_image_half(source), "token"  # its norm has been looked at
    elif not values and in_directory and (open_clip := source.with_name(OPEN_CLIP_NAME)).is_file():
        found = open_clip_settings(read_json(open_clip), open_clip, num_classes=num_classes)
        config, weights = VisionTowerConfig.from_dict({**found, **stated}), read_image_half(source)
    elif values.get("model_type") in (None, "jina_clip"):
        weights = read_image_half(source)
        known = jina_settings(values, config_file)
        settings = {"resolution": resolution, **processor, **known, **stated}
        config = infer_config(weights, str(source), **settings)
        if config.resolution != known.get("resolution", config.resolution):
            raise WeightsError(
                f"{source} has positions for {config.grid[0]}x{config.grid[1]} patches of {config.patch}, and its "
                f"{CONFIG_NAME} an image_size of {known['resolution']}; correct that, and give resolution= to change it"
            )
    else:
        raise ValueError(
            f"{config_file} describes a {values['model_type']!r}; expected {MODEL_TYPE!r}, "
            "'jina_clip', or timm's architecture. To infer the shape all the same, name the file of weights itself"
        )
    _check_agreement(config, processor, stated, source.with_name(PROCESSOR_NAME))
    if "fc_norm.weight" in weights and timms != "token":
        raise WeightsError(
            f"{source} has fc_norm, the norm of a model that averages its patches, and a VisionTower gives the class "
            "token; state global_pool='token' to take its weights all the same, to train on"
        )
    tower = _with_weights(config, to_timm_names(weights), str(source))
    return tower if resolution is None else tower.set_resolution(resolution)


def _with(config: VisionTowerConfig, stated: Mapping[str, Any]) -> VisionTowerConfig:
    return VisionTowerConfig.from_dict({**asdict(config), **stated})


def _check_agreement(
    config: VisionTowerConfig, others: Mapping[str, Any], stated: Mapping[str, Any], source: Path
) -> None:
    """Two files of one directory that say different things leave it open which of them is meant."""
    if not others:
        return
    ours, theirs = asdict(config), asdict(_with(config, others))
    for key in others:
        # What a crop_pct makes of the resolution is all that it does.
        same = ours[key] == theirs[key] or (
            key == "crop_pct" and _whole_sides(config, ours) == _whole_sides(config, theirs)
        )
        if key not in stated and not same:
            raise ValueError(
                f"{source}: {key} is {theirs[key]!r}, and the tower's {ours[key]!r}; make them agree"
                + (f", or state {key}=" if key != "resolution" else ", and give resolution= to change it after loading")
            )


def _whole_sides(config: VisionTowerConfig, values: Mapping[str, Any]) -> list[int]:
    """The size to which `preprocess` brings an image before it cuts out the centre."""
    return [math.floor(side / values["crop_pct"]) for side in as_pair(config.resolution)]


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and the config.json beside it ({} for none, or for a file that was named itself)."""
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


def _own_config(values: dict[str, Any], source: Path, stated: dict[str, Any]) -> VisionTowerConfig:
    ours = {key: value for key, value in values.items() if key not in ("model_type", *_FOR_TIMM)}
    try:
        config = VisionTowerConfig.from_dict(ours)
        for_timm = values.get("pretrained_cfg") or {}
        both = {key: for_timm[key] for key in _PREPROCESSING if key in for_timm}
        _check_agreement(config, both, stated, source.with_name(f"{CONFIG_NAME}, pretrained_cfg"))
        return _with(config, stated)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def from_timm(name: str, **options: Any) -> VisionTower:
    """A tower with the shape, preprocessing and weights of `timm.create_model(name, num_classes=0, **options)`, in
    float32 on the CPU.

    `pretrained=True` downloads timm's weights; `img_size` then changes the resolution after loading, with EVA's
    resampling rather than timm's. EVA02 models of B and L size, of CLIP and of MIM training. A MIM model averages
    patches: `global_pool="token"` takes its weights for a tower of the class token, with its final norm. Raises
    ValueError for anything else.
    """
    import timm
    from timm.data import resolve_data_config

    resolution = options.pop("img_size", None) if options.get("pretrained") else None
    # The norm of a MIM model's weights is that of its average: it is made as it is, and then read for the class token.
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
    data = resolve_data_config({}, model=model)
    config = config_of(model, name, options, num_classes=None, global_pool=global_pool)
    config = _with(config, {key: data[key] for key in _PREPROCESSING})
    tower = _with_weights(config, to_timm_names(model.state_dict()), f"timm's {name}")
    return tower if resolution is None else tower.set_resolution(resolution)


@contextmanager
def _float32_on_the_cpu() -> Iterator[None]:
    """Whatever PyTorch's defaults are: a default dtype would round weights as they are made."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


def _with_weights(config: VisionTowerConfig, weights: Mapping[str, Tensor], source: str) -> VisionTower:
    """Builds the tower around the weights, so that they are neither initialised first nor held twice."""
    from .tower import VisionTower

    with torch.device("meta"):
        tower = VisionTower(config)
    expected = tower.state_dict()
    problems = [
        (f"{kind}: {', '.join(sorted(keys)[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
        for kind, keys in (
            ("missing", expected.keys() - weights.keys()),
            ("not known", weights.keys() - expected.keys()),
            (
                "of another shape",
                {
                    f"{key} {list(weights[key].shape)} where {list(expected[key].shape)} is needed"
                    for key in expected.keys() & weights.keys()
                    if weights[key].shape != expected[key].shape
                },
            ),
        )
        if keys
    ]
    if problems:
        height, width = config.grid
        raise WeightsError(
            f"{source} does not fit a tower of width {config.width}, {config.layers} layers, patch {config.patch} and "
            f"a {height}x{width} grid. {'; '.join(problems)}. Use the config.json that was written with these weights"
        )
    # Copies, because what a file gives may be a map of it.
    tower.load_state_dict({key: weights[key].to(torch.float32, copy=True) for key in expected}, assign=True)
    return tower
