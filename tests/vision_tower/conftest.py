"""Small towers, the timm models that they are held against, and images of every awkward kind."""

import functools
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from vision_tower import VisionTower, VisionTowerConfig


@pytest.fixture
def config() -> VisionTowerConfig:
    return VisionTowerConfig(resolution=48, patch=8, width=64, layers=3, heads=2)


@pytest.fixture
def make_tower() -> Callable[[VisionTowerConfig], VisionTower]:
    def make(config: VisionTowerConfig) -> VisionTower:
        """A tower in which every parameter matters: no bias is 0, no norm the identity."""
        generator = torch.Generator().manual_seed(7)
        tower = VisionTower(config)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise)
        return tower

    return make


@pytest.fixture
def tower(config, make_tower) -> VisionTower:
    return make_tower(config)


@pytest.fixture
def make_timm() -> Callable[[VisionTower], nn.Module]:
    def make(tower: VisionTower) -> nn.Module:
        """timm's own model of the same shape, with the tower's weights under the tower's names."""
        import timm

        model = timm.create_model("eva02_large_patch14_clip_224", **tower.config.timm_arguments())
        model.load_state_dict(tower.state_dict())
        return model

    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    def encode(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def photo() -> Image.Image:
    """Smooth colours with an edge, 90 x 60, so that a lossy or a resized copy stays comparable."""
    rows, columns = np.mgrid[0:60, 0:90]
    pixels = np.stack([rows * 4, columns * 2, 255 * (columns > rows)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def png_header() -> Callable[[int, int], bytes]:
    def header(width: int, height: int) -> bytes:
        """A PNG that states its size and holds no pixels: decoding it fails, reading its header does not."""

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    return header


@pytest.fixture
def noise_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 70, 3), dtype=np.uint8))


@pytest.fixture
def small_timm() -> tuple[str, dict[str, int]]:
    """An entry of timm's, and what makes a small model of it."""
    return "eva02_base_patch16_clip_224", {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2
    }  # fmt: skip


@pytest.fixture
def write_timm(tmp_path, small_timm) -> Callable[..., Path]:
    def write(
        model_args: dict[str, Any] | None = None, pretrained_cfg: dict[str, Any] | None = None, **top: Any
    ) -> Path:
        """A directory as timm's own `save_for_hf` writes it, with weights that it loads, and with changes."""
        import timm
        from timm.models import save_for_hf

        name, small = small_timm
        arguments = {**small, **(model_args or {})}
        known = {key: value for key, value in arguments.items() if value is not None}
        model = timm.create_model(name, **{"num_classes": 0, **known}).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                middle = 0.0 if parameter.ndim > 1 else 0.5
                parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
        sides = arguments["img_size"]
        sides = [sides, sides] if isinstance(sides, int) else list(sides)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *sides), "crop_pct": 1.0}
        model.pretrained_cfg["num_classes"] = model.num_classes
        save_for_hf(model, tmp_path, model_args=known)
        config = tmp_path / "config.json"
        values = json.loads(config.read_text())
        values["model_args"] = {**values["model_args"], **arguments}
        for key, value in (pretrained_cfg or {}).items():
            values["pretrained_cfg"][key] = value
            if value is ...:
                del values["pretrained_cfg"][key]
        config.write_text(json.dumps({**values, **top}))
        return tmp_path

    return write


@pytest.fixture
def compile_with(monkeypatch) -> Callable[..., None]:
    def choose(**options: Any) -> None:
        """What torch.compile is called with from now on, for blocks that compile by default."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **options))

    return choose
