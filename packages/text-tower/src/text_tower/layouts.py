"""Layouts of weight files: for each of our names the names in another library.

Ours are those of `TextTower.state_dict()`, which are transformers' on disk. A layout only renames, except that
XLM-RoBERTa and open_clip store queries, keys and values separately.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD_TABLE = "embeddings.word_embeddings."
_XLM_R = (  # ours, theirs
    ("emb_ln.", "embeddings.LayerNorm."),
    ("encoder.layers.", "encoder.layer."),
    ("mixer.out_proj.", "attention.output.dense."),
    ("norm1.", "attention.output.LayerNorm."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("norm2.", "output.LayerNorm."),
)
_OPEN_CLIP = (  # ours, and those of transformers' jina_embeddings_v3 in memory, which open_clip saves
    ("emb_ln.", "embeddings.LayerNorm."),
    ("encoder.layers.", "layers."),
    ("mixer.out_proj.", "self_attn.o_proj."),
    ("norm1.", "post_attention_layernorm."),
    ("norm2.", "post_mlp_layernorm."),
)
_RENAMED = {  # kind -> parts of names, and the names of queries, keys and values
    "xlm-r": (_XLM_R, ("attention.self.query", "attention.self.key", "attention.self.value")),
    "open-clip": (_OPEN_CLIP, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
}


@dataclass(frozen=True)
class Layout:
    """One way to name the weights.

    Attributes:
        kind: "transformers", "remote-code" (jina's own, adapters as parametrizations), "xlm-r" or "open-clip".
        prefix: of every name, such as `roberta.`.
    """

    kind: str
    prefix: str = ""

    @classmethod
    def of(cls, keys: Collection[str]) -> Layout:
        """The layout that a file's keys resemble most."""
        marks = (_WORD_TABLE, "encoder.layer")
        prefix = next((key[: key.index(mark)] for mark in marks for key in keys if mark in key), "")
        if any(".parametrizations." in key for key in keys):
            return cls("remote-code", prefix)
        if any(".self_attn.q_proj." in key for key in keys):
            return cls("open-clip", prefix)
        return cls("xlm-r" if any(".attention.self." in key for key in keys) else "transformers", prefix)

    def __str__(self) -> str:
        title = {
            "transformers": "jina_embeddings_v3, as transformers writes it",
            "remote-code": "jina's remote-code layout, with parametrizations",
            "xlm-r": "XLM-RoBERTa",
            "open-clip": "jina_embeddings_v3 in a model of open_clip",
        }[self.kind]
        return f"the text half of jina-clip-v2 ({title})" if self.is_half else title

    @property
    def is_half(self) -> bool:
        """Whether the text weights are a part of a jina-clip model's."""
        return self.prefix.startswith("text_model.")

    def names(self, ours: str, every_name: Collection[str]) -> list[str]:
        """Their names for one of ours; several are parts to be concatenated along dimension 0.

        Args:
            ours: a name of `TextTower.state_dict()`.
            every_name: all of our names, which show the modules that have adapters.
        """
        module, _, leaf = ours.rpartition(".")
        if self.kind == "remote-code" and f"{module}.lora_A" in every_name and leaf != "bias":
            leaf = {"weight": "original"}.get(leaf, f"0.{leaf}")
            return [f"{self.prefix}{module}.parametrizations.weight.{leaf}"]
        if self.kind not in _RENAMED:
            return [self.prefix + ours]
        renamed, qkv = _RENAMED[self.kind]
        for our_part, their_part in renamed:
            ours = re.sub(rf"(^|\.){re.escape(our_part)}", rf"\g<1>{their_part}", ours)
        parts = qkv if ".mixer.Wqkv." in ours else ("",)
        return [self.prefix + ours.replace("mixer.Wqkv", part) for part in parts]

    def expected(self, shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """{our name: shape} -> {their name: shape}."""
        theirs = {}
        for ours, shape in shapes.items():
            names = self.names(ours, shapes)
            theirs.update({name: [shape[0] // len(names), *shape[1:]] for name in names})
        return theirs

    def without_the_rest(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights without heads, poolers, absolute positions and an image half."""
        heads = ("lm_head.", "classifier.", "qa_outputs.", f"{self.prefix}pooler.")
        positions = ("position_embeddings.", "position_ids") if self.kind == "xlm-r" else ("position_ids",)
        others = (*heads, *(f"{self.prefix}embeddings.{name}" for name in positions))
        if self.is_half:
            others += ("vision_model.", "logit_scale")
        if self.kind == "open-clip":
            others += ("visual.", "logit_scale", "logit_bias")
        return {name: tensor for name, tensor in weights.items() if not name.startswith(others)}

    def without_merged(self, weights: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        """A file of jina's layout whose adapters are merged, and their own places filled with zeros: as a plain one.

        Raises:
            ValueError: an adapter that is not zero: it is not merged.
        """
        middle = ".parametrizations.weight."
        halves = {name: tensor for name, tensor in weights.items() if f"{middle}0.lora_" in name}
        real = sorted(name for name, tensor in halves.items() if not tensor.is_meta and bool(tensor.any()))
        if real:
            raise ValueError(
                f"the adapters should be merged into the weights, but {real[0]} is not zero; take the config.json that "
                "was written with the weights"
            )
        plain = {name.replace(f"{middle}original", ".weight"): t for name, t in weights.items() if name not in halves}
        return Layout("transformers", self.prefix), plain

    def to_ours(self, names: Collection[str], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checked weights under our names, as float32 copies; `weights` is emptied."""
        result = {}
        for ours in names:
            parts = [weights.pop(name) for name in self.names(ours, names)]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            result[ours] = tensor.to(torch.float32, copy=True)  # safetensors' tensors may be mapped from the file
        return result

    def from_ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under their names."""
        result: dict[str, Tensor] = {}
        for ours, tensor in weights.items():
            names = self.names(ours, weights)
            result.update(zip(names, tensor.chunk(len(names)), strict=True))
        return result
