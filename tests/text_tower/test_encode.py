"""encode: texts in, numpy rows out, in the order given."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
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


class Table:
    """As pandas' and polars' DataFrames: iterating gives the names of columns."""

    columns = ("id", "text")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (Table(), "texts is a Table, whose parts are its keys or columns"),
        (pa.table({"id": ["1"], "text": ["a"]}), "texts is a Table"),
        ({"text": "a b", "id": "7"}, "texts is a dict"),
        ({"text": "a b"}.keys(), "texts is a dict_keys"),
        ({"a", "b"}, "texts is a set"),
        (frozenset("ab"), "texts is a frozenset"),
        (b"a b", "texts is bytes"),
        (bytearray(b"a"), "texts is bytearray"),
        (np.array([["a", "b"]]), "texts is a ndarray of 2 dimensions"),
        (np.array("a"), "texts is a ndarray of 0 dimensions"),
        (5, "texts is 5, a int"),
        (None, "texts is None, a NoneType"),
        (["a", float("nan")], r"texts\[1\] is nan, a float"),
        (["a", 3], r"texts\[1\] is 3, a int"),
        (iter(["a", None]), r"texts\[1\] is None"),
        ([["a"], ["b"]], r"texts\[0\] is \['a'\], a list"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_as_a_bare_string_is(tower, texts, message):
    with pytest.raises(ValueError, match=message):
        tower.encode(texts)


def test_columns_arrays_and_iterators_are_lists_of_texts(tower):
    texts = ["alpha beta", "gamma", ""]
    expected = tower.encode(texts)
    for given in (tuple(texts), np.array(texts), np.array(texts, dtype=object), iter(texts), (t for t in texts),
                  iter(dict.fromkeys(texts)), dict(enumerate(texts)).values()):  # fmt: skip
        np.testing.assert_array_equal(tower.encode(given), expected)
    assert tower.encode([]).shape == (0, 32)


def test_numpys_integers_are_numbers(tower):
    texts = ["alpha beta", "gamma"]
    np.testing.assert_array_equal(
        tower.encode(texts, truncate_dim=np.int64(8), max_length=np.int32(5), batch_size=np.uint8(1)),
        tower.encode(texts, truncate_dim=8, max_length=5, batch_size=1),
    )
    for option in ("truncate_dim", "max_length", "batch_size", "batch_tokens"):
        for wrong in (8.0, True, "8", 0):
            with pytest.raises(ValueError, match=f"{option} is {wrong!r}"):
                tower.encode(texts, **{option: wrong})


def test_threads_share_a_tower_and_its_mode_is_kept(tower, sentences):
    texts = list(sentences.values())
    expected = tower.encode(texts)
    tower.train()
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda k: tower.encode(texts[:k], max_length=512), [3, 30, 11, 7] * 3))
    for rows in parts:
        np.testing.assert_allclose(rows, expected[: len(rows)], atol=1e-5)
    assert all(module.training for module in tower.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorchs_defaults_change_nothing(tower, tmp_path, sentences, dtype):
    texts = list(sentences.values())
    expected = tower.encode(texts)
    tower.save_pretrained(tmp_path / "model")
    tower.save_pretrained(tmp_path / "plain", merge=True)
    torch.set_default_dtype(dtype)
    try:
        np.testing.assert_array_equal(tower.encode(texts), expected)
        with torch.device("meta"):  # where tensors would go that are not told
            np.testing.assert_array_equal(tower.encode(texts), expected)
            loaded = type(tower).from_pretrained(tmp_path / "model", adapters=("separation",))
            fresh = type(tower).from_pretrained(tmp_path / "plain", adapters=("fresh",), lora_rank=2)
        assert {p.dtype for p in [*loaded.parameters(), *fresh.parameters()]} == {torch.float32}
        np.testing.assert_array_equal(loaded.encode(texts, task="separation"), tower.encode(texts, task="separation"))
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_runs_inside_inference_mode(tower):
    expected = tower.encode(["a b"])
    with torch.inference_mode():
        np.testing.assert_array_equal(tower.encode(["a b"]), expected)
    tower.eval()(PackedTokens.from_lists([[0, 5, 2]])).sum().backward()  # nothing of it lingers


def test_the_towers_own_truncate_dim_is_the_default(tower):
    tower.configure(truncate_dim=8)
    assert tower.encode(["a"]).shape == (1, 8)
    assert tower.encode(["a"], truncate_dim=32).shape == (1, 32)


@pytest.mark.parametrize(
    ("option", "least"), [("max_length", 2), ("batch_size", 1), ("batch_tokens", 1), ("truncate_dim", 1)]
)
def test_numbers_below_the_least_that_makes_sense_are_refused(tower, option, least):
    assert tower.encode(["a b c"], **{option: least}).shape == (1, 1 if option == "truncate_dim" else 32)
    with pytest.raises(ValueError, match=rf"{option} is {least - 1}; expected .*\b{least}\b"):
        tower.encode(["a b c"], **{option: least - 1})
