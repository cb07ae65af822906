"""The interface of a task: everything in which one way to train a stage differs from another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL.Image import Image
from text_tower import Tokenizer
from torch import Tensor, nn

from stage_trainer.data.config import DataConfig
from stage_trainer.data.stateless_rng import key
from stage_trainer.engine import Engine, Objective, make_engine
from stage_trainer.metrics.measure import Measure
from stage_trainer.optim.groups import ParameterGroups
from stage_trainer.plan.auto import Choice
from stage_trainer.recipe import OptimizerConfig, Recipe, Stage

Losses = dict[str, tuple[Tensor, object]]
"""{name: (loss over all ranks, 0-d; statistics of the task)}."""
Charts = dict[str, dict[str, list[str]]]
"""TensorBoard's Custom Scalars page: sections, their charts, and the tags that each shows."""

HEALTH_CHARTS = {
    "size of the gradients": ["^gradient_norm/"],
    "size of an update": ["^update_norm/"],
    "share of the time spent waiting for data": ["^speed/data_wait_share$"],
    "skipped steps, samples that could not be read": ["^trouble/"],
    "gigabytes that each machine has fetched": ["^fetched_gigabytes/"],
}
"""Charts that every task has."""


class Batches(Protocol):
    """A stage's batches for one rank; item n is (batch, `data.batches.Drawn`), a function of n alone."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """{data set: hash of its manifest}."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> tuple[Any, Any]: ...

    def state_dict(self) -> dict[str, list[int]]:
        """What this rank's next batches need beside their numbers; those of all ranks together are the run's."""

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Takes the run's."""


@dataclass(frozen=True)
class Measured:
    """What a validation found. Ranks other than 0 may leave it empty.

    Attributes:
        values: by name in TensorBoard.
        shown: the figures that are printed.
        picture: for TensorBoard.
        vectors, labels: `[N, D]` for TensorBoard's projector, each with a name and a kind.
    """

    values: dict[str, float]
    shown: Sequence[str] = ()
    picture: Image | None = None
    vectors: Tensor | None = None
    labels: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Validation:
    """What a stage measures on held-out data.

    Attributes:
        measures: by name in TensorBoard, known before the first step.
        run: runs the validation; every rank has to call. Its arguments: whether the stage ends here, and what it calls
            before each of its batches, on every rank as often; that may raise, to end it.
    """

    measures: dict[str, Measure]
    run: Callable[[bool, Callable[[], None]], Measured]


class TrainedObjective(Objective, ABC):
    """A module for the engine to run, and which of its parameters train."""

    @abstractmethod
    def set_trainable(self, stage: Stage) -> None:
        """Freezes what the stage does not train."""

    @abstractmethod
    def parameter_groups(
        self, stage: Stage, config: OptimizerConfig, saved: Mapping[str, Tensor] | None = None
    ) -> ParameterGroups:
        """The trainable parameters; `saved` is the optimizer state to continue with."""

    def after_step(self, engine: Engine) -> None:
        """Keeps parameters within their limits; every rank has to call."""

    def figures(self, engine: Engine, losses: Losses) -> dict[str, float]:
        """What a monitor shows beside the losses of a step; every rank has to call."""
        return {}


