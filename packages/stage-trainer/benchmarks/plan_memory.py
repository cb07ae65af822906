"""The planner's peak memory beside the measured one, for real training steps of one process.

    python packages/stage-trainer/benchmarks/plan_memory.py             # small towers on a CPU, a minute
    python packages/stage-trainer/benchmarks/plan_memory.py --large     # L/14 and 561M, on a GPU

Measured is, on a GPU, `torch.cuda.max_memory_allocated` over two steps, update of the weights included; on a CPU, whose
allocator keeps no such account, the profiler's sum of all that was given out and taken back. Each case runs twice and
is measured the second time, so that the optimizer's state is there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stage_trainer.batch import Batch
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.plan.devices import DEVICES, Device, present
from stage_trainer.plan.memory import Model, Setting, Sizes, estimate
from stage_trainer.recipe import GradientCache, LossConfig, Trainable
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch.profiler import ProfilerActivity, profile
from vision_tower import VisionTower, VisionTowerConfig

SMALL = (
    TextTowerConfig(vocab_size=16386, width=128, layers=4, heads=4, mlp_width=512, lora_rank=4, adapters=("a",)),
    VisionTowerConfig(resolution=64, patch=8, width=128, layers=6, heads=4),
)
LARGE = (
    TextTowerConfig(lora_rank=4, lora_alpha=4.0, adapters=("retrieval.query",)),
    VisionTowerConfig.eva02_large(224),
)
Case = tuple[int, int, int, float, bool, tuple[int, int] | None]
"""Images, text pairs, tokens of a text, patch dropout, checkpointing, images and texts of a chunk."""

CASES: dict[str, list[Case]] = {
    "small": [
        (64, 64, 24, 0.0, False, None),
        (64, 64, 24, 0.5, True, None),
        (128, 64, 24, 0.5, False, (32, 64)),
        (128, 32, 48, 0.0, True, (32, 64)),
    ],
    "large": [
        (64, 64, 77, 0.5, False, None),
        (512, 512, 77, 0.5, True, None),
        (2048, 2048, 77, 0.5, False, (64, 256)),
        (2048, 2048, 77, 0.5, True, (512, 1024)),
    ],
}


class Engine:
    """A step with torch alone."""

    def __init__(self, model: DualEncoder, dims: tuple[int, ...], precision: str, device: torch.device):
        self.objective, self.device = (
            ContrastiveObjective(model.to(device).train(), LossConfig(dims=dims), precision),
            device,
        )

    def upload(self, part: Any) -> Any:
        return part.to(self.device)

    def forward(self, part: Any, **options: Any) -> Any:
        return self.objective(part.to(self.device), **options)

    def cast_once(self) -> contextlib.AbstractContextManager[object]:
        return cast_once(self.objective) if self.objective.precision == "bf16" else contextlib.nullcontext()

    def forward_passes(self, mine: int) -> int:
        return mine

    @contextlib.contextmanager
    def backwards(self) -> Iterator[Callable[[torch.Tensor, bool], None]]:
        yield lambda loss, last: loss.backward()


def a_batch(images: int, pairs: int, length: int, resolution: int) -> Batch:
    texts = images + 2 * pairs
    return Batch(
        images=torch.randint(0, 256, (images, 3, resolution, resolution), dtype=torch.uint8),
        image_seeds=torch.arange(images),
        texts=PackedTokens.from_lists([[5] * length] * texts),
        text_seeds=torch.arange(texts),
        image_ids=torch.arange(images),
        pairs=pairs,
        negatives=0,
        text_ids=torch.arange(pairs),
    )


@dataclass(frozen=True)
class Step:
    """A whole step of a case, update included, without DeepSpeed; and what the planner is told of it."""

    run: Callable[[], None]
    batch: Batch
    model: Model
    sizes: Sizes
    setting: Setting
    about: dict[str, Any]


def step_of(
    towers: tuple[TextTowerConfig, VisionTowerConfig],
    case: Case,
    precision: str,
    device: torch.device,
    fused: bool | None = None,
) -> Step:
    images, pairs, length, dropout, checkpointing, chunk = case
    text, vision = replace(towers[0], checkpointing=checkpointing), replace(towers[1], checkpointing=checkpointing)
    cache = None if chunk is None else GradientCache(images=chunk[0], tokens=chunk[1] * length)
    dims = tuple(text.width >> i for i in range(4))
    with device:
        engine = Engine(DualEncoder(TextTower(text), VisionTower(vision)), dims, precision, device)
    numbers = [p.numel() for p in engine.objective.model.parameters()]
    model = Model(
        text, vision, Trainable(), dropout, precision, "adamw", dims,
        weights=sum(numbers), learning=sum(numbers), largest=max(numbers), matrices=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(engine.objective.parameters(), fused=fused)
    assert isinstance(vision.resolution, int)
    batch = a_batch(images, pairs, length, vision.resolution)

    def run() -> None:
        tasks = ("image_text", "text")
        forward_backward(engine, batch, pairs=tasks, patch_dropout=dropout, cache=cache)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()

    about = {
        "images": images, "text_pairs": pairs, "tokens_of_a_text": length, "patch_dropout": dropout,
        "checkpointing": checkpointing, "chunk": chunk, "precision": precision,
    }  # fmt: skip
    sizes = Sizes(images, images + 2 * pairs, length, pairs, 0, 1)
    return Step(run, batch, model, sizes, Setting(cache, checkpointing, checkpointing, 0), about)


def compare(
    towers: tuple[TextTowerConfig, VisionTowerConfig], case: Case, precision: str, device: torch.device
) -> dict[str, Any]:
    step = step_of(towers, case, precision, device)
    planned = estimate(step.model, step.sizes, step.setting, planned_for(device))
    step.run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.run()
        measured = torch.cuda.max_memory_allocated()
    else:
        batch = step.batch
        assert batch.images is not None
        assert isinstance(batch.texts, PackedTokens)
        resting = 12 * step.model.weights + batch.images.nbytes + batch.texts.ids.nbytes
        measured = resting + peak_above(step.run)
    result = {
        **step.about, "planned_bytes": planned.total,
        "measured_bytes": measured, "planned_to_measured": round(planned.total / measured, 3), "moment": planned.moment,
        "parts": {name: size for name, size in planned.parts.items() if size},
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "parts"}), flush=True)
    return result


def planned_for(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("cpu", 0, 1.0, None, 1.0, None, kind="cpu")
    known = present(device) or DEVICES["h100-80gb"]
    return replace(known, capability=torch.cuda.get_device_capability(device))


def peak_above(run: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator had given out at once, above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="L/14 and 561M instead of small towers")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    name = "large" if options.large else "small"
    results = [compare(LARGE if options.large else SMALL, case, precision, device) for case in CASES[name]]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    path = Path(__file__).with_name("results") / f"plan-memory-{device.type}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    worst = max(results, key=lambda r: abs(r["planned_to_measured"] - 1))["planned_to_measured"]
    print(f"furthest off: {worst:.3f} of what was measured; written: {path}")


if __name__ == "__main__":
    main()
