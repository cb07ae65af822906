"""The unified batch of jina-clip-v2, section 5.2, against one InfoNCE over explicit columns."""

import pytest
import torch
from contrastive_losses import InfoNCE, UnifiedInfoNCE, unified_info_nce


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)

    def pairs(rows):
        return tuple(torch.randn(rows, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))

    return {"image_text": pairs(3), "text": pairs(4), "image_views": pairs(3)}


def together(parts):
    return [torch.cat(side) for side in zip(*parts.values(), strict=True)]


def test_it_is_one_info_nce_over_the_union_of_the_pairs(parts, oracle):
    loss, stats = UnifiedInfoNCE(dims=(4, 8), temperature=0.1)(**parts, return_stats=True)
    first, second = together(parts)
    same_image = torch.tensor([0, 1, 2, 10, 11, 12, 13, 0, 1, 2])
    expected = oracle(first, second, temperature=0.1, dims=(4, 8), query_ids=same_image)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert stats.dims == (4, 8)
    loss.backward()
    expected_gradients = torch.autograd.grad(expected, [tensor for pair in parts.values() for tensor in pair])
    for tensor, gradient in zip([t for pair in parts.values() for t in pair], expected_gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-9)


def test_the_module_is_the_function_with_a_temperature_of_its_own(parts):
    module = UnifiedInfoNCE(dims=(4, 8), weights=(1.0, 2.0), temperature=0.1, false_negative_margin=0.1)
    options = {"dims": (4, 8), "weights": (1.0, 2.0), "false_negative_margin": 0.1}
    assert torch.equal(module(**parts), unified_info_nce(**parts, temperature=module.temperature, **options))


def test_without_views_it_is_images_and_texts_alone(parts):
    del parts["image_views"]
    loss = UnifiedInfoNCE(temperature=0.1)(**parts)
    assert torch.equal(loss, InfoNCE(temperature=0.1)(*together(parts)))


def test_ids_hide_equal_images_and_equal_texts_but_not_an_image_and_a_text(parts, oracle):
    ids = {"image_ids": torch.tensor([5, 6, 5]), "text_ids": torch.tensor([5, 6, 7, 6])}
    loss = UnifiedInfoNCE(temperature=0.1)(**parts, **ids)
    first, second = together(parts)
    all_ids = torch.tensor([5, 6, 5, 105, 106, 107, 106, 5, 6, 5])
    expected = oracle(first, second, temperature=0.1, query_ids=all_ids)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_modalities_are_negatives_of_each_other(parts):
    module = UnifiedInfoNCE(temperature=0.5)
    union = module(**parts)
    without_texts = module(parts["image_text"], tuple(side[:0] for side in parts["text"]), parts["image_views"])
    alone = InfoNCE(temperature=0.5)
    assert union * 10 > without_texts * 6 + alone(*parts["text"]) * 4


BAD = {
    "a 3-d image": (
        "image_text",
        (torch.ones(3, 2, 8), torch.ones(3, 8)),
        r"queries have shape \[3, 2, 8\]",
    ),
    "another width": ("text", (torch.ones(4, 6), torch.ones(4, 6)), r"widths .*'text': 6"),
    "other views": ("image_views", (torch.ones(2, 8), torch.ones(2, 8)), "2 image_views for 3 images"),
    "three of a pair": ("text", (torch.ones(4, 8),) * 3, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_do_not_fit_are_refused(name, parts):
    part, value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        UnifiedInfoNCE()(**{**parts, part: value})
