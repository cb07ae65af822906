"""Adapters beside the weights."""

import pytest
import torch
from text_tower import TextTower
from text_tower.lora import AdaptedLinear
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

LENGTHS = [5, 1, 17, 40]  # more tokens than the tower is wide: adapters are added to the weights
FEW = [5, 1, 17]  # fewer: each token takes them by itself


@pytest.mark.parametrize("lengths", [LENGTHS, FEW])
@pytest.mark.parametrize("name", [None, "retrieval.query", "separation"])
def test_adapters_beside_the_weights_equal_merged_ones(make_tower, pack, lora, name, lengths):
    adapted, plain = make_tower(**lora).double(), make_tower().double()
    plain.load_state_dict(adapted.merged_state_dict(name))
    torch.testing.assert_close(adapted(pack(lengths), adapter=name), plain(pack(lengths)), rtol=1e-10, atol=1e-10)


def set_learning(tower, what):
    tower.set_trainable({"weights": "all"}.get(what, what), adapter="none" if what == "weights" else None)


def by_autograd(tower, plain, packed, adapter, scale):
    """The embeddings of a tower without adapters whose weights are W + scale · B A, or W + scale · A B of a table."""
    k, given = tower.config.adapters.index(adapter), dict(tower.named_parameters())
    weights = {}
    for name in plain.state_dict():
        module, _, kind = name.rpartition(".")
        a, b = (given.get(f"{module}.lora_{half}_{k}") for half in "AB")
        if kind == "weight" and a is not None:
            weights[name] = given[name] + scale * (a @ b if "embeddings" in name else b @ a)
        else:
            weights[name] = given[name]
    return functional_call(plain, weights, (packed,))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("learning", ["all", "adapters", "weights"])
@pytest.mark.parametrize("lengths", [LENGTHS, FEW])
def test_gradients_of_two_tasks_are_those_of_the_formula(make_tower, pack, lora, checkpointing, learning, lengths):
    adapted, plain = make_tower(**lora, checkpointing=checkpointing).double(), make_tower().double()
    set_learning(adapted, learning)
    parameters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert parameters
    scale = lora["lora_alpha"] / lora["lora_rank"]
    batches = {name: pack(lengths, seed) for seed, name in enumerate(lora["adapters"])}
    ours = sum(adapted(packed, adapter=name).pow(3).sum() for name, packed in batches.items())
    theirs = sum(by_autograd(adapted, plain, packed, name, scale).pow(3).sum() for name, packed in batches.items())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(loss, list(parameters.values())) for loss in (ours, theirs))
    for name, one, other in zip(parameters, found, expected, strict=True):
        assert (one - other).norm() <= 1e-11 * other.norm(), name


@pytest.mark.parametrize("learning", ["all", "weight", "adapter"])
@pytest.mark.parametrize("tokens", [3, 9])
def test_a_linears_derivatives_are_exact(learning, tokens):
    linear = AdaptedLinear(7, 5, 1, 2, 0.3).double()
    for name, parameter in linear.named_parameters():
        torch.nn.init.normal_(parameter)
        parameter.requires_grad_(learning == "all" or ("lora" in name) == (learning == "adapter"))
    names = [name for name, _ in linear.named_parameters()]
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return functional_call(linear, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *linear.parameters()))


def test_the_sum_is_formed_where_that_is_less_work(make_tower, pack, lora):
    """By the operations of a pass: with the sum they do not depend on the tokens, without they do. A base that does not
    learn would need its own gradient for it, as large a product as the forward pass."""
    adapted, plain = make_tower(**lora), make_tower()
    weights = adapted.num_layers * (4 * 32 * 32 + 2 * 32 * 48)
    sides = adapted.num_layers * (8 * 32 + 2 * 48)

    def more(lengths):
        counts = []
        for tower in (adapted, plain):
            with FlopCounterMode(display=False) as counter:
                tower(pack(lengths))
            counts.append(counter.get_total_flops())
        return (counts[0] - counts[1]) / (2 * lora["lora_rank"]) - 32 * (sum(lengths) + 1)  # the tables'

    assert more(LENGTHS) == more(LENGTHS * 3) == weights
    assert more(FEW) == sum(FEW) * sides
    adapted.set_trainable("adapters")
    assert more(LENGTHS) == sum(LENGTHS) * sides
    with torch.no_grad():  # as gradient caching's first pass, which the second has to repeat
        assert more(LENGTHS) == sum(LENGTHS) * sides
    adapted.set_trainable("none")
    assert more(LENGTHS) == weights


@pytest.mark.parametrize(("learning", "most"), [("all", 1.05), ("adapters", 1.3)])
def test_under_autocast_the_error_is_that_of_plain_weights(make_tower, pack, lora, learning, most):
    """The sum is rounded to bfloat16 once; each token's own products are rounded too."""
    adapted, plain = make_tower(**lora), make_tower()
    plain.load_state_dict(adapted.merged_state_dict())
    adapted.set_trainable(learning)
    packed = pack([9] * 60)
    exact = plain.double()(packed)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = adapted(packed), plain.float()(packed)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= most * (rounded - exact).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("learning", ["all", "adapters"])
