"""Tasks of mteb by name, measured one after another; what is done is kept, so an interrupted run goes on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.results import TaskResult
from mteb.types import PromptType

from stage_trainer.errors import UserError
from stage_trainer.evaluation.mteb_model import MtebModel
from stage_trainer.files import sha256, writing

HIT = "hit_rate_at_5"
"""mteb's name of the recall@5 of CLIP papers: a hit is any right one among the first five."""
_LOCAL = "local-"


class Missing(UserError):
    """The data of a task cannot be had."""


def asked_tasks(words: Iterable[str], data: Path | None = None) -> list[AbsTask]:
    """The tasks that words name: a task, TASK:SUBSET,…, or a benchmark, which means all of its tasks.

    Args:
        data: a folder in which `TASK/` holds what the hub's repository of a task does; tasks without one are the hub's.

    Raises:
        UserError: there is no such task, benchmark or subset.
    """
    found: dict[str, AbsTask] = {}
    for word in words:
        for task in _named(word):
            found.setdefault(task.metadata.name, task)
    return [_local(task, data) for task in found.values()]


def _named(word: str) -> list[AbsTask]:
    name, _, said = word.partition(":")
    try:
        task = mteb.get_task(name)
    except KeyError as no_task:
        try:
            return list(mteb.get_benchmark(word).tasks)
        except KeyError as error:
            close = re.findall(r"Did you mean: '?([^'?]+)", f"{no_task} {error}")
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"mteb {mteb.__version__} has no task or benchmark {word!r}{hint}") from error
    if not said:
        return [task]
    subsets, there = [each.strip() for each in said.split(",")], task.hf_subsets
    if wrong := [each for each in subsets if each not in there]:
        raise UserError(f"{name} has no subset {wrong[0]!r}; it has {', '.join(there)}")
    return [mteb.get_task(name, hf_subsets=subsets)]


def _local(task: AbsTask, data: Path | None) -> AbsTask:
    """The task on the folder of its name, if there is one; its revision is then a hash of the files."""
    if isinstance(task, AbsTaskAggregate):
        return _changed(task, tasks=[_local(part, data) for part in task.metadata.tasks])
    folder = data / task.metadata.name if data else None
    if folder is None or not folder.is_dir():
        return task
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{path.relative_to(folder)}\0{sha256(path)}\n" for path in files)
    revision = _LOCAL + hashlib.sha256(lines.encode()).hexdigest()
    local = _changed(task, dataset={**task.metadata.dataset, "path": str(folder), "revision": revision})
    local.hf_subsets, local._eval_splits = task.hf_subsets, task._eval_splits
    return local


def _changed(task: AbsTask, **metadata: Any) -> AbsTask:
    """A task of a class of its own, as mteb's classes share their metadata with all of their tasks."""
    kind = type(task)
    found: AbsTask = type(kind.__name__, (kind,), {"metadata": kind.metadata.model_copy(update=metadata)})()
    return found


def check_modalities(model: MtebModel, tasks: Iterable[AbsTask]) -> None:
    """UserError if a task asks for what the model does not embed, before the first of several takes its time."""
    can = set(model.mteb_model_meta.modalities)
    for task in tasks:
        if isinstance(task, AbsTaskRetrieval):  # of texts with images one of the two is enough, as in mteb
            fits = all(can & set(task.metadata.get_modalities(prompt)) for prompt in PromptType)
        else:
            fits = can >= set(task.metadata.modalities)
        if not fits:
            what, embeds = (" and ".join(sorted(of)) for of in (task.metadata.modalities, can))
            tower = "" if model.embedder.sees else "; it has no image tower"
            raise UserError(f"{task.metadata.name} is a task of {what}; {model.embedder.name} embeds {embeds}{tower}")


