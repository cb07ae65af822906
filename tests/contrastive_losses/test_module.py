import math

import pytest
import torch
from contrastive_losses import InfoNCE, matryoshka_info_nce


def test_module_is_the_function_at_its_temperature(make_batch):
    queries, targets, negatives = make_batch(4, hard=2)
    options = {
        "query_ids": torch.tensor([0, 1, 0, 2]),
        "target_ids": torch.tensor([0, 1, 2, 1]),
        "sample_weights": torch.tensor([1.0, 2.0, 0.5, 1.0]),
    }
    module = InfoNCE(dims=(8, 3), weights=(1.0, 0.5), temperature=0.2)
    loss, stats = module(queries, targets, negatives, **options, return_stats=True)
    expected = matryoshka_info_nce(
        queries, targets, negatives=negatives, temperature=0.2, dims=(8, 3), weights=(1.0, 0.5), **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert stats.dims == (8, 3)
    loss.backward()
    # d loss / d log_scale = -temperature * d loss / d temperature
    temperature = torch.tensor(0.2, requires_grad=True)
    options |= {"dims": (8, 3), "weights": (1.0, 0.5)}
    matryoshka_info_nce(queries, targets, negatives=negatives, temperature=temperature, **options).backward()
    torch.testing.assert_close(module.log_scale.grad, -0.2 * temperature.grad[None], rtol=1e-5, atol=0)


def test_log_scale_is_one_float32_parameter_that_starts_at_the_published_value():
    module = InfoNCE()
    assert [(name, value.shape, value.dtype) for name, value in module.named_parameters()] == [
        ("log_scale", (1,), torch.float32)
    ]
    assert module.log_scale.item() == pytest.approx(2.6592, abs=1e-4)
    assert module.temperature.shape == (1,)
    assert module.temperature.requires_grad
    assert module.temperature.item() == pytest.approx(0.07)


def test_a_fixed_temperature_is_saved_but_not_trained():
    module = InfoNCE(temperature=0.05, learnable=False)
    assert not module.log_scale.requires_grad
    other = InfoNCE()
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == pytest.approx(0.05)


def test_clamp_keeps_the_temperature_above_its_minimum_and_training_going():
    module = InfoNCE(temperature=0.0101, min_temperature=0.01)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    rows = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    module(rows, rows).backward()  # aligned pairs: colder is better
    optimizer.step()
    storage = module.log_scale.data_ptr()
    assert module.temperature.item() < 0.01
    module.clamp_()
    assert module.temperature.item() == pytest.approx(0.01, rel=1e-6)
    assert module.log_scale.data_ptr() == storage  # in place: an optimizer's reference stays good
    optimizer.zero_grad()
    module(rows, rows.flip(0)).backward()  # crossed pairs: warmer is better, and the gradient at the limit says so
    assert module.log_scale.grad.item() > 0


def test_clamp_leaves_a_temperature_above_the_minimum_alone():
    module = InfoNCE(temperature=0.5)
    before = module.log_scale.detach().clone()
    module.clamp_()
    assert torch.equal(module.log_scale, before)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_half_precision_models_keep_the_exact_log_scale(cast):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), InfoNCE())
    before = model[1].log_scale.detach().clone()
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert model[1].log_scale.dtype == torch.float32
    assert torch.equal(model[1].log_scale, before)
    assert cast(InfoNCE().to("meta")).log_scale.device.type == "meta"


def test_a_learnable_temperature_falls_when_pairs_are_easy():
    module = InfoNCE(temperature=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rows = torch.eye(3)
    first = module(rows, rows)
    first.backward()
    optimizer.step()
    assert module.temperature.item() < 0.5
    assert module(rows, rows) < first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 0.005}, "below min_temperature"),
        ({"min_temperature": -1.0}, "min_temperature is -1.0"),
        ({"min_temperature": 0.0}, "min_temperature is 0.0"),
        ({"dims": (64, 0)}, "dims hold 0"),
        ({"dims": (64, 32), "weights": (1.0,)}, "1 weights for 2 dims"),
        ({"exchange": "tree"}, "exchange is 'tree'; expected one of auto, gather, ring"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)


def test_log_scale_is_the_log_of_one_over_the_temperature():
    assert InfoNCE(temperature=0.02).log_scale.item() == pytest.approx(math.log(50), rel=1e-6)
