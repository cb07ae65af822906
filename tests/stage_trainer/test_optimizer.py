import dataclasses
import inspect
import re
import sys

import forks
import pytest
import torch
from stage_trainer.build import tower_configs
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.optim import eager
from stage_trainer.optim.build import build_optimizer
from stage_trainer.optim.groups import let_rest, named_states
from stage_trainer.optim.muon import Muon, orthogonalise
from stage_trainer.optim.schedule import schedule, set_rates
from stage_trainer.recipe.read import load
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import TextTower
from vision_tower import VisionTower


@pytest.fixture
def parts(recipes):
    def build(*overrides, stage=2):
        recipe = load(recipes / "drawn.yaml", list(overrides), stage).recipe
        text, vision = tower_configs(recipe, stage)
        torch.manual_seed(0)
        return recipe, recipe.stage(stage), DualEncoder(TextTower(text), VisionTower(vision))

    return build


def parameter_groups(model, stage, config, saved=None):
    return list(ContrastiveObjective(model, stage.loss, "fp32").parameter_groups(stage, config, saved))


def test_every_trainable_parameter_is_in_one_group(parts):
    for name in ("adamw", "muon"):
        recipe, stage, model = parts(f"optimizer.name={name}")
        model.vision.blocks[0].requires_grad_(False)
        names = [n for g in parameter_groups(model, stage, recipe.optimizer) for n in g["names"]]
        assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_layer_decay_is_per_layer_from_the_top(parts):
    """Embeddings at the bottom, then one block after another; what comes after them at the full rate."""
    recipe, stage, model = parts(
        "optimizer.name=adamw", "layer_decay={image: 0.5, text: 0.8}", "lr={image: 0.3, text: 0.7}",
        "model.text.layers=5", "model.vision.layers=4",
    )  # fmt: skip
    rate = {n: g["lr"] for g in parameter_groups(model, stage, recipe.optimizer) for n in g["names"]}
    seen = set()
    for name, found in rate.items():
        base, decay, layers = (0.3, 0.5, 4) if name.startswith(("vision", "logit_scale")) else (0.7, 0.8, 5)
        if block := re.search(r"(blocks|layers)\.(\d+)\.", name):
            depth = 1 + int(block[2])
        else:
            depth = layers if "scale" in name or name.startswith("vision.norm") else 0
        assert found == pytest.approx(base * decay ** (layers - depth), rel=1e-12), name
        seen.add((name.partition(".")[0], depth))
    assert len(seen) == 5 + 6 + 2


def test_vectors_temperatures_and_tables_have_no_weight_decay(parts):
    recipe, stage, model = parts()
    for group in parameter_groups(model, stage, recipe.optimizer):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            plain = parameter.ndim < 2 or name in ("vision.cls_token", "vision.pos_embed")
            assert (group["weight_decay"] == 0) == plain, name


def test_muon_takes_matrices_of_the_blocks_alone(parts):
    recipe, stage, model = parts("optimizer.name=muon")
    groups = parameter_groups(model, stage, recipe.optimizer)
    muon = {n for g in groups if g["muon"] for n in g["names"]}
    assert all(dict(model.named_parameters())[n].ndim == 2 for n in muon)
    assert not any("embedding" in n or "patch_embed" in n or "scale" in n for n in muon)
    assert any(n.startswith("text.encoder") for n in muon)
    assert any(n.startswith("vision.blocks") for n in muon)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_tower_without_a_part_in_the_step_stays_as_it_is(parts, name):
    """DeepSpeed gives zeros to parameters without a gradient, and weight decay would shrink them."""
    recipe, stage, model = parts(f"optimizer.name={name}", "optimizer.weight_decay=0.5")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, stage, recipe.optimizer), recipe.optimizer, "fp32")
    for n, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter) if n.startswith("text.") else torch.zeros_like(parameter)
    set_rates(optimizer, 1.0, ("text",))
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith("text.")}


