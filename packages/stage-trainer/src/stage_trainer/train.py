"""One stage of training, from its start or from its last checkpoint to its end."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from stage_trainer import checkpoint, masked_lm
from stage_trainer.build import Model, build_model, check_configs, load_model, load_tokenizer, with_text_weights
from stage_trainer.control import Control
from stage_trainer.data import StageBatches, batches
from stage_trainer.engine import Engine, initialize_distributed
from stage_trainer.environment import keep_freed_memory, native_precision, peak_memory, quiet, set_threads, versions
from stage_trainer.errors import Stopped, UserError
from stage_trainer.keyed import key
from stage_trainer.ledger import Ledger
from stage_trainer.masked_data import MaskedBatches
from stage_trainer.masked_lm import HiddenWords
from stage_trainer.model import DualEncoder
from stage_trainer.monitor import Monitor
from stage_trainer.objective import MultiTask
from stage_trainer.optim import schedule, set_rates
from stage_trainer.recipe import Recipe, Stage
from stage_trainer.recipe_file import flatten, to_dict
from stage_trainer.step import forward_backward
from stage_trainer.validation import validation


def train(recipe: Recipe, number: int, *, start_over: bool = False) -> None:
    """Trains stage `number` (from 1) of a recipe; to be called by every rank.

    Raises:
        UserError: a stage whose predecessor has not run, data or settings that do not fit, a full disk, a loss that is
            no longer finite. Checkpoints written before stay.
    """
    quiet()
    rank, world, device = initialize_distributed()
    set_threads(world)
    if device.type == "cpu":
        keep_freed_memory()
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=native_precision(device))
        if rank == 0:
            print(f"precision: auto is {recipe.precision} here", flush=True)
    torch.manual_seed(key(recipe.seed, number))
    stage, directory = recipe.stage(number), recipe.stage_directory(number)
    for task in ("image_text", "text", "masked_lm"):
        if 0 < getattr(stage.batch, task) < world:
            raise UserError(
                f"batch.{task} is {getattr(stage.batch, task)}, fewer than the {world} ranks; raise it or use fewer"
            )
    if start_over and rank == 0:
        _move_aside(directory)
    if world > 1:
        torch.distributed.barrier()
    check_configs(recipe, number)
    tokenizer = load_tokenizer(recipe)
    make_batches = MaskedBatches if stage.masked else StageBatches
    data = make_batches(recipe, stage, number, tokenizer, rank, world)
    state = {"settings": settings(recipe, number), "data": data.fingerprint, "seconds": 0.0, "versions": versions()}

    step = -1
    while step < stage.steps:
        # A change of resolution is a checkpoint and a start from it: one way for both, and nothing to patch in place.
        model, optimizer, step, seconds = starting_point(recipe, number, state, tokenizer)
        if step == stage.steps:
            break
        objective: MultiTask | HiddenWords
        if isinstance(model, DualEncoder):
            checkpoint.set_resolution(model, stage.resolution_at(step), optimizer)
            objective = MultiTask(model.to(device), stage.loss, recipe.precision)
            until = min([start for start, _ in stage.resolution if start > step] + [stage.steps])
        else:
            objective, until = HiddenWords(model.to(device), recipe.precision), stage.steps
        engine = Engine(objective, recipe, stage)
        if optimizer:
            engine.load_optimizer_state(optimizer)
        state["seconds"] = seconds
        run(recipe, stage, number, engine, data, state, step, until)
    if rank == 0:
        print(f"stage {number} of {recipe.name} is complete: {checkpoint.all_saved(directory)[-1].path}", flush=True)


def run(
    recipe: Recipe,
    stage: Stage,
    number: int,
    engine: Engine,
    data: StageBatches | MaskedBatches,
    state: dict[str, Any],
    start: int,
    stop: int,
) -> None:
    """Steps `start` to `stop` - 1, at one resolution, with a checkpoint at the end."""
    rank, world = data.rank, data.world
    directory = recipe.stage_directory(number)
    validate = validation(recipe, stage, engine, data.tokenizer)
    title = f"stage {number}, " + ("hidden words" if stage.masked else f"{stage.resolution_at(start)} px")
    # Ranks see different samples but one group: losses are over the global batch.
    group = torch.distributed.group.WORLD if world > 1 else None
    cache = stage.gradient_cache
    began, before = time.perf_counter(), state["seconds"]
    ledger, samples = Ledger(directory / "corrupt.jsonl", recipe.max_corrupt, rank == 0), 0
    with (
        Control() as control,
        Monitor(
            directory, title=title, start=start, steps=stage.steps, every=recipe.log_every, active=rank == 0
        ) as monitor,
    ):
        loader = batches(data, start, stop, recipe.workers)
        for step in range(start, stop):
            began_waiting = time.perf_counter()
            batch, drawn = next(loader)
            waited = time.perf_counter() - began_waiting
            tasks, dropout = data.tasks_at(step), stage.patch_dropout_at(step)
            towers = ("text", "image") if "image_text" in tasks else ("text",)
            rate = schedule(step, stage.steps, stage.warmup_steps, stage.min_lr_ratio)
            set_rates(engine.optimizer, rate, towers)
            engine.engine.train()
            losses: dict[str, Any]
            if stage.masked:
                losses = masked_lm.forward_backward(engine, batch, cache.tokens if cache else 0)
            else:
                losses = forward_backward(engine, batch, tasks=tasks, patch_dropout=dropout, group=group, cache=cache)
            samples += (of_step := sum(getattr(stage.batch, task) for task in tasks))
            norms = engine.gradient_norms() if monitor.wants(step) else {}
            engine.step()
            done = step + 1
            asked_to_stop, corrupt, tokens = control.agree(control.asked, len(drawn.corrupt), drawn.tokens)
            monitor.count(of_step, tokens, waited, drawn.texts)
            if corrupt:
                ledger.enter(control.gather(drawn.corrupt), step, samples)
                monitor.scalar("data/corrupt_samples", ledger.count, step)
            keep_it = done == stop or asked_to_stop or (recipe.checkpoint.every and done % recipe.checkpoint.every == 0)
            if keep_it or monitor.wants(step):
                _check_finite(engine, losses, step, directory)
            if monitor.wants(step):
                monitor.log(step, losses, {**engine.objective.figures(losses), **scalars(engine, norms)})
            monitor.advance()
            state["seconds"] = before + time.perf_counter() - began
            if validate and (done % recipe.evaluation.every == 0 or done == stage.steps):
                validate(monitor, done, rank, world)
            if keep_it:
                state["peak_memory_bytes"] = max(peak_memory(), state.get("peak_memory_bytes", 0))
                checkpoint.save(directory, done, engine, state, recipe.checkpoint.keep, rank)
            if asked_to_stop and done < stage.steps:
                raise Stopped(
                    f"stopped after step {done} of {stage.steps}, as asked; the same command goes on from there"
                )


def starting_point(
    recipe: Recipe, number: int, state: dict[str, Any], tokenizer: Any
) -> tuple[Model, dict[str, torch.Tensor] | None, int, float]:
    """(model, optimizer state, step, seconds so far): this stage's newest checkpoint, the stage before, or new."""
    directory = recipe.stage_directory(number)
    saved = checkpoint.newest_sound(directory)
    before = checkpoint.newest_sound(recipe.stage_directory(number - 1)) if number > 1 else None
    finished = before if before and before.step >= recipe.stage(number - 1).steps else None
    grown_from = f"the model of stage {number - 1}"
    if finished:
        state["data"][grown_from] = finished.model_digest()
    if saved:
        former = saved.state()
        if not finished:  # it may be gone once the next stage has begun
            state["data"] |= {k: v for k, v in former.get("data", {}).items() if k == grown_from}
        checkpoint.compatible(former, state, directory)
        state["peak_memory_bytes"] = former.get("peak_memory_bytes", 0)
        return load_model(recipe, number, saved.model), saved.optimizer(), saved.step, former["seconds"]
    if number == 1:
        return build_model(recipe, number, tokenizer), None, 0, 0.0
    if not finished:
        needed = recipe.stage(number - 1).steps
        reached = f"stopped at step {before.step} of {needed}" if before else "has not run"
        raise UserError(
            f"stage {number} starts from stage {number - 1}, which {reached} ({recipe.stage_directory(number - 1)}); "
            f"run it first: bash launch/stage{number - 1}.sh"
        )
    if recipe.stage(number - 1).masked and not recipe.stage(number).masked:
        return build_model(with_text_weights(recipe, finished.model), number, tokenizer), None, 0, 0.0
    return load_model(recipe, number, finished.model), None, 0, 0.0


