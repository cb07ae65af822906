"""Patch dropout is a function of the seed alone; position tables are resampled as EVA does it."""

import pytest
import torch
import torch.nn.functional as F
from vision_tower import VisionTowerConfig, patch_keep_indices, resample_optimizer_state, resample_position_table


@pytest.mark.parametrize(
    ("patches", "rate", "kept"), [(36, 0.5, 18), (256, 0.3, 179), (36, 0.0, 36), (4, 0.99, 1), (1, 0.5, 1)]
)
def test_kept_patches_are_distinct_ascending_and_as_many_as_asked(patches, rate, kept):
    keep = patch_keep_indices(torch.arange(-50, 50), patches, rate)
    assert keep.shape == (100, kept)
    assert keep.dtype == torch.int64
    assert keep.min() >= 0
    assert keep.max() < patches
    assert (keep.diff(dim=1) > 0).all()


def test_every_patch_is_dropped_as_often_as_any_other_even_for_neighbouring_seeds():
    keep = patch_keep_indices(torch.arange(20_000), 36, 0.5)
    share = torch.bincount(keep.flatten(), minlength=36) / 20_000
    assert (share - 0.5).abs().max() < 0.016  # 4.5 standard deviations
    together = torch.zeros(20_000, 36).scatter(1, keep, 1)
    pairs = (together.T @ together / 20_000).fill_diagonal_(17 / 70)
    assert (pairs - 17 / 70).abs().max() < 0.016  # 18 * 17 / (36 * 35): no two patches go together
    assert len(keep.unique(dim=0)) == 20_000


def test_seeds_as_integers_and_as_tensor_are_the_same_modulo_64_bits():
    keep = patch_keep_indices(torch.tensor([5, -1, 2**62]), 49, 0.5)
    assert torch.equal(patch_keep_indices([5 + 2**64, 2**64 - 1, 2**62], 49, 0.5), keep)


def test_kept_patches_never_change_between_releases():
    """A resumed run must drop what the interrupted one would have dropped."""
    expected = [[1, 5, 8, 10], [1, 2, 6, 8], [2, 6, 10, 11]]
    assert patch_keep_indices([0, 1, -1], 16, 0.75).tolist() == expected


def test_a_wrong_rate_count_or_seed_is_named():
    with pytest.raises(ValueError, match=r"drop_rate is 1\.0"):
        patch_keep_indices([1], 36, 1.0)
    with pytest.raises(ValueError, match="num_patches is 0"):
        patch_keep_indices([1], 0, 0.5)
    with pytest.raises(ValueError, match=r"seeds are torch\.float32"):
        patch_keep_indices(torch.zeros(3), 36, 0.5)


@pytest.mark.parametrize(("old", "new"), [((16, 16), (27, 27)), ((6, 6), (4, 9)), ((27, 27), (36, 36))])
def test_position_table_is_resampled_as_eva_does_and_not_as_timm(old, new):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, 1 + old[0] * old[1], 8, generator=torch.Generator().manual_seed(0))
    ours = resample_position_table(table, old, new)
    grid = table[:, 1:].reshape(1, *old, 8).permute(0, 3, 1, 2)
    eva = F.interpolate(grid, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(ours[:, :1], table[:, :1])
    torch.testing.assert_close(ours[:, 1:], eva)
    arguments = {"new_size": new, "old_size": old, "num_prefix_tokens": 1}
    torch.testing.assert_close(ours, resample_abs_pos_embed(table, antialias=False, **arguments))
    assert (ours - resample_abs_pos_embed(table, **arguments)).abs().mean() > 0.01


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("new", [(16, 8), (24, 30), (5, 12)])
def test_its_gradient_is_that_of_pytorchs_interpolation(mode, new):
    table = torch.randn(1, 1 + 16 * 12, 4, dtype=torch.float64, requires_grad=True)
    ours = resample_position_table(table, (16, 12), new, mode=mode)
    grid = table[:, 1:].unflatten(1, (16, 12)).permute(0, 3, 1, 2)
    theirs = F.interpolate(grid, size=new, mode=mode, align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    aim = torch.randn_like(ours)
    (expected,) = torch.autograd.grad(torch.cat([table[:, :1], theirs], dim=1), table, aim)
    torch.testing.assert_close(torch.autograd.grad(ours, table, aim)[0], expected)


def test_there_and_back_keeps_a_smooth_table_and_the_class_row():
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 12), torch.linspace(0, 2, 12), indexing="ij")
    smooth = torch.stack([rows.sin(), columns.cos(), torch.ones(12, 12)], dim=-1).reshape(1, 144, 3)
    table = torch.cat([torch.full((1, 1, 3), 9.0), smooth], dim=1)
    back = resample_position_table(resample_position_table(table, (12, 12), (30, 25)), (30, 25), (12, 12))
    torch.testing.assert_close(back, table, rtol=0, atol=0.02)
    assert torch.equal(back[:, 0], table[:, 0])
    assert resample_position_table(table, (12, 12), (12, 12)) is table


