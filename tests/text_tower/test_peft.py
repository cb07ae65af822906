"""Adapters in PEFT's folders: PEFT reads ours, we read PEFT's, and both compute one function."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from text_tower import TextTower, peft_folders
from transformers import AutoModel

LENGTHS = [*range(1, 9), 5, 33, 512]
TARGETS = ["word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def base(path):
    return AutoModel.from_pretrained(path, add_pooling_layer=False)


@pytest.fixture
def saved(make_tower, lora, tmp_path):
    """A directory with PEFT folders, and the tower that wrote it."""
    tower = make_tower(**lora)
    tower.save_pretrained(tmp_path / "model", layout="peft")
    return tower, tmp_path / "model"


def test_embeddings_and_every_adapter_gradient_agree_in_float32(saved, pack, padded_mean):
    tower, path = saved
    model = PeftModel.from_pretrained(base(path), path / "separation", is_trainable=True)
    packed = pack(LENGTHS)
    ours, theirs = tower(packed, adapter="separation"), padded_mean(model, packed)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    direction = torch.randn(ours.shape)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in tower.named_parameters():
        module, _, half = name.rpartition(".")
        half, _, number = half.rpartition("_")
        if not half.startswith("lora_"):
            continue
        if number == "0":
            assert parameter.grad is None  # the other adapter rests
            continue
        theirs_at = module.removeprefix("encoder.").replace("mixer.out_proj", "self_attn.o_proj")
        if "embeddings" in module:
            expected = grads[f"{theirs_at}.{half.replace('lora_', 'lora_embedding_')}.default"].T
        elif "Wqkv" in module:
            parts = [
                grads[f"{theirs_at.replace('mixer.Wqkv', f'self_attn.{p}_proj')}.{half}.default.weight"] for p in "qkv"
            ]
            expected = sum(parts) if half == "lora_A" else torch.cat(parts)  # one A serves all three
        else:
            expected = grads[f"{theirs_at}.{half}.default.weight"]
        assert (parameter.grad - expected).norm() / expected.norm() < 1e-5, name
        compared += 1
    assert compared == 2 * (2 + 4 * tower.config.layers)


def test_transformers_loads_each_adapter_by_itself(saved, pack, padded_mean):
    tower, path = saved
    model = base(path)
    for name in tower.config.adapters:
        theirs = name.replace(".", "_")  # PEFT's own names may hold no dot
        report = model.load_adapter(path / name, adapter_name=theirs)
        assert not [key for key in report.missing_keys if theirs in key]
        assert not report.unexpected_keys
        model.set_adapter(theirs)
        with torch.no_grad():
            torch.testing.assert_close(
                padded_mean(model, pack(LENGTHS)), tower(pack(LENGTHS), adapter=name), rtol=1e-4, atol=1e-4
            )


def peft_trained(path, folder, rank, alpha, targets):
    """An adapter as PEFT would train it, queries, keys and values apart, and its model."""
    model = get_peft_model(base(path), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"], ["fc1", "k_proj"]])
def test_what_peft_trained_is_read_exactly(make_tower, pack, padded_mean, tmp_path, targets):
    make_tower().save_pretrained(tmp_path / "model")
    model = peft_trained(tmp_path / "model", tmp_path / "mine", 4, 6, targets)
    tower = TextTower.from_pretrained(tmp_path / "model", peft=tmp_path / "mine")
    assert tower.config.adapters == ("mine",)
    with torch.no_grad():
        ours, theirs = tower(pack(LENGTHS)), padded_mean(model, pack(LENGTHS))
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        # Written again, it is still what PEFT computes.
        tower.save_adapter(tmp_path / "again")
        again = padded_mean(PeftModel.from_pretrained(base(tmp_path / "model"), tmp_path / "again"), pack(LENGTHS))
        assert (again - theirs).norm() / theirs.norm() < 1e-5


def test_adapters_of_different_ranks_and_scales_share_a_tower(make_tower, pack, padded_mean, tmp_path):
    make_tower().save_pretrained(tmp_path / "model")
    models = {
        "a": peft_trained(tmp_path / "model", tmp_path / "a", 4, 6, TARGETS),
        "b": peft_trained(tmp_path / "model", tmp_path / "b", 2, 5, ["o_proj", "fc2"]),
    }
    tower = TextTower.from_pretrained(tmp_path / "model", peft={name: tmp_path / name for name in models})
    for name, model in models.items():
        with torch.no_grad():
            ours, theirs = tower(pack(LENGTHS), adapter=name), padded_mean(model, pack(LENGTHS))
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, name


def test_folders_that_do_not_fit_are_refused_by_name(saved, make_tower, tmp_path):
    tower, path = saved
    make_tower().save_pretrained(tmp_path / "plain")
    folder = path / "separation"
    with pytest.raises(ValueError, match=r"has adapters, .*peft= is for weights without any"):
        TextTower.from_pretrained(path, peft=folder)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        TextTower.from_pretrained(tmp_path / "plain", peft=tmp_path / "nowhere")
    make_tower(mlp_width=56).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"6 mis-shaped modules: .*layers.0.mlp.fc1 A \[4, 32\], B \[48, 4\]"):
        TextTower.from_pretrained(tmp_path / "wider", peft=folder)
    make_tower(layers=2).save_pretrained(tmp_path / "lower")
    with pytest.raises(
        ValueError, match=r"looks like PEFT's.*\n.*unexpected: base_model.model.layers.2.mlp.fc1.lora_A"
    ):
        TextTower.from_pretrained(tmp_path / "lower", peft=folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "of type 'IA3'")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            TextTower.from_pretrained(tmp_path / "plain", peft=folder)
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        tower.save_adapter(tmp_path / "x", "x")
    with pytest.raises(ValueError, match="no adapter to save"):
        make_tower().save_adapter(tmp_path / "x")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_beside_changed_base_weights_is_refused_by_name(make_tower, tmp_path, init):
    make_tower().save_pretrained(tmp_path / "model")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "fc1"], init_lora_weights=init)
    get_peft_model(base(tmp_path / "model"), config).save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"init_lora_weights '{init}'.*plain LoRA"):
        TextTower.from_pretrained(tmp_path / "model", peft=tmp_path / "mine")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"fc1": 3, r"layers\.\d.*k_proj": 9}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
        {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["k_proj"]},
    ],
)  # fmt: skip
def test_fields_that_shape_an_adapter_are_honoured(make_tower, pack, padded_mean, tmp_path, options):
    make_tower().save_pretrained(tmp_path / "model")
    targets = ["q_proj", "k_proj", "o_proj", "fc1", *([] if "exclude_modules" in options else ["word_embeddings"])]
    if options.get("init_lora_weights") == "orthogonal":
        targets.remove("word_embeddings")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    model = get_peft_model(base(tmp_path / "model"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "mine")
    tower = TextTower.from_pretrained(tmp_path / "model", peft=tmp_path / "mine")
    theirs = PeftModel.from_pretrained(base(tmp_path / "model"), tmp_path / "mine").eval()
    with torch.no_grad():
        ours, theirs = tower(pack(LENGTHS)), padded_mean(theirs, pack(LENGTHS))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_every_field_of_pefts_configuration_is_known_to_us():
    fields = LoraConfig().to_dict().keys() | {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == peft_folders._HONOURED | peft_folders._HARMLESS | peft_folders._PLAIN.keys()


def test_the_defaults_of_pefts_configuration_are_plain_lora(tmp_path):
    peft_folders._check_config(LoraConfig().to_dict(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config {'beta': 0.0001}"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["fc2"]}, r"modules_to_save \['fc2'\]"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices \[5\]"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"use_tomorrows_lora": None}, "use_tomorrows_lora None, of which this tower does not know"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"r": "8"}, "has r '8'; expected a whole number above 0"),
        ({"r": 0}, "has r 0; expected a whole number above 0"),
        ({"r": 4.0}, "has r 4.0; expected a whole number above 0"),
        ({"lora_alpha": None}, "has lora_alpha None; expected a number above 0"),
        ({"lora_alpha": True}, "has lora_alpha True; expected a number above 0"),
        ({"rank_pattern": [1]}, r"has rank_pattern \[1\]; expected an object"),
        ({"rank_pattern": {"fc1": "8"}}, "has rank_pattern 'fc1': '8'; expected a whole number above 0"),
        ({"alpha_pattern": {"fc(1": 8}}, r"has alpha_pattern 'fc\(1', which is no regular expression"),
        ({"alpha_pattern": {"fc1": None}}, "has alpha_pattern 'fc1': None; expected a number above 0"),
        ({"use_rslora": "yes"}, "has use_rslora 'yes'; expected true or false"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(saved, make_tower, tmp_path, change, message):
    _, path = saved
    make_tower().save_pretrained(tmp_path / "plain")
    file = path / "separation" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        TextTower.from_pretrained(tmp_path / "plain", peft=file.parent)
