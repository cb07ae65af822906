"""Configuration of a text tower; errors name the field."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, cast

from text_tower.fields import check_name

# "auto", then what it may choose from; see text_tower.attention.
BACKENDS = ("auto", "flash-attn", "varlen", "xformers", "sdpa")
POSITIONS = ("rotary", "alibi")  # see text_tower.positions
MLPS = ("gelu", "geglu")  # see text_tower.blocks
_MODELS = {("rotary", "gelu"): "XLM-RoBERTa's", ("alibi", "geglu"): "JinaBERT's"}
NO_ADAPTER = "none"  # as an adapter's name: the weights alone


_MOST = {"layers": 1000, "width": 2**20, "mlp_width": 2**24}
"""Beyond every model that exists; a foreign file's billion blocks would be built before they are refused."""


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int (numpy's integers too).

    Raises:
        ValueError: another kind of value, or one out of range; the message names it.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
        if number < least or (most is not None and number > most):
            raise TypeError
    except TypeError:
        wanted = f"a whole number of at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected {wanted}") from None
    return number


@dataclass(frozen=True)
class TextTowerConfig:
    """Shape and settings of a tower. The defaults are Jina-XLM-RoBERTa (arXiv 2409.10173) without adapters.

    Args:
        vocab_size: rows of the word table.
        width: channels of a token and, without a projector, of an embedding.
        layers: number of blocks.
        heads: attention heads; `width / heads` is even, because rotary positions turn pairs of channels.
        mlp_width: hidden channels of the MLP.
        positions: one of `POSITIONS`, together with `mlp`: "rotary" and "gelu" are XLM-RoBERTa's blocks, "alibi" and
            "geglu" JinaBERT-v2's (arXiv 2310.19923; jina-embeddings-v2, jina-clip-v1).
        mlp: one of `MLPS`; "geglu" is gated, and has 3 matrices where "gelu" has 2.
        token_types: rows of the token type table, of which a text has the first; JinaBERT has 2.
        rope_theta: base of the rotary frequencies. It belongs to the weights: never change it by length.
        max_length: longest sequence accepted, in tokens.
        layer_norm_eps: of every LayerNorm.
        pad_id: written to config.json for other libraries; the tower has no padding tokens.
        dropout: hidden dropout in training, keyed by sample (see `TextTower.forward`).
        lora_rank: rank of each adapter; 0 if and only if there are no `adapters`.
        lora_alpha: adapters are scaled by `lora_alpha / lora_rank`.
        adapters: names of the LoRA adapters; the first one is the default. jina-clip-v2 has one that is always on:
            `adapters=("retrieval.query",), lora_rank=4, lora_alpha=4.0`.
        projector: width of what a projector after the mean gives (`projector`); 0 for none.
        projector_hidden: hidden units of a projector of two products with a GELU between them; 0 for one product.
        instructions: task name -> text that `encode(task=…)` prepends to every text.
        truncate_dim: dims that `encode` keeps by default; None for all.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        attention: one of `BACKENDS`; "auto" takes the fastest that can run. Like the next two a setting of the
            machine: none of them is written to a model's directory.
        compile: run each block through `torch.compile`, once for all lengths.
        residual_in_fp32: under autocast keep the residual stream in float32, as autocast itself does; otherwise it has
            autocast's dtype, which is faster and less exact.

    Raises:
        ValueError: an impossible value; the message names the field.
    """

    vocab_size: int = 250002
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    positions: str = "rotary"
    mlp: str = "gelu"
    token_types: int = 1
    rope_theta: float = 20000.0
    max_length: int = 8192
    layer_norm_eps: float = 1e-5
    pad_id: int = 1
    dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 1.0
    adapters: tuple[str, ...] = ()
    projector: int = 0
    projector_hidden: int = 0
    instructions: Mapping[str, str] = field(default_factory=dict, hash=False)
    truncate_dim: int | None = None
    checkpointing: bool = False
    attention: str = "auto"
    compile: bool = False
    residual_in_fp32: bool = True

    def __post_init__(self) -> None:
        least_of = {"vocab_size": 4, "width": 2, "layers": 1, "heads": 1, "mlp_width": 1, "max_length": 2, "pad_id": 0,
                    "token_types": 1}  # fmt: skip
        for name, least in least_of.items():
            most = _MOST.get(name, 2**31 - 1)
            number = whole_number(name, getattr(self, name), least)
            if number > most:
                raise ValueError(f"{name} is {number}; expected at most {most:,}")
            object.__setattr__(self, name, number)
        self._check_projector()
        if self.truncate_dim is not None:
            dims = whole_number("truncate_dim", self.truncate_dim, 1, self.output_width)
            object.__setattr__(self, "truncate_dim", dims)
        self._check_block()
        for name in ("rope_theta", "layer_norm_eps", "lora_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 1e-300 < cast(float, value) < 1e300:
                raise ValueError(f"{name} is {value!r}; expected a number above 0")
            if not isinstance(value, int | float):  # a numpy scalar, which JSON does not know
                object.__setattr__(self, name, float(value))
        if self.positions != "rotary" and self.rope_theta != TextTowerConfig.rope_theta:
            raise ValueError(
                f"rope_theta is {self.rope_theta:g}, and positions {self.positions!r} have none; leave it out"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id is {self.pad_id}; expected an id below vocab_size, {self.vocab_size}")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; expected a share, at least 0 and below 1")
        object.__setattr__(self, "dropout", float(self.dropout))
        if self.attention not in BACKENDS:
            raise ValueError(f"attention is {self.attention!r}; expected one of {list(BACKENDS)}")
        for name in ("checkpointing", "compile", "residual_in_fp32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        self._check_adapters()
        if not isinstance(self.instructions, Mapping):
            raise ValueError(f"instructions is {self.instructions!r}; expected names of tasks and texts")
        object.__setattr__(self, "instructions", dict(self.instructions))
        for task, instruction in self.instructions.items():
            if not isinstance(task, str) or not isinstance(instruction, str):
                raise ValueError(f"instructions has {task!r}: {instruction!r}; expected a task's name and a text")

    def _check_block(self) -> None:
        for name, known in (("positions", POSITIONS), ("mlp", MLPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {list(known)}")
        if (self.positions, self.mlp) not in _MODELS:
            models = " or ".join(f"{p} with {m} ({whose})" for (p, m), whose in _MODELS.items())
            raise ValueError(f"positions is {self.positions!r} and mlp {self.mlp!r}; expected {models}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"heads is {self.heads} and width {self.width}: a head would have {self.width / self.heads:g} "
                "channels, but rotary positions need an even number"
            )

    def _check_projector(self) -> None:
        for name in ("projector", "projector_hidden"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0, _MOST["width"]))
        if self.projector_hidden and not self.projector:
            raise ValueError(
                f"projector_hidden is {self.projector_hidden} and projector 0; state the projector's width"
            )

    def _check_adapters(self) -> None:
        if isinstance(self.adapters, str):
            raise ValueError(f"adapters is the string {self.adapters!r}; expected a tuple of names")
        if not isinstance(self.adapters, tuple | list):
            raise ValueError(f"adapters is {self.adapters!r}; expected a tuple of names")
        # Each may become a folder's name, when the tower is saved for PEFT or read from there.
        object.__setattr__(self, "adapters", tuple(check_name(name, "adapters has") for name in self.adapters))
        if len(set(self.adapters)) < len(self.adapters):
            raise ValueError(f"adapters is {self.adapters}; expected every name once")
        if NO_ADAPTER in self.adapters:
            raise ValueError(f"adapters is {self.adapters}; the name {NO_ADAPTER!r} stands for the bare weights")
        object.__setattr__(self, "lora_rank", whole_number("lora_rank", self.lora_rank, 0, 2**16))
        if bool(self.lora_rank) != bool(self.adapters):
            raise ValueError(
                f"lora_rank is {self.lora_rank} and adapters is {self.adapters}; "
                "expected both a rank and names, or neither"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def output_width(self) -> int:
        """Numbers of an embedding."""
        return self.projector or self.width

    @property
    def mlp_matrices(self) -> int:
        """Matrices of `width` times `mlp_width` in a block's MLP."""
        return {"gelu": 2, "geglu": 3}[self.mlp]

    def merged(self, adapter: str | None) -> TextTowerConfig:
        """That of weights into which one adapter has been merged (`NO_ADAPTER`: none).

        The adapter's name stays a task. Instructions of the other adapters go with them: with this one's weights they
        would give other embeddings than before, without a word.
        """
        others = set(self.adapters) - {adapter}
        instructions = {task: text for task, text in self.instructions.items() if task not in others}
        if adapter in self.adapters:
            instructions = {adapter: "", **instructions}
        return replace(self, lora_rank=0, adapters=(), instructions=instructions)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of `encode(task=…)`: the adapters and the names of instructions."""
        return tuple(dict.fromkeys([*self.adapters, *self.instructions]))
