"""open_clip's and sentence-transformers' models of the same architecture, with the weights of ours.

The text tower is transformers' `jina_embeddings_v3`, which both libraries take, the vision tower timm's EVA02, which
open_clip takes: the same layers, sizes and parameters as ours, to the last one, so that all compute the same loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from common import cut
from open_clip.hf_configs import arch_dict
from open_clip_train.train import train_one_epoch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from text_tower import PackedTokens, TextTower
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging
from vision_tower import normalize

PAD = 1
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class OpenClip:
    """open_clip's model, loss and training loop (`open_clip_train.train.train_one_epoch`, as it stands).

    Args:
        model: whose shape and weights it takes.
        optimizer: makes one from the model.
        clip: the gradient's largest norm.
        patch_dropout: share of the patches that images lose.
        compiled: torch.compile, as its `--torchcompile`.
    """

    def __init__(
        self,
        model: DualEncoder,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        clip: float,
        patch_dropout: float = 0.0,
        compiled: bool = False,
    ):
        # The tower's names in transformers are XLM-RoBERTa's, which open_clip knows.
        arch_dict.setdefault("jina_embeddings_v3", arch_dict["xlm-roberta"])
        with tempfile.TemporaryDirectory() as folder:
            model.text.save_pretrained(Path(folder) / "text")
            self.model: Any = open_clip.CustomTextCLIP(
                embed_dim=model.text.config.width,
                # Any timm model: the one of our shape, which no name of timm's has, takes its place.
                vision_cfg={"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none"},
                text_cfg={"hf_model_name": str(Path(folder) / "text"), "hf_proj_type": None},
                output_dict=True,
            )
        arguments = model.vision.config.timm_arguments()
        trunk = timm.create_model("eva02_large_patch14_clip_224", **arguments, patch_drop_rate=patch_dropout)
        trunk.load_state_dict(model.vision.state_dict())
        self.model.visual.trunk = trunk
        self.network = torch.compile(self.model) if compiled else self.model
        self.loss, self.optimizer = open_clip.ClipLoss(), optimizer(self.model)
        self.settings = SimpleNamespace(
            device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=clip,
            log_every_n_steps=100, rank=0, world_size=1, horovod=False, batch_size=1, wandb=False,
        )  # fmt: skip

    def train(
        self, batches: Iterable[tuple[Tensor, Tensor]], schedule: Callable[[int], Any] = lambda step: None
    ) -> None:
        """One of its epochs over (images, padded ids), `schedule` being called before each step."""
        data = {"train": SimpleNamespace(dataloader=_Loader(batches), set_epoch=lambda epoch: None)}
        train_one_epoch(self.network, data, self.loss, 0, self.optimizer, None, schedule, None, self.settings)

    def put_into(self, model: DualEncoder) -> None:
        """Gives ours the weights that were trained here."""
        model.vision.load_state_dict(self.model.visual.trunk.state_dict())
        _take_text(model, self.model.text.transformer)


class _Loader:
    """What open_clip's loop wants of a loader."""

    num_batches = num_samples = 10**9

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def for_open_clip(batch: Batch) -> tuple[Tensor, Tensor]:
    """(normalised images, ids padded to the longest of the batch; its own tokenizers pad to the context length)."""
    assert batch.images is not None
    assert isinstance(batch.texts, PackedTokens)
    (ids,) = cut(batch.texts, len(batch.images))
    return normalize(batch.images), pad_sequence(ids, batch_first=True, padding_value=PAD)


class SentenceTransformers:
    """A SentenceTransformer with its Matryoshka loss over multiple negatives ranking, both directions.

    Its step is a plain loop around its loss: what its Trainer adds (callbacks, logging, accelerate) is not counted.

    Args:
        model: whose text tower's shape and weights it takes.
        optimizer: makes one from the model.
        dims: of the Matryoshka loss.
        scale: 1 / temperature, which it keeps fixed.
        clip: the gradient's largest norm.
        cached: options of the cached loss (`mini_batch_size`, `mini_batch_num_tokens`); None: the plain one.
    """

    def __init__(
        self,
        model: DualEncoder,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        dims: tuple[int, ...],
        scale: float,
        clip: float,
        cached: dict[str, int] | None = None,
    ):
        with tempfile.TemporaryDirectory() as folder:
            model.text.save_pretrained(Path(folder) / "text")
            transformer = Transformer(str(Path(folder) / "text"), model_kwargs={"add_pooling_layer": False})
        self.model = SentenceTransformer(modules=[transformer, Pooling(model.text.config.width, "mean")], device="cpu")
        both: Any = {
            "scale": scale,
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
        }
        if cached is None:
            ranking: nn.Module = losses.MultipleNegativesRankingLoss(self.model, **both)
        else:
            ranking = losses.CachedMultipleNegativesRankingLoss(
                self.model,
                **both,
                mini_batch_size=cached["mini_batch_size"],
                mini_batch_num_tokens=cached.get("mini_batch_num_tokens"),
            )
        self.loss, self.clip = losses.MatryoshkaLoss(self.model, ranking, dims), clip
        self.optimizer = optimizer(self.model)
        self.model.train()

    def step(self, columns: list[dict[str, Any]]) -> float:
        """The loss, before the update."""
        # It writes into the features and would find its own embeddings there the next time.
        loss = self.loss([dict(column) for column in columns], None)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def put_into(self, model: DualEncoder) -> None:
        """Gives ours the weights that were trained here."""
        _take_text(model, self.model[0].model)


def for_sentence_transformers(batch: Batch) -> list[dict[str, Any]]:
    """Queries and targets as its collator gives them, each column padded to its own longest."""
    assert isinstance(batch.texts, PackedTokens)
    columns = []
    for texts in cut(batch.texts, batch.pairs, batch.pairs):
        ids = pad_sequence(texts, batch_first=True, padding_value=PAD)
        columns.append({"input_ids": ids, "attention_mask": (ids != PAD).long(), "modality": "text"})
    return columns


def adamw(lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Callable[[nn.Module], Any]:
    """torch's fused AdamW; no decay on vectors, as in open_clip and in ours."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        vectors = [p for p in model.parameters() if p.ndim < 2]
        rest = [p for p in model.parameters() if p.ndim >= 2]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": weight_decay}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    return make


def _take_text(model: DualEncoder, trained: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        model.text.load_state_dict(TextTower.from_pretrained(folder).state_dict())
