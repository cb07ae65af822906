"""The tower's numbers are timm's, at every resolution; patch dropout is keyed by sample; a wrong setting is named."""

import copy
import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from vision_tower import VisionTower, VisionTowerConfig, patch_keep_indices
from vision_tower.config import as_pair

SHAPES = {
    "laptop": {"resolution": 48, "patch": 8, "width": 128, "layers": 2, "heads": 4},
    "L/14 at 224": {"resolution": 224},
    "L/14 at 384, six pixels dropped": {"resolution": 384},
    "L/14 at 512, eight pixels dropped": {"resolution": 512},
    "not square": {"resolution": (56, 100)},
    "MIM": {"resolution": 56, "attention_norm": False},
    "rotary positions not rescaled": {"resolution": 56, "reference_grid": None},
    "hidden stated": {"resolution": 56, "mlp_width": 100},
}


@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_equal_timm(name, make_tower, make_timm):
    small = {"patch": 14, "width": 64, "layers": 2, "heads": 1}
    tower = make_tower(VisionTowerConfig(**{**small, **SHAPES[name]}))
    model = make_timm(tower)
    height, width = as_pair(tower.config.resolution)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))
    ours, theirs = tower(images), model(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    reference = dict(model.named_parameters())
    assert reference.keys() == dict(tower.named_parameters()).keys()
    for key, parameter in tower.named_parameters():
        expected = reference[key].grad
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(("resolution", "parameters"), [(224, 303_317_952), (384, 303_802_304), (512, 304_382_912)])
def test_large_tower_has_the_published_parameter_count_without_allocating(resolution, parameters):
    with torch.device("meta"):
        tower = VisionTower(VisionTowerConfig.eva02_large(resolution))
        moved = VisionTower(VisionTowerConfig.eva02_large()).set_resolution(resolution)
    assert all(parameter.is_meta for parameter in moved.parameters())
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters
    assert sum(parameter.numel() for parameter in moved.parameters()) == parameters
    assert not list(moved.buffers())


def test_names_and_shapes_equal_timm_of_the_large_and_base_entries():
    import timm

    for config, name in (
        (VisionTowerConfig.eva02_large(), "eva02_large_patch14_clip_224"),
        (VisionTowerConfig.eva02_base(), "eva02_base_patch16_clip_224"),
    ):
        with torch.device("meta"):
            ours, theirs = VisionTower(config).state_dict(), timm.create_model(name, num_classes=0).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_fresh_weights_have_the_spread_of_timm(config):
    import timm

    torch.manual_seed(0)
    ours = VisionTower(config).state_dict()
    theirs = timm.create_model("eva02_large_patch14_clip_224", **config.timm_arguments()).state_dict()
    for key, value in theirs.items():
        if value.numel() > 1000:
            assert ours[key].std().item() == pytest.approx(value.std().item(), rel=0.1), key
        elif "patch_embed" not in key and "cls_token" not in key:  # norms and biases
            assert torch.equal(ours[key], value), key


def test_output_is_float32_and_near_under_autocast_and_in_bfloat16(tower, images):
    reference = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = tower(images)
    low = tower.bfloat16()(images)
    for output in (autocast, low):
        assert output.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(output, reference).min() > 0.999


@pytest.mark.parametrize("tokens", [37, 600])
def test_attention_in_16_bits_is_near_float32_whichever_kernel_takes_it(tokens):
    from vision_tower.attention import attend

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 4, 32, generator=generator).bfloat16() for _ in range(3))
    wide = [t.double().transpose(1, 2) for t in (q, k, v)]
    reference = (torch.softmax(wide[0] @ wide[1].mT / 32**0.5, dim=-1) @ wide[2]).transpose(1, 2)
    for output in (attend(q, k, v), attend(q.float(), k.float(), v.float())):
        torch.testing.assert_close(output.double(), reference, rtol=0, atol=0.03)
    assert attend(q, k, v).dtype == torch.bfloat16


