"""Adapters beside the weights."""

import pytest
import torch
from text_tower import TextTower

LENGTHS = [5, 1, 17, 40]


@pytest.mark.parametrize("name", [None, "retrieval.query", "separation"])
def test_low_rank_path_equals_merged_weights(make_tower, pack, lora, name):
    adapted, plain = make_tower(**lora).double(), make_tower().double()
    plain.load_state_dict(adapted.merged_state_dict(name))
    torch.testing.assert_close(adapted(pack(LENGTHS), adapter=name), plain(pack(LENGTHS)), rtol=1e-10, atol=1e-10)


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
    with pytest.raises(ValueError, match="expected 'all', 'adapters' or 'none'"):
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
