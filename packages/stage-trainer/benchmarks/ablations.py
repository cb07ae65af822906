"""The paper's findings at laptop scale: trains every variant, measures all on the same items, writes tables and charts.

    bash launch/ablations.sh                                   # three seeds, within five hours on two cores; resumes
    python packages/stage-trainer/benchmarks/ablations.py --corpus runs/corpus --steps-scale 0.25 --seeds 1

Every run is launch/recipes/laptop.yaml with a few settings changed (`runs_of` has them all), one process and one
thread. Runs that are finished and measured are not repeated; one that was interrupted goes on from its checkpoint.
Steps, not seconds, end a run, so that a busy machine gives the same figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import common
from ablation_measure import Measured, measure
from ablation_pages import make_pages
from ablation_report import report

RESOLUTIONS = (36, 60, 84, 120)
"""As 224, 384, 512 and 768 in grids of patches: 16, 27, 36 and 54 there, 6, 10, 14 and 20 here."""
DRAWN_RESOLUTIONS = (32, 56, 72, 112)
DIMS = "[128, 96, 64, 32, 16, 8]"
STEPS = {1: 700, 2: 200, 3: 150}


@dataclass(frozen=True)
class Run:
    """A stage of a recipe to train: in the folder `name`, on from the first stage of `start` if one is named."""

    name: str
    stage: int
    overrides: tuple[str, ...] = ()
    start: str | None = None
    documents: bool = False


def runs_of(scale: float, small: bool = False) -> list[Run]:
    """Every run of a seed, in an order in which each finds what it starts from."""
    steps = {stage: max(3, round(of * scale)) for stage, of in STEPS.items()}

    lowest = (DRAWN_RESOLUTIONS if small else RESOLUTIONS)[0]
    first = f"task_start.image_text={round(150 * scale)}", f"resolution=[[0, {lowest}]]"

    def own(stage: int) -> tuple[str, ...]:
        warm = max(1, round((50 if stage == 1 else 10) * scale))
        return f"steps={steps[stage]}", f"warmup_steps={warm}", "log_every=5", *(first if stage == 1 else ())

    def settings(stage: int) -> tuple[str, ...]:  # and those of the stages before, which have to be complete
        before = [
            f"stages.{number}.{setting}"
            for number in range(1, stage)
            for setting in own(number)
            if "log_every" not in setting
        ]
        return *own(stage), *before

    pages = "[{path: image-short/pages-figures, rate: 2}, {path: image-short/pages-titles, rate: 1}]"
    of_pages = (
        *settings(2), "lr.image=4e-4", "lr.text=4e-4", "batch.image_text=64", "batch.text=32", "max_tokens=32",
        "patch_dropout=[[0, 0.0]]", f"data.image_text={pages}",
        "augmentation={scale: [0.95, 1.0], ratio: [0.97, 1.03], color: 0.1}",
    )  # fmt: skip
    together = (*settings(1), "task_start.image_text=0")
    branches = [] if small else [
        Run(f"pages-{size}", 2, (*of_pages, f"resolution=[[0, {size}]]"), "multi-task", documents=True)
        for size in RESOLUTIONS
    ]  # fmt: skip
    return [
        Run("multi-task", 1, settings(1)),
        Run("multi-task", 2, settings(2)),
        Run("multi-task", 3, settings(3)),
        # The paper's prefixes, 1024 to 64, in the same ratios; the recipe itself has three.
        *([] if small else [Run("matryoshka", 2, (*settings(2), f"loss.dims={DIMS}"), "multi-task")]),
        *branches,
        # A unified loss has both tasks from the first step on, and so has what it is compared with.
        Run("together", 1, together),
        Run("unified", 1, (*together, "loss.kind=unified")),
        Run("frozen-image", 2, (*settings(2), "trainable.image=none"), "multi-task"),
        Run("frozen-text", 2, (*settings(2), "trainable.text=none"), "multi-task"),
    ]


def main() -> None:
    parser = common.parser(__doc__, "ablations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="of the laptop recipe's steps, in every run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="where runs and measurements stay")
    parser.add_argument(
        "--pictures", type=Path, default=None, help="a folder for the charts; default: beside --results"
    )
    parser.add_argument("--report-only", action="store_true", help="of what has been measured so far; trains nothing")
    options = parser.parse_args()
    out = options.out / f"scale-{options.steps_scale:g}"
    if not options.small and not options.report_only:
        make_pages(Path(options.corpus), out / "corpus")
    corpus = Path(options.corpus) if options.small else out / "corpus"
    found: dict[int, dict[str, Measured]] = {}
    for seed in range(options.seeds):
        for run in runs_of(options.steps_scale, options.small):
            job = Job(run, out / f"seed-{seed}", corpus, seed, options.small)
            if (done := job.kept()) or (not options.report_only and (done := job.trained_and_measured())):
                found.setdefault(seed, {})[f"{run.name}/{run.stage}"] = done
    pictures = options.pictures or options.results.parent
    settings = {"steps_scale": options.steps_scale, "seeds": sorted(found), "recipe": "laptop.yaml, precision auto"}
    common.write(options.results, settings, report(found, options.results.with_suffix(""), pictures))


@dataclass(frozen=True)
class Job:
    """A run of one seed; `folder` is the seed's."""

    run: Run
    folder: Path
    corpus: Path
    seed: int
    small: bool

    @property
    def recipe(self) -> Path:
        return common.RECIPES / ("drawn.yaml" if self.small else "laptop.yaml")

    @property
    def figures(self) -> Path:
        return self.folder / f"{self.run.name}-stage{self.run.stage}.npz"

    @property
    def overrides(self) -> list[str]:
        of_corpus = [f"corpus={self.corpus}", f"model.tokenizer={self.corpus}/tokenizer.model"]
        its = [f"seed={self.seed}", f"output={self.folder / self.run.name}", "evaluation.every=0"]
        return [*self.run.overrides, *of_corpus, *its]

    @property
    def mark(self) -> str:
        """Other settings have another one, so that no figure of theirs is taken for these."""
        settings = [asdict(self.run), *self.overrides, self.recipe.read_text()]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def kept(self) -> Measured | None:
        """What was measured before, under the same settings."""
        found = Measured.load(self.figures) if self.figures.exists() else None
        return found if found and found.mark == self.mark else None

    def trained_and_measured(self) -> Measured:
        run = self.run
        print(f"seed {self.seed}: {run.name}, stage {run.stage} …", flush=True)
        if run.start:
            link = self.folder / run.name / "stage1"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(Path("..") / run.start / "stage1")
        trainer = Path(sys.executable).with_name("stage-trainer")
        command = [trainer, "train", "--recipe", self.recipe, "--stage", str(run.stage), *self.overrides]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.figures.with_suffix(".log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(list(map(str, command)), check=True, stdout=log, env=environment)
        stage = self.folder / run.name / f"stage{run.stage}"
        measured = measure(stage, self.corpus, run.documents, self.mark)
        measured.save(self.figures)
        return measured


if __name__ == "__main__":
    main()
