"""`residual_in_fp32`: the dtype of the tokens between blocks under autocast, and what that costs in exactness.

LayerNorm computes as on a GPU where a test says so."""

from dataclasses import replace

import pytest
import torch
from vision_tower import VisionTower, blocks, patch_keep_indices

DEEP = {"layers": 12, "width": 64, "heads": 2, "mlp_width": 168}
NORMS = 1.5
"""LayerNorm in 16 bits may make the error of bfloat16 so many times as large: a tower of L/14's depth has 1.1."""
RESIDUAL = 2.0
"""With a residual stream in bfloat16, too: there 1.5. What may take more than `NORMS` is not the default."""


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    def forward(norm, x):
        return norm.in_16_bits(x) if x.dtype in blocks.HALF else torch.nn.LayerNorm.forward(norm, x)

    return lambda: monkeypatch.setattr(blocks.LayerNorm, "forward", forward)


def step(tower, images, keep):
    """Embeddings and gradients; the loss weighs each channel differently."""
    tower.zero_grad()
    out = tower(images, keep=keep)
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return [out.detach(), *(p.grad for p in tower.parameters())]


def errors(found, exact):
    """Relative: of the embeddings, and of all gradients as one vector."""
    off = [(a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)]
    size = [b.square().sum() for b in exact]
    return [float(sum(off[part]) / sum(size[part])) ** 0.5 for part in (slice(1), slice(1, None))]


def test_tokens_between_blocks_have_the_dtype_that_is_asked_for(tower, images):
    seen = []
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    for in_fp32, expected in ((True, torch.float32), (False, torch.bfloat16)):
        tower.configure(residual_in_fp32=in_fp32)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = tower(images)
        assert seen == len(tower.blocks) * [(expected, expected)]
        assert out.dtype == torch.float32


def test_without_autocast_nothing_changes(tower, images):
    expected = tower(images)
    tower.configure(residual_in_fp32=False)
    assert torch.equal(tower(images), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_16_bits_add_to_the_error_of_bfloat16(make_tower, config, as_on_a_gpu, checkpointing):
    config = replace(config, **DEEP, checkpointing=checkpointing)
    tower, images = make_tower(config), torch.randn(8, 3, 48, 48)
    keep = patch_keep_indices(range(8), config.num_patches, 0.5)
    exact = step(make_tower(config).double(), images.double(), keep)
    with torch.autocast("cpu", torch.bfloat16):
        before = errors(step(tower, images, keep), exact)
        as_on_a_gpu()
        norms = errors(step(tower, images, keep), exact)
        tower.configure(residual_in_fp32=False)
        residual = errors(step(tower, images, keep), exact)
    for own, of_norms, of_residual in zip(before, norms, residual, strict=True):
        print(f"{own:.2e}, norms {of_norms / own:.2f}, residual {of_residual / own:.2f}")
        assert own < 0.05
        assert of_norms < NORMS * own
        assert of_residual < RESIDUAL * own


def test_compiled_blocks_keep_it_in_one_graph(make_tower, config, compile_with, as_on_a_gpu):
    as_on_a_gpu()
    compile_with(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    config = replace(config, residual_in_fp32=False)
    eager, compiled = make_tower(config), make_tower(replace(config, compile=True))
    images = torch.randn(3, 3, 48, 48)
    keep = patch_keep_indices(range(3), config.num_patches, 0.5)
    exact = step(make_tower(config).double(), images.double(), keep)
    with torch.autocast("cpu", torch.bfloat16):
        of_eager, of_compiled = (errors(step(tower, images, keep), exact) for tower in (eager, compiled))
    assert of_compiled == pytest.approx(of_eager, rel=0.5)


def test_a_models_directory_does_not_say_it(tower, tmp_path):
    tower.configure(residual_in_fp32=False)
    tower.save_pretrained(tmp_path / "saved")
    assert VisionTower.from_pretrained(tmp_path / "saved").config.residual_in_fp32
    assert not VisionTower.from_pretrained(tmp_path / "saved", residual_in_fp32=False).config.residual_in_fp32
