"""Compiled blocks in training: no graph for each batch, and eager's values and gradients.

Through the tracer and a backend that runs the graph as it is; Inductor's own code is a matter of `full`
(test_attention.py).
"""

from dataclasses import replace

import pytest
import torch
from vision_tower import patch_keep_indices


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_twenty_batches_take_no_more_graphs_than_the_first_few(make_tower, config, compile_with):
    """Each as gradient caching takes it: a pass without gradients, then one with. Other numbers of images, shares of
    dropped patches and resolutions do not count, but for no dropout at all."""
    compile_with(backend="eager", fullgraph=True)
    tower, seen = make_tower(replace(config, compile=True)), []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(20):
            images, side, rate = 3 + number * 5 % 7, 48 + 8 * (number // 7), (0.5, 0.0, 0.3)[number % 3]
            patches = tower.set_resolution(side).config.num_patches
            keep = patch_keep_indices(range(images), patches, rate) if rate else None
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    tower(torch.randn(images, 3, side, side), keep=keep)
            seen.append(graphs())
    assert seen[-1] == seen[1] == 8, seen  # with gradients or not, dropout or not, all tokens or the class token


def step(tower, images, keep):
    tower.zero_grad()
    out = tower(images, keep=keep)
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return [out.detach(), *(p.grad for p in tower.parameters())]


def error(found, exact):
    """Relative, over all values and gradients."""
    off = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return float(off / sum(b.square().sum() for b in exact)) ** 0.5


def test_under_autocast_and_checkpointing_numbers_are_eagers(make_tower, config, compile_with):
    """A chunk of another size comes between a pass and its recomputation, as a last chunk does: what is computed again
    must come from the graph of the first time."""
    compile_with(backend="aot_eager", fullgraph=True)
    config = replace(config, checkpointing=True)
    eager, compiled = make_tower(config), make_tower(replace(config, compile=True))
    exact_tower = make_tower(config).double()
    errors = []
    for bf16 in (False, True):
        for count in (4, 3):
            images = torch.randn(count, 3, 48, 48)
            keep = patch_keep_indices(range(count), config.num_patches, 0.5)
            exact = step(exact_tower, images.double(), keep)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = step(compiled, images, keep)
                errors.append((error(found, exact), error(step(eager, images, keep), exact)))
            assert errors[-1][0] < 1.5 * errors[-1][1], errors
    assert errors[-1][1] > 100 * errors[0][1]