def measure(model: MtebModel, task: AbsTask, cache: mteb.ResultCache, say: Callable[[str], None]) -> TaskResult:
    """A task's result, from `cache` if it was measured with these weights, settings and data. mteb keeps every subset
    once it is measured.

    Raises:
        Missing: its data cannot be had.
        UserError: the embeddings cannot be ranked by, or the result cannot be written.
    """
    path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
    if isinstance(task, AbsTaskAggregate):
        for part in task.metadata.tasks:
            measure(model, part, cache, say)
        path.unlink(missing_ok=True)  # made anew from its parts, of which some may be new
    elif _missing(task, path, say):
        say(f"{task.metadata.name}: measuring …")
        _load(task)
    try:
        with writing(path):
            return mteb.evaluate(
                model, task, cache=cache, encode_kwargs={"batch_size": 64}, co2_tracker=False, show_progress_bar=False
            ).task_results[0]
    finally:
        if task.data_loaded:
            task.unload_data()


def _missing(task: AbsTask, path: Path, say: Callable[[str], None]) -> bool:
    """Whether something of a task has to be measured. A result that is damaged, or of other data, is removed: mteb
    would end with a traceback, or take a whole one whatever data it is of."""
    if not path.exists():
        return True
    try:
        kept = TaskResult.from_disk(path)
        if kept.dataset_revision == task.metadata.revision:
            return bool(kept.get_missing_evaluations(task))
        say(f"{path} is of other data ({kept.dataset_revision}); measuring again")
    except (ValueError, KeyError, TypeError) as error:
        say(f"{path} is damaged ({next(iter(str(error).splitlines()), '')}); measuring again")
    path.unlink()
    return True


def _load(task: AbsTask) -> None:
    where, default = task.metadata.dataset, datasets.config.HF_DATASETS_CACHE
    if where["revision"].startswith(_LOCAL):
        # `datasets` keeps what it once read of a folder by the folder's name, whatever the folder holds now.
        datasets.config.HF_DATASETS_CACHE = Path(default) / where["revision"]
    try:
        task.load_data()
    except Exception as error:  # whatever data sets' library and the hub's raise without network, and at broken files
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        name, path, revision = task.metadata.name, where["path"], where["revision"]
        way = f"make DATA/{name} again"
        if not revision.startswith(_LOCAL):
            fetch = f"hf download --repo-type dataset {path} --revision {revision} --local-dir DATA/{name}"
            way = f"where there is network, `{fetch}`, and name it here with --data DATA"
        raise Missing(f"{name}: its data, {path} at {revision}, cannot be had ({first}); {way}") from error
    finally:
        datasets.config.HF_DATASETS_CACHE = default


def scores_of(task: AbsTask, result: TaskResult) -> dict[str, tuple[float, int]]:
    """measure → (plain mean over splits and subsets, their number): the main one, and `HIT` of searches between texts
    and images. Of a result that has more subsets than were asked for, those that were."""
    main = task.metadata.main_score
    asked = None if isinstance(task, AbsTaskAggregate) else set(task.hf_subsets)
    entries: list[dict[str, Any]] = [
        dict(entry)
        for split, of in result.scores.items()
        if asked is None or split in task.eval_splits
        for entry in of
        if asked is None or entry["hf_subset"] in asked
    ]
    names = {main: "main_score"}
    if task.metadata.type.startswith("Any2Any") and main != HIT:
        names[HIT] = HIT
    shown = {name: [entry[key] for entry in entries] for name, key in names.items() if all(key in e for e in entries)}
    return {
        name: (float("nan") if None in values else float(np.mean(values)), len(values))
        for name, values in shown.items()
    }


def as_text(rows: dict[str, dict[str, tuple[float, int]]]) -> str:
    """The figures times 100, by task and measure."""
    lines = [("task", "measure", "x 100", "subsets")]
    for name, measures in rows.items():
        for number, (measure_, (value, count)) in enumerate(measures.items()):
            lines.append((name if number == 0 else "", measure_, f"{100 * value:.3f}", str(count) if count > 1 else ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines
    )
