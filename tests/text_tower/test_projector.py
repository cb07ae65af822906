"""The projector after a tower: what it computes, what learns, and what a directory keeps of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from text_tower import MaskedLM, PackedTokens, TextTower, TextTowerConfig

SHAPE = {"vocab_size": 30, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24, "max_length": 32}
TEXTS = PackedTokens.from_lists([[0, 7, 9, 2], [0, 4, 2], [0, 11, 12, 13, 2]])


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(**SHAPE))
    tower.save_pretrained(tmp_path / "plain")
    return tower


@pytest.mark.parametrize("hidden", [0, 40])
def test_a_new_projector_stands_after_weights_without_one_and_is_kept(plain, hidden, tmp_path):
    tower = TextTower.from_pretrained(tmp_path / "plain", projector=24, projector_hidden=hidden)
    assert torch.equal(tower.pooled(TEXTS), plain(TEXTS))
    found, state = tower(TEXTS), tower.state_dict()
    if hidden:
        inner = torch.nn.functional.gelu(plain(TEXTS) @ state["projector.0.weight"].T)
        expected = inner @ state["projector.2.weight"].T
    else:
        expected = plain(TEXTS) @ state["projector.weight"].T
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.05
    for layout in ("transformers", "peft"):
        tower.save_pretrained(tmp_path / layout, layout=layout)
        again = TextTower.from_pretrained(tmp_path / layout)
        assert again.config == tower.config
        assert torch.equal(again(TEXTS), found)
        # What others read of the tower is as it was.
        left = load_file(tmp_path / layout / "model.safetensors")
        assert left.keys() == load_file(tmp_path / "plain/model.safetensors").keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert tower(TEXTS).dtype == torch.float32
    ids = torch.tensor([[0, 7, 9, 2, 1], [0, 4, 2, 1, 1], [0, 11, 12, 13, 2]])
    torch.testing.assert_close(tower.padded()(ids), found)


def test_jina_bert_keeps_one_too(tmp_path):
    jina_bert = {"positions": "alibi", "mlp": "geglu", "token_types": 2, "pad_id": 0}
    tower = TextTower(TextTowerConfig(**SHAPE, **jina_bert, projector=24))
    tower.save_pretrained(tmp_path / "out")
    again = TextTower.from_pretrained(tmp_path / "out")
    assert again.config == tower.config
    assert torch.equal(again(TEXTS), tower(TEXTS))


def test_an_adapter_is_merged_before_the_projector(plain, tmp_path):
    options = {"projector": 24, "adapters": ("a",), "lora_rank": 2}
    tower = TextTower.from_pretrained(tmp_path / "plain", **options)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    torch.testing.assert_close(tower.merged()(TEXTS), tower(TEXTS))
    assert (tower(TEXTS) - tower(TEXTS, adapter="none")).abs().max() > 1e-2
    for layout in ("transformers", "peft"):
        tower.save_pretrained(tmp_path / layout, layout=layout)
        again = TextTower.from_pretrained(tmp_path / layout)
        torch.testing.assert_close(again(TEXTS), tower(TEXTS))


def test_the_projector_alone_learns_and_beside_an_adapter_both():
    tower = TextTower(TextTowerConfig(**SHAPE, projector=24, lora_rank=2, adapters=("a", "b")))
    for what, words in (("projector", ("projector",)), ("adapters", ("projector", ".lora_A_0", ".lora_B_0"))):
        tower.set_trainable(what, adapter="a")
        tower.zero_grad()
        tower(TEXTS).square().sum().backward()
        learning = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
        assert learning == {n for n, _ in tower.named_parameters() if any(w in n for w in words)}
    assert tower.layer_ids()["projector.weight"] == tower.num_layers


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(**SHAPE, projector=5, projector_hidden=7)).double()
    rows = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    weights = [parameter for name, parameter in tower.named_parameters() if name.startswith("projector.")]
    assert torch.autograd.gradcheck(lambda rows, *_: tower.project(rows), (rows, *weights))


def test_what_cannot_be_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="no projector to train"):
        plain.set_trainable("projector")
    with pytest.raises(ValueError, match="projector_hidden is 8 and projector 0"):
        TextTowerConfig(**SHAPE, projector_hidden=8)
    with pytest.raises(ValueError, match="projector is -1; expected 0 to"):
        TextTowerConfig(**SHAPE, projector=-1)
    with pytest.raises(ValueError, match="truncate_dim is 20; expected 1 to 12"):
        TextTowerConfig(**SHAPE, projector=12, truncate_dim=20)
    tower = TextTower.from_pretrained(tmp_path / "plain", projector=24)
    with pytest.raises(ValueError, match="remote code has no place for a projector"):
        tower.save_pretrained(tmp_path / "remote", layout="remote-code")
    with pytest.raises(ValueError, match="a projector, which masked-language-model training has no use for"):
        MaskedLM(tower)
    tower.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="projector is 20, but .* has a projector with 24"):
        TextTower.from_pretrained(tmp_path / "out", projector=20)
    shutil.copytree(tmp_path / "out", tmp_path / "lacking")
    shutil.rmtree(tmp_path / "lacking/2_Dense")
    with pytest.raises(FileNotFoundError, match="2_Dense"):
        TextTower.from_pretrained(tmp_path / "lacking")
    file = tmp_path / "out/2_Dense/config.json"
    said = json.loads(file.read_text())
    for change, message in (
        ({"bias": True}, "bias True; a projector knows False only"),
        (
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            "expected 16 and torch.nn.modules.linear.Identity",
        ),
        ({"out_features": 20}, "projector to 24 by its config.json, .* and Dense modules of"),
        ({"odd": 1}, "unknown keys .'odd'."),
    ):
        file.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=message):
            TextTower.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "projector" not in config["trilith"]  # of a tower without one, directories are as they were
