"""The encoder: packed tokens in, one pooled embedding per text out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from text_tower import peft_folders, pretrained
from text_tower.attention import Attend, Attention, choose_backend
from text_tower.blocks import Embeddings, Encoder
from text_tower.config import NO_ADAPTER, TextTowerConfig
from text_tower.dropout import KeyedDropout
from text_tower.encode import encode as _encode
from text_tower.lora import AdaptedEmbedding, AdaptedLinear, adapter_number, is_adapter
from text_tower.norm import LayerNorm
from text_tower.packed import ByLength, PackedTokens
from text_tower.padded import PaddedTower
from text_tower.positions import scheme
from text_tower.projector import is_projector, make_projector, project
from text_tower.tokenizer import Tokenizer


class TextTower(nn.Module):
    """A packed, post-norm encoder with mean pooling: rotary XLM-RoBERTa (jina-embeddings-v3, arXiv 2409.10173), or, by
    `positions` and `mlp` of its configuration, JinaBERT (jina-embeddings-v2, arXiv 2310.19923).

    Build it under `torch.device("meta")` to count parameters without memory.

    Args:
        config: its shape.
        tokenizer: needed by `encode` only; may be set later.
    """

    def __init__(self, config: TextTowerConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.embeddings = Embeddings(config)
        self.emb_ln = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.projector = make_projector(config)
        self.configure()

    def forward(
        self,
        packed: PackedTokens,
        *,
        adapter: str | None = None,
        sample_seeds: Tensor | None = None,
        training: bool | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Embeds N texts.

        Args:
            packed: N sequences, T tokens in all, on the tower's device.
            adapter: name of the adapter; None for the first, if there is one; "none" for the bare weights.
            sample_seeds: int64 `[N]`, needed in training with dropout: a sample's mask is a function of its seed, so it
                is the same on any rank, in any batch, and when the pass is repeated.
            training: compute as in that mode; None for the tower's own.
            attend: computes attention, instead of what `config.attention` and the device choose.

        Returns:
            `[N, config.output_width]`: the mean over each text's tokens, after the projector, if there is one; float32
            under autocast and for bfloat16 weights too, not normalised.

        Raises:
            ValueError: an unknown adapter, a sequence longer than `config.max_length`, ids outside the vocabulary
                (checked on a CPU), dropout without seeds, or an attention backend that cannot run here.
        """
        pooled = self.pooled(packed, adapter=adapter, sample_seeds=sample_seeds, training=training, attend=attend)
        return self.project(pooled)

    def project(self, pooled: Tensor) -> Tensor:
        """What the projector makes of rows of `pooled`; the rows themselves if there is none."""
        return project(self.projector, pooled)

    def pooled(
        self,
        packed: PackedTokens,
        *,
        adapter: str | None = None,
        sample_seeds: Tensor | None = None,
        training: bool | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """`[N, width]`: as `forward`, before the projector."""
        training = self.training if training is None else training
        h, layout = self._states(packed, adapter, sample_seeds, training, attend)
        return layout.mean(h)

    def token_states(
        self, packed: PackedTokens, *, adapter: str | None = None, sample_seeds: Tensor | None = None
    ) -> Tensor:
        """What `forward` averages: float32 `[T, width]`, in the order of `packed.ids`. Arguments as for `forward`."""
        h, layout = self._states(packed, adapter, sample_seeds, self.training)
        return layout.as_given(h)

    def _states(
        self,
        packed: PackedTokens,
        adapter: str | None,
        sample_seeds: Tensor | None,
        training: bool,
        attend: Attend | None = None,
    ) -> tuple[Tensor, ByLength]:
        """Token states `[T, width]`, at least float32, in the order of the layout."""
        config = self.config
        if packed.max_seqlen > config.max_length:
            raise ValueError(
                f"a sequence has {packed.max_seqlen} tokens; expected at most {config.max_length}, the tower's "
                "max_length; truncate it"
            )
        self._check_ids(packed.ids)
        k = self._adapter_index(adapter)
        layout = ByLength.of(packed)
        dropout = self._dropout(sample_seeds, len(packed), layout) if training and config.dropout else None
        positions = scheme(config, layout.positions)
        backend = attend or self._backend(packed.ids.device.type)
        attention = Attention(layout, positions, backend, config.compile)

        h = self.emb_ln(self.embeddings(packed.ids[layout.tokens], k))
        if dropout:
            h = dropout.at(0)(h)
        device = h.device.type
        if not config.residual_in_fp32 and h.dtype == torch.float32 and torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))
        checkpointing = config.checkpointing and training and torch.is_grad_enabled()
        h = self.encoder(h, attention, k, dropout, checkpointing)
        return h.to(torch.promote_types(h.dtype, torch.float32)), layout

    encode = _encode
    from_pretrained = classmethod(pretrained.load)
    save_pretrained = pretrained.save
    save_adapter = peft_folders.save_adapter

    def configure(self, **changes: Any) -> None:
        """Changes settings that no weight depends on: attention, compile, residual_in_fp32, checkpointing, dropout,
        instructions, truncate_dim.

        Raises:
            ValueError: another field of the configuration, or an impossible value.
        """
        settings = {
            "attention", "compile", "residual_in_fp32", "checkpointing", "dropout", "instructions", "truncate_dim"
        }  # fmt: skip
        if unknown := set(changes) - settings:
            raise ValueError(f"{sorted(unknown)} cannot be changed on a tower that exists")
        self.config = replace(self.config, **changes)
        for block in self.encoder.layers:
            block._compiled_call_impl = None
            if self.config.compile:
                block.compile(dynamic=True)
        if self.config.compile:
            # All blocks are one function to Dynamo, which gives up after 8 graphs: too few for gradients or none,
            # dropout or none, each adapter, few tokens or many, and the lengths at which attention changes its kernel.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 64)

    def merged(self, adapter: str | None = None) -> TextTower:
        """A tower without adapters, for inference: a copy of the weights with one adapter (None: the first) added.

        Its embeddings are the same up to rounding. The tasks of other adapters are unknown to it.
        """
        k = self._adapter_index(adapter)
        name = NO_ADAPTER if k is None or not self.config.adapters else self.config.adapters[k]
        with torch.device("meta"):
            tower = TextTower(self.config.merged(name), self.tokenizer)
        ours = {parameter.data_ptr() for parameter in self.parameters()}
        weights = self.merged_state_dict(adapter).items()
        tower.load_state_dict({n: t.clone() if t.data_ptr() in ours else t for n, t in weights}, assign=True)
        return tower.train(self.training)

    def padded(self, adapter: str | None = None) -> PaddedTower:
        """The tower on padded ids `[N, L]` instead of packed ones, with one adapter (None: the first) in its weights:
        plain tensors in and out, as `torch.export` and other runtimes take them."""
        tower = self.merged(adapter) if self.config.adapters else self
        return PaddedTower(tower.config, tower.embeddings, tower.emb_ln, tower.encoder, tower.projector).eval()

    def merged_state_dict(self, adapter: str | None = None) -> dict[str, Tensor]:
        """Weights under their published names, with one adapter (None: the first) added to them; not copies."""
        k = self._adapter_index(adapter)
        with torch.no_grad():
            plain = {n: p.detach() for n, p in self.named_parameters() if not is_adapter(n)}
            for name, module in self.named_modules():
                if isinstance(module, AdaptedLinear | AdaptedEmbedding) and module.adapters:
                    plain[f"{name}.weight"] = module.merged(k)
        return plain

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy computes as the original does: compiled code is not copied, so the copy compiles its own."""
        cast(Any, super()).__setstate__(state)
        self.configure()

    def joined_linears(self) -> list[tuple[AdaptedLinear]]:
        """The Linears of the blocks, those of one product together; here each is by itself. What an engine sets as
        `joined` of a first one computes `x Wᵀ + b` of them all, as a tuple, until it is None again."""
        return [(module,) for module in self.encoder.modules() if isinstance(module, AdaptedLinear)]

    @property
    def num_layers(self) -> int:
        """Depth of the top block as `layer_ids` counts it."""
        return self.config.layers

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter: 0 for embeddings, 1 to `num_layers` for the blocks, bottom to top; a projector
        counts as the last block."""
        names = [name for name, _ in self.named_parameters()]
        others = {name: self.num_layers for name in names if is_projector(name)}
        return {n: int(n.split(".")[2]) + 1 if n.startswith("encoder.") else others.get(n, 0) for n in names}

    def set_trainable(self, what: str, *, adapter: str | None = None) -> None:
        """Chooses what learns.

        Args:
            what: "all", "adapters" (a projector, too), "projector" (that alone) or "none".
            adapter: the one adapter that learns with "all" or "adapters", the others being frozen; None for each one.

        Raises:
            ValueError: another word, one for what the tower does not have, or an unknown adapter.
        """
        if what not in ("all", "adapters", "projector", "none"):
            raise ValueError(f"trainable is {what!r}; expected 'all', 'adapters', 'projector' or 'none'")
        if what == "adapters" and not self.config.adapters:
            raise ValueError("this tower has no adapters to train; name some in config.adapters, or train 'all'")
        if what == "projector" and not self.config.projector:
            raise ValueError("this tower has no projector to train; give it a projector's width, or train 'all'")
        chosen = None if adapter is None else self._adapter_index(adapter)
        for name, parameter in self.named_parameters():
            k = adapter_number(name)
            if is_projector(name):
                learns = what != "none"
            elif k is None:
                learns = what == "all"
            else:
                learns = what in ("all", "adapters") and (adapter is None or k == chosen)
            parameter.requires_grad_(learns)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns texts into ids for `encode`; its ids must lie within the tower's vocabulary."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but config.vocab_size is {self.config.vocab_size}; "
                "expected the tokenizer that this tower was trained with"
            )
        elif tokenizer is not None and not tokenizer.fits(self.config.vocab_size):
            warnings.warn(
                f"the tokenizer has {tokenizer.vocab_size} ids and config.vocab_size is {self.config.vocab_size}: "
                "is it the one that this tower was trained with?",
                stacklevel=3,
            )
        self._tokenizer = tokenizer

    def _backend(self, device: str) -> str:
        # Autocast decides the dtype of the queries; LayerNorm, whose output it leaves in float32, does not.
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.emb_ln.weight.dtype
        config = self.config
        return choose_backend(config.attention, device, dtype, config.head_dim, config.positions == "alibi")

    def _adapter_index(self, name: str | None) -> int | None:
        if name is None:
            return 0
        if name == NO_ADAPTER:
            return None
        if name not in self.config.adapters:
            raise ValueError(f"there is no adapter {name!r}; this tower has {list(self.config.adapters) or 'none'}")
        return self.config.adapters.index(name)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.device.type == "cpu":  # elsewhere the lookup itself fails, and a check would make the host wait
            low, high = map(int, ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token ids run from {low} to {high}; expected 0 to {self.config.vocab_size - 1}: "
                    "do the tokenizer and the tower belong together?"
                )

    def _dropout(self, seeds: Tensor | None, n: int, layout: ByLength) -> KeyedDropout:
        if seeds is None:
            raise ValueError(f"training with dropout {self.config.dropout} needs sample_seeds, one int64 for each text")
        if seeds.shape != (n,) or seeds.dtype != torch.int64:
            raise ValueError(f"sample_seeds is {seeds.dtype} {list(seeds.shape)}; expected torch.int64 [{n}]")
        return KeyedDropout(self.config.dropout, seeds.to(layout.rows.device)[layout.rows], layout.positions)
