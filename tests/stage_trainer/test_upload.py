"""What a batch takes to a GPU: copies from pinned memory, on a stream of their own. The GPU is PyTorch's fake one, and
its streams take notes."""

import contextlib
import dataclasses

import pytest
import torch
from stage_trainer.batch import Batch, tensors_of
from stage_trainer.engine.upload import Uploader
from text_tower import PackedTokens
from text_tower.packed import ByLength, on_device
from torch._subclasses import FakeTensorMode

GPU = torch.device("cuda", 0)


def make_batch():
    texts = PackedTokens.from_lists([[3, 4, 5], [6], [7, 8], [9, 3]])
    images = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    return Batch(
        images, torch.arange(2), texts, torch.arange(4), image_ids=torch.arange(2), pairs=1, negatives=0,
        text_ids=torch.arange(1),
    )  # fmt: skip


class Stream:
    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    def wait_stream(self, other):
        self.notes.append((self.name, "waits for", other.name))


@pytest.fixture
def notes(monkeypatch):
    """What happens to streams and tensors of a GPU that takes notes."""
    found, now = [], ["computing"]
    streams = {name: Stream(found, name) for name in ("computing", "copying")}
    to = torch.Tensor.to

    @contextlib.contextmanager
    def on(stream):
        now.append(stream.name)
        yield
        now.pop()

    def copied(tensor, *args, **options):
        if tensor.device.type == "cpu":
            found.append((now[-1], "copies", tuple(tensor.shape), getattr(tensor, "pinned", False), options))
        return to(tensor, *args, **options)

    def pinned(tensor):
        tensor = tensor.clone()
        tensor.pinned = True
        return tensor

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams["copying"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["computing"])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, s: found.append((s.name, "uses", tensor.shape)))
    return found


def test_a_gpu_copies_from_pinned_memory_beside_what_it_computes(notes):
    batch = make_batch()
    sizes = sorted(tuple(tensor.shape) for tensor in tensors_of(batch.to(torch.device("cpu"))))
    layout = ByLength.of(batch.texts)
    notes.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = Uploader(GPU)(batch)
        on_device(layout, GPU)
    assert {tensor.device for tensor in tensors_of(moved)} == {GPU}
    wait = notes.index(("computing", "waits for", "copying"))
    copies, after = notes[:wait], notes[wait + 1 :]
    assert sorted(shape for *_, shape, _, _ in copies) == sizes
    assert all(note[:2] == ("copying", "copies") for note in copies)
    assert {note[:2] for note in after[: len(sizes)]} == {("computing", "uses")}
    assert sorted(tuple(shape) for *_, shape in after[: len(sizes)]) == sizes
    plan = after[len(sizes) :]  # of the text tower, for where each text is
    assert len(plan) == sum(isinstance(getattr(layout, f.name), torch.Tensor) for f in dataclasses.fields(layout))
    for *_, is_pinned, options in (*copies, *plan):
        assert is_pinned
        assert options["non_blocking"]


def test_what_is_there_is_not_copied_again(notes):
    batch, upload = make_batch(), Uploader(GPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = upload(batch)
        notes.clear()
        again = upload(moved)
    assert all(one is other for one, other in zip(tensors_of(moved), tensors_of(again), strict=True))
    assert not [note for note in notes if note[1] == "copies"]