def test_a_data_worker_does_not_import_timm():
    code = "import sys, vision_tower; vision_tower.augment; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checkpointing_recomputes_every_block_and_changes_no_gradient(config, images):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = VisionTower(VisionTowerConfig(**{**vars(config), "checkpointing": checkpointing}))
        calls.append(0)
        for block in tower.blocks:
            block.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        tower(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    assert calls == [3, 6]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_keeping_every_patch_equals_no_dropout(tower, images):
    keep = torch.arange(tower.config.num_patches).repeat(len(images), 1)
    torch.testing.assert_close(tower(images, keep=keep), tower(images), rtol=0, atol=1e-6)


def test_dropped_patches_have_no_influence_and_kept_ones_keep_their_place(tower, images):
    keep = patch_keep_indices([1, 2, 3, 4], 36, 0.5)
    reference = tower(images, keep=keep)
    outside = torch.ones(4, 36).scatter(1, keep, 0).view(4, 1, 6, 6)
    noise = torch.nn.functional.interpolate(outside, scale_factor=8) * 5
    torch.testing.assert_close(tower(images + noise, keep=keep), reference, rtol=0, atol=1e-6)
    # the set of kept patches matters, not the order in which they are listed: each carries its own position
    torch.testing.assert_close(tower(images, keep=keep.flip(1)), reference, rtol=0, atol=1e-5)
    assert (tower(images, keep=(keep + 1) % 36) - reference).abs().max() > 1e-3


def test_a_sample_drops_the_same_patches_in_any_batch(tower, images):
    seeds, order = torch.tensor([11, -5, 2**62, 0]), torch.tensor([2, 0, 3, 1])
    keep = patch_keep_indices(seeds, 36, 0.5)
    assert torch.equal(patch_keep_indices(seeds[order], 36, 0.5), keep[order])
    embeddings = tower(images, keep=keep)
    shuffled = tower(images[order], keep=patch_keep_indices(seeds[order], 36, 0.5))
    torch.testing.assert_close(shuffled, embeddings[order], rtol=0, atol=1e-6)
    alone = tower(images[1:2], keep=patch_keep_indices([-5], 36, 0.5))
    torch.testing.assert_close(alone, embeddings[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_caching_replays_patch_dropout_exactly(config, make_tower, images, checkpointing):
    """GradCache (arXiv 2101.06983): embed in parts without gradient, differentiate the loss by the embeddings, embed
    again with gradient. The gradient is the whole batch's, because the kept patches follow from the seeds alone."""
    tower = make_tower(VisionTowerConfig(**{**vars(config), "checkpointing": checkpointing})).double()
    images, seeds = images.double(), torch.tensor([3, 1, 4, 1])

    def embed(part):
        return tower(images[part], keep=patch_keep_indices(seeds[part], config.num_patches, 0.5))

    def loss(embeddings):
        return torch.nn.functional.cross_entropy(embeddings @ embeddings.T / 50, torch.tensor([1, 0, 3, 2]))

    loss(embed(slice(None))).backward()
    expected = [parameter.grad.clone() for parameter in tower.parameters()]
    tower.zero_grad()
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    with torch.no_grad():
        cached = torch.cat([embed(part) for part in parts])
    torch.rand(5)  # a generator's state plays no part
    cached.requires_grad_()
    loss(cached).backward()
    for part in reversed(parts):
        embed(part).backward(cached.grad[part])
    for parameter, gradient in zip(tower.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences_in_float64(make_tower):
    tower = make_tower(VisionTowerConfig(resolution=16, patch=8, width=8, layers=2, heads=1, mlp_width=12)).double()
    keep = torch.tensor([[0, 3], [1, 2]])
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    names = ["pos_embed", "blocks.0.attn.q_proj.weight", "blocks.1.mlp.norm.weight", "cls_token"]

    def embed(*values):
        return torch.func.functional_call(tower, dict(zip(names, values, strict=True)), (images,), {"keep": keep})

    values = [tower.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(embed, values, eps=1e-6, atol=1e-6)


def test_the_base_tower_of_jina_clip_v1_equals_timm():
    """EVA02-B/16 whole, with timm's own entry and arguments of our own writing: rotary positions 0 to 13 as they are,
    where EVA-CLIP's B/16 rescales them to a grid of 16; 85,869,312 parameters (published.md, B5)."""
    import timm

    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig.eva02_base(reference_grid=None))
    assert sum(p.numel() for p in tower.parameters()) == 85_869_312
    fixed = {"num_classes": 0, "global_pool": "token", "ref_feat_shape": (14, 14)}
    model = timm.create_model("eva02_base_patch16_clip_224", **fixed)
    model.load_state_dict(tower.state_dict())
    images = torch.randn(1, 3, 224, 224)
    ours, theirs = tower(images), model(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    weights = torch.randn(1, 768)  # the squares of a fresh norm's output sum to a constant
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, parameter), reference in zip(tower.named_parameters(), model.parameters(), strict=True):
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-5, name
    shallow = timm.create_model("eva02_base_patch16_clip_224", **{**fixed, "ref_feat_shape": (16, 16)}, depth=1)
    model.rope = shallow.rope
    with torch.no_grad():
        assert (model(images) - theirs).abs().max() > 1e-3  # its defaults would be another tower


@pytest.mark.full
@pytest.mark.parametrize("resolution", [224, 384, 512])
def test_the_whole_large_tower_equals_timm(resolution, make_timm):
    """EVA02-L/14 as it is trained: 24 layers, output and gradients, float32."""
    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig.eva02_large(resolution))
    model = make_timm(tower)
    images = torch.randn(1, 3, *(side // 14 * 14 for side in (resolution, resolution)))
    padded = torch.nn.functional.pad(images, (0, resolution % 14, 0, resolution % 14), value=7.0)
    ours, theirs = tower(padded), model(padded)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    weights = torch.randn(1, 1024)  # the squares of a fresh norm's output sum to a constant
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, parameter), reference in zip(tower.named_parameters(), model.parameters(), strict=True):
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-5, name


def test_layer_ids_follow_timms_order(tower, make_timm):
    from timm.models import group_parameters

    model = make_timm(tower)
    theirs = group_parameters(model, model.group_matcher(), reverse=True)
    assert tower.layer_ids() == theirs
    assert max(theirs.values()) == tower.num_layers == 3


def test_set_trainable_switches_every_parameter(tower, images):
    assert not tower.set_trainable("none")(images).requires_grad
    assert all(parameter.requires_grad for parameter in tower.set_trainable("all").parameters())
    with pytest.raises(ValueError, match="'lora'"):
        tower.set_trainable("lora")


def test_images_of_another_size_say_what_is_set_and_how_to_change_it(tower):
    with pytest.raises(ValueError, match=r"56x64 pixels.*set to 48x48.*set_resolution\(\(56, 64\)\)"):
        tower(torch.zeros(1, 3, 56, 64))


def test_images_and_keep_of_another_kind_are_refused(tower, images):
    for wrong in (torch.zeros(1, 3, 48, 48, dtype=torch.uint8), torch.zeros(3, 48, 48), torch.zeros(1, 1, 48, 48)):
        with pytest.raises(ValueError, match="normalize"):
            tower(wrong)
    for wrong in (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="patch_keep_indices"):
            tower(images, keep=wrong)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resolution", 7),
        ("resolution", (48, 0)),
        ("resolution", "48"),
        ("patch", 0),
        ("width", 64.0),
        ("layers", -1),
        ("heads", 3),
        ("heads", 32),
        ("mlp_ratio", 0),
        ("mlp_ratio", 0.001),
        ("mlp_width", 0),
        ("reference_grid", 0),
        ("rope_theta", float("inf")),
        ("rope_theta", True),
        ("crop_pct", np.float32(1.5)),
        ("attention_norm", 1),
        ("layer_norm_eps", -1e-6),
        ("checkpointing", "yes"),
    ],
)
def test_a_wrong_setting_is_named(config, setting, value):
    with pytest.raises(ValueError, match=setting):
        VisionTowerConfig(**{**vars(config), "mlp_width": None, setting: value})


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, int, float])
def test_numbers_of_every_kind_are_settings(config, kind):
    settings = dict.fromkeys(("mlp_ratio", "rope_theta", "layer_norm_eps", "crop_pct"), kind(1))
    found = VisionTowerConfig(**{**vars(config), "mlp_width": None, **settings})
    assert {type(getattr(found, name)) for name in settings} == {float}