def test_adamw_without_the_compiler_is_torchs_own():
    """Bit for bit, with its hooks, and without gradients of its own."""
    paths, hooked = [], []
    for kind in (torch.optim.AdamW, eager.AdamW):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(8, 5)), torch.nn.Parameter(torch.randn(3))]
        optimizer = kind([{"params": weights[:1]}], lr=0.1, weight_decay=0.1, fused=True)
        optimizer.add_param_group({"params": weights[1:], "lr": 0.2})
        optimizer.register_step_post_hook(lambda *seen: hooked.append(seen))
        path = []
        for _ in range(4):
            sum(weight.square().sum() for weight in weights).backward()
            assert optimizer.step() is None
            path += [weight.detach().clone() for weight in weights]
            optimizer.zero_grad()
            assert [weight.grad for weight in weights] == [None, None]
        assert optimizer.step(lambda: torch.is_grad_enabled()) is True
        paths.append(path)
    assert all(map(torch.equal, *paths))
    assert len(hooked) == 10


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.9, 0.999)])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_tower_that_waited_takes_the_steps_of_a_fresh_adamw(parts, betas, zeros):
    """Against torch's AdamW on a parameter that never waited; ZeRO gives zeros to what waits."""
    config = dataclasses.replace(parts("optimizer.name=adamw")[0].optimizer, betas=betas, weight_decay=0.1)
    paths = []
    for wait in (None, 0, 1, 50):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(100, dtype=torch.float64))
        group = {
            "params": [parameter],
            "lr": 1e-3,
            "peak_lr": 1e-3,
            "weight_decay": 0.1,
            "tower": "image",
            "waits": True,
        }
        if wait is None:
            optimizer = torch.optim.AdamW([parameter], 1e-3, betas, config.eps, 0.1)
        else:
            optimizer = build_optimizer([{**group, "names": ["p"], "muon": False}], config, "fp32")
        for _ in range(wait or 0):
            set_rates(optimizer, 1.0, ("text",))
            parameter.grad = torch.zeros_like(parameter) if zeros else None
            optimizer.step()
        path = []
        for _ in range(20):
            if wait is not None:
                set_rates(optimizer, 1.0, ("text", "image"))
            parameter.grad = torch.randn(100, dtype=torch.float64)
            optimizer.step()
            path.append(parameter.detach().clone())
        paths.append(torch.stack(path))
        assert optimizer.state[parameter]["step"] == 20
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_rests_keeps_its_moments_and_its_count(parts, name):
    """Adam's and Muon's alike, after steps of its own, whatever stands in its gradient."""
    recipe, stage, model = parts(f"optimizer.name={name}", "optimizer.weight_decay=0.5")
    optimizer = build_optimizer(parameter_groups(model, stage, recipe.optimizer), recipe.optimizer, "fp32")

    def step(towers):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_rates(optimizer, 1.0, towers)
        optimizer.step()

    def of_images():
        states = {n: {**s, "value": p} for n, p, s in named_states(optimizer) if n.startswith(("vision.", "logit"))}
        return {f"{n}|{key}": value.detach().clone() for n, state in states.items() for key, value in state.items()}

    step(("text", "image"))
    before = of_images()
    assert "vision.pos_embed|exp_avg" in before
    assert any(key.endswith("|momentum_buffer") for key in before) == (name == "muon")
    step(("text",))
    after = of_images()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.vision.pos_embed.grad.all(), "gradients are whole again after the step"
    step(("text", "image"))
    assert of_images()["vision.pos_embed|step"] == 2


def test_a_group_holds_what_takes_part_together_and_was_moved_as_often(parts):
    """ZeRO makes one tensor of a group, with one count of steps."""
    recipe, stage, model = parts(
        "optimizer.name=adamw",
        "model.text.lora_rank=2",
        "model.text.adapters=[a, b]",
        "layer_decay={image: 1, text: 1}",
    )
    steps = {"vision.cls_token": 3.0, "vision.norm.bias": 3.0, "text.emb_ln.bias": 5.0}
    groups = parameter_groups(
        model, stage, recipe.optimizer, {f"{name}|step": torch.tensor(count) for name, count in steps.items()}
    )
    for group in groups:
        assert len({steps.get(name, 0.0) for name in group["names"]}) == 1
        assert len({name.split(".")[0] for name in group["names"]}) == 1
        if len(group["names"]) > 1:
            assert not any(name.endswith("logit_scale") for name in group["names"])
    of_bias = next(g for g in groups if "vision.cls_token" in g["names"])
    assert of_bias["names"] == ["vision.cls_token", "vision.norm.bias"]


def test_the_one_temperature_of_a_unified_loss_does_not_wait_for_images(parts):
    for kind, rate in (("unified", 0.25), ("multi_task", 0.0)):
        recipe, stage, model = parts("optimizer.name=adamw", f"loss.kind={kind}", "lr={image: 0.5, text: 0.5}")
        optimizer = build_optimizer(parameter_groups(model, stage, recipe.optimizer), recipe.optimizer, "fp32")
        set_rates(optimizer, 0.5, ("text",))
        rates = {name: g["lr"] for g in optimizer.param_groups for name in g["names"]}
        assert rates["logit_scale"] == rate
        assert rates["text_logit_scale"] == 0.25
        assert rates["vision.cls_token"] == 0.0


