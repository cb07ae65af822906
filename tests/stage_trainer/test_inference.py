"""How `encode` computes: the dtype by device, images made ready by threads, no vector that is not finite."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.encoding.ahead import ahead, available
from stage_trainer.encoding.precision import dtype_of
from stage_trainer.errors import UserError


@pytest.mark.parametrize(
    ("capability", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_gpus_compute_in_16_bits_by_default(monkeypatch, capability, dtype):
    gpu, asked = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert dtype_of("auto", gpu) == dtype
    assert asked == [gpu]
    assert dtype_of("float32", gpu) == torch.float32


def test_the_cpu_computes_in_float32_unless_it_is_told():
    cpu = torch.device("cpu")
    assert dtype_of("auto", cpu) == torch.float32
    assert dtype_of("float16", cpu) == torch.float16
    with pytest.raises(UserError, match="dtype is 'half'; expected auto, float32, bfloat16, float16"):
        dtype_of("half", cpu)


def test_the_towers_compute_in_the_dtype_and_give_float32(reader, monkeypatch):
    mixed = ["a red disk", Image.new("RGB", (30, 20), "red")]
    seen, product = set(), torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a: seen.add(torch.is_autocast_enabled("cpu")) or product(*a)
    )
    exact = reader.encode(mixed)
    assert seen == {False}
    for call in (
        lambda **o: reader.encode(mixed, **o),
        lambda **o: np.concatenate([reader.encode_text(mixed[:1], **o), reader.encode_image(mixed[1:], **o)]),
    ):
        seen.clear()
        found = call(dtype="bfloat16")
        assert seen == {True}
        assert found.dtype == np.float32
        assert 0 < np.abs(found - exact).max() < 0.03
        assert np.array_equal(call(dtype="float32"), exact)
    # What "auto" chooses is what is computed in.
    monkeypatch.setattr("stage_trainer.encoding.encode.dtype_of", lambda asked, device: torch.bfloat16)
    assert np.array_equal(reader.encode(mixed), reader.encode(mixed, dtype="bfloat16"))
    assert not np.array_equal(reader.encode(mixed), exact)


def test_a_vector_that_is_not_finite_is_refused(reader, monkeypatch):
    encode = type(reader.text).encode
    monkeypatch.setattr(type(reader.text), "encode", lambda *a, **o: encode(*a, **o) * [[1], [np.inf], [np.nan]])
    with pytest.raises(
        UserError, match=r"inputs\[1\] and 1 more: the vector is not finite \(dtype 'auto'\); try dtype='float32'"
    ):
        reader.encode(["a", "b", "c"])


def test_threads_make_images_ready_and_keep_their_order(reader, monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(12)]
    used, prepare = set(), type(reader.vision).preprocess
    monkeypatch.setattr(
        type(reader.vision), "preprocess", lambda *a, **o: used.add(threading.current_thread()) or prepare(*a, **o)
    )
    expected = reader.encode_image(images)
    for threads in (1, 3, None):
        used.clear()
        assert np.abs(reader.encode(images, threads=threads, batch_size=5) - expected).max() < 1e-6
        assert (threading.main_thread() in used) == (threads == 1 or available() == 1)
    images[7].save(tmp_path / "large.png")
    mixed = [*images[:3], b"no image", tmp_path / "large.png"]
    found = reader.encode(mixed, errors="skip", max_pixels=599, threads=2)
    assert [each.place for each in found.skipped] == [0, 1, 2, 3, 4]
    assert "30x20 pixels, more than the 599 allowed" in found.skipped[4].reason
    for wrong in ({"threads": 0}, {"max_pixels": "many"}, {"threads": True}):
        with pytest.raises(UserError, match="expected a whole number from 1"):
            reader.encode(images, **wrong)


@pytest.mark.parametrize("threads", [1, 3])
def test_work_ahead_is_in_order_bounded_and_ends_with_its_caller(threads):
    begun = []

    def make(number):
        begun.append(number)
        if number == 50:
            raise ZeroDivisionError
        return number * number

    made = ahead(make, range(100), threads)
    assert [next(made) for _ in range(10)] == [n * n for n in range(10)]
    assert len(begun) <= 10 + 2 * threads
    made.close()
    assert len(begun) <= 10 + 2 * threads
    made = ahead(make, range(40, 100), threads)
    with pytest.raises(ZeroDivisionError):
        list(made)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]
