"""What TensorBoard's pages show of a run: charts that matter first, and the settings that runs differ by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WELL = {
    "size of the gradients": ["^gradient_norm/"],
    "size of an update": ["^update_norm/"],
    "share of the time spent waiting for data": ["^speed/data_wait_share$"],
    "skipped steps, samples that could not be read": ["^trouble/"],
}
PAGE = {
    "what matters": {
        "loss": ["^loss/"],
        "held out: recall and nDCG, mean over languages": [
            "^validation_(recall|ndcg)_at_5_[^/]+/[^/]+$",
            "^validation_ndcg_at_10_[^/]+/mean$",
        ],
        "temperature": ["^temperature/"],
        "learning rate": ["^learning_rate_"],
        "samples a second": ["^speed/samples_per_second$"],
    },
    "is it well": {
        "found within the batch, by dim": ["^train_accuracy_"],
        **_WELL,
        "share of the texts that max_tokens cuts": ["^texts_cut/"],
    },
}
"""TensorBoard's Custom Scalars page: sections, their charts, and which tags each shows."""
MASKED_PAGE = {
    "what matters": {
        "loss on hidden words": ["^loss/"],
        "held out: loss on hidden words, all languages": ["^validation_loss_masked_lm/all$"],
        "learning rate": ["^learning_rate_"],
        "text tokens a second": ["^speed/text_tokens_per_second$"],
    },
    "is it well": {"held out: loss on hidden words by language": ["^validation_loss_masked_lm/"], **_WELL},
}
"""The same for masked-language-model training."""
_COMPARED = (
    "stage.batch.", "stage.lr.", "stage.steps", "stage.warmup_steps", "stage.min_lr_ratio", "stage.max_tokens",
    "stage.resolution", "stage.patch_dropout", "stage.layer_decay.", "stage.loss.kind", "stage.loss.dims",
    "stage.trainable.", "optimizer.name", "optimizer.weight_decay", "model.temperature", "precision", "seed",
)  # fmt: skip
"""Settings on TensorBoard's HPARAMS page, by their beginnings: all sixty, by the alphabet, would hide these."""


def charts(*, masked: bool) -> dict[str, dict[str, list[Any]]]:
    """The page Custom Scalars, as `SummaryWriter.add_custom_scalars` takes it."""
    page = MASKED_PAGE if masked else PAGE
    return {section: {title: ["Multiline", tags] for title, tags in of.items()} for section, of in page.items()}


def compared(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Of a run's settings those of the page HPARAMS, as it takes them."""
    return {
        name.removeprefix("stage."): value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in settings.items()
        if name.startswith(_COMPARED) and not (name.startswith("stage.batch.") and not value)
    }