def test_an_unknown_setting_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"depth; known are .*layers"):
        VisionTowerConfig.from_dict({"depth": 3})
    assert VisionTowerConfig.from_dict({"resolution": [48, 56], "patch": 8}).grid == (6, 7)


def test_a_copy_of_a_compiled_tower_is_compiled(tower, images, compile_with):
    """As EMA makes copies. Only what nn.Module.compile leaves behind tells whether a module is compiled."""
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph.forward

    def compiled(tower):
        return [block._compiled_call_impl is not None for block in tower.blocks]

    assert not any(compiled(copy.deepcopy(tower)))
    compile_with(backend=backend, dynamic=False)
    tower.configure(compile=True)
    holder = torch.nn.ModuleList([tower])  # as DualEncoder holds it
    copied = copy.deepcopy(holder)[0]
    again = copy.deepcopy(copied)
    for each in (copied, again, torch.optim.swa_utils.AveragedModel(tower).module):
        assert all(compiled(each))
        assert each.config == tower.config
        assert each.pos_embed is not tower.pos_embed
        assert all(a is not b for a, b in zip(each.parameters(), tower.parameters(), strict=True))
    with torch.no_grad():
        expected = tower(images)
        count = len(compiles)
        assert count > 0
        torch.testing.assert_close(copied(images), expected)
        torch._dynamo.reset()
        copied(images)
    assert len(compiles) > count
    whole = io.BytesIO()
    torch.save(tower, whole)
    whole.seek(0)
    assert all(compiled(torch.load(whole, weights_only=False)))
    tower.configure(compile=False)
    assert not any(compiled(tower))
    with pytest.raises(ValueError, match=r"\['width'\] cannot be changed"):
        tower.configure(width=128)


