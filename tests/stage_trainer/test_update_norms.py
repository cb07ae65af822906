"""Sizes of parameters and updates: against norms over all values."""

import pytest
import torch
from stage_trainer.optim.update_norms import SAMPLE, UpdateNorms
from torch import nn


def test_norms_of_small_parameters_are_exact():
    torch.manual_seed(0)
    towers = {
        "text": [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(3))],
        "image": [nn.Parameter(torch.randn(11))],
    }
    before = {tower: [p.detach().clone() for p in ps] for tower, ps in towers.items()}
    norms = UpdateNorms(towers)
    norms.before()
    with torch.no_grad():
        for parameter in towers["text"]:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    found = norms.after()
    for tower, parameters in towers.items():
        now, then = (torch.cat([p.detach().flatten() for p in ps]) for ps in (parameters, before[tower]))
        assert found[f"parameter_norm/{tower}"] == pytest.approx(now.norm().item(), rel=1e-5)
        assert found[f"update_norm/{tower}"] == pytest.approx((now - then).norm().item(), rel=1e-5, abs=1e-12)
    assert set(found) == {f"{what}_norm/{tower}" for what in ("parameter", "update") for tower in towers}


@pytest.mark.parametrize("shape", [(SAMPLE,), (1024, 640), (300, 1001)])
def test_norms_of_large_parameters_are_right_to_two_percent(shape):
    """Where columns differ in size, too: an even distance between the values looked at would meet some of them only."""
    torch.manual_seed(0)
    columns = 1 + 9 * (torch.arange(shape[-1]) % 2)
    parameter = nn.Parameter(torch.randn(shape) * columns)
    norms = UpdateNorms({"text": [parameter]})
    norms.before()
    with torch.no_grad():
        parameter.add_(0.01 * columns)
    found = norms.after()
    assert found["parameter_norm/text"] == pytest.approx(parameter.detach().norm().item(), rel=0.02)
    assert found["update_norm/text"] == pytest.approx((0.01 * columns.expand(shape)).norm().item(), rel=0.02)
