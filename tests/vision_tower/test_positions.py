"""Rotary positions turn alike in the form for complex numbers and in the one that torch.compile gets."""

import pytest
import torch
from vision_tower.positions import rotary_table, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_complex_rotation_agree(monkeypatch, dtype):
    torch.manual_seed(0)
    table = rotary_table((3, 4), 16, reference=16, theta=10_000.0).unsqueeze(-3)
    wanted = torch.randn(2, 13, 2, 16, dtype=dtype)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        x = torch.randn(2, 13, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        turned = rotate(x, table)
        turned.backward(wanted)
        results.append((turned.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other)
    turned, x = results[1][0], torch.randn(2, 13, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(turned[:, 0], x[:, 0])  # the class token does not turn
    assert (turned[:, 1:] - x[:, 1:]).abs().amax() > 0.5
