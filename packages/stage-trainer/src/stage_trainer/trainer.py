"""The trainer: a stage, from its start or its last checkpoint to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from stage_trainer.build import load_tokenizer
from stage_trainer.checkpoint.load import path_of
from stage_trainer.checkpoint.resume import move_aside, settings, starting_point
from stage_trainer.checkpoint.save import Saver
from stage_trainer.checkpoint.state import RunState
from stage_trainer.data.drawn import LEDGER, Drawn
from stage_trainer.errors import UserError
from stage_trainer.optim.schedule import schedule, set_rates
from stage_trainer.plan.auto import planned_and_measured
from stage_trainer.plan.devices import peak_flops
from stage_trainer.recipe import GradientCache, Recipe
from stage_trainer.recipe.read import flatten
from stage_trainer.recipe.rules import check_ranks
from stage_trainer.run.agreement import check_same_data, machines
from stage_trainer.run.device import check_fp8, uses_gpu
from stage_trainer.run.environment import keep_freed_memory, native_precision, quiet, set_threads, versions
from stage_trainer.run.evaluation import Evaluation
from stage_trainer.run.fetched import Fetched
from stage_trainer.run.health import Health
from stage_trainer.run.hooks import Hook, Step, Totals
from stage_trainer.run.ledger import Ledger
from stage_trainer.run.limits import Watch
from stage_trainer.run.loader import WORKER_STARTS, batches, worker_deaths_explained
from stage_trainer.run.monitor import Monitor, Shown, open_sinks
from stage_trainer.run.next_steps import next_steps
from stage_trainer.run.rendezvous import initialize_distributed, leave_distributed, let_groups_wait
from stage_trainer.run.saving import Saving
from stage_trainer.run.shortages import shortages_explained
from stage_trainer.run.stop_signal import StopSignal
from stage_trainer.run.text_counts import TextCounts
from stage_trainer.run.watchdog import Heartbeat, one_reason
from stage_trainer.tasks import make_task
from stage_trainer.tasks.task import Losses

_T = TypeVar("_T")
UNPLANNED_CHUNKS = GradientCache(images=32, tokens=8192)
"""Of `gradient_cache: auto` where the planner failed: small enough for any GPU that holds the model."""


def train(recipe: Recipe, number: int, *, start_over: bool = False, refusal: UserError | None = None) -> None:
    """Trains stage `number` (from 1) of a recipe; every rank has to call.

    Args:
        start_over: moves the stage's folder aside, and starts it again.
        refusal: why rank 0 may not start, to be passed on to ranks of other machines.

    Raises:
        UserError: a stage whose predecessor has not run, data or settings that do not fit, a full disk, losses that are
            no longer finite. Checkpoints written before stay.
        Stopped: the run was asked to stop, and has saved.
    """
    with Watch(recipe.limits, Path(recipe.output)) as watch, shortages_explained(), contextlib.ExitStack() as stack:
        with watch.phase("start"):
            rank, world, device = _meet(recipe, number, refusal)
            set_threads(world)
            if device.type == "cpu":
                keep_freed_memory()
            stack.enter_context(Heartbeat(rank, world, Path(recipe.output)))
            stack.enter_context(one_reason(Path(recipe.output), rank, world))
            stack.enter_context(shortages_explained())  # before one_reason, which shows anything else as a traceback
        with watch.phase("load"):
            trainer = Trainer(recipe, number, rank, world, device, watch, start_over=start_over)
        while trainer.resume():
            trainer.run_segment()
            trainer.release()
        if rank == 0:
            print(f"stage {number} of {recipe.name} is complete: {path_of(trainer.directory, trainer.start)}")
            print(next_steps(recipe, number), flush=True)
        leave_distributed()


def _meet(recipe: Recipe, number: int, refusal: UserError | None) -> tuple[int, int, torch.device]:
    """(rank, world size, device), once all ranks agree that they train the same stage of the same recipe, and can."""
    cuda, first = False, int(os.environ.get("RANK", "0")) == 0
    try:
        cuda = uses_gpu(recipe.device, recipe.precision, print if first else lambda _: None)
    except UserError as error:
        refusal = refusal or error
    quiet()
    settled = {"stage": number, **flatten(dataclasses.asdict(recipe))}
    return initialize_distributed(recipe.output, cuda=cuda, recipe=settled, refusal=refusal)


class Trainer:
    """A stage on this rank, in segments: a change of resolution is a checkpoint and a start from it, so that there is
    one way for both, and nothing to change in place."""

    def __init__(
        self,
        recipe: Recipe,
        number: int,
        rank: int,
        world: int,
        device: torch.device,
        watch: Watch,
        *,
        start_over: bool = False,
    ):
        self.rank, self.world, self.device, self.watch = rank, world, device, watch
        watch.gpu = device.type == "cuda"
        if recipe.precision == "auto":
            recipe = dataclasses.replace(recipe, precision=native_precision(device))
            self.say(f"precision: auto is {recipe.precision} here")
        check_fp8(recipe.stage(number).fp8, recipe.precision, device)
        self.recipe, self.number = recipe, number
        self.stage, self.directory = recipe.stage(number), recipe.stage_directory(number)
        check_ranks(self.stage, world, f"{recipe.name}: stage {number}")
        self.task = make_task(recipe, number)
        torch.manual_seed(self.task.seed)
        self.task.check_configs(fetch=True)
        self.tokenizer = load_tokenizer(recipe)
        self.data = self.task.make_batches(self.tokenizer, rank, world)
        check_same_data(self.data.fingerprint)
        self.machine, self.machines = machines()
        if start_over and rank == 0:
            move_aside(self.directory)
        if world > 1:
            torch.distributed.barrier()
        self.state = RunState(settings(recipe, number), self.data.fingerprint, versions())
        self.started = self.unplanned = False

    def resume(self) -> bool:
        """Prepares the next segment, from the newest checkpoint or from what the stage starts from; returns False when
        the stage is complete. One without steps makes up for an evaluation that was due after the last one."""
        with self.watch.phase("load"):
            return self._resume()

    def _resume(self) -> bool:
        # Also after the last step: machines with folders of their own get its checkpoint, which the next stage needs.
        model, optimizer = starting_point(self.task, self.state, self.tokenizer)
        self.data.load_state_dict(self.state.reading)
        self.start, last = self.state.step, self.stage.steps - 1
        if self.start > last and (self.started or not self.state.unmeasured):
            return False
        if self.start and not self.started:
            where = path_of(self.directory, self.start)
            self.say(f"going on from step {self.start} of {self.stage.steps} ({where})")
        self.stop = self.task.set_up_segment(model, self.start, optimizer)
        model.to(self.device)
        self.task.prepare(model, self.data, self.device, lambda: self.watch.phase("load"))
        self.choice = self._planned(lambda: self.task.choose_chunks(min(self.start, last), self.stop, self.device))
        if self.choice:
            self.say(self.choice.line)
            self.choice.configure(model)
        elif self.unplanned and self.stage.gradient_cache == "auto":
            self.task.chunks = UNPLANNED_CHUNKS
        self.engine = self.task.make_engine(model, optimizer)
        let_groups_wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = True
        return True

    def run_segment(self) -> None:
        """The steps from `start` to `stop`, and what runs after each of them."""
        with self.segment() as (data, hooks):
            for number in range(self.start, self.stop):
                step = self.train_step(number, data)
                for hook in hooks:
                    with self.watch.phase(hook.phase):
                        hook.after_step(step)

    def release(self) -> None:
        """Frees the engine, before the next one takes as much memory again."""
        self.engine.close()
        del self.engine, self.monitor, self.saver, self.stop_signal
        gc.collect()  # modules, hooks and optimizer refer to one another
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def segment(self) -> Iterator[tuple[Iterator[tuple[Any, Drawn]], list[Hook]]]:
        """Gives the data of the steps from `start` to `stop`, and what runs after each of them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watch.phase("save"))  # what the hooks do when they end
            stack.enter_context(worker_deaths_explained(self.recipe.workers))
            with self.watch.phase("load"):
                hooks = self._enter_hooks(stack)
            data = batches(
                self.data, self.start, self.stop, self.recipe.workers, limit=self.recipe.limits.batch, say=self.say
            )
            stack.enter_context(contextlib.closing(data))
            for hook in hooks:
                with self.watch.phase(hook.phase):
                    hook.before_first_step(self.start)
            yield data, hooks
            for hook in hooks:
                with self.watch.phase(hook.phase):
                    hook.after_last_step()
        if (choice := self.choice) and (
            line := self._planned(lambda: planned_and_measured(choice.planned, self.device))
        ):
            self.say(line)

    def train_step(self, number: int, data: Iterator[tuple[Any, Drawn]]) -> Step:
        """One forward and backward pass over a global batch, and one update."""
        engine, task, stage = self.engine, self.task, self.stage
        began = time.perf_counter()
        with self.watch.phase("batch", times=1 + WORKER_STARTS if self.recipe.workers else 1):
            batch, drawn = next(data)
        waited = time.perf_counter() - began
        with self.watch.phase("compile" if number == self.start else "step"):
            rate = schedule(number, stage.steps, stage.warmup_steps, stage.min_lr_ratio)
            set_rates(engine.optimizer, rate, task.towers_at(number))
            engine.train()
            losses = task.forward_backward(engine, batch, number)
            if logged := self.monitor.should_log(number):
                engine.update_norms.before()
            applied = engine.step()
            engine.objective.after_step(engine)
            totals = self._totals(drawn)
            tokens = totals.tokens, totals.squared_tokens
            return Step(
                number,
                losses,
                applied,
                diagnosis="" if applied else engine.diagnosis(),
                scalars=self._scalars(losses) if logged and applied else None,
                samples=sum(stage.batch_at(number).values()),
                operations=self._planned(lambda: task.operations(engine, batch, number, *tokens)) or 0,
                waited=waited,
                totals=totals,
            )

    def _planned(self, compute: Callable[[], _T]) -> _T | None:
        """What the planner computes. On GPUs, where a run is dear, its fault costs the plan alone, with a warning."""
        try:
            return compute()
        except UserError:
            raise
        except Exception as error:
            if self.device.type != "cuda":
                raise
            if not self.unplanned:
                auto = f"; gradient_cache: auto is {UNPLANNED_CHUNKS}" if self.stage.gradient_cache == "auto" else ""
                fault = f"{type(error).__name__}: {error}"
                self.say(f"warning: the planner failed ({fault}); the run goes on without a plan{auto}")
            self.unplanned = True
            return None

    def say(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def _enter_hooks(self, stack: contextlib.ExitStack) -> list[Hook]:
        """What runs after each step, in this order; all of it ends with the stack."""
        recipe, stage, state, task = self.recipe, self.stage, self.state, self.task
        validation = task.make_validation(self.engine, self.tokenizer) if recipe.evaluation.every else None
        self.stop_signal = stack.enter_context(StopSignal())
        self.saver = stack.enter_context(Saver(self.directory, recipe.checkpoint.keep))
        self.monitor = stack.enter_context(self._make_monitor())
        say, best = self.monitor.say, recipe.checkpoint.best
        hooks = [
            Health(recipe.max_skipped, state, say),
            Ledger(self.directory / LEDGER, recipe.max_corrupt, self.rank == 0, say),
            Fetched(),
            self.monitor,
            Evaluation(validation, recipe.evaluation.every, best, state, self.monitor, self.saver, self.stop_signal),
            Saving(
                self.saver,
                self.engine,
                state,
                self.stop_signal,
                self.data,
                every=recipe.checkpoint.every,
                stop=self.stop,
                steps=stage.steps,
            ),
        ]
        for hook in hooks:
            if hook is not self.monitor:
                stack.enter_context(hook)
        return hooks

    def _make_monitor(self) -> Monitor:
        recipe, stage, state = self.recipe, self.stage, self.state
        peak = self._planned(lambda: peak_flops(self.engine.device, recipe.precision))
        shown = Shown(
            title=f"stage {self.number}, {self.task.title(self.start)}",
            start=self.start,
            steps=stage.steps,
            every=recipe.log_every,
            charts=self.task.charts,
            sources=list(self.data.fingerprint),
            max_tokens=stage.max_tokens if self.task.cuts_texts else None,
            peak=peak and peak * self.world,
            predicted=self.choice.seconds if self.choice else None,
        )
        sinks = open_sinks(recipe.sinks, self.directory, state.settings) if self.rank == 0 else ()
        texts = TextCounts(state.texts_drawn, state.texts_cut)
        return Monitor(self.directory, shown, active=self.rank == 0, sinks=sinks, texts=texts)

    def _totals(self, drawn: Drawn) -> Totals:
        """Sums over ranks, and whether any of them was asked to stop.

        Raises:
            UserError: rank 0 could not write the last checkpoint.
        """
        fetched = [drawn.fetched if number == self.machine else 0 for number in range(self.machines)]
        asked, unsaved, corrupt, tokens, squared_tokens, *others = self.stop_signal.agree(
            self.stop_signal.asked, self.saver.failed, len(drawn.corrupt), drawn.tokens, drawn.squared_tokens,
            *fetched, *drawn.of_sources(list(self.data.fingerprint)),
        )  # fmt: skip
        if unsaved:
            self.saver.finish()
        replaced = self.stop_signal.gather(drawn.corrupt) if corrupt else []
        texts, fetched = others[self.machines :], others[: self.machines]
        return Totals(bool(asked), tokens, squared_tokens, texts, replaced, fetched)

    def _scalars(self, losses: Losses) -> dict[str, float]:
        """What is shown beside the losses: the task's figures, the rates of each tower, norms."""
        engine = self.engine
        values = engine.objective.figures(engine, losses)
        for group in engine.optimizer.param_groups:
            name = f"learning_rate_{'muon' if group['muon'] else 'adamw'}/{group['tower']}"
            values[name] = max(values.get(name, 0.0), group["lr"])
        values |= {f"gradient_norm/{tower}": norm for tower, norm in engine.gradient_norms().items()}
        return {**values, **engine.update_norms.after()}
