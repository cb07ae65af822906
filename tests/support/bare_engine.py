"""A step of small towers in bfloat16 under an engine without DeepSpeed, in the ways in which towers may be made."""

import contextlib
from dataclasses import replace

import torch
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.recipe import GradientCache, LossConfig
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch import nn
from vision_tower import VisionTower, VisionTowerConfig

TEXT = TextTowerConfig(vocab_size=50, width=32, layers=2, heads=2, mlp_width=64, dropout=0.1)
LORA = replace(TEXT, lora_rank=2, adapters=("a", "b"))
VISION = VisionTowerConfig(resolution=24, patch=8, width=32, layers=2, heads=2, mlp_width=44)
CHUNKS = GradientCache(images=3, tokens=80)
"""More tokens than the 32 from which on a Linear adds its adapter to the weight by itself."""


class Engine:
    """No DeepSpeed; `once`: weights are cast once for all passes."""

    def __init__(self, text=LORA, vision=VISION, once=True, trains="all"):
        torch.manual_seed(0)
        model = DualEncoder(TextTower(text), VisionTower(vision)).train()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.1)
        model.text.set_trainable(trains, adapter=next(iter(text.adapters), None))
        if trains == "adapters":
            model.vision.set_trainable("adapters" if vision.lora_rank else "none")
        self.objective, self.once = ContrastiveObjective(model, LossConfig(dims=(32, 16)), "bf16"), once

    def upload(self, part):
        return part

    def forward(self, part, **options):
        return self.objective(part, **options)

    def forward_passes(self, mine):
        return mine

    def cast_once(self):
        return cast_once(self.objective) if self.once else contextlib.nullcontext()

    @contextlib.contextmanager
    def backwards(self):
        yield lambda loss, last: loss.backward()

    def step(self):
        losses = forward_backward(self, make_batch(), pairs=("image_text", "text"), patch_dropout=0.5, cache=CHUNKS)
        return [loss for loss, _ in losses.values()], dict(self.objective.model.named_parameters())


def make_batch():
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 50, (20,), generator=g).tolist() for _ in range(16)]
    return Batch(
        torch.randint(0, 256, (8, 3, 24, 24), generator=g, dtype=torch.uint8), torch.arange(8),
        PackedTokens.from_lists(texts), torch.arange(16), image_ids=torch.arange(8), pairs=4, negatives=0,
        text_ids=torch.arange(4),
    )  # fmt: skip


WAYS = {
    "plain": {"text": TEXT},
    "adapters": {},
    "adapters alone": {"trains": "adapters"},
    "both towers' adapters": {"vision": replace(VISION, lora_rank=2)},
    "both towers' adapters alone": {"vision": replace(VISION, lora_rank=2), "trains": "adapters"},
    "checkpointing": {"text": replace(LORA, checkpointing=True), "vision": replace(VISION, checkpointing=True)},
    "JinaBERT with adapters": {"text": replace(LORA, positions="alibi", mlp="geglu")},  # a Linear of it has no bias
}