def adamw_after(tower, images, steps: int):
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3, amsgrad=True)
    for _ in range(steps):
        optimizer.zero_grad()
        tower(images).square().mean().backward()
        optimizer.step()
    return optimizer


def test_optimizer_state_follows_the_table_and_its_second_moments_stay_positive(tower, images):
    state = adamw_after(tower, images, 3).state[tower.pos_embed]
    noisy = {**state, "exp_avg_sq": torch.rand_like(state["exp_avg_sq"]).pow(8)}  # as jumpy as real ones become
    assert resample_position_table(noisy["exp_avg_sq"], (6, 6), (9, 7)).min() < 0  # what must not happen
    moved = resample_optimizer_state(noisy, (6, 6), (9, 7))
    assert moved.keys() == state.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert moved["step"] is state["step"]
    assert torch.equal(moved["exp_avg"], resample_position_table(state["exp_avg"], (6, 6), (9, 7)))
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        assert moved[name].shape == (1, 64, 64)
        assert moved[name].min() >= 0
        bilinear = F.interpolate(noisy[name][:, 1:].mT.unflatten(2, (6, 6)), size=(9, 7), mode="bilinear").flatten(2).mT
        torch.testing.assert_close(moved[name][:, 1:], bilinear)
        assert torch.equal(moved[name][:, :1], noisy[name][:, :1])


@pytest.mark.parametrize("kind", ["Adagrad", "Adadelta", "Adamax", "NAdam", "RMSprop", "SGD"])
def test_every_optimizers_state_survives_a_change_of_resolution(tower, kind):
    """Through steps whose squares are as jumpy as real ones become: what a root is taken of stays above zero."""
    options = {"RMSprop": {"momentum": 0.9, "centered": True}, "SGD": {"momentum": 0.9}}.get(kind, {})
    old = getattr(torch.optim, kind)([tower.pos_embed], **options)
    for seed in range(3):
        tower.pos_embed.grad = torch.randn(tower.pos_embed.shape, generator=torch.Generator().manual_seed(seed)).pow(5)
        old.step()
    state, before = old.state[tower.pos_embed], tower.config.grid
    new = getattr(torch.optim, kind)([tower.set_resolution(72).pos_embed], **options)
    new.state[tower.pos_embed] = resample_optimizer_state(state, before, tower.config.grid)
    for name, value in new.state[tower.pos_embed].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            assert value.shape == tower.pos_embed.shape
            assert (value < 0).any() == (state[name] < 0).any(), name
    tower.pos_embed.grad = torch.full_like(tower.pos_embed, 1e-3)
    new.step()
    assert tower.pos_embed.isfinite().all()


def test_a_state_in_8_bits_is_refused():
    with pytest.raises(ValueError, match=r"state1 is torch\.uint8"):
        resample_optimizer_state({"state1": torch.zeros(1, 37, 64, dtype=torch.uint8)}, (6, 6), (9, 9))


def test_a_nan_leaves_the_rest_of_a_second_moment_positive():
    squares = torch.rand(1, 37, 64, generator=torch.Generator().manual_seed(0)).pow(8)
    squares[0, 5, 0] = torch.nan
    moved = resample_optimizer_state({"exp_avg_sq": squares}, (6, 6), (9, 9))["exp_avg_sq"]
    assert not (moved < 0).any()


