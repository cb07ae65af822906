"""One model of ours beside two specialists after equal processor time: open_clip's on images and captions,
sentence-transformers' on text pairs; ours learns both.

    bash launch/environment.sh && source .venv/bin/activate
    data-prep corpus runs/corpus
    nice -n 10 python packages/stage-trainer/benchmarks/equal_time.py --corpus runs/corpus --seconds 120 600 --seeds 3
    python packages/stage-trainer/benchmarks/equal_time.py --report-only --seconds 120 600 --seeds 3

Every training is a process of one thread. It may spend so many seconds of processor time, of which reading, augmenting
and tokenising are a part and importing, building and measuring are not; other work on the machine changes little. What
has been measured is kept (`--out`), so an interrupted run goes on, and more seeds or seconds add to it. The whole takes
three hours of processor time, one of which is choosing. Two runs at once, with other --contenders and --results, share
what they keep; the command above then writes the table.

All start from the same weights of the same towers (see peers.py), take the same data sets at the recipe's rates, as one
sampler draws them (sentence-transformers orders what was drawn itself), in batches of the same size at one resolution,
cut texts at the same length, and follow one schedule by the clock: the recipe's share of warm-up, then a cosine to
nothing. Each chooses first: of the settings in ROUNDS those that are best on the validation split after
--choose-seconds. The test split is measured with these alone.

- open_clip: its CustomTextCLIP, `train_one_epoch`, its transforms, and its tokenizer, filled up to the longest text of
  the batch rather than to the context length. A torch DataLoader gives images that are decoded once.
- sentence-transformers: its Trainer, samplers and collator, Matryoshka loss over multiple negatives ranking in both
  directions. The pairs lie in memory before the clock starts. Its `unpad_inputs` needs FlashAttention 2, a GPU's.
- ours: the recipe's data, tasks, augmentation, Muon and rates; which share of the time is of text alone, and whether
  the data of stages 2 and 3 follow, it chooses like the others.
bfloat16 is tried where the processor multiplies in it. Elsewhere it takes 3.4 times as long a step in open_clip.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import yaml
from ablation_measure import IMAGES, of_pool, top
from ablation_report import paired
from equal_time_trainers import TRAINERS, Job, Settings
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.evaluation.retrieval import Pool, embed_texts
from stage_trainer.metrics.retrieval import unit
from stage_trainer.run.environment import native_precision

PRECISIONS = [{"precision": "fp32"}]
if native_precision(torch.device("cpu")) == "bf16":
    PRECISIONS.append({"precision": "bf16"})
OPTIMIZERS = [
    *({"optimizer": "adamw", "lr": lr} for lr in (1e-3, 5e-4, 2e-3)),
    *({"optimizer": "muon", "lr": lr} for lr in (2e-3, 5e-3, 1e-2)),
]
ROUNDS: dict[str, list[list[dict[str, Any]]]] = {
    "open_clip": [
        OPTIMIZERS,
        [{"augmentation": "default"}, {"augmentation": "strong"}],
        [{"patch_dropout": 0.5}, {"patch_dropout": 0.0}],
        PRECISIONS,
    ],
    "sentence-transformers": [
        OPTIMIZERS,
        [{"sampler": "no_duplicates"}, {"sampler": "batch_sampler"}],
        [{"scale": 20.0}, {"scale": 50.0}],
        PRECISIONS,
    ],
    "ours": [
        [{"text_first": 0.1}, {"text_first": 0.0}, {"text_first": 0.2}],
        [{"stages": [1.0]}, {"stages": [0.65, 0.2, 0.15]}],
        PRECISIONS,
    ],
}
"""What each chooses from, round after round: with the first of the rounds to come, the best of those before."""
DIRECTIONS = ("text→image", "image→text", "other→English")
TASKS = {"open_clip": DIRECTIONS[:2], "sentence-transformers": DIRECTIONS[2:], "ours": DIRECTIONS}


def main() -> None:
    parser = common.parser(__doc__, "equal_time")
    parser.add_argument("--seconds", type=float, nargs="+", default=[120.0, 600.0], help="of processor time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose-seconds", type=float, default=120.0, help="of each training to choose by, seed 0")
    parser.add_argument("--contenders", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--out", type=Path, default=Path("runs/equal-time"), help="where measurements stay")
    parser.add_argument("--report-only", action="store_true", help="of what has been measured so far; trains nothing")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(trained_and_measured(Job(**options.one))))
        return
    if options.small:
        options.seconds, options.seeds, options.choose_seconds = [2.0], 1, 1.0
    store = Store(options.out, Path(options.corpus), train=not options.report_only)
    chosen: dict[str, Any] = {}
    measured: dict[float, dict[str, dict[int, Any]]] = {}
    for name in options.contenders:
        job = Job(name, {}, options.choose_seconds, 0, "validation", options.corpus, options.small)
        if found := choose(store, job):
            chosen[name] = found
    for seconds in options.seconds:
        for seed in range(options.seeds):
            for name, found in chosen.items():
                job = Job(name, found["settings"], seconds, seed, "test", options.corpus, options.small)
                if kept := store.measured(job):
                    measured.setdefault(seconds, {}).setdefault(name, {})[seed] = kept
    torch.set_num_threads(1)
    results = {"chosen": chosen, "measured": {f"{seconds:g}": report(of) for seconds, of in measured.items()}}
    settings = {"choose_seconds": options.choose_seconds, "recipe": "drawn" if options.small else "laptop"}
    common.write(options.results, settings, results)
    table = markdown(results["measured"])
    options.results.with_suffix(".md").write_text(table)
    print(table)


@dataclass(frozen=True)
class Store:
    """Measurements on the disk, each under a hash of what it depends on. `train`: makes those that are missing."""

    folder: Path
    corpus: Path
    train: bool

    def measured(self, job: Job) -> dict[str, Any] | None:
        recipe = common.RECIPES / ("drawn.yaml" if job.small else "laptop.yaml")
        corpus = (self.corpus / "corpus.json").read_text()
        depends = [asdict(replace(job, corpus="")), yaml.safe_load(recipe.read_text()), corpus]
        mark = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{job.contender}-{job.split}-{job.seconds:g}s-seed{job.seed}-{mark}.json"
        if not path.exists() and self.train:
            print(f"{job.contender}, {job.seconds:g} s, seed {job.seed}, {dict(job.settings)} …", flush=True)
            command = [sys.executable, __file__, "--one", json.dumps(asdict(job))]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(output.splitlines()[-1])
            part.rename(path)
        return json.loads(path.read_text()) if path.exists() else None


def choose(store: Store, job: Job) -> dict[str, Any] | None:
    """{settings, tried: [(settings, score), …]} of a contender; None if nothing has been tried.

    A score is the mean recall@5 of its directions and of the pools, in percent.
    """
    tried: list[tuple[Settings, float]] = []
    for settings in candidates(job, tried):
        if found := store.measured(replace(job, settings=settings)):
            score = float(np.mean([np.mean(values) for values in found["items"].values()]))
            tried.append((settings, round(100 * score, 2)))
    if not tried:
        return None
    best, _ = max(tried, key=lambda pair: pair[1])
    return {"settings": best, "tried": tried}


def candidates(job: Job, tried: list[tuple[Settings, float]]) -> Iterator[Settings]:
    """Settings to try next, given what was found for those before. With --small the last of all rounds alone."""
    rounds = ROUNDS[job.contender]
    first, last = ({k: v for each in rounds for k, v in each[place].items()} for place in (0, -1))
    yield last if job.small else first
    if job.small:
        return
    for each in rounds:
        best = max(tried, key=lambda pair: pair[1])[0] if tried else first  # none with --report-only
        yield from ({**best, **candidate} for candidate in each[1:])


def trained_and_measured(job: Job) -> dict[str, Any]:
    """{steps, processor_seconds, items: {"POOL DIRECTION": recall@5 of each item}}; see `of_pool` and `to_english`."""
    common.start(group=job.contender == "ours")
    model, figures = TRAINERS[job.contender](job)
    model.eval()
    items: dict[str, list[float]] = {}
    for name in IMAGES:
        if not (path := Path(job.corpus) / job.split / "image-short" / name).exists():
            continue
        pool, width = Pool.open(path), model.text.config.width
        found: dict[str, Iterable[float]] = {}
        if DIRECTIONS[0] in TASKS[job.contender]:
            both = zip(DIRECTIONS[:2], of_pool(model, pool, [width], {}), strict=True)
            found = {direction: of[width] for direction, of in both}
        if DIRECTIONS[2] in TASKS[job.contender]:
            found[DIRECTIONS[2]] = to_english(model, pool)
        items |= {f"{name} {direction}": [float(v) for v in values] for direction, values in found.items()}
    return {**figures, "items": items}


def to_english(model: DualEncoder, pool: Pool) -> np.ndarray:
    """Per image `[N]` that has names in English and in another language: the share of its other languages whose names
    find an English one of it among the first five."""
    words = sorted({text for _, text in pool.texts["en"]})
    named: list[set[str]] = [set() for _ in pool.images]
    for number, text in pool.texts["en"]:
        named[number].add(text)
    others = {language: entries for language, entries in pool.texts.items() if language != "en"}
    texts = sorted({*words, *(text for entries in others.values() for _, text in entries)})
    vectors, row = unit(embed_texts(model, texts)), {text: i for i, text in enumerate(texts)}
    english = vectors[[row[word] for word in words]]
    found: list[list[float]] = [[] for _ in pool.images]
    for entries in others.values():
        asked = sorted({text for _, text in entries})
        answers = {
            text: {words[place] for place in top(scores)}
            for text, scores in zip(asked, vectors[[row[text] for text in asked]] @ english.T, strict=True)
        }
        hits: dict[int, list[float]] = {}
        for number, text in entries:
            if named[number]:
                hits.setdefault(number, []).append(float(bool(named[number] & answers[text])))
        for number, of in hits.items():
            found[number].append(float(np.mean(of)))
    return np.array([np.mean(of) for of in found if of])


def report(found: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Of one budget: {"steps", METRIC: {CONTENDER: figures, "difference": ours less the specialist}}, in percent.

    `sampling_error` is the standard error of the mean over items (of each item the mean over seeds), `spread` the
    standard deviation over seeds, `interval` a 95 % bootstrap interval over items of the paired difference.
    """
    steps = {name: [of["steps"] for of in by_seed.values()] for name, by_seed in found.items()}
    result: dict[str, Any] = {"steps": steps}
    for name, by_seed in found.items():
        for metric in next(iter(by_seed.values()))["items"]:
            values = 100 * np.array([of["items"][metric] for of in by_seed.values()])
            items, means = values.mean(axis=0), values.mean(axis=1)
            result.setdefault(metric, {})[name] = {
                "mean": items.mean(),
                "sampling_error": items.std(ddof=1) / np.sqrt(len(items)),
                "spread": means.std(ddof=1) if len(means) > 1 else None,
                "seeds": dict(zip(by_seed, means.tolist(), strict=True)),
            }
    for metric, of in result.items():
        specialist = next((name for name in of if name != "ours"), None)
        if metric != "steps" and specialist and "ours" in of:
            of["difference"] = difference(found["ours"], found[specialist], metric)
    return result


