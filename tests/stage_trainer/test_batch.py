"""Chunks of a batch: what each holds, and how much."""

import torch
from stage_trainer.batch import Batch, image_chunks, packed_chunks, text_chunks
from text_tower import PackedTokens

from .test_step import make_batch


def test_chunks_hold_every_sample_once_within_the_budget():
    batch = make_batch()
    assert torch.equal(torch.cat([p.images for p in image_chunks(batch, 3)]), batch.images)
    assert [len(p.images) for p in image_chunks(batch, 3)] == [3, 3, 1]
    parts = list(text_chunks(batch, 12))
    assert torch.equal(torch.cat([p.texts.ids for p in parts]), batch.texts.ids)
    assert torch.equal(torch.cat([p.text_seeds for p in parts]), batch.text_seeds)
    assert sum((p.texts.lengths for p in parts), ()) == batch.texts.lengths
    assert all(len(p.texts.ids) <= 12 for p in parts)
    assert len(list(text_chunks(batch, 1))) == len(batch.texts)


def test_a_part_holds_the_longest_run_of_texts_that_fits():
    """Against a plain walk, where lengths meet the budget exactly and where they pass it, and for many texts."""
    lengths = torch.randint(1, 9, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = PackedTokens.from_lists([list(range(3, 3 + n)) for n in lengths])
    for budget in (1, 7, 8, 16, 0):
        parts = [p.lengths for _, _, p in packed_chunks(texts, budget)]
        expected: list[tuple[int, ...]] = []
        for n in lengths:
            if expected and (not budget or sum(expected[-1]) + n <= budget):
                expected[-1] += (n,)
            else:
                expected.append((n,))
        assert parts == expected
    whole = next(packed_chunks(texts, 0))
    assert (whole[0], whole[1], whole[2].max_seqlen) == (slice(0, 300), slice(0, sum(lengths)), max(lengths))


def test_chunks_of_one_kind_carry_nothing_of_the_other():
    batch = make_batch()
    for part in image_chunks(batch, 3):
        assert (part.texts, len(part.text_seeds), len(part.image_seeds)) == (None, 0, len(part.images))
    for part in text_chunks(batch, 12):
        assert (part.images, len(part.image_seeds), len(part.text_seeds)) == (None, 0, len(part.texts))
    assert next(image_chunks(make_batch(images=1), 0)).images.shape[0] == 1
    assert list(image_chunks(Batch(**{**vars(batch), "images": None}), 2)) == []
    assert list(text_chunks(Batch(**{**vars(batch), "texts": None}), 2)) == []
