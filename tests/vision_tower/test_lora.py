"""The adapter of an image tower, against PEFT's on the same weights."""

import peft
import pytest
import torch
from vision_tower import VisionTower, VisionTowerConfig

SHAPE = {"resolution": 32, "patch": 8, "width": 32, "layers": 3, "heads": 2, "mlp_width": 52}
PRODUCTS = ["q_proj", "k_proj", "v_proj", "proj", "fc1_g", "fc1_x", "fc2"]


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    tower = VisionTower(VisionTowerConfig(**SHAPE, lora_rank=3, lora_alpha=5.0))
    for name, parameter in tower.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.2)
    return tower


def test_the_adapter_is_pefts(adapted, images):
    plain = VisionTower(VisionTowerConfig(**SHAPE))
    plain.load_state_dict({n: t for n, t in adapted.state_dict().items() if "lora" not in n})
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=rf"blocks\..*\.({'|'.join(PRODUCTS)})")
    reference = peft.inject_adapter_in_model(config, plain)
    halves = {n: t for n, t in adapted.state_dict().items() if "lora" in n}
    named = dict(reference.named_parameters())
    assert len(halves) == sum("lora" in name for name in named) == 2 * 7 * 3
    with torch.no_grad():
        for name, half in halves.items():
            named[f"{name}.default.weight"].copy_(half)
    torch.testing.assert_close(adapted(images), reference(images), rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_vectors_and_leaves_timms_parameters(adapted, images):
    merged = adapted.merged()
    assert merged.state_dict().keys() == VisionTower(VisionTowerConfig(**SHAPE)).state_dict().keys()
    torch.testing.assert_close(merged(images), adapted(images), rtol=1e-5, atol=1e-5)
    assert merged.merged() is merged
    with torch.no_grad():
        merged.norm.weight.zero_()
    assert adapted.norm.weight.any()  # a copy


def test_a_new_adapter_on_weights_without_one_changes_nothing(adapted, images, tmp_path):
    plain = adapted.merged()
    plain.save_pretrained(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path, lora_rank=2, lora_alpha=4.0)
    assert torch.equal(tower(images), plain(images))
    assert all(p.any() for n, p in tower.named_parameters() if n.endswith("lora_A"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_learns(adapted, images, checkpointing):
    adapted.configure(checkpointing=checkpointing)
    adapted.set_trainable("adapters")
    adapted(images).square().sum().backward()
    learning = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in adapted.named_parameters() if "lora" in name}


def test_a_directory_keeps_the_adapter_and_does_not_say_that_it_is_timms(adapted, images, tmp_path):
    import timm

    adapted.save_pretrained(tmp_path)
    again = VisionTower.from_pretrained(tmp_path)
    assert again.config == adapted.config
    assert torch.equal(again(images), adapted(images))
    with pytest.raises((RuntimeError, AssertionError, KeyError)):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_what_cannot_be_is_refused(tmp_path):
    plain = VisionTower(VisionTowerConfig(**SHAPE))
    with pytest.raises(ValueError, match="no adapter to train"):
        plain.set_trainable("adapters")
    for rank in (-1, 1.5, "4"):
        with pytest.raises(ValueError, match="lora_rank is"):
            VisionTowerConfig(**SHAPE, lora_rank=rank)
    plain.save_pretrained(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path, lora_rank=2)
    tower.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="of another shape"):
        VisionTower.from_pretrained(tmp_path / "two", lora_rank=3)