class Task(ABC):
    """One way to train a stage. Of the recipe, what a task makes gets only its own part.

    Attributes:
        charts: TensorBoard's page for this task.
        cuts_texts: whether texts longer than `max_tokens` are cut; a run then reports how many.
        seed: of all random numbers in the stage.
        chunks: sizes of the chunks of a forward pass; None: no chunks.
    """

    charts: ClassVar[Charts]
    cuts_texts: ClassVar[bool] = True

    def __init__(self, recipe: Recipe, number: int):
        self.recipe, self.number, self.stage = recipe, number, recipe.stage(number)
        self.seed, self.data = key(recipe.seed, number), DataConfig.of(recipe)
        self.chunks = self.stage.chunks

    @abstractmethod
    def check_configs(self, fetch: bool = False) -> None:
        """Checks that the weights have what the recipe asks of them, before anything is allocated.

        Args:
            fetch: downloads weights that are not on this machine; otherwise the check does without them.

        Raises:
            UserError: names the key.
        """

    @abstractmethod
    def build_model(self, tokenizer: Tokenizer | None = None) -> nn.Module:
        """A new model, with the weights that the recipe starts from; it has `save_pretrained(path)`.

        Raises:
            UserError: an invalid configuration, a tokenizer with another vocabulary, weights that do not fit.
        """

    @abstractmethod
    def load_model(self, path: Path) -> nn.Module:
        """A checkpoint's model, with the recipe's settings that do not affect its weights (dropout, checkpointing, …).

        Raises:
            UserError: a directory that holds no model, or one of another shape than the recipe's.
        """

    def load_former_model(self, path: Path, tokenizer: Tokenizer) -> nn.Module:
        """The model that this stage starts from, from the last checkpoint of the stage before, whatever its task."""
        return self.load_model(path)

    @abstractmethod
    def empty_model(self) -> nn.Module:
        """The model as it is at the end of the stage, on the meta device: shapes without memory."""

    @abstractmethod
    def parameter_counts(self, model: nn.Module) -> list[tuple[int, str]]:
        """(number, what is counted) for each line of `train --dry-run`."""

    def set_up_segment(self, model: nn.Module, step: int, optimizer: dict[str, Tensor] | None) -> int:
        """Prepares a model and its optimizer state for the steps from `step` on; returns the step before which this
        has to be repeated."""
        return self.stage.steps

    def prepare(  # noqa: B027  # most tasks have nothing to prepare
        self, model: nn.Module, batches: Any, device: torch.device, phase: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """Computes what the steps up to the next change of the model read from the disk; every rank has to call.

        Args:
            model: as `set_up_segment` left it, on the device.
            batches: of `make_batches`, which no process has begun to read.
            phase: entered for each part of the work, so that a watch can tell long from stuck.
        """

    def choose_chunks(self, start: int, stop: int, device: torch.device) -> Choice | None:
        """Sets `chunks` for these steps to what fits into memory; every rank has to call. None: nothing was chosen."""
        return None

    @abstractmethod
    def make_objective(self, model: Any) -> TrainedObjective:
        """What the engine runs."""

    def make_engine(self, model: nn.Module, optimizer: dict[str, Tensor] | None) -> Engine:
        """An engine for the model, with the optimizer state to continue with."""
        objective, recipe = self.make_objective(model), self.recipe
        objective.fp8 = bool(self.stage.fp8)
        objective.set_trainable(self.stage)
        return make_engine(
            objective,
            objective.parameter_groups(self.stage, recipe.optimizer, optimizer),
            recipe.optimizer,
            precision=recipe.precision,
            deepspeed=self.stage.deepspeed,
            saved=optimizer,
        )

    @abstractmethod
    def make_batches(self, tokenizer: Tokenizer, rank: int, world: int) -> Batches:
        """The stage's batches for one rank.

        Raises:
            UserError: data that are missing, damaged or of a wrong kind.
        """

    def towers_at(self, step: int) -> tuple[str, ...]:
        """The towers that take part in a step ("text", "image"); the others rest."""
        return ("text",)

    @abstractmethod
    def forward_backward(self, engine: Engine, batch: Any, step: int) -> Losses:
        """Leaves the gradients of the loss over the global batch on the parameters; returns the losses."""

    @abstractmethod
    def operations(self, engine: Engine, batch: Any, step: int, tokens: int, squared_tokens: int) -> int:
        """Floating-point operations of the model in a step, over all ranks, for MFU.

        Args:
            batch: this rank's part, for what is the same in all parts.
            tokens, squared_tokens: of all ranks' texts, the sums of the lengths and of their squares.
        """

    @abstractmethod
    def make_validation(self, engine: Engine, tokenizer: Tokenizer) -> Validation | None:
        """What is measured while the stage trains; None if there is nothing to measure.

        Raises:
            UserError: held-out data that are missing or damaged.
        """

    def title(self, step: int) -> str:
        """A short name for the line of progress, from `step` on."""
        return self.stage.task
