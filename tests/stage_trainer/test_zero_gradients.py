"""Gradient caching on two ranks under real DeepSpeed, each ZeRO stage: every gradient against one plain big batch."""

import os
import sys
from pathlib import Path

import pytest
import torch

ZERO = (0, 1, 2, 3)
KINDS = ("multi_task", "unified", "sigmoid", "image_negatives")
OPTIONS = {"sigmoid": ", weights: [1, 2.5], temperature: shared, false_negative_margin: 0.1"}
SCALARS = {
    "multi_task": {"logit_scale", "text_logit_scale"},
    "unified": {"logit_scale"},
    "sigmoid": {"logit_scale", "logit_bias", "text_logit_bias"},
    "image_negatives": {"logit_scale", "text_logit_scale"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, two_ranks):
    """{(ZeRO stage, kind of loss): {parameter: (gradient, that of the plain batch)}}"""
    folder = tmp_path_factory.mktemp("zero")
    two_ranks(__file__, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ZERO)
def test_caching_gives_one_big_batchs_gradients(found, zero, kind):
    """To 3e-6 of their norm, float32; dropout, patch dropout, LoRA, hard negatives and views among it."""
    gradients = found[zero, kind]
    assert SCALARS[kind] == {name for name in gradients if "logit" in name}
    assert any("lora" in name for name in gradients)
    ours, plain = (torch.cat([pair[i].flatten().double() for pair in gradients.values()]) for i in (0, 1))
    assert (ours - plain).norm() < 3e-6 * plain.norm()
    for name, (mine, expected) in gradients.items():
        assert (mine - expected).norm() < 3e-6 * expected.norm() + 1e-7 * plain.norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ZERO)
def test_norms_are_those_of_the_whole_batchs_gradients(found, zero, kind):
    """Before clipping: of each tower with its temperature, under ZeRO of all together."""
    expected = {"all": [], "image": [], "text": []}
    for name, (_, gradient) in found[zero, kind].items():
        tower = "image" if name.startswith(("vision.", "logit_")) else "text"
        for key in ("all", tower):
            expected[key].append(gradient.flatten())
    norms = found[zero, kind, "norms"]
    assert set(norms) == ({"all"} if zero else {"image", "text"})
    for key, norm in norms.items():
        assert norm == pytest.approx(torch.cat(expected[key]).norm().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ZERO)
def test_the_size_of_the_towers_is_known_but_under_zero_3(found, zero, kind):
    """At a rate of 0 nothing moves."""
    measured, weights = found[zero, kind, "update norms"]
    norms = {"image": [], "text": []}
    for name, value in weights.items():
        norms["image" if name.startswith(("vision.", "logit_")) else "text"].append(value.flatten())
    expected = {f"parameter_norm/{tower}": torch.cat(values).norm().item() for tower, values in norms.items()}
    expected |= {f"update_norm/{tower}": 0.0 for tower in norms}
    if "text_logit_scale" not in SCALARS[kind]:  # the one temperature is the images'
        of_text = weights["text_logit_scale"].item()
        expected["parameter_norm/text"] = (expected["parameter_norm/text"] ** 2 - of_text**2) ** 0.5
    assert measured == ({} if zero == 3 else pytest.approx(expected, rel=1e-4))


@pytest.mark.parametrize("zero", ZERO)
def test_ranks_add_up_numbers_and_make_as_many_passes_where_each_gathers_weights(found, zero):
    for rank, (total, passes) in enumerate(found[zero, "multi_task", "ranks"]):
        assert torch.equal(total, torch.tensor([1.5, -2.0], dtype=torch.float64))
        assert passes == (4 if zero == 3 else 3 + rank)


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    from deepspeed.utils import safe_get_full_grad
    from stage_trainer.optim.schedule import set_rates
    from stage_trainer.recipe import GradientCache
    from stage_trainer.recipe.read import load
    from stage_trainer.run.environment import quiet
    from stage_trainer.run.rendezvous import initialize_distributed
    from stage_trainer.tasks.contrastive import forward_backward
    from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
    from test_step import BOTH, OF_KIND, PlainEngine, deepspeed_engine, make_batch

    quiet()
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    initialize_distributed()
    drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
    found = {}
    for kind in KINDS:
        options = {"pairs": BOTH, "patch_dropout": 0.5}
        of_loss = "multi_task" if kind == "image_negatives" else kind
        plain = PlainEngine(kind, torch.float32)
        # The plain engine averages over ranks, if there are any: here both run the same whole batch.
        forward_backward(plain, make_batch(**OF_KIND[kind]), **options)
        expected = {n: p.grad for n, p in plain.objective.model.named_parameters()}
        for zero in ZERO:
            whole = ", stage3_param_persistence_threshold: 0" if zero == 3 else ""
            under = f"deepspeed={{zero_optimization: {{stage: {zero}{whole}}}}}"
            settings = ["optimizer.name=adamw", "optimizer.gradient_clipping=0", under]
            recipe = load(
                drawn, [*settings, f"loss={{kind: {of_loss}, dims: [32, 16]{OPTIONS.get(kind, '')}}}"], 1
            ).recipe
            objective = ContrastiveObjective(
                PlainEngine(kind, torch.float32).objective.model, recipe.stage(1).loss, "fp32"
            )
            engine = deepspeed_engine(objective, recipe)
            batch = make_batch(rows=slice(0, 3) if rank == 0 else slice(3, None), **OF_KIND[kind])
            group = torch.distributed.group.WORLD
            for _ in range(2):  # the second step would show what the first one left behind
                forward_backward(engine, batch, group=group, cache=GradientCache(2, 9), **options)
                gradients = {n: safe_get_full_grad(p) for n, p in engine.parameters.items()}
                set_rates(engine.optimizer, 0.0, ("image", "text"))
                engine.update_norms.before()
                engine.step()
            found[zero, kind, "update norms"] = engine.update_norms.after(), engine.copy_of_weights()
            found[zero, kind, "norms"] = engine.gradient_norms()
            mine = engine.sum_over_ranks(torch.tensor([rank + 0.25, -1.0])), engine.forward_passes(3 + rank)
            both = [None, None]
            torch.distributed.all_gather_object(both, mine)
            found[zero, kind, "ranks"] = both
            found[zero, kind] = {n: (g.clone(), expected[n]) for n, g in gradients.items() if g is not None}
            engine.close()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
