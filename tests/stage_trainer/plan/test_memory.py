"""The estimate of a whole step against the profiler's account of one that is really run, on a CPU."""

import contextlib
from dataclasses import replace

import pytest
import torch
from contrastive_losses import matryoshka_margin_mse
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.plan.devices import DEVICES, Device
from stage_trainer.plan.memory import Model, Setting, Sizes, estimate, loss_bytes, resting_parts, update_parts
from stage_trainer.recipe import GradientCache, LossConfig, Trainable
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from stage_trainer.tasks.distill import teacher_loss
from text_tower import PackedTokens, TextTower, TextTowerConfig
from vision_tower import VisionTower, VisionTowerConfig

CPU = Device("cpu", 2**33, 1.0, None, 1.0, None, kind="cpu")
TEXT = TextTowerConfig(vocab_size=500, width=64, layers=3, heads=2, mlp_width=256, lora_rank=4, adapters=("a",))
VISION = VisionTowerConfig(resolution=48, patch=8, width=64, layers=4, heads=2)
LENGTH = 20


class PlainEngine:
    """A step without DeepSpeed."""

    def __init__(self, text: TextTowerConfig, vision: VisionTowerConfig, precision: str):
        self.model = DualEncoder(TextTower(text), VisionTower(vision)).train()
        self.objective = ContrastiveObjective(self.model, LossConfig(dims=(64, 32)), precision)

    def upload(self, part):
        return part

    def forward(self, part, **options):
        return self.objective(part, **options)

    def cast_once(self):
        return cast_once(self.objective) if self.objective.precision == "bf16" else contextlib.nullcontext()

    def forward_passes(self, mine):
        return mine

    @contextlib.contextmanager
    def backwards(self):
        yield lambda loss, last: loss.backward()


def planned_model(engine: PlainEngine, precision: str, patch_dropout: float) -> Model:
    learning = [p.numel() for p in engine.model.parameters()]
    return Model(
        engine.model.text.config, engine.model.vision.config, Trainable(), patch_dropout, precision, "adamw", (64, 32),
        weights=sum(learning), learning=sum(learning), largest=max(learning), matrices=0,
    )  # fmt: skip


def a_batch(images: int, pairs: int, negatives: int, image_negatives: int = 0) -> Batch:
    texts, shown = images + pairs * (2 + negatives), images * (1 + image_negatives)
    return Batch(
        images=torch.randint(0, 256, (shown, 3, 48, 48), dtype=torch.uint8),
        image_seeds=torch.arange(shown),
        texts=PackedTokens.from_lists([[5] * LENGTH] * texts),
        text_seeds=torch.arange(texts),
        image_ids=torch.arange(images),
        pairs=pairs,
        negatives=negatives,
        text_ids=torch.arange(pairs),
        image_negatives=image_negatives,
    )


@pytest.mark.parametrize(
    ("images", "pairs", "negatives", "checkpointing", "cache", "precision", "dropout"),
    [
        (32, 32, 0, False, None, "fp32", 0.0),
        (32, 32, 0, True, None, "fp32", 0.5),
        (16, 8, 3, False, None, "bf16", 0.0),
        (96, 64, 0, False, GradientCache(16, 16 * LENGTH), "fp32", 0.25),
        (64, 16, 3, True, GradientCache(16, 64 * LENGTH), "fp32", 0.0),
        (64, 16, 3, False, GradientCache(8, 16 * LENGTH), "bf16", 0.0),
    ],
)
def test_a_step_takes_what_the_profiler_measures(
    profiled_peak, images, pairs, negatives, checkpointing, cache, precision, dropout
):
    text, vision = replace(TEXT, checkpointing=checkpointing), replace(VISION, checkpointing=checkpointing)
    engine, batch = PlainEngine(text, vision, precision), a_batch(images, pairs, negatives)

    def run():
        engine.model.zero_grad()
        forward_backward(engine, batch, pairs=("image_text", "text"), patch_dropout=dropout, cache=cache)
        engine.model.zero_grad()

    sizes = Sizes(images, images + pairs * (2 + negatives), LENGTH, pairs, negatives, 1)
    model = planned_model(engine, precision, dropout)
    planned = estimate(model, sizes, Setting(cache, checkpointing, checkpointing, 0), CPU)
    ours = planned.total - sum(resting_parts(model, 0, 1).values()) - planned.parts["batch"]
    assert ours == pytest.approx(profiled_peak(run), rel=0.15)


@pytest.mark.parametrize("cache", [None, GradientCache(16, 16 * LENGTH)])
def test_hard_negative_images_take_what_the_profiler_measures(profiled_peak, cache):
    engine, batch = PlainEngine(TEXT, VISION, "fp32"), a_batch(16, 0, 0, image_negatives=4)

    def run():
        engine.model.zero_grad()
        forward_backward(engine, batch, pairs=("image_text",), cache=cache)
        engine.model.zero_grad()

    model, sizes = planned_model(engine, "fp32", 0.0), Sizes(80, 16, LENGTH, 0, 0, 1, image_negatives=4)
    planned = estimate(model, sizes, Setting(cache, False, False, 0), CPU)
    ours = planned.total - sum(resting_parts(model, 0, 1).values()) - planned.parts["batch"]
    assert planned.parts["batch"] == 80 * (3 * 48 * 48 + 8) + 8 * 16 * LENGTH
    assert ours == pytest.approx(profiled_peak(run), rel=0.15)


