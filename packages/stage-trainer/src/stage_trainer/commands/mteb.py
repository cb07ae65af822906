"""`stage-trainer mteb`: tasks of mteb, measured by mteb itself, of any model."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stage_trainer.commands.any_model import ANY_MODEL, check_any, open_any
from stage_trainer.commands.common import a_path, add_max_pixels, max_pixels_of, say
from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from stage_trainer.evaluation.mteb_model import MtebModel

OUT = Path("runs/mteb")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "mteb",
        help="tasks of mteb, measured by mteb itself",
        description="Lets mteb measure a model on its tasks: of texts, of images, of both. What is measured is kept in "
        "--out, in mteb's own files, by the hash of the weights and by every setting; an interrupted run goes on.",
    )
    p.add_argument("model", type=a_path, help=ANY_MODEL)
    p.add_argument(
        "tasks", nargs="+", metavar="TASK", help="a task (STSBenchmark), one of its subsets (STS17:en-en, or more: "
        "XM3600T2IRetrieval:bn,de), or a benchmark ('ViDoRe(v1)')"
    )  # fmt: skip
    p.add_argument("--dim", type=int, metavar="N", help="one of its Matryoshka dims (default: the whole width)")
    p.add_argument(
        "--data", type=a_path, metavar="DATA", help="take a task's data from DATA/TASK, a copy of its hub's "
        "repository, if there is one"
    )  # fmt: skip
    p.add_argument("--out", type=a_path, default=OUT, help="folder of mteb's result files (default: %(default)s)")
    p.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a text (default: 512; of other libraries what they say)"
    )
    p.add_argument(
        "--query-task", metavar="TASK", help="whose instruction queries of texts and pages get, retrieval.query for "
        "example (default: none)"
    )  # fmt: skip
    add_max_pixels(p)
    p.set_defaults(run=run)


def mteb_model(
    path: str | Path,
    *,
    dim: int | None = None,
    max_length: int | None = None,
    query_task: str | None = None,
    device: str | None = None,
    max_pixels: int | None = None,
) -> MtebModel:
    """A model for `mteb.evaluate(mteb_model("my-model"), tasks)`, with its `mteb_model_meta`.

    Args:
        path: what `stage-trainer evaluate` takes: a folder, a checkpoint, a name on the hub, open_clip:NAME/PRETRAINED.
        dim: one of its Matryoshka dims; None for the whole width.
        max_length: tokens kept of a text; None for 512, or what another library's model says.
        query_task: the task whose instruction queries of texts and pages get; None for none.
        device: None for a GPU if there is one.
        max_pixels: larger images are refused.

    Raises:
        UserError: mteb is not installed, there is no such model, or it has no such dim.
    """
    _check_installed()
    from stage_trainer.evaluation.models import Asked
    from stage_trainer.evaluation.mteb_model import load

    check_any(Path(path))
    return load(open_any(Path(path), Asked(max_length, query_task, device, max_pixels)), dim, max_pixels)


def run(arguments: argparse.Namespace) -> None:
    max_pixels = _check(arguments)
    say("loading mteb …")
    from stage_trainer.evaluation.mteb_run import asked_tasks, check_modalities

    tasks = asked_tasks(arguments.tasks, arguments.data)
    model = mteb_model(
        arguments.model,
        dim=arguments.dim,
        max_length=arguments.max_length,
        query_task=arguments.query_task,
        max_pixels=max_pixels,
    )
    check_modalities(model, tasks)
    _measure(model, tasks, arguments.out)


def _check(arguments: argparse.Namespace) -> int:
    """--max-pixels. UserError for what can be refused before mteb and PyTorch are loaded."""
    from stage_trainer.files import check_can_write

    for task in arguments.tasks:
        if not task.strip() or task.rstrip().endswith(":"):
            raise UserError(f"a task is {task!r}; expected one such as STSBenchmark, or STS17:en-en for a subset")
    if arguments.dim is not None and arguments.dim < 1:
        raise UserError(f"--dim is {arguments.dim}; expected one of the model's dims")
    if arguments.query_task is not None and not arguments.query_task.strip():
        raise UserError(f"--query-task is {arguments.query_task!r}; name one, or leave it out")
    if arguments.max_length is not None and arguments.max_length < 2:
        raise UserError(f"--max-length is {arguments.max_length}; expected a whole number from 2")
    if arguments.data is not None and not arguments.data.is_dir():
        raise UserError(f"--data {arguments.data}: there is no such folder")
    max_pixels = max_pixels_of(arguments)
    check_any(arguments.model)
    _check_installed()
    check_can_write(arguments.out / "results")
    return max_pixels


def _check_installed() -> None:
    if find_spec("mteb") is None:
        raise UserError("mteb is not installed: pip install './packages/stage-trainer[mteb]'")


def _measure(model: MtebModel, tasks: list[AbsTask], out: Path) -> None:
    import mteb

    from stage_trainer.evaluation.mteb_run import Missing, as_text, measure, scores_of

    cache, rows, gaps = mteb.ResultCache(out), {}, []
    for task in tasks:
        try:
            rows[task.metadata.name] = scores_of(task, measure(model, task, cache, say))
        except Missing as error:
            gaps.append(str(error))
    embedder = model.embedder
    if rows:
        settings = ", ".join(f"{name} {value}" for name, value in embedder.settings.items())
        print(as_text(rows))
        print(f"\nmeasured with mteb {mteb.__version__} at dim {model.dim}, {settings}")
        folder = cache.get_task_result_path("", model.mteb_model_meta).parent
        print(f"weights {embedder.fingerprint[:12]}; every figure: {folder}")
    if gaps:
        raise UserError("\n".join(gaps))