def test_whole_numbers_of_every_kind_make_a_configuration_and_truth_values_do_not():
    kinds = {"patch": np.int64(8), "width": np.int32(64), "layers": torch.tensor(3), "heads": np.uint8(2)}
    config = VisionTowerConfig(
        resolution=[np.int64(48), 56], mlp_width=np.int16(100), reference_grid=np.int64(7), **kinds
    )
    plain = VisionTowerConfig(
        resolution=(48, 56), mlp_width=100, reference_grid=7, patch=8, width=64, layers=3, heads=2
    )
    assert config == plain
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(plain))
    assert VisionTowerConfig(resolution=np.int64(224)).resolution == 224
    for name in ("patch", "width", "layers", "heads", "mlp_width", "reference_grid", "resolution"):
        for wrong in (True, np.True_, torch.tensor(True), 8.0, np.float64(8), "8", -8):
            with pytest.raises(ValueError, match=f"{name} is"):
                VisionTowerConfig(**{name: wrong})
    with pytest.raises(ValueError, match="mean is"):
        VisionTowerConfig(mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="std is"):
        VisionTowerConfig(std=(0.5, 0.5, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_export_takes_a_batch_of_any_size(make_tower, dtype):
    tower = make_tower(VisionTowerConfig(resolution=32, patch=8, width=32, layers=2, heads=2)).eval().to(dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(tower, (torch.randn(3, 3, 32, 32, dtype=dtype),), dynamic_shapes=({0: batch},))
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 32, 32, dtype=dtype)
        bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
        torch.testing.assert_close(exported.module()(images), tower(images), **bounds)