def test_the_loss_of_images_with_negatives_takes_what_that_of_texts_does():
    model = planned_model(PlainEngine(TEXT, VISION, "fp32"), "fp32", 0.0)
    of_images = Sizes(64 * 4, 64, LENGTH, 0, 0, 8, image_negatives=3)
    assert loss_bytes(model, of_images, CPU) == loss_bytes(model, Sizes(0, 64 * 5, LENGTH, 64, 3, 8), CPU)


def test_on_a_gpu_chunks_lie_in_one_upload_of_the_whole_batch():
    model = planned_model(PlainEngine(TEXT, VISION, "bf16"), "bf16", 0.0)
    sizes, cache = Sizes(512, 512, LENGTH, 0, 0, 1), GradientCache(64, 64 * LENGTH)
    planned = estimate(model, sizes, Setting(cache), DEVICES["h100-80gb"])
    assert planned.parts["batch"] == 512 * (3 * 48 * 48 + 8) + 8 * 512 * LENGTH


def test_adamw_takes_its_state_and_on_a_cpu_a_weight_at_a_time(profiled_peak):
    engine = PlainEngine(TEXT, VISION, "fp32")
    model = planned_model(engine, "fp32", 0.0)
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(engine.model.parameters())
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert state == resting_parts(model, 0, 1)["optimizer state"]
    assert update_parts(model, 0, 1, CPU)["reduction and update"] == pytest.approx(
        profiled_peak(optimizer.step), rel=0.01
    )


@pytest.mark.parametrize(
    ("own", "negatives", "ranks", "exchange"),
    [
        (256, 0, 1, "auto"),
        (512, 3, 1, "auto"),
        (128, 0, 8, "auto"),
        (128, 7, 8, "auto"),
        (512, 0, 8, "ring"),
        (512, 3, 32, "ring"),
    ],
)
def test_the_loss_takes_what_the_profiler_measures(profiled_peak, own, negatives, ranks, exchange):
    """Ranks as torch's fake process group has them: every other rank says what this one says."""
    from contrastive_losses import matryoshka_info_nce
    from torch.testing._internal.distributed.fake_pg import FakeStore

    width, dims = 256, (256, 128, 64, 32)
    queries, targets = (torch.randn(own, width, requires_grad=True) for _ in range(2))
    hard = torch.randn(own, negatives, width, requires_grad=True) if negatives else None

    def run():
        loss = matryoshka_info_nce(
            queries, targets, negatives=hard, temperature=0.07, dims=dims, group=group, return_stats=True,
            exchange=exchange,
        )  # fmt: skip
        loss[0].backward()
        queries.grad = targets.grad = None
        if hard is not None:
            hard.grad = None

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        group = torch.distributed.group.WORLD if ranks > 1 else None
        measured = profiled_peak(run)
    finally:
        torch.distributed.destroy_process_group()
    engine = PlainEngine(TEXT, VISION, "fp32")
    model = replace(planned_model(engine, "fp32", 0.0), text=replace(TEXT, width=width), dims=dims)
    model = replace(model, exchange=exchange)
    sizes = Sizes(0, own * (2 + negatives), LENGTH, own, negatives, ranks)
    assert sum(loss_bytes(model, sizes, CPU)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "own", "ranks"), [("relational", 256, 1), ("relational", 128, 8), ("cosine", 2048, 1), ("cosine", 512, 8)]
)
def test_a_teachers_loss_takes_what_the_profiler_measures(profiled_peak, monkeypatch, kind, own, ranks):
    """Every other rank has as many rows."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    width = 64
    ours, wanted = torch.randn(own, width, requires_grad=True), torch.randn(own, width)

    def run():
        teacher_loss(ours, wanted, kind, torch.distributed.group.WORLD if ranks > 1 else None).backward()
        ours.grad = None

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, **_: sums.fill_(sums.max()))
    try:
        measured = profiled_peak(run)
    finally:
        torch.distributed.destroy_process_group()
    model = planned_model(PlainEngine(TEXT, VISION, "fp32"), "fp32", 0.0)
    sizes = Sizes(0, 2 * own, LENGTH, own, 0, ranks, replaced=("text",), taught=(own,), relational=kind == "relational")
    assert sum(loss_bytes(model, sizes, CPU)) == pytest.approx(measured, rel=0.15)


def test_margins_take_what_the_profiler_measures(profiled_peak):
    own, negatives, width = 512, 7, 64
    queries, targets = (torch.randn(own, width, requires_grad=True) for _ in range(2))
    hard, scores = torch.randn(own, negatives, width, requires_grad=True), torch.randn(own, 1 + negatives)

    def run():
        matryoshka_margin_mse(queries, targets, hard, scores, dims=(64, 32)).backward()
        queries.grad = targets.grad = hard.grad = None

    model, texts = planned_model(PlainEngine(TEXT, VISION, "fp32"), "fp32", 0.0), own * (2 + negatives)
    sizes = Sizes(0, texts, LENGTH, own, negatives, 1, replaced=("text",), taught=(texts,))
    assert sum(loss_bytes(model, sizes, CPU)) == pytest.approx(profiled_peak(run), rel=0.15)


def test_zero_shares_out_the_state_but_not_the_gradients():
    model = planned_model(PlainEngine(TEXT, VISION, "fp32"), "fp32", 0.0)
    rest = {zero: resting_parts(model, zero, 8) for zero in (0, 1, 2, 3)}
    assert (
        rest[1]["optimizer state"]
        == rest[3]["optimizer state"]
        == pytest.approx(rest[0]["optimizer state"] / 8, rel=0.01)
    )
    assert rest[1] == rest[2]
    assert update_parts(model, 1, 8, CPU)["gradients"] == update_parts(model, 0, 8, CPU)["gradients"]
