"""What DeepSpeed keeps between two steps, and what it takes in one, on two real ranks, against the plan."""

import gc
import json
import sys

import pytest

ZERO = (0, 1, 2, 3)


@pytest.mark.full
def test_two_ranks_keep_and_take_what_is_planned_under_each_zero_stage(tmp_path, two_ranks):
    two_ranks(__file__, tmp_path)
    for rank in (0, 1):
        for zero, (kept, planned, peak, planned_peak) in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert kept == pytest.approx(planned, rel=0.15), f"rank {rank}, ZeRO {zero}: kept"
            assert peak == pytest.approx(planned_peak, rel=0.15), f"rank {rank}, ZeRO {zero}: peak"


def one_rank(rank: int, folder: str) -> None:
    import os
    from pathlib import Path

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    import torch
    from stage_trainer.batch import Batch
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.engine import make_engine
    from stage_trainer.plan.devices import Device
    from stage_trainer.plan.memory import Model, Setting, Sizes, estimate, resting_parts
    from stage_trainer.recipe import Trainable
    from stage_trainer.recipe.read import load
    from stage_trainer.run.environment import quiet
    from stage_trainer.run.rendezvous import initialize_distributed
    from stage_trainer.tasks.contrastive import forward_backward
    from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
    from text_tower import PackedTokens, TextTower, TextTowerConfig
    from torch.profiler import ProfilerActivity, profile
    from vision_tower import VisionTower, VisionTowerConfig

    quiet()
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    initialize_distributed()
    text = TextTowerConfig(vocab_size=4000, width=128, layers=3, heads=2, mlp_width=512)
    vision = VisionTowerConfig(resolution=48, patch=8, width=128, layers=3, heads=2)
    drawn = Path(__file__).parents[3] / "launch/recipes/drawn.yaml"
    results = {}
    for zero in ZERO:
        bucket = 100_000
        options = f"stage: {zero}"
        options += f", reduce_bucket_size: {bucket}" if zero else ""
        options += ", stage3_param_persistence_threshold: 0" if zero == 3 else ""
        wide = ("model.text.width=128", "model.vision.width=128", "loss={dims: [128, 64]}")
        settings = ["optimizer.name=adamw", *wide, f"deepspeed={{zero_optimization: {{{options}}}}}"]
        recipe = load(drawn, settings, 1).recipe
        stage = recipe.stage(1)
        torch.manual_seed(0)
        before = live_bytes()
        objective = ContrastiveObjective(DualEncoder(TextTower(text), VisionTower(vision)), stage.loss, "fp32")
        numbers = [p.numel() for p in objective.model.parameters()]
        objective.set_trainable(stage)
        groups = objective.parameter_groups(stage, recipe.optimizer)
        under = {"precision": recipe.precision, "deepspeed": stage.deepspeed}
        engine = make_engine(objective, groups, recipe.optimizer, **under)
        engine.train()
        batch = Batch(
            images=torch.zeros(8, 3, 48, 48, dtype=torch.uint8),
            image_seeds=torch.arange(8),
            texts=PackedTokens.from_lists([[5] * 20] * 24),
            text_seeds=torch.arange(24),
            image_ids=torch.arange(8) + 8 * rank,
            pairs=8,
            negatives=0,
            text_ids=torch.arange(8) + 8 * rank,
        )

        def step(engine=engine, batch=batch) -> None:
            forward_backward(engine, batch, pairs=("image_text", "text"), group=torch.distributed.group.WORLD)
            engine.step()

        step()
        step()
        kept = live_bytes() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        model = Model(
            text, vision, Trainable(), 0.0, "fp32", "adamw", stage.loss.dims, weights=sum(numbers),
            learning=sum(numbers), largest=max(numbers), matrices=0, deepspeed=(("reduce_bucket_size", bucket),),
        )  # fmt: skip
        planned = resting_parts(model, zero, 2)
        if zero == 3:  # whole weights live during a step alone
            planned["weights"] -= 4 * min(sum(numbers), 10**9)
        cpu = Device("cpu", 0, 1.0, None, 1.0, None, kind="cpu")
        whole = estimate(model, Sizes(8, 24, 20, 8, 0, 2), Setting(None, False, False, zero), cpu)
        results[zero] = kept, sum(planned.values()), kept + peak_of(profiler), whole.total
        engine.close()
        del engine, groups, objective, batch, step, profiler
        gc.collect()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def live_bytes() -> int:
    """Of all tensors that Python knows of."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def peak_of(profiler) -> int:
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