def test_training_goes_on_after_a_change_of_resolution(tower, images):
    """With moments carried by hand as a trainer does it: finite everywhere, and of the size of a step."""
    old = adamw_after(tower, images, 3)
    states = {name: old.state[parameter] for name, parameter in tower.named_parameters()}
    before = tower.config.grid
    tower.set_resolution(72)
    states["pos_embed"] = resample_optimizer_state(states["pos_embed"], before, tower.config.grid)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3, amsgrad=True)
    for name, parameter in tower.named_parameters():
        optimizer.state[parameter] = states[name]
    table = tower.pos_embed.detach().clone()
    tower(torch.randn(4, 3, 72, 72)).square().mean().backward()
    optimizer.step()
    change = (tower.pos_embed - table).abs()
    assert 0 < change.max() < 0.02
    assert change.isfinite().all()


def test_a_table_that_is_not_of_its_grid_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 37, C\] for a 6x6 grid"):
        resample_position_table(torch.zeros(1, 36, 8), (6, 6), (9, 9))
    with pytest.raises(ValueError, match="'nearest'"):
        resample_position_table(torch.zeros(1, 37, 8), (6, 6), (9, 9), mode="nearest")


def test_set_resolution_resamples_positions_in_place_and_only_them(tower):
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    old = tower.pos_embed
    tower.set_resolution((72, 61))  # five trailing pixels
    assert tower.config.grid == (9, 7)
    assert tower.pos_embed is not old
    assert tower.pos_embed.requires_grad
    expected = resample_position_table(before.pop("pos_embed"), (6, 6), (9, 7))
    assert torch.equal(tower.pos_embed, expected)
    assert all(torch.equal(tower.get_parameter(name), value) for name, value in before.items())
    assert tower(torch.zeros(1, 3, 72, 61)).shape == (1, 64)


def test_from_224_to_768_the_tower_stays_timms(make_tower, make_timm):
    tower = make_tower(VisionTowerConfig(resolution=224, patch=14, width=64, layers=1, heads=1))
    for resolution, side in ((384, 27), (512, 36), (768, 54)):
        assert tower.set_resolution(resolution).config.grid == (side, side)
        images = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
        expected = make_timm(tower)(images)
        torch.testing.assert_close(tower(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_resolution_set_in_inference_mode_can_still_be_learnt(tower):
    with torch.inference_mode():
        tower.set_resolution(72)
    tower(torch.randn(2, 3, 72, 72)).square().sum().backward()
    assert tower.pos_embed.grad is not None


def test_the_same_grid_keeps_the_parameter_and_a_frozen_one_stays_frozen(tower):
    old = tower.pos_embed
    assert tower.set_resolution(48).pos_embed is old
    assert tower.set_resolution(51).pos_embed is old
    tower(torch.zeros(1, 3, 51, 51))
    tower.set_trainable("none").set_resolution(64)
    assert not tower.pos_embed.requires_grad


def test_a_resolution_below_one_patch_is_refused_and_changes_nothing(tower, images):
    for wrong in (7, (48, 7), 0, -48, "48", 48.0, (48, 48, 3)):
        with pytest.raises(ValueError, match="resolution"):
            tower.set_resolution(wrong)
    tower(images)


def test_trailing_pixels_have_no_influence(make_tower, config):
    tower = make_tower(config).set_resolution(53)
    images = torch.randn(2, 3, 53, 53, generator=torch.Generator().manual_seed(0))
    cropped = tower(images)
    images[..., 48:, :] = images[..., 48:] = 100
    assert torch.equal(tower(images), cropped)
    torch.testing.assert_close(tower.set_resolution(48)(images[..., :48, :48]), cropped)


@pytest.mark.parametrize(
    ("patches", "rate", "kept"),
    [(5, 0.5, 2), (7, 0.5, 4), (9, 0.5, 4), (10, 0.75, 2), (14, 0.75, 4), (10, 0.25, 8), (6, 0.25, 4), (1, 0.5, 1)],
)
def test_where_the_share_that_stays_falls_on_a_half_the_even_number_stays(patches, rate, kept):
    assert patch_keep_indices([1, 2], patches, rate).shape == (2, kept)
