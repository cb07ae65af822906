"""The image half of a CLIP model as a whole: an EVA02 tower and the projection into the space that texts share."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tower.checkpoints import read_image_half
from vision_tower.config import whole
from vision_tower.errors import WeightsError
from vision_tower.packed import PackedPatches
from vision_tower.pretrained import find
from vision_tower.tower import VisionTower


class ProjectedTower(nn.Module):
    """A tower with the linear projection that EVA-CLIP and open_clip train on top of it (1024 to 768 for L/14).

    Its vectors are those of the published CLIP models, to be compared with their texts' vectors. Training here starts
    from the tower alone, whose width both towers share.

    Args:
        tower: gives `[N, width]`.
        head: to `[N, D]`.
    """

    def __init__(self, tower: VisionTower, head: nn.Linear) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> ProjectedTower:
        """Reads EVA-CLIP's `.pt`, an open_clip checkpoint or directory of EVA02, or a timm directory with a head.

        Args:
            options: of `VisionTower.from_pretrained`.

        Raises:
            WeightsError: there is no projection, or one that does not fit; else as `VisionTower.from_pretrained`.
        """
        tower = VisionTower.from_pretrained(path, num_classes=0, **options)
        source, _ = find(Path(path))
        weights = read_image_half(source)
        weight, bias = weights.get("head.weight"), weights.get("head.bias")
        if weight is None:
            raise WeightsError(
                f"{source} has no projection (head.weight) after its image tower; VisionTower.from_pretrained reads it"
            )
        fits = weight.ndim == 2 and weight.shape[1] == tower.config.width and len(weight) > 0
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = [list(part.shape) for part in (weight, bias) if part is not None]
            raise WeightsError(f"{source} has a projection of {shapes}; expected [D, {tower.config.width}] and [D]")
        head = nn.Linear(tower.config.width, len(weight), bias=bias is not None)
        with torch.no_grad():
            head.weight.copy_(weight)
            if bias is not None:
                head.bias.copy_(bias)
        return cls(tower, head)

    def forward(self, images: Tensor | PackedPatches) -> Tensor:
        """`[N, D]` float32, not L2-normalised, of images as `VisionTower.forward` takes them."""
        projected: Tensor = self.head(self.tower(images))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))

    def encode(
        self, images: Iterable[Any] | Tensor | np.ndarray, *, truncate_dim: int | None = None, normalize: bool = True,
        **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Embeds images: float32 `[N, truncate_dim or D]`; arguments and errors as of `VisionTower.encode`."""
        dims = self.head.out_features if truncate_dim is None else whole(truncate_dim)
        if dims is None or not 1 <= dims <= self.head.out_features:
            raise ValueError(f"truncate_dim is {truncate_dim!r}; expected 1 … {self.head.out_features}")
        pooled = torch.from_numpy(self.tower.encode(images, normalize=False, **options))
        with torch.inference_mode():
            rows = self.head(pooled.to(self.head.weight)).float()[:, :dims]
            return (F.normalize(rows, dim=-1) if normalize else rows).cpu().numpy()
