"""PackedTokens refuses what could not be embedded."""

import pickle

import pytest
import torch
from text_tower import PackedTokens
from text_tower.packed import ByLength


def test_lists_are_laid_end_to_end():
    packed = PackedTokens.from_lists([[0, 5, 2], [0, 2], [0, 6, 7, 2]])
    assert packed.ids.tolist() == [0, 5, 2, 0, 2, 0, 6, 7, 2]
    assert packed.ids.dtype == torch.int64
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.max_seqlen, len(packed), packed.lengths) == (4, 3, (3, 2, 4))


def test_it_travels_between_processes_and_devices_without_asking_the_device():
    packed = PackedTokens.from_lists([[0, 5, 2], [0, 2]])
    assert pickle.loads(pickle.dumps(packed)).lengths == (3, 2)
    moved = packed.to("meta")  # a device that cannot be read
    assert moved.ids.is_meta
    assert moved.cu_seqlens.is_meta
    assert (moved.lengths, moved.max_seqlen) == ((3, 2), 3)


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "longest", "message"),
    [
        ([5, 6], [0, 0, 2], 2, "sequence 0 has 0 tokens"),
        ([5, 6], [0, 3, 2], 3, "sequence 1 has -1 tokens"),
        ([5, 6], [0, 1], 1, "end with the number of ids"),
        ([5, 6], [1, 2], 1, "start with 0"),
        ([], [0], 0, "at least one sequence"),
        ([5, 6], [0, 2], 3, "max_seqlen is 3, but the longest sequence has 2"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(ids, cu_seqlens, longest, message):
    with pytest.raises(ValueError, match=message):
        PackedTokens(torch.tensor(ids, dtype=torch.int64), torch.tensor(cu_seqlens, dtype=torch.int32), longest)


def test_wrong_types_and_nothing_at_all_are_refused():
    with pytest.raises(ValueError, match=r"^ids is torch.int32"):
        PackedTokens(torch.zeros(2, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="no sequence"):
        PackedTokens.from_lists([])
    with pytest.raises(ValueError, match="sequence 1 has 0 tokens"):
        PackedTokens.from_lists([[0, 2], []])


def test_sorting_by_length_loses_nothing_and_is_undone():
    sequences = [[10, 11, 12], [20], [30, 31, 32], [40, 41]]
    packed = PackedTokens.from_lists(sequences)
    layout = ByLength.of(packed)
    assert layout.groups == ((1, 1), (2, 1), (3, 2))
    assert packed.ids[layout.tokens].tolist() == [20, 40, 41, 10, 11, 12, 30, 31, 32]
    assert layout.positions.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2]
    assert layout.rows.tolist() == [1, 3, 3, 0, 0, 0, 2, 2, 2]
    assert layout.order.tolist() == [1, 3, 0, 2]
    assert layout.cu_seqlens.tolist() == [0, 1, 3, 6, 9]
    assert layout.as_given(packed.ids[layout.tokens, None]).flatten().tolist() == packed.ids.tolist()
    assert layout.mean(packed.ids[layout.tokens, None].double()).flatten().tolist() == [11, 20, 31, 40.5]
