"""Whole words are hidden, the same ones wherever and whenever a sample is seen."""

import itertools

import pytest
import torch
from text_tower import PackedTokens, Tokenizer, WholeWordMasking

SEEDS = torch.arange(30) * 7919 - 50


@pytest.fixture(scope="module")
def masking(tokenizer):
    return WholeWordMasking(tokenizer)


@pytest.fixture(scope="module")
def texts(tokenizer, sentences):
    return tokenizer(list(sentences.values()))


def parts(masked, lengths):
    """Per text: the ids that the tower sees, and {position: label}."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    hidden = dict(zip(masked.places.tolist(), masked.labels.tolist(), strict=True))
    return [
        (masked.packed.ids[a:b].tolist(), {p - a: hidden[p] for p in range(a, b) if p in hidden})
        for a, b in itertools.pairwise(starts)
    ]


def test_a_sample_is_masked_alike_in_any_batch_and_otherwise_with_another_seed(masking, texts):
    together = parts(masking(PackedTokens.from_lists(texts), SEEDS), [len(t) for t in texts])
    order = torch.randperm(30).tolist()
    for chosen in (order[:7], order[7:8], order[8:]):
        batch = [texts[i] for i in chosen]
        alone = parts(masking(PackedTokens.from_lists(batch), SEEDS[chosen]), [len(t) for t in batch])
        assert alone == [together[i] for i in chosen]
    other = parts(masking(PackedTokens.from_lists(texts), SEEDS + 1), [len(t) for t in texts])
    assert sum(a != b for a, b in zip(together, other, strict=True)) > 25


def test_masking_is_on_the_cpu_whatever_the_default_device(masking, tokenizer, texts):
    packed = PackedTokens.from_lists(texts)
    with torch.device("meta"):
        found = WholeWordMasking(tokenizer)(packed, SEEDS)
    assert torch.equal(found.packed.ids, masking(packed, SEEDS).packed.ids)


def test_labels_are_what_stood_there_and_the_rest_is_untouched(masking, texts):
    for (seen, hidden), text in zip(
        parts(masking(PackedTokens.from_lists(texts), SEEDS), [len(t) for t in texts]), texts, strict=True
    ):
        assert hidden  # every text gives something to predict
        assert all(text[p] == label for p, label in hidden.items())
        assert all(seen[p] == i for p, i in enumerate(text) if p not in hidden)
        assert all(text[p] > 3 for p in hidden)  # never a special token, never <unk>


def test_words_are_hidden_whole(masking, texts, tokenizer):
    pieces, inside = tokenizer.pieces(), 0
    for (_, hidden), text in zip(
        parts(masking(PackedTokens.from_lists(texts), SEEDS), [len(t) for t in texts]), texts, strict=True
    ):
        for position in range(2, len(text) - 1):
            same_word = not masking.begins_word[text[position]]
            both_words = text[position] > 3 and text[position - 1] > 3
            if same_word and both_words:
                inside += position in hidden
                assert (position in hidden) == (position - 1 in hidden), pieces[text[position]]
    assert inside > 50  # there was something to keep whole


def test_without_spaces_every_piece_is_a_word(masking, tokenizer):
    begins = dict(zip(tokenizer.pieces(), masking.begins_word.tolist(), strict=True))
    assert all(flag for piece, flag in begins.items() if piece.startswith("▁"))
    han = [p for p in begins if p and "\u4e00" <= p[0] <= "\u9fff"]
    latin = [p for p in begins if p.isascii() and p.isalpha()]
    assert han
    assert all(begins[p] for p in han)
    assert latin
    assert not any(begins[p] for p in latin)


def test_shares_are_those_of_bert(tokenizer):
    masking = WholeWordMasking(tokenizer, share=0.2)
    mask = tokenizer.mask_id
    ids = torch.randint(4, 481, (200, 300), generator=torch.Generator().manual_seed(0))
    packed = PackedTokens.from_lists([[0, *row, 2] for row in ids.tolist()])
    masked = masking(packed, torch.arange(200))
    n = len(masked.labels)
    assert n / 60000 == pytest.approx(0.2, abs=0.01)
    seen = masked.packed.ids[masked.places]
    assert (seen == mask).double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (seen == masked.labels).double().mean().item() == pytest.approx(0.1, abs=0.015)
    random = seen[(seen != mask) & (seen != masked.labels)]
    assert random.min() >= 4
    assert random.unique().numel() > 400


def test_both_kinds_of_tokenizer_mask_alike(masking, tokenizer, texts, spm_file, tmp_path):
    from transformers import XLMRobertaTokenizer

    XLMRobertaTokenizer.from_pretrained(spm_file.parent).save_pretrained(tmp_path)
    other = WholeWordMasking(Tokenizer.from_file(tmp_path / "tokenizer.json"))
    packed = PackedTokens.from_lists(texts)
    assert torch.equal(masking(packed, SEEDS).packed.ids, other(packed, SEEDS).packed.ids)


def test_empty_texts_hide_nothing_and_wrong_input_is_refused(masking, tokenizer):
    masked = masking(PackedTokens.from_lists([[0, 2], [0, 3, 2]]), torch.tensor([1, 2]))
    assert len(masked.places) == len(masked.labels) == 0
    assert masked.to("meta").packed.ids.is_meta
    with pytest.raises(ValueError, match=r"expected torch.int64 \[1\]"):
        masking(PackedTokens.from_lists([[0, 2]]), torch.zeros(2))
    with pytest.raises(ValueError, match="share is 1"):
        WholeWordMasking(tokenizer, share=1)
