"""Gradient caching against one big batch, in float64 with plain torch. Under DeepSpeed: tests/integration."""

import contextlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from contrastive_losses import matryoshka_info_nce
from stage_trainer.model import DualEncoder
from stage_trainer.objective import Batch, MultiTask
from stage_trainer.recipe import GradientCache, Loss
from stage_trainer.step import forward_backward, image_chunks, text_chunks
from text_tower import PackedTokens, TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig

BOTH = ("image_text", "text")
OF_KIND = {"multi_task": {}, "unified": {"negatives": 0, "views": 2}}


class PlainEngine:
    """No DeepSpeed, one or several ranks whose gradients are averaged after the last backward pass."""

    def __init__(self, kind="multi_task", dtype=torch.float64, adapters=("a",), temperature=0.07):
        torch.manual_seed(0)
        text = TextTowerConfig(
            vocab_size=50, width=32, layers=2, heads=2, mlp_width=64, dropout=0.1, lora_rank=2, adapters=adapters
        )
        vision = VisionTowerConfig(resolution=24, patch=8, width=32, layers=2, heads=2, hidden=48)
        model = DualEncoder(TextTower(text), VisionTower(vision), temperature=temperature).to(dtype).train()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        self.objective = MultiTask(model, Loss(kind, dims=(32, 16)), "fp32")
        self.passes = 0

    def embed(self, part, patch_dropout):
        self.passes += 1
        return self.objective(part, patch_dropout=patch_dropout)

    def forward_passes(self, mine):
        return mine

    @contextlib.contextmanager
    def backwards(self):
        yield lambda loss, last: loss.backward()
        if dist.is_initialized():
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def gradients(self):
        return {n: p.grad for n, p in self.objective.model.named_parameters() if p.grad is not None}


def make_batch(images=7, pairs=6, negatives=3, seed=0, rows=slice(None), views=0) -> Batch:
    """The rows of a global batch: of its pairs of both kinds, and of its views of each image."""
    g = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(3, 50, (n,), generator=g).tolist()
        for n in torch.randint(1, 9, (images + pairs * (2 + negatives),), generator=g).tolist()
    ]
    i, p = range(images)[rows], range(pairs)[rows]
    hard = [images + 2 * pairs + k * negatives + n for k in p for n in range(negatives)]
    chosen = [*i, *[images + k for k in p], *[images + pairs + k for k in p], *hard]
    pixels = torch.randint(0, 256, (1 + views, images, 3, 24, 24), generator=g, dtype=torch.uint8)
    return Batch(
        images=pixels[:, rows].flatten(0, 1),
        image_seeds=torch.arange((1 + views) * images).view(1 + views, images)[:, rows].flatten(),
        texts=PackedTokens.from_lists([texts[n] for n in chosen]),
        text_seeds=torch.tensor(chosen),
        image_ids=torch.arange(images)[rows] // 2,
        pairs=len(p),
        negatives=negatives,
        text_ids=torch.arange(pairs)[rows],
    )


def step(batch, cache=None, group=None, tasks=BOTH, kind="multi_task"):
    engine = PlainEngine(kind)
    losses = forward_backward(engine, batch, tasks=tasks, patch_dropout=0.5, group=group, cache=cache)
    return {t: loss.item() for t, (loss, _) in losses.items()}, engine.gradients(), engine.passes


@pytest.mark.parametrize("cache", [GradientCache(2, 10), GradientCache(0, 7), GradientCache(3, 0), GradientCache(1, 1)])
@pytest.mark.parametrize("negatives", [0, 3])
def test_caching_gives_the_gradients_of_one_big_batch(cache, negatives):
    batch = make_batch(negatives=negatives)
    losses, gradients, _ = step(batch)
    cached_losses, cached, passes = step(batch, cache)
    assert passes > 2
    assert cached_losses == pytest.approx(losses, rel=1e-12)
    assert cached.keys() == gradients.keys()
    assert {"logit_scale", "text_logit_scale"} <= cached.keys()
    assert any("lora" in name for name in cached)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_no_patch_is_dropped_unasked():
    engine, other = PlainEngine(), PlainEngine()
    forward_backward(engine, make_batch(), tasks=BOTH)
    forward_backward(other, make_batch(), tasks=BOTH, patch_dropout=0.0)
    torch.testing.assert_close(engine.gradients(), other.gradients(), rtol=0, atol=0)
    _, dropped, _ = step(make_batch())
    assert not torch.equal(dropped["vision.pos_embed"], engine.gradients()["vision.pos_embed"])


@pytest.mark.parametrize("task", BOTH)
def test_caching_serves_a_task_alone(task):
    batch = make_batch(pairs=0, negatives=0) if task == "image_text" else make_batch(images=0)
    if task == "text":
        batch = Batch(**{**vars(batch), "images": None})
    _, gradients, _ = step(batch, tasks=(task,))
    _, cached, _ = step(batch, GradientCache(2, 10), tasks=(task,))
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
def test_a_unified_batch_is_one_info_nce_over_all_pairs_and_views(cache):
    """Against InfoNCE over the columns of the paper's figure 3, put together by hand; one temperature learns."""
    batch = make_batch(negatives=0, views=2)
    losses, gradients, _ = step(batch, cache, kind="unified")
    engine = PlainEngine("unified")
    embedded = engine.embed(batch, 0.5)
    images, first, second = embedded.images.split(7)
    captions, queries, targets = embedded.texts.split([7, 6, 6])
    ids = torch.cat([batch.image_ids, 100 + batch.text_ids, batch.image_ids])
    columns = torch.cat([images, queries, first]), torch.cat([captions, targets, second])
    temperature = torch.exp(-engine.objective.model.logit_scale)
    loss = matryoshka_info_nce(*columns, temperature=temperature, dims=(32, 16), query_ids=ids)
    loss.backward()
    assert losses == {"unified": pytest.approx(loss.item(), rel=1e-12)}
    expected = engine.gradients()
    assert gradients.keys() == expected.keys()
    assert "text_logit_scale" not in gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


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


@pytest.mark.parametrize("kind", ["multi_task", "unified"])
def test_two_ranks_with_caching_give_the_gradients_of_one_process(tmp_path, kind):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path), kind]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    losses, gradients, _ = step(make_batch(**OF_KIND[kind]), kind=kind)
    for rank in (0, 1):
        theirs, averaged = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == pytest.approx(losses, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(averaged[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def one_rank(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(0, 2) if rank == 0 else slice(2, None)
    batch = make_batch(rows=rows, **OF_KIND[kind])
    losses, gradients, _ = step(batch, GradientCache(2, 9), dist.group.WORLD, kind=kind)
    torch.save((losses, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), *sys.argv[2:])