def settings(recipe: Recipe, number: int) -> dict[str, Any]:
    """What must not change between two runs of a stage: all that bears on its numbers."""
    how = ("deepspeed", "gradient_cache")  # what they change is rounding
    stage = {k: v for k, v in to_dict(recipe)["stages"][number - 1].items() if k not in how}
    tree = {k: v for k, v in to_dict(recipe).items() if k in ("model", "optimizer", "seed", "precision")}
    # A folder may be moved; what is in it has a fingerprint of its own.
    del tree["model"]["tokenizer"]
    return flatten({**tree, "stage": stage})


def scalars(engine: Engine, norms: dict[str, float]) -> dict[str, float]:
    """What TensorBoard shows beside the losses: temperatures, the rates of each tower, gradient norms."""
    values = {f"temperature/{task}": value for task, value in engine.temperatures().items()}
    for group in engine.optimizer.param_groups:
        kind = "muon" if group["muon"] else "adamw"
        name = f"learning_rate_{kind}/{group['tower']}"
        values[name] = max(values.get(name, 0.0), group["lr"])
    values.update({f"gradient_norm/{tower}": norm for tower, norm in norms.items()})
    if (norm := engine.global_gradient_norm()) is not None:
        values["gradient_norm/all"] = norm
    return values


def _check_finite(engine: Engine, losses: dict[str, Any], step: int, directory: Path) -> None:
    """Stops before a model that is lost is written over one that is not."""
    lost = [name for name, p in engine.parameters.items() if not torch.isfinite(p.detach()).all()]
    loss = sum(value.item() for value, _ in losses.values())
    if not math.isfinite(loss) or lost:
        what = f"the loss is {loss}" if not lost else f"{len(lost)} parameters are not finite ({lost[0]}, …)"
        raise UserError(
            f"{what} at step {step}; lower the learning rate or lengthen warmup_steps. "
            f"Checkpoints in {directory} are from before"
        )


def _move_aside(directory: Path) -> None:
    if directory.exists():
        number = 1
        while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
            number += 1
        directory.rename(aside)
        print(f"the former run now stands in {aside}", flush=True)


def summary(directory: Path) -> dict[str, Any]:
    """Seconds, peak memory and versions of a finished stage, from its last checkpoint."""
    saved = checkpoint.all_saved(directory)
    if not saved:
        raise UserError(f"{directory} holds no checkpoint; run that stage first")
    state = saved[-1].state()
    return {k: state[k] for k in ("step", "seconds", "peak_memory_bytes", "versions")}