def test_the_joint_optimizer_steps_as_its_parts_would(parts):
    """Against torch's own Muon and AdamW, run apart, with a rate that changes."""
    recipe, stage, model = parts("optimizer.name=muon")
    _, _, twin = parts("optimizer.name=muon")
    groups = parameter_groups(model, stage, recipe.optimizer)
    joint = build_optimizer(groups, recipe.optimizer, "bf16")
    twins = dict(twin.named_parameters())
    c = recipe.optimizer
    apart = []
    for g in parameter_groups(model, stage, c):
        ps = [twins[n] for n in g["names"]]
        options = {"lr": g["lr"], "weight_decay": g["weight_decay"]}
        apart.append(
            torch.optim.Muon(ps, momentum=c.muon_momentum, **options)
            if g["muon"]
            else torch.optim.AdamW(ps, betas=c.betas, eps=c.eps, fused=True, **options)
        )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            twins[name].grad = p.grad.clone()
        set_rates(joint, 0.5**step, ("text", "image"))
        for o, g in zip(apart, parameter_groups(model, stage, c), strict=True):
            o.param_groups[0]["lr"] = g["lr"] * 0.5**step
            o.step()
        joint.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, twins[name]), name
    assert {n for n, _, s in named_states(joint) if s} == set(twins)


def test_ranks_that_share_the_work_of_muon_end_in_the_bits_of_one(tmp_path):
    worker = f"""
import sys, torch, torch.distributed as dist
from stage_trainer.optim.muon import Muon
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store" + sys.argv[2], rank=rank, world_size=world)
torch.manual_seed(0)
matrices = [torch.randn(shape) for shape in ((8, 5), (16, 16), (5, 24), (3, 3), (7, 2))]
resting = torch.randn(4, 4)
groups = [{{"params": matrices}}, {{"params": [resting], "lr": 0.0}}]
optimizer = Muon(groups, lr=0.1, dtype=torch.float32, group=dist.group.WORLD if world > 1 else None)
before = resting.clone()
for step in range(4):
    for matrix in (*matrices, resting):
        matrix.grad = torch.randn(matrix.shape)
    matrices[3].grad = None
    optimizer.step()
assert torch.equal(resting, before)
torch.save(matrices, f"{tmp_path}/" + f"{{rank}}-of-{{world}}.pt")
"""
    for world in (1, 3):
        ranks = [[sys.executable, "-c", worker, str(r), str(world)] for r in range(world)]
        done = forks.together(ranks, tmp_path, [{}] * world)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = torch.load(tmp_path / "0-of-1.pt")
    for rank in range(3):
        together = torch.load(tmp_path / f"{rank}-of-3.pt")
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_schedule_warms_up_then_falls_as_a_cosine():
    values = [schedule(s, 100, 10) for s in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert 0 < values[99] < 0.001
    assert schedule(100, 100, 10, 0.1) == pytest.approx(0.1)


def test_muon_orthogonalises():
    """Singular values come near one, whatever those of the gradient are (checked by SVD in float64)."""
    torch.manual_seed(0)
    for shape in ((32, 32), (64, 24), (24, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, dtype=torch.float64), torch.float64))
        assert 0.6 < values.min() < values.max() < 1.3


def test_muon_in_float32_does_not_magnify_rounding():
    torch.manual_seed(0)
    gradient = torch.randn(64, 32)
    other = gradient * (1 + 1e-7 * torch.randn(64, 32))
    change = (orthogonalise(gradient, torch.float32) - orthogonalise(other, torch.float32)).norm()
    assert change / orthogonalise(gradient, torch.float32).norm() < 2e-6


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="matrices alone"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_muon_has_torchs_defaults():
    ours, theirs = (inspect.signature(muon).parameters for muon in (Muon, torch.optim.Muon))
    for name in ("lr", "momentum", "weight_decay"):
        assert ours[name].default == theirs[name].default


def test_an_optimizer_of_ones_own_rests_too():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [parameter], "peak_lr": 0.5, "tower": "image"}], lr=0.5)
    for towers, value in ((("text",), 1.0), (("image",), 0.5)):
        set_rates(optimizer, 1.0, towers)
        parameter.grad = torch.ones(2)
        optimizer.step()
        assert parameter.tolist() == [value, value]


def test_nothing_rests_until_it_is_told_to():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = let_rest(torch.optim.SGD([parameter], lr=0.5))
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [0.5, 0.5]
    optimizer.param_groups[0]["rests"] = True
    optimizer.step()
    assert parameter.tolist() == [0.5, 0.5]
