"""Operations counted from shapes, against torch's counter over the real modules, forward and backward."""

from dataclasses import replace

import pytest
import torch
from stage_trainer.plan.flops import (
    StepShape,
    kept_patches,
    loss_flops,
    masked_lm_flops,
    step_flops,
    text_flops,
    vision_flops,
)
from stage_trainer.recipe import Trainable
from stage_trainer.tasks.distill import teacher_loss
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vision_tower import VisionTower, VisionTowerConfig, patch_keep_indices

LENGTHS = (3, 17, 9, 17, 40, 1)
TEXT = {"vocab_size": 50, "width": 32, "layers": 3, "heads": 2, "mlp_width": 80}
JINA_BERT = {"positions": "alibi", "mlp": "geglu"}
VISION = {"resolution": 45, "patch": 8, "width": 32, "layers": 3, "heads": 2, "mlp_width": 52}


def counted(module, forward) -> tuple[int, int]:
    """(forward, backward) by torch's counter. Attention in plain products: the counter gives fused kernels their
    recomputed scores."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as there:
            out = forward()
        with FlopCounterMode(display=False) as back:
            if out.requires_grad:
                out.sum().backward()
    return there.get_total_flops(), back.get_total_flops()


def texts(lengths=LENGTHS) -> StepShape:
    return StepShape(texts=len(lengths), tokens=sum(lengths), squared_tokens=sum(n * n for n in lengths))


@pytest.mark.parametrize(
    ("adapters", "trainable"), [((), "all"), ((), "none"), (("a",), "all"), (("a",), "adapters"), (("a",), "none")]
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("block", [{}, JINA_BERT], ids=["xlm-roberta", "jina-bert"])
def test_text_flops_are_those_of_the_tower(adapters, trainable, checkpointing, block):
    lora = {"adapters": adapters, "lora_rank": 4 * len(adapters)}
    config = TextTowerConfig(**TEXT, **block, **lora, checkpointing=checkpointing)
    tower = TextTower(config).train()
    tower.set_trainable(trainable)
    packed = PackedTokens.from_lists([[7] * n for n in LENGTHS])
    forward, backward = counted(tower, lambda: tower(packed))
    ours = text_flops(config, texts(), trainable)
    assert (ours.forward, ours.backward + ours.recomputed) == (forward, backward)
    assert bool(ours.recomputed) == (checkpointing and trainable != "none")


@pytest.mark.parametrize("trainable", ["all", "adapters", "projector", "none"])
@pytest.mark.parametrize("hidden", [0, 40])
def test_a_projector_is_counted_and_alone_where_the_tower_is_stored(hidden, trainable):
    projector = {"projector": 24, "projector_hidden": hidden}
    text = TextTower(TextTowerConfig(**TEXT, **projector, adapters=("a",), lora_rank=4))
    vision = VisionTower(VisionTowerConfig(**VISION, **projector, lora_rank=2)).set_trainable(trainable)
    text.set_trainable(trainable)
    packed, images = PackedTokens.from_lists([[7] * n for n in LENGTHS]), torch.randn(4, 3, 45, 45)
    shape = StepShape(images=4, kept_patches=kept_patches(vision.config, 0.0))
    for tower, forward, ours in (
        (text, lambda: text(packed), text_flops(text.config, texts(), trainable)),
        (vision, lambda: vision(images), vision_flops(vision.config, shape, trainable)),
    ):
        assert (ours.forward, ours.backward) == counted(tower, forward)
    if trainable in ("projector", "none"):
        stored = replace(shape, texts=6, stored=("image", "text"))
        ours = step_flops(text.config, vision.config, stored, trainable=Trainable(image=trainable, text=trainable))
        loss = loss_flops(stored, 24, 24, trainable != "none")
        rows = torch.randn(6, 32), torch.randn(4, 32)
        found = [counted(t, lambda t=t, r=r: t.project(r)) for t, r in zip((text, vision), rows, strict=True)]
        sums = map(sum, zip(*found, strict=True))
        assert (ours.forward - loss.forward, ours.backward - loss.backward) == tuple(sums)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("rank", "trainable"), [(0, "all"), (0, "none"), (2, "all"), (2, "adapters"), (2, "none")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_vision_flops_are_those_of_the_tower(dropout, rank, trainable, checkpointing):
    config = VisionTowerConfig(**VISION, lora_rank=rank, checkpointing=checkpointing)
    tower = VisionTower(config).set_trainable(trainable)
    keep = patch_keep_indices(range(4), config.num_patches, dropout) if dropout else None
    images = torch.randn(4, 3, 45, 45)
    forward, backward = counted(tower, lambda: tower(images, keep=keep))
    ours = vision_flops(config, StepShape(images=4, kept_patches=kept_patches(config, dropout)), trainable)
    assert (ours.forward, ours.backward + ours.recomputed) == (forward, backward)
    assert bool(ours.recomputed) == (checkpointing and trainable != "none")


def test_one_product_serves_all_prefixes_of_the_loss():
    from contrastive_losses.plain import plain_info_nce

    queries, targets, negatives = (torch.randn(*s, requires_grad=True) for s in ((6, 32), (6, 32), (6, 3, 32)))
    forward, backward = counted(
        None, lambda: plain_info_nce(queries, targets, negatives=negatives, temperature=0.1, dims=(32,))
    )
    ours = loss_flops(StepShape(pairs=6, negatives=3), 32, 40)
    assert (ours.forward, ours.backward) == (forward, backward)
    assert ours.recomputed == ours.forward
    assert loss_flops(StepShape(images=6 * 4, image_negatives=3), 32, 40) == ours


def test_a_relational_loss_takes_the_place_of_a_contrastive_one_or_comes_beside_it():
    ours, wanted = torch.randn(6, 32, requires_grad=True), torch.randn(6, 32)
    forward, backward = counted(None, lambda: teacher_loss(ours, wanted, "relational"))
    found = loss_flops(StepShape(pairs=3, replaced=("text",), related=(6,)), 8, 32)
    assert (found.forward, found.backward, found.recomputed) == (forward, backward, 0)
    contrastive = loss_flops(StepShape(images=4, pairs=3), 8, 32)
    assert loss_flops(StepShape(images=4, pairs=3, related=(6,)), 8, 32) == found + contrastive


def test_a_step_is_both_towers_and_both_losses():
    text, vision = TextTowerConfig(**TEXT), VisionTowerConfig(**VISION)
    shape = StepShape(images=2, kept_patches=25, texts=6, tokens=87, squared_tokens=2269, pairs=1, negatives=2)
    step = step_flops(text, vision, shape, dims=(16, 8))
    parts = text_flops(text, shape) + vision_flops(vision, shape) + loss_flops(shape, 16, text.output_width)
    assert step == parts
    cached = step_flops(text, vision, shape, dims=(16, 8), cached=True)
    towers = text_flops(text, shape) + vision_flops(vision, shape)
    assert cached.model == step.model
    assert cached.recomputed == step.recomputed + towers.forward
    frozen = step_flops(text, vision, shape, dims=(16, 8), trainable=Trainable("none", "none"))
    assert frozen.backward == 0


def test_parts_of_ranks_add_up():
    one = StepShape(images=2, kept_patches=25, texts=3, tokens=9, squared_tokens=29, pairs=1, negatives=7)
    assert one + one == StepShape(4, 25, 6, 18, 58, 2, 7)
    shared = replace(one, image_negatives=3)
    assert (shared + shared).image_negatives == 3


def test_hidden_words_cost_the_head_and_the_word_table():
    from text_tower import MaskedLM, MaskedTokens

    config = TextTowerConfig(**TEXT)
    model = MaskedLM(TextTower(config))
    masked = MaskedTokens(
        PackedTokens.from_lists([[7] * n for n in LENGTHS]), torch.arange(0, 80, 7), torch.zeros(12).long()
    )
    forward, backward = counted(model, lambda: model(masked).total)
    ours = masked_lm_flops(config, texts(), 12)
    assert (ours.forward, ours.backward) == (forward, backward)