def test_weights_need_be_whole_in_their_own_modules_pass_alone(make_tower, pack, lora, checkpointing, learning):
    """As under ZeRO 3, where a matrix is empty outside of its module's forward and backward pass; vectors stay."""
    whole, parted = (make_tower(**lora, checkpointing=checkpointing).double() for _ in range(2))
    for tower in (whole, parted):
        set_learning(tower, learning)
    full = {parameter: parameter.data for parameter in parted.parameters() if parameter.dim() > 1}

    def gather(module, *_):
        for parameter in full.keys() & set(module.parameters(recurse=False)):
            parameter.data = full[parameter]

    def release(module, *_):
        for parameter in full.keys() & set(module.parameters(recurse=False)):
            parameter.data = parameter.data.new_empty(0)

    for module in parted.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
        release(module)
    out = parted(pack(LENGTHS))
    assert all(parameter.numel() == 0 for parameter in full)
    out.square().sum().backward()
    whole(pack(LENGTHS)).square().sum().backward()
    for (name, ours), theirs in zip(parted.named_parameters(), whole.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-13 * theirs.grad.norm(), name


def test_a_merged_tower_is_a_plain_one_with_the_same_embeddings(make_tower, pack, lora):
    adapted = make_tower(**lora).double()
    merged = adapted.merged("separation")
    assert merged.config.adapters == ()
    assert {p.data_ptr() for p in merged.parameters()}.isdisjoint(p.data_ptr() for p in adapted.parameters())
    expected = adapted(pack(LENGTHS), adapter="separation")
    torch.testing.assert_close(merged(pack(LENGTHS)), expected, rtol=1e-10, atol=1e-10)


def test_none_by_name_is_the_bare_weights(make_tower, pack, lora):
    adapted, plain = make_tower(**lora), make_tower()
    plain.load_state_dict({n: p for n, p in adapted.state_dict().items() if "lora" not in n})
    assert torch.equal(adapted(pack(LENGTHS), adapter="none"), plain(pack(LENGTHS)))


def test_adapters_differ_and_the_first_is_the_default(make_tower, pack, lora):
    tower = make_tower(**lora)
    default = tower(pack(LENGTHS))
    assert torch.equal(default, tower(pack(LENGTHS), adapter="retrieval.query"))
    assert (default - tower(pack(LENGTHS), adapter="separation")).abs().max() > 1e-2


def test_a_fresh_adapter_changes_nothing_and_learns(pack, make_tower, lora):
    plain = make_tower()
    fresh = TextTower(make_tower(**lora).config)
    fresh.load_state_dict(plain.state_dict(), strict=False)
    out = fresh(pack(LENGTHS))
    assert torch.equal(out, plain(pack(LENGTHS)))
    out.square().sum().backward()
    gradients = {n: p.grad for n, p in fresh.named_parameters() if "lora_B" in n}
    assert all((g is None) == n.endswith("_1") for n, g in gradients.items())  # the default learns, the other one rests
    assert all(g.any() for g in gradients.values() if g is not None)


def test_every_linear_and_both_tables_have_an_adapter_of_the_right_size(make_tower, lora):
    tower, rank = make_tower(**lora), lora["lora_rank"]
    adapted = {n.removesuffix(".lora_A_1") for n, _ in tower.named_parameters() if n.endswith(".lora_A_1")}
    matrices = {
        n.removesuffix(".weight"): p for n, p in tower.named_parameters() if n.endswith("weight") and p.dim() == 2
    }
    assert adapted == matrices.keys()
    size = sum(p.numel() for n, p in tower.named_parameters() if "lora" in n)
    assert size == 2 * sum(rank * (m.shape[0] + m.shape[1]) for m in matrices.values())


def test_trainable_chooses_what_learns(make_tower, lora):
    tower = make_tower(**lora)

    def learning():
        return {n for n, p in tower.named_parameters() if p.requires_grad}

    everything = learning()
    tower.set_trainable("adapters")
    assert learning() == {n for n in everything if "lora" in n} != set()
    tower.set_trainable("adapters", adapter="separation")
    assert learning() == {n for n in everything if "lora" in n and n.endswith("_1")} != set()
    tower.set_trainable("all", adapter="separation")
    assert learning() == {n for n in everything if "lora" not in n or n.endswith("_1")}
    tower.set_trainable("all", adapter="none")
    assert learning() == {n for n in everything if "lora" not in n}
    with pytest.raises(ValueError, match="no adapter 'x'"):
        tower.set_trainable("adapters", adapter="x")
    tower.set_trainable("none")
    assert learning() == set()
    tower.set_trainable("all")
    assert learning() == everything == dict(tower.named_parameters()).keys()
    with pytest.raises(ValueError, match="expected 'all', 'adapters', 'projector' or 'none'"):
        tower.set_trainable("some")
    with pytest.raises(ValueError, match="no adapters to train"):
        make_tower().set_trainable("adapters")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop", "Muon"])
def test_a_resting_adapter_stays_bit_for_bit_under_momentum_and_decay(make_tower, pack, lora, optimizer):
    tower = make_tower(**lora)
    tower.set_trainable("adapters")
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    if optimizer == "AdamW":
        del options["momentum"]
    learning = [p for p in tower.parameters() if p.requires_grad]
    steps = getattr(torch.optim, optimizer)(learning, **options)

    def step(adapter):
        steps.zero_grad()
        tower(pack(LENGTHS), adapter=adapter).square().sum().backward()
        steps.step()

    step("separation")  # so that there is momentum
    before = {n: p.detach().clone() for n, p in tower.named_parameters()}
    for _ in range(3):
        step("retrieval.query")
    moved = {n for n, p in tower.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora" in n and n.endswith("_0")}