def difference(ours: Mapping[int, Any], theirs: Mapping[int, Any], metric: str) -> dict[str, Any]:
    seeds = sorted(ours.keys() & theirs.keys())
    left, right = (np.array([of[seed]["items"][metric] for seed in seeds]) for of in (ours, theirs))
    differences = 100 * (left - right).mean(axis=0)
    low, high, p = paired(differences)
    return {"mean": differences.mean(), "interval": [low, high], "p": p, "seeds": seeds}


def markdown(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each budget and metric: mean ± spread over seeds, and the sampling error of either."""
    lines = [
        "| seconds | recall@5, test | specialist | | one model of ours | difference, 95 % interval | sampling error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seconds, metrics in measured.items():
        for metric, of in metrics.items():
            specialist = next((name for name in of if name in TRAINERS and name != "ours"), "")
            if metric == "steps":
                continue
            between = of.get("difference")
            shown = between and "{:+.1f} ({:+.1f} to {:+.1f})".format(between["mean"], *between["interval"])
            errors = [f"{of[name]['sampling_error']:.1f}" for name in (specialist, "ours") if name in of]
            cells = [seconds, metric, specialist, mean(of.get(specialist)), mean(of.get("ours")), shown or ""]
            lines.append(f"| {' | '.join(cells)} | {', '.join(errors)} |")
    return "\n".join(lines) + "\n"


def mean(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    spread = "" if figures["spread"] is None else f" ± {figures['spread']:.1f}"
    return f"{figures['mean']:.1f}{spread}"


if __name__ == "__main__":
    main()
