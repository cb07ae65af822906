"""A stage with a frozen image tower, with its embeddings from the disk and without, on a CPU.

    python packages/stage-trainer/benchmarks/frozen_tower.py --small --corpus runs/corpus-drawn    # five minutes

An image tower of the text tower's width, deeper and at 112 pixels, is frozen beside a text tower that trains, as in LiT
(arXiv 2111.07991). Each run is `stage-trainer train` in a process of its own: captions with images without
`embedding_cache` and with it (made before by `stage-trainer embed`, whose time stands beside it), and as many texts in
pairs without any image, which is the text tower's own speed. Speed is that of the fastest step, since a busy
machine only slows steps down, memory the peak of the process, libraries included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

STEPS, BATCH = 30, 32
STAGE = (
    f"steps={STEPS}", "warmup_steps=0", "evaluation.every=0", "checkpoint.every=0", "log_every=1", "precision=fp32",
    "trainable.image=none", "augmentation.views=1", "resolution=[[0, 112]]", "patch_dropout=[[0, 0]]",
    "model.vision={patch: 8, width: 64, layers: 12, heads: 2}", "optimizer.name=adamw",
)  # fmt: skip
RUNS = {
    "without": (f"batch={{image_text: {BATCH}, text: 0}}",),
    "with": (f"batch={{image_text: {BATCH}, text: 0}}", "embedding_cache=KEPT"),
    "texts alone": (f"batch={{image_text: 0, text: {BATCH // 2}}}",),
}


def main() -> None:
    options = common.parser(__doc__, "frozen_tower").parse_args()
    if not options.small:
        raise SystemExit("this is measured on the drawn corpus: add --small, and name it as --corpus")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/kept"
        began = time.perf_counter()
        _run("embed", options.corpus, f"{folder}/with", (*STAGE, *RUNS["with"]), kept)
        rows["embed, seconds"] = round(time.perf_counter() - began, 1)
        for name, more in RUNS.items():
            output = Path(folder) / name.replace(" ", "-")
            _run("train", options.corpus, str(output), (*STAGE, *more), kept)
            rows[name] = _measured(output / "stage1")
    without, cached, texts = (rows[name] for name in RUNS)
    ratios = {
        "speed, with over without": round(cached["texts a second"] / without["texts a second"], 2),
        "speed, with over texts alone": round(cached["texts a second"] / texts["texts a second"], 2),
        "memory, with over without": round(cached["peak MiB"] / without["peak MiB"], 2),
    }
    common.write(options.results, {"stage": STAGE, "batch": BATCH, "steps": STEPS}, {"runs": rows, "ratios": ratios})


def _run(command: str, corpus: str, output: str, settings: tuple[str, ...], kept: str) -> None:
    program = Path(sys.executable).with_name("stage-trainer")
    here = [f"corpus={corpus}", f"model.tokenizer={corpus}/tokenizer.model", f"output={output}"]
    words: list[str | Path] = [program, command, "--recipe", common.RECIPES / "drawn.yaml", "--stage", "1", *here]
    subprocess.run([*words, *(s.replace("KEPT", kept) for s in settings)], check=True)


def _measured(stage: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage), size_guidance={"scalars": 0})
    events.Reload()
    speeds = [event.value for event in events.Scalars("speed/samples_per_second") if event.step >= 2]
    state = json.loads(next(stage.glob("step-*/state.json")).read_text())
    texts = 2 if "texts-alone" in stage.parent.name else 1  # of a sample
    return {
        "texts a second": round(texts * max(speeds), 1),
        "peak MiB": round(state["peak_memory_bytes"] / 2**20),
    }


if __name__ == "__main__":
    main()
