"""A padded batch gives what the packed one does, and torch.export takes it with any number of texts and tokens."""

import pytest
import torch
from text_tower import PackedTokens

LORA = {"lora_rank": 4, "lora_alpha": 6.0, "adapters": ("retrieval.query", "separation")}
PAD = 1


def padded(packed: PackedTokens, before: int = 0, after: int = 0) -> torch.Tensor:
    rows = [torch.cat([row.new_full((before,), PAD), row]) for row in packed.ids.split(list(packed.lengths))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return torch.nn.functional.pad(ids, (0, after), value=PAD)


@pytest.mark.parametrize("adapter", [None, "separation", "none"])
@pytest.mark.parametrize("lengths", [(1,), (7, 7), (3, 40, 1, 17)], ids=str)
def test_padded_is_packed_to_the_last_digits_of_float64(make_tower, pack, adapter, lengths):
    tower, packed = make_tower(**LORA).double(), pack(lengths)
    with torch.no_grad():
        wanted = tower(packed, adapter=adapter)
        for places, bound in (({}, 1e-12), ({"after": 9}, 1e-12), ({"before": 4}, 1e-5)):  # angles are in float32
            found = tower.padded(adapter)(padded(packed, **places))
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() < bound


def test_a_tower_without_adapters_shares_its_weights(make_tower, pack):
    tower, packed = make_tower(), pack((5, 2))
    view = tower.padded()
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in tower.parameters()}
    assert not view.training
    assert tower.training
    with torch.no_grad():
        assert torch.allclose(view(padded(packed)), tower(packed), atol=1e-6)


def test_padding_alone_is_zero_and_disturbs_no_other(make_tower, pack):
    tower, packed = make_tower(), pack((5, 2))
    ids = torch.cat([torch.full((1, 5), PAD), padded(packed)])
    with torch.no_grad():
        found = tower.padded()(ids)
        assert not found[0].any()
        assert torch.allclose(found[1:], tower(packed), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_export_takes_any_number_of_texts_and_tokens(make_tower, pack, dtype):
    tower = make_tower().to(dtype)
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        tower.padded(), (padded(pack((3, 5, 4))),), dynamic_shapes=({0: dynamic, 1: dynamic},)
    ).module()
    with torch.no_grad():
        for lengths in ((3, 5, 4), (1,), (2, 300), (40, 1, 7, 7, 2)):
            packed = pack(lengths)
            found = exported(padded(packed))
            assert found.dtype == torch.float32
            assert (found - tower(packed)).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
