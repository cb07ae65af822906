"""Images of different grids in one call get what each would get by itself."""

import copy

import pytest
import torch
from vision_tower import PackedPatches, VisionTowerConfig, patch_keep_indices

SIZES = [(48, 48), (24, 80), (80, 24), (8, 8), (48, 48), (45, 67)]


@pytest.fixture
def pages() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


def test_packed_images_equal_the_tower_set_to_each_resolution(tower, pages):
    """Position table resampled and rotary grid rescaled to each image's own grid, and back in the order given."""
    packed = tower(PackedPatches.from_images(pages, 8))
    assert packed.dtype == torch.float32
    for page, embedding in zip(pages, packed, strict=True):
        own = copy.deepcopy(tower).set_resolution(tuple(page.shape[1:]))
        torch.testing.assert_close(embedding[None], own(page[None]), rtol=0, atol=1e-5)


def test_packed_images_of_the_set_resolution_equal_timm(tower, make_timm, images):
    packed = tower(PackedPatches.from_images(list(images), 8))
    torch.testing.assert_close(packed, make_timm(tower)(images), rtol=0, atol=1e-5)


def test_packed_gradients_equal_those_of_single_images(tower, pages):
    weights = torch.randn(len(pages), 64, generator=torch.Generator().manual_seed(1))
    (tower(PackedPatches.from_images(pages, 8)) * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in tower.parameters()]
    tower.zero_grad()
    for page, weight in zip(pages, weights, strict=True):
        (tower(PackedPatches.from_images([page], 8)) * weight).sum().backward()
    for (name, parameter), gradient in zip(tower.named_parameters(), found, strict=True):
        tolerance = 1e-5 * parameter.grad.abs().max().item()
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_position_table_learns_through_its_resampling(make_tower):
    """In float64, against finite differences."""
    tower = make_tower(VisionTowerConfig(resolution=16, patch=8, width=8, layers=1, heads=1)).double()
    packed = PackedPatches.from_images([torch.randn(3, 24, 8, dtype=torch.float64)], 8)

    def embed(table):
        return torch.func.functional_call(tower, {"pos_embed": table}, (packed,))

    assert torch.autograd.gradcheck(embed, tower.pos_embed.detach().requires_grad_(), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_patch_dropout_is_each_images_own(make_tower, config, pages, checkpointing):
    tower = make_tower(VisionTowerConfig(**{**vars(config), "checkpointing": checkpointing}))
    seeds = torch.arange(100, 100 + len(pages))
    packed = PackedPatches.from_images(pages, 8).drop(seeds, 0.5)
    assert packed.lengths == (18, 15, 15, 1, 18, 20)
    embeddings = tower(packed)
    for i in (0, 4):  # of the set resolution: the same patches as without packing
        keep = patch_keep_indices(seeds[i : i + 1], 36, 0.5)
        torch.testing.assert_close(embeddings[i : i + 1], tower(pages[i][None], keep=keep), rtol=0, atol=1e-5)
    order = [3, 5, 1, 0, 2, 4]
    shuffled = PackedPatches.from_images([pages[i] for i in order], 8).drop(seeds[order], 0.5)
    torch.testing.assert_close(tower(shuffled), embeddings[order], rtol=0, atol=1e-5)
    embeddings.sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_what_does_not_belong_together_is_refused(tower, images):
    with pytest.raises(ValueError, match="no images"):
        PackedPatches.from_images([], 8)
    with pytest.raises(ValueError, match="below one patch"):
        PackedPatches.from_images([torch.zeros(3, 7, 80)], 8)
    with pytest.raises(ValueError, match=r"uint8.*after normalize"):
        PackedPatches.from_images([torch.zeros(3, 8, 8, dtype=torch.uint8)], 8)
    packed = PackedPatches.from_images(list(images), 8)
    with pytest.raises(ValueError, match="3 seeds for 4 images"):
        packed.drop([1, 2, 3], 0.5)
    with pytest.raises(ValueError, match=r"PackedPatches\.drop"):
        tower(packed, keep=torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="pack with patch=8"):
        tower(PackedPatches.from_images(list(images), 6))
    with pytest.raises(ValueError, match="do not belong together"):
        PackedPatches(packed.patches, packed.places, packed.grids[:2], packed.lengths)
