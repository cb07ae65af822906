"""encode: texts in, numpy rows out, in the order given."""

import numpy as np
import pytest
import torch
from text_tower import PackedTokens


@pytest.fixture
def tower(make_tower, tokenizer, lora):
    return make_tower(vocab_size=482, tokenizer=tokenizer, instructions={"search": "find all: "}, dropout=0.2, **lora)


def test_rows_keep_the_order_of_the_texts_whatever_the_batch(tower, sentences):
    texts = [*sentences.values(), "", "a", "a"]
    alone = np.concatenate([tower.encode([text]) for text in texts])
    for batch_size in (1, 7, 64):
        np.testing.assert_allclose(tower.encode(texts, batch_size=batch_size), alone, atol=1e-5)
    assert alone.shape == (33, 32)
    assert alone.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


def test_truncation_comes_before_normalising(tower, sentences):
    texts = list(sentences.values())
    raw = tower.encode(texts, normalize=False)
    pooled = tower.eval()(PackedTokens.from_lists(tower.tokenizer(texts)))
    np.testing.assert_allclose(raw, pooled.detach(), atol=1e-5)
    short = tower.encode(texts, truncate_dim=8)
    np.testing.assert_allclose(short, raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True), atol=1e-5)


def test_encoding_leaves_the_mode_alone_and_keeps_no_gradient(tower):
    tower.train()
    first = tower.encode(["a b c"])
    assert tower.training
    np.testing.assert_array_equal(first, tower.eval().encode(["a b c"]))  # so dropout was off the first time
    assert not tower.training
    with pytest.raises(ValueError):
        tower.train().encode([None])
    assert tower.training


def test_a_task_selects_instruction_and_adapter_where_they_exist(tower):
    texts = ["a cat", "human rights"]
    plain = tower.encode(texts)
    np.testing.assert_array_equal(tower.encode(texts, task="retrieval.query"), plain)
    assert np.abs(tower.encode(texts, task="separation") - plain).max() > 1e-3
    instructed = tower.encode(texts, task="search")
    np.testing.assert_array_equal(instructed, tower.encode(["find all: " + t for t in texts]))
    with pytest.raises(ValueError, match=r"unknown task 'x'; this tower knows .*'separation', 'search'"):
        tower.encode(texts, task="x")


def test_long_texts_are_cut_to_what_is_allowed(tower, tokenizer):
    text = "human rights " * 400
    np.testing.assert_array_equal(tower.encode([text], max_length=9999), tower.encode([text], max_length=512))
    assert np.abs(tower.encode([text], max_length=5) - tower.encode([text])).max() > 1e-3


def test_no_texts_give_no_rows(tower):
    assert tower.encode([], truncate_dim=8).shape == (0, 8)


def test_what_cannot_be_encoded_is_refused(make_tower, tower, tokenizer):
    with pytest.raises(ValueError, match="no tokenizer; set one"):
        make_tower().encode(["a"])
    with pytest.raises(ValueError, match="single string"):
        tower.encode("a")
    with pytest.raises(ValueError, match=r"texts\[1\] is None"):
        tower.encode(["a", None], task="search")
    with pytest.raises(ValueError, match=r"texts\[0\] is b'\\xff', a bytes; expected a string"):
        tower.encode([b"\xff"])
    with pytest.raises(ValueError, match="truncate_dim is 33; expected 1 to 32"):
        tower.encode(["a"], truncate_dim=33)
    with pytest.raises(ValueError, match="batch_size is 0"):
        tower.encode(["a"], batch_size=0)
    with pytest.raises(ValueError, match=r"482 ids, but config.vocab_size is 400"):
        make_tower(vocab_size=400).tokenizer = tokenizer
    with pytest.warns(UserWarning, match="has 482 ids and config.vocab_size is 600"):
        make_tower(vocab_size=600).tokenizer = tokenizer


def test_a_progress_bar_counts_texts(tower, capsys):
    tower.encode(["a", "b", "c"], batch_size=2, show_progress=True)
    assert "3/3" in capsys.readouterr().err
    assert torch.is_grad_enabled()


def test_batches_stay_within_their_tokens(tower, sentences, monkeypatch):
    texts = [*sentences.values(), "", "a"]
    expected = tower.encode(texts)
    seen, forward = [], type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda self, p, **o: seen.append(p) or forward(self, p, **o))
    np.testing.assert_allclose(tower.encode(texts, batch_tokens=100), expected, atol=1e-5)
    assert len(seen) > 5
    assert all(len(p.ids) <= 100 or len(p) == 1 for p in seen)
    assert sorted(n for p in seen for n in p.lengths) == sorted(map(len, tower.tokenizer(texts)))
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        tower.encode(texts, batch_tokens=0)


def test_a_hundred_thousand_characters_are_one_text(tower):
    long = "human rights " * 8000
    assert np.isfinite(tower.encode(["", long])).all()
    np.testing.assert_allclose(tower.encode(["", long])[1], tower.encode([long[:5000]])[0], atol=1e-6)


def test_a_text_of_8192_tokens_is_encoded_as_the_tower_embeds_it(make_tower, tokenizer):
    tower = make_tower(vocab_size=482, tokenizer=tokenizer, max_length=8192)
    text = " ".join(["a b c d"] * 5000)
    (ids,) = tokenizer([text], max_length=8192)
    assert len(ids) == 8192
    with torch.no_grad():
        expected = tower.eval()(PackedTokens.from_lists([ids]))[0]
    row, short = tower.encode([text, "a"], max_length=8192, normalize=False)
    np.testing.assert_allclose(row, expected, atol=1e-5)
    np.testing.assert_allclose(short, tower.encode(["a"], normalize=False)[0], atol=1e-5)
