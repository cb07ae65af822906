"""What rests while others move, on two ranks under real DeepSpeed: towers that start later, towers that were frozen in
the stage before, a temperature whose task rests, an adapter that nobody uses, a step that is skipped. Every update
against torch.optim.AdamW alone, with None for the gradients of what rests; ZeRO changes with every part of the way."""

import dataclasses
import math
import os
import sys
from pathlib import Path

import pytest
import torch

TEXT, IMAGES, BOTH = ("text",), ("image_text",), ("image_text", "text")
LOST = "lost"
"""A step of both tasks whose gradients are not finite."""
WAY = (
    ("trainable={image: none, text: adapters}", (TEXT, TEXT)),
    ("trainable={image: all, text: all}", (TEXT, BOTH, LOST)),
    ("trainable={image: all, text: none}", (IMAGES, IMAGES, IMAGES)),
    ("trainable={image: all, text: all}", (BOTH, BOTH)),
    ("trainable={image: adapters, text: none}", (IMAGES,)),
)
"""What trains in each part, an engine of its own that goes on with the state of the one before, and its steps."""
ZERO = (0, 1, 2, 3)
FLOOR = 0.999
"""Of the temperatures, which start at 1: there the one of the images falls, once the towers have learnt something."""
SETTINGS = (
    "optimizer={name: adamw, betas: [0.9, 0.999], weight_decay: 0.5, gradient_clipping: 1.0}",
    "lr={image: 0.01, text: 0.005}",
    "model.text.adapters=[a, b]",
    "model.text.lora_rank=2",
    "model.vision.lora_rank=2",
    "model.temperature=1.0",
    "layer_decay={image: 0.9, text: 0.8}",
    f"loss={{dims: [32, 16], min_temperature: {FLOOR}}}",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory, two_ranks):
    """What `one_rank` saves."""
    folder = tmp_path_factory.mktemp("rest")
    two_ranks(__file__, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("first", ZERO)
def test_every_update_is_that_of_adamw_alone_whatever_rested_before(found, first):
    """To 1e-3 of its norm; what rests is bit-equal."""
    torch_alone, ours = found["torch"], found[first]
    assert len(ours) == len(torch_alone) == 1 + sum(len(steps) for _, steps in WAY)
    at_rest = 0
    for step in range(1, len(torch_alone)):
        for name, value in torch_alone[step].items():
            expected = value - torch_alone[step - 1][name]
            update = ours[step][name] - ours[step - 1][name]
            if expected.any():
                assert (update - expected).norm() < 1e-3 * expected.norm() + 1e-7, (step, name)
            else:
                assert not update.any(), (step, name)
                at_rest += 1
    assert at_rest > 100


@pytest.mark.parametrize("first", ZERO)
def test_a_checkpoint_counts_the_steps_of_each_parameter(found, first):
    expected, counts = found["torch steps"], found[f"{first} steps"]
    assert counts == expected
    after_second, last = counts[1], counts[-1]
    assert after_second["vision.cls_token"] == after_second["logit_scale"] == 1
    assert after_second["text_logit_scale"] == 2 + 2
    assert last["vision.cls_token"] == 1 + 3 + 2
    assert last["logit_scale"] == last["vision.blocks.0.mlp.fc2.lora_B"] == 1 + 3 + 2 + 1
    assert last["text.emb_ln.weight"] == 2 + 0 + 2
    assert last["text_logit_scale"] == 2 + 2 + 0 + 2
    assert max(count for name, count in last.items() if ".lora_A_" in name) == 2 + 2 + 0 + 2


def test_a_temperature_stays_at_its_floor_under_every_zero_stage(found):
    """As ZeRO's own copy has it, too, which would run away behind a floor that the weights alone keep to."""
    assert found["met the floor"] >= 2
    for first in ZERO:
        lowest = [min(of_task.values()) for of_task in found[f"{first} temperatures"]]
        assert min(lowest) == pytest.approx(FLOOR, rel=1e-6)
        assert lowest[-2:] == [min(lowest)] * 2
        for weights, low in zip(found[first][1:], lowest, strict=True):
            scales = weights["logit_scale"].item(), weights["text_logit_scale"].item()
            assert math.exp(-max(scales)) == pytest.approx(low, rel=1e-6)


def a_batch(tasks, rows=slice(None)):
    from test_step import make_batch

    batch = make_batch(7 * ("image_text" in tasks), 6 * ("text" in tasks), 3 * ("text" in tasks), rows=rows)
    return batch if "image_text" in tasks else dataclasses.replace(batch, images=None)


def an_engine():
    from test_step import PlainEngine

    return PlainEngine(dtype=torch.float32, adapters=("a", "b"), temperature=1.0, image_rank=2)


def torch_alone(recipe_of) -> tuple[list, list, int]:
    """(weights before the first step and after each, counts of steps after each part, how often a temperature met its
    floor), of one process without DeepSpeed."""
    from stage_trainer.tasks.contrastive import forward_backward

    engine = an_engine()
    model = engine.objective.model
    recipe = recipe_of(WAY[-1][0], 0)
    groups = list(engine.objective.parameter_groups(recipe.stage(1), recipe.optimizer))
    options = {"betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
    one_each = [{"params": [p], "lr": g["lr"], "weight_decay": g["weight_decay"]} for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW(one_each, **options)
    weights, counts, met = [copy_of(model.state_dict())], [], 0
    for trainable, steps in WAY:
        engine.objective.set_trainable(recipe_of(trainable, 0).stage(1))
        for tasks in steps:
            if tasks != LOST:
                forward_backward(engine, a_batch(tasks), pairs=tasks, patch_dropout=0.5)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    for scale in engine.objective.logit_scales.values():
                        met += int(scale > -math.log(FLOOR) + 1e-6)
                        scale.clamp_(max=-math.log(FLOOR))
            optimizer.zero_grad()
            weights.append(copy_of(model.state_dict()))
        states = {name: optimizer.state.get(p) for name, p in model.named_parameters()}
        counts.append({name: float(state["step"]) for name, state in states.items() if state})
    return weights, counts, met


def under_deepspeed(recipe_of, first: int, rank: int) -> tuple[list, list, list]:
    """Weights and counts of two ranks, and the temperatures after each step: a part under ZeRO `first`, the next under
    the stage after that, and so on."""
    from stage_trainer.optim.schedule import set_rates
    from stage_trainer.recipe import GradientCache
    from stage_trainer.tasks.contrastive import forward_backward
    from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
    from test_step import deepspeed_engine

    model = an_engine().objective.model
    weights, counts, temperatures, state = [copy_of(model.state_dict())], [], [], None
    rows = slice(0, 3) if rank == 0 else slice(3, None)
    for number, (trainable, steps) in enumerate(WAY):
        recipe = recipe_of(trainable, (first + number) % len(ZERO))
        fresh = an_engine().objective.model
        box = [weights[-1]]  # rank 0 alone has the weights
        torch.distributed.broadcast_object_list(box)
        fresh.load_state_dict(box[0])
        engine = deepspeed_engine(ContrastiveObjective(fresh, recipe.stage(1).loss, "fp32"), recipe, state)
        losses = engine.objective.losses
        for tasks in steps:
            if tasks == LOST:
                engine.objective.losses = lambda *a, of=losses, **o: {
                    task: (loss * float("nan"), stats) for task, (loss, stats) in of(*a, **o).items()
                }
            moving = BOTH if tasks == LOST else tasks
            set_rates(engine.optimizer, 1.0, ("text", "image") if "image_text" in moving else ("text",))
            group = torch.distributed.group.WORLD
            cache = GradientCache(2, 9) if len(weights) % 2 else None
            forward_backward(engine, a_batch(moving, rows), pairs=moving, patch_dropout=0.5, group=group, cache=cache)
            assert engine.step() == (tasks != LOST)
            engine.objective.after_step(engine)
            engine.objective.losses = losses
            weights.append(copy_of(engine.copy_of_weights()))
            temperatures.append(engine.objective.temperatures(engine))
        state = {name: value.clone() for name, value in engine.optimizer_state()}
        counts.append({n.removesuffix("|step"): float(v) for n, v in state.items() if n.endswith("|step")})
        engine.close()
    return weights, counts, temperatures


def copy_of(weights):
    return {name: value.detach().clone() for name, value in weights.items()}


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    from stage_trainer.recipe.read import load
    from stage_trainer.run.environment import quiet
    from stage_trainer.run.rendezvous import initialize_distributed

    def recipe_of(trainable: str, zero: int):
        whole = ", stage3_param_persistence_threshold: 0" if zero == 3 else ""
        under = f"deepspeed={{zero_optimization: {{stage: {zero}{whole}}}}}"
        drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
        return load(drawn, [*SETTINGS, trainable, under], 1).recipe

    quiet()
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    initialize_distributed()
    found = {}
    found["torch"], found["torch steps"], found["met the floor"] = torch_alone(recipe_of)
    for first in ZERO:
        of_this = under_deepspeed(recipe_of, first, rank)
        found[first], found[f"{first} steps"], found[f"{first} temperatures"] = of_this
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
