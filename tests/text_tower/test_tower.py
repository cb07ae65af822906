"""What the encoder computes, whatever it is packed with."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from text_tower import TextTower, TextTowerConfig

MIXED = [7, 1, 30, 7, 3, 12, 1, 200, 30]


def count(tower):
    return sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 558_314_496),
        ({"adapters": ("retrieval.query",), "lora_rank": 4, "lora_alpha": 4.0}, 560_895_564),
    ],
)
def test_published_size_has_the_published_parameter_count_without_memory(options, parameters):
    with torch.device("meta"):
        tower = TextTower(TextTowerConfig(**options))
    assert all(p.is_meta for p in tower.parameters())
    assert count(tower) == parameters


def test_a_text_is_embedded_alike_alone_and_in_any_batch(make_tower, pack):
    tower, packed = make_tower().double(), pack(MIXED)
    together = tower(packed)
    order = [8, 0, 5, 3, 1, 7, 2, 6, 4]
    sequences = [s.tolist() for s in packed.ids.split(list(packed.lengths))]
    shuffled = tower(type(packed).from_lists([sequences[i] for i in order]))
    torch.testing.assert_close(shuffled, together[order], rtol=1e-12, atol=1e-12)
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(tower(type(packed).from_lists([sequence]))[0], together[i], rtol=1e-12, atol=1e-12)


def test_word_order_matters(make_tower, pack):
    tower, packed = make_tower(), pack([6])
    backwards = type(packed).from_lists([packed.ids.flip(0).tolist()])
    assert (tower(packed) - tower(backwards)).abs().max() > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_changes_no_gradient(make_tower, pack, dropout):
    packed, seeds = pack(MIXED), torch.arange(len(MIXED))
    gradients = []
    for checkpointing in (False, True):
        tower = make_tower(dropout=dropout, checkpointing=checkpointing)
        tower(packed, sample_seeds=seeds).square().sum().backward()
        gradients.append([p.grad for p in tower.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_layer_ids_cover_every_parameter_and_grow_with_depth(make_tower, lora):
    tower = make_tower(**lora)
    depth = tower.layer_ids()
    assert depth.keys() == dict(tower.named_parameters()).keys()
    assert {d for n, d in depth.items() if n.startswith("emb")} == {0}
    assert [depth[f"encoder.layers.{i}.mlp.fc1.lora_A_0"] for i in range(3)] == [1, 2, 3]
    assert max(depth.values()) == tower.num_layers == 3


def test_fresh_weights_are_those_of_xlm_roberta():
    tower = TextTower(TextTowerConfig(vocab_size=500, width=64, layers=1, heads=2, mlp_width=256))
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name or "_ln" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width": 0}, "width"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"heads": 5}, "heads"),
        ({"width": 12, "heads": 4}, "heads"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"dropout": 1.0}, "dropout"),
        ({"pad_id": -1}, "pad_id"),
        ({"attention": "fast"}, "attention"),
        ({"adapters": ("none",), "lora_rank": 4}, "adapters"),
        ({"lora_rank": 4}, "lora_rank"),
        ({"adapters": ("a",)}, "lora_rank"),
        ({"adapters": "a", "lora_rank": 4}, "adapters"),
        ({"adapters": ("a", "a"), "lora_rank": 4}, "adapters"),
    ],
)
def test_a_configuration_that_cannot_be_names_its_field(changes, field):
    with pytest.raises(ValueError, match=f"^{field} is "):
        TextTowerConfig(**changes)


def test_input_that_does_not_fit_the_tower_is_refused(make_tower, pack):
    tower = make_tower(max_length=8)
    with pytest.raises(ValueError, match=r"9 tokens; expected at most 8.*truncate"):
        tower(pack([3, 9]))
    with pytest.raises(ValueError, match=r"expected 0 to 599"):
        tower(pack([8] * 40, vocab_size=5000))
    with pytest.raises(ValueError, match=r"no adapter 'x'"):
        tower(pack([3]), adapter="x")


def test_token_states_are_what_the_embedding_is_the_mean_of(make_tower, pack):
    tower, packed = make_tower().double(), pack(MIXED)
    states = tower.token_states(packed)
    means = torch.stack([part.mean(0) for part in states.split(list(packed.lengths))])
    torch.testing.assert_close(means, tower(packed), rtol=1e-12, atol=1e-12)


@pytest.mark.full  # the compiler itself takes most of a minute
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_all_depths_and_lengths(make_tower, pack, lora):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seeds = torch.arange(len(MIXED))
    batches = [pack(MIXED), pack(MIXED[:4]), pack([5, 3, 90]), pack([8] * 9)]
    results, compiled_so_far = {}, []
    for compiled in (False, True):
        tower = make_tower(layers=6, dropout=0.3, compile=compiled, checkpointing=True, **lora).double()
        for packed in batches:
            out = tower(packed, sample_seeds=seeds[: len(packed)])
            out.square().sum().backward()
            results.setdefault(compiled, []).append(out)
            compiled_so_far.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        results[compiled] += [p.grad for p in tower.parameters()]
    torch.testing.assert_close(results[True], results[False], rtol=1e-8, atol=1e-8)
    assert 0 < compiled_so_far[-1] <= 8, compiled_so_far
    assert compiled_so_far[-1] == compiled_so_far[-3], compiled_so_far


def test_settings_of_a_tower_can_be_changed_but_not_its_shape(make_tower):
    tower = make_tower()
    tower.configure(checkpointing=True, dropout=0.2)
    assert (tower.config.checkpointing, tower.config.dropout) == (True, 0.2)
    with pytest.raises(ValueError, match=r"\['width'\] cannot be changed"):
        tower.configure(width=8)


@pytest.mark.full  # 32,768 tokens
def test_memory_with_checkpointing_grows_linearly_with_tokens():
    script = Path(__file__).parents[2] / "packages/text-tower/benchmarks/memory.py"

    def mib(length):
        command = [sys.executable, str(script), "--one", str(length), "True"]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    small, large = mib(1024), mib(4096)
    assert 3 < large / small < 4.6  # quadratic would be 16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_a_copy_of_a_compiled_tower_is_compiled(make_tower, copied):
    tower = make_tower(layers=1, compile=True)
    again = copied(tower)
    assert again.config.compile
    assert all(block._compiled_call_impl is not None for block in again.encoder.layers)
    assert all(block._compiled_call_impl is None for block in copied(make_tower(layers=1)).encoder.layers)


def test_numpys_numbers_make_a_configuration_that_json_can_hold(tmp_path):
    shape = {"vocab_size": 50, "width": 16, "layers": 1, "heads": 2, "mlp_width": 8, "max_length": 9}
    shape = {name: np.int64(value) for name, value in shape.items()}
    config = TextTowerConfig(**shape, rope_theta=np.float32(5), dropout=np.float64(0.5), truncate_dim=np.int32(4))
    TextTower(config).save_pretrained(tmp_path / "model")
    assert TextTower.from_pretrained(tmp_path / "model").config == config
    with pytest.raises(ValueError, match="layers is True"):
        TextTowerConfig(layers=True)
