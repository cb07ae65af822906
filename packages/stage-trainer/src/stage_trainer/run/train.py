"""One stage of training, from its start or from its last checkpoint to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from stage_trainer import masked_lm
from stage_trainer.build import check_configs, load_tokenizer
from stage_trainer.data.batches import StageBatches
from stage_trainer.data.ledger import Ledger
from stage_trainer.data.masked import MaskedBatches
from stage_trainer.data.stateless_rng import key
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine import Engine
from stage_trainer.errors import Stopped, UserError
from stage_trainer.masked_lm import HiddenWords
from stage_trainer.objective import MultiTask
from stage_trainer.optim import schedule, set_rates
from stage_trainer.plan.auto import choose, planned_and_measured
from stage_trainer.plan.devices import peak_flops
from stage_trainer.plan.flops import StepShape, kept_patches, step_flops
from stage_trainer.recipe import GradientCache, Recipe, Stage
from stage_trainer.recipe.rules import check_ranks
from stage_trainer.run import checkpoint
from stage_trainer.run.control import Control
from stage_trainer.run.environment import keep_freed_memory, native_precision, peak_memory, quiet, set_threads, versions
from stage_trainer.run.health import Health
from stage_trainer.run.loader import batches, worker_deaths_explained
from stage_trainer.run.monitor import Monitor, open_sinks
from stage_trainer.run.next_steps import next_steps
from stage_trainer.run.rank_0 import from_rank_0
from stage_trainer.run.rendezvous import initialize_distributed
from stage_trainer.run.saver import Saver, better, check_best
from stage_trainer.run.start import move_aside, settings, starting_point
from stage_trainer.run.text_counts import TextCounts
from stage_trainer.run.together import Heartbeat, one_reason
from stage_trainer.run.validation import validation
from stage_trainer.step import forward_backward


def train(recipe: Recipe, number: int, *, start_over: bool = False, refusal: UserError | None = None) -> None:
    """Trains stage `number` (from 1) of a recipe; to be called by every rank.

    Args:
        start_over: moves what the stage has aside, and begins anew.
        refusal: why rank 0 may not begin, for the ranks of other machines to hear of it.

    Raises:
        UserError: a stage whose predecessor has not run, data or settings that do not fit, a full disk, losses that are
            no longer finite. Checkpoints written before stay.
        Stopped: the run was asked to stop, and has saved.
    """
    quiet()
    rank, world, device = initialize_distributed(recipe.output)
    set_threads(world)
    if device.type == "cpu":
        keep_freed_memory()
    with one_reason(Path(recipe.output), rank, world):
        if refusal := from_rank_0(refusal):
            raise refusal
        _train(recipe, number, rank, world, device, start_over)


def _train(recipe: Recipe, number: int, rank: int, world: int, device: torch.device, start_over: bool) -> None:
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=native_precision(device))
        if rank == 0:
            print(f"precision: auto is {recipe.precision} here", flush=True)
    torch.manual_seed(key(recipe.seed, number))
    stage, directory = recipe.stage(number), recipe.stage_directory(number)
    check_ranks(recipe, number, world, recipe.name)
    check_configs(recipe, number, fetch=True)
    tokenizer = load_tokenizer(recipe)
    make_batches = MaskedBatches if stage.masked else StageBatches
    data = make_batches(recipe, stage, number, tokenizer, rank, world)
    if start_over and rank == 0:
        move_aside(directory)
    if world > 1:
        torch.distributed.barrier()
    state: dict[str, Any] = {"settings": settings(recipe, number), "data": data.fingerprint, "versions": versions()}

    step = -1
    while step < stage.steps:
        # A change of resolution is a checkpoint and a start from it: one way for both, and nothing to patch in place.
        former, (model, optimizer, step) = step, starting_point(recipe, number, state, tokenizer)
        if step == stage.steps:
            break
        if rank == 0 and former < 0 < step:
            print(f"going on from step {step} of {stage.steps} ({checkpoint.path_of(directory, step)})", flush=True)
        objective: MultiTask | HiddenWords
        if isinstance(model, DualEncoder):
            checkpoint.set_resolution(model, stage.resolution_at(step), optimizer)
            objective = MultiTask(model.to(device), stage.loss, recipe.precision)
            until = min([start for start, _ in stage.resolution if start > step] + [stage.steps])
        else:
            objective, until = HiddenWords(model.to(device), recipe.precision), stage.steps
        cache, planned = stage.chunks, None
        if not stage.masked and (stage.gradient_cache == "auto" or device.type == "cuda"):
            choice = choose(recipe, number, step, until, device)
            cache, planned = choice.cache, choice.planned
            if rank == 0:
                print(choice.line, flush=True)
        engine = Engine(objective, recipe, stage, optimizer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with worker_deaths_explained(recipe.workers):
            run(recipe, stage, number, engine, data, state, step, until, cache)
        if rank == 0 and planned and (line := planned_and_measured(planned, device)):
            print(line, flush=True)
    if rank == 0:
        print(f"stage {number} of {recipe.name} is complete: {checkpoint.all_saved(directory)[-1].path}")
        print(next_steps(recipe, number), flush=True)


def run(
    recipe: Recipe,
    stage: Stage,
    number: int,
    engine: Engine,
    data: StageBatches | MaskedBatches,
    state: dict[str, Any],
    start: int,
    stop: int,
    cache: GradientCache | None,
) -> None:
    """Steps `start` to `stop` - 1, at one resolution, with a checkpoint at the end."""
    rank, world, directory = data.rank, data.world, recipe.stage_directory(number)
    title = f"stage {number}, " + ("hidden words" if stage.masked else f"{stage.resolution_at(start)} px")
    # Ranks see different samples but one group: losses are over the global batch.
    group = torch.distributed.group.WORLD if world > 1 else None
    validate = validation(recipe, stage, engine, data.tokenizer)
    check_best(recipe.checkpoint.best, validate.measures if validate else None)
    ledger = Ledger(directory / "corrupt.jsonl", recipe.max_corrupt, rank == 0)
    health = Health(recipe.max_skipped, state["skipped"])
    began, before, samples = time.perf_counter(), state["seconds"], 0
    peak = peak_flops(engine.engine.device, recipe.precision)
    sinks = open_sinks(recipe.sinks, directory, state["settings"]) if rank == 0 else ()
    with (
        Heartbeat(rank, world),
        Control() as control,
        Saver(directory, recipe.checkpoint.keep) as saver,
        Monitor(
            directory,
            title=title,
            start=start,
            steps=stage.steps,
            every=recipe.log_every,
            active=rank == 0,
            sinks=sinks,
            peak=peak and peak * world,
            max_tokens=None if stage.masked else stage.max_tokens,  # of a text with hidden words a part is meant
            texts=TextCounts(state["texts_drawn"], state["texts_cut"]),
        ) as monitor,
        contextlib.closing(batches(data, start, stop, recipe.workers)) as loader,
    ):
        sources = list(data.fingerprint)
        if validate and state["unmeasured"]:
            measured = validate(monitor, start, rank, world)
            if best := better(measured, validate.measures, recipe.checkpoint.best, state):
                saver.note_best(start, best)
            state["unmeasured"] = False
        for step in range(start, stop):
            began_waiting = time.perf_counter()
            batch, drawn = next(loader)
            waited = time.perf_counter() - began_waiting
            tasks = data.tasks_at(step)
            towers = ("text", "image") if "image_text" in tasks else ("text",)
            rate = schedule(step, stage.steps, stage.warmup_steps, stage.min_lr_ratio)
            set_rates(engine.optimizer, rate, towers)
            engine.engine.train()
            losses: dict[str, Any]
            if stage.masked:
                losses = masked_lm.forward_backward(engine, batch, cache.tokens if cache else 0)
            else:
                dropout = stage.patch_dropout_at(step)
                losses = forward_backward(engine, batch, tasks=tasks, patch_dropout=dropout, group=group, cache=cache)
            if looked_at := monitor.wants(step):
                engine.movement.before()
            applied = engine.step()
            if problem := health.stepped(step, applied, engine.diagnosis):
                monitor.say(problem)
            done = step + 1
            samples += (of_step := sum(getattr(stage.batch, task) for task in tasks))
            asked, unsaved, corrupt, tokens, squared_tokens, *texts = control.agree(
                control.asked, saver.failed, len(drawn.corrupt), drawn.tokens, drawn.squared_tokens,
                *drawn.of_sources(sources),
            )  # fmt: skip
            operations = model_operations(engine, stage, batch, step, tokens, squared_tokens)
            monitor.count(of_step, tokens, operations, waited)
            monitor.texts.count(sources, texts)
            if corrupt:
                ledger.enter(control.gather(drawn.corrupt), step, samples)
            if looked_at and applied:
                monitor.log(step, losses, {**engine.objective.figures(losses), **scalars(engine, health, ledger)})
                for warning in health.logged(losses):
                    monitor.say(f"step {step}: {warning}")
            monitor.advance()
            if unsaved:
                saver.finish()
            best = None
            due = validate and (done % recipe.evaluation.every == 0 or done == stage.steps)
            # An evaluation may take longer than whoever asks for an end will wait: what is due is then made up for.
            state["unmeasured"] = bool(due and asked and done < stage.steps)
            if validate and due and not state["unmeasured"]:
                measured = validate(monitor, done, rank, world)
                best = better(measured, validate.measures, recipe.checkpoint.best, state)
                if done == stage.steps:
                    shown = [name for name in measured if validate.measures[name].headline]
                    monitor.outcome(state["settings"], [*shown, *(f"loss/{task}" for task in losses)])
                (asked,) = control.agree(control.asked)
            if done == stop or asked or best or (recipe.checkpoint.every and done % recipe.checkpoint.every == 0):
                _check_parameters(engine, step, directory)
                state["seconds"] = before + time.perf_counter() - began
                state["peak_memory_bytes"] = max(peak_memory(), state["peak_memory_bytes"])
                state["skipped"] = health.skipped
                state["texts_drawn"], state["texts_cut"] = dict(monitor.texts.drawn), dict(monitor.texts.cut)
                saver.save(done, engine, state, best)
            if ledger.count and (asked or done == stop):
                monitor.say(
                    f"{ledger.count:,} samples could not be read, and others took their places: {ledger.path} has each"
                )
            if asked and done < stage.steps:
                saver.finish()
                raise Stopped(
                    f"stopped after step {done} of {stage.steps}, as asked; the same command goes on from there"
                )
        saver.finish()  # here signals are still heard: what asks for an end while the last checkpoint is written counts
        (asked,) = control.agree(control.asked)
        if asked and stop < stage.steps:
            raise Stopped(f"stopped after step {stop} of {stage.steps}, as asked; the same command goes on from there")


def model_operations(engine: Engine, stage: Stage, batch: Any, step: int, tokens: int, squared_tokens: int) -> int:
    """Floating-point operations of the model in a step, over all ranks, for MFU.

    Args:
        batch: this rank's part, for what is alike in all parts.
        tokens, squared_tokens: of all ranks' texts, the sums of the lengths and of their squares.
    """
    model, sizes = engine.objective.model, stage.batch
    if stage.masked:
        hidden = round(stage.masking.share * tokens)  # as many as are expected; counting them would wait for the device
        shape = StepShape(texts=sizes.masked_lm, tokens=tokens, squared_tokens=squared_tokens, hidden=hidden)
        return step_flops(model.tower.config, None, shape).model
    images, pairs = sizes.image_text if len(batch.image_ids) else 0, sizes.text if batch.pairs else 0
    shape = StepShape(
        images=images * (1 + stage.loss.views),
        kept_patches=kept_patches(model.vision.config, stage.patch_dropout_at(step)),
        texts=images + pairs * (2 + batch.negatives),
        tokens=tokens,
        squared_tokens=squared_tokens,
        pairs=pairs,
        negatives=batch.negatives,
        unified=stage.loss.unified_pairs(images, pairs),
    )
    text, vision, trainable = model.text.config, model.vision.config, stage.trainable
    return step_flops(text, vision, shape, trainable=trainable, dims=stage.loss.dims).model


def scalars(engine: Engine, health: Health, ledger: Ledger) -> dict[str, float]:
    """What TensorBoard shows beside the losses: temperatures, the rates of each tower, norms, what went wrong."""
    values = {f"temperature/{task}": value for task, value in engine.temperatures().items()}
    for group in engine.optimizer.param_groups:
        kind = "muon" if group["muon"] else "adamw"
        name = f"learning_rate_{kind}/{group['tower']}"
        values[name] = max(values.get(name, 0.0), group["lr"])
    values |= {f"gradient_norm/{tower}": norm for tower, norm in engine.gradient_norms().items()}
    values |= engine.movement.after()
    return {**values, "trouble/skipped_steps": health.skipped, "trouble/corrupt_samples": ledger.count}


def _check_parameters(engine: Engine, step: int, directory: Path) -> None:
    """Stops before a model that is lost is written over one that is not."""
    lost = [name for name, p in engine.parameters.items() if not torch.isfinite(p.detach()).all()]
    if lost:
        raise UserError(
            f"after step {step} {len(lost)} parameters are not finite ({lost[0]}, …); lower the learning rate or "
            f"lengthen warmup_steps. Checkpoints in {directory} are from before"
        )
