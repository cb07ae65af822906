"""What belongs to weights comes from them: a recipe may leave it out, say the same, or override it by name."""

import dataclasses
import json
import math

import pytest
import torch
from stage_trainer import DualEncoder, hub, weights
from stage_trainer.build import build_model, check_configs, load_model, load_tokenizer, tower_configs
from stage_trainer.commands.dry_run import dry_run
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

TEXT = {
    "width": 32, "layers": 1, "heads": 2, "mlp_width": 48, "rope_theta": 500.0, "layer_norm_eps": 1e-4, "pad_id": 3,
    "max_length": 96, "dropout": 0.3, "lora_rank": 2, "lora_alpha": 5.0, "adapters": ("retrieval.query", "separation"),
    "instructions": {"retrieval.query": "find: "},
}  # fmt: skip
VISION = {"resolution": 24, "patch": 8, "width": 32, "layers": 1, "heads": 2, "mlp_width": 40, "reference_grid": 3,
          "rope_theta": 300.0, "layer_norm_eps": 1e-4}  # fmt: skip
THEIRS = ("rope_theta", "layer_norm_eps", "pad_id", "lora_rank", "lora_alpha", "adapters", "instructions", "heads",
          "max_length")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from sentencepiece import SentencePieceTrainer

    prefix = tmp_path_factory.mktemp("spm") / "small"
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red disk and a blue one", "ein roter Kreis"] * 9), model_prefix=str(prefix),
        vocab_size=40, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture
def ours(tmp_path, tokenizer_file):
    """A whole model of ours on disk, nothing of it at a default."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    text = TextTower(TextTowerConfig(vocab_size=tokenizer.vocab_size, **TEXT), tokenizer)
    model = DualEncoder(text, VisionTower(VisionTowerConfig(**VISION)), temperature=0.05)
    with torch.no_grad():
        model.text_logit_scale.fill_(math.log(1 / 0.2))
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * (parameter.ndim > 1))
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def recipe_from(recipes):
    """finetune.yaml with other settings under `model`."""

    def make(*settings, keep=False):
        plain = () if keep else ("model.text={}", "model.vision={}")
        stage = ("resolution=[[0, 24]]", "max_tokens=32", "loss.dims=[32, 16]")
        return load(recipes / "finetune.yaml", [*plain, *stage, *settings], stage=1).recipe

    return make


def test_a_model_of_ours_is_fine_tuned_as_it_is(ours, recipe_from, tmp_path):
    recipe = recipe_from(f"model.weights={ours}")
    check_configs(recipe, 1)
    tokenizer = load_tokenizer(recipe)
    assert tokenizer.sha256 == Tokenizer.from_file(ours / "text").sha256
    before, model = DualEncoder.from_pretrained(ours), build_model(recipe, 1, tokenizer)
    for name in THEIRS:
        assert getattr(model.text.config, name) == getattr(before.text.config, name), name
    assert model.text.config.dropout == 0.0  # the recipe's, which is silent
    torch.testing.assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    # What comes out has what went in.
    model.save_pretrained(tmp_path / "out")
    again = load_model(recipe, 1, tmp_path / "out")
    wanted = dataclasses.replace(before.text.config, dropout=0.0)
    assert again.text.config == wanted
    assert again.vision.config == before.vision.config
    assert [p.name for p in sorted((tmp_path / "out/text").iterdir())] == [
        p.name for p in sorted((ours / "text").iterdir())
    ]
    torch.testing.assert_close(dict(again.state_dict()), dict(before.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.text.rope_theta=20000", "model.text.rope_theta is 20000, but the weights in .* say 500;"),
        ("model.text.layer_norm_eps=1e-5", "model.text.layer_norm_eps is 1e-05, but .* say 0.0001;"),
        ("model.text.instructions={retrieval.query: x}", "instructions is {'retrieval.query': 'x'}, but .*'find: '"),
        ("model.text.lora_alpha=4", "lora_alpha is 4, but .* say 5; .* model.override.text"),
        ("model.text.adapters=[mine]", r"adapters is \['mine'\], but .*'separation'\]"),
        ("model.text.width=64", "width is 64, but .* say 32; .*or name others"),
        ("model.vision.rope_theta=10000", "model.vision.rope_theta is 10000, but .* say 300; .*model.override.vision"),
        ("model.vision.layers=2", "model.vision.layers is 2, but .* say 1"),
        ("model.vision.mlp_ratio=2.6667", "model.vision.mlp_ratio is 85, but .* say 40"),
        ("model.temperature=0.07", r"model.temperature is 0.07, but .* has 0.05 .*model.override.temperature"),
    ],
)
def test_a_recipe_that_contradicts_its_weights_is_refused_with_both_values(ours, recipe_from, setting, message):
    for named in (
        [f"model.weights={ours}"],
        [f"model.text_weights={ours}/text", f"model.vision_weights={ours}/vision", "model.weights=null"],
    ):
        recipe = recipe_from(*named, setting)
        with pytest.raises(UserError, match=message):
            build_model(recipe, 1, load_tokenizer(recipe))


def test_a_recipe_that_agrees_with_its_weights_or_overrides_them_is_heard(ours, recipe_from):
    agrees = recipe_from(
        f"model.weights={ours}", "model.temperature=0.05", "model.text={rope_theta: 500, width: 32, lora_alpha: 5, "
        "adapters: [retrieval.query, separation], dropout: 0.1, max_length: 64, attention: sdpa, checkpointing: true}",
        "model.vision={mlp_ratio: 1.25, patch: 8, checkpointing: true}",
    )  # fmt: skip
    config = build_model(agrees, 1).text.config
    assert (config.rope_theta, config.dropout, config.max_length, config.attention) == (500, 0.1, 64, "sdpa")
    override = "{text: {rope_theta: 9.5, instructions: {}, adapters: [separation]}, vision: {rope_theta: 8.5}}"
    overrides = recipe_from(
        f"model.weights={ours}", f"model.override={override}", "model.override.temperature=0.5", "model.temperature=0.1"
    )
    model, before = build_model(overrides, 1), DualEncoder.from_pretrained(ours)
    assert (model.text.config.rope_theta, model.vision.config.rope_theta) == (9.5, 8.5)
    assert (model.text.config.adapters, model.text.config.instructions) == (("separation",), {})
    fc1, fc1_before = (m.text.encoder.layers[0].mlp.fc1 for m in (model, before))
    assert torch.equal(fc1.lora_B_0, fc1_before.lora_B_1)
    assert model.logit_scale.item() == pytest.approx(math.log(2)) == model.text_logit_scale.item()


def test_of_several_adapters_a_recipe_takes_some(ours, recipe_from):
    model = build_model(recipe_from(f"model.weights={ours}", "model.text.adapters=[separation]"), 1)
    assert (model.text.config.adapters, model.text.config.instructions) == (("separation",), {})
    before = DualEncoder.from_pretrained(ours)
    assert torch.equal(
        model.text.encoder.layers[0].mixer.Wqkv.lora_A_0, before.text.encoder.layers[0].mixer.Wqkv.lora_A_1
    )


def test_biases_are_the_recipes_or_the_whole_models_and_belong_to_a_sigmoid_loss(ours, recipe_from):
    sigmoid = "loss={kind: sigmoid, dims: [32], bias: -4}"
    assert build_model(recipe_from(f"model.weights={ours}"), 1).logit_bias is None
    new = build_model(recipe_from(f"model.weights={ours}", sigmoid), 1)
    assert (new.logit_bias.item(), new.text_logit_bias.item()) == (-4, -4)
    new.set_biases((-2.0, -1.0))
    new.save_pretrained(ours.with_name("sigmoid"))
    for settings, expected in (((sigmoid,), (-2, -1)), ((), None)):
        model = build_model(recipe_from(f"model.weights={ours.with_name('sigmoid')}", *settings), 1)
        found = None if model.logit_bias is None else (model.logit_bias.item(), model.text_logit_bias.item())
        assert found == expected


def test_temperatures_are_those_of_the_whole_model(ours, recipe_from):
    for named in (
        [f"model.weights={ours}"],
        [f"model.text_weights={ours}/text", f"model.vision_weights={ours}/vision", "model.weights=null"],
    ):
        model = build_model(recipe_from(*named), 1)
        assert math.exp(-model.logit_scale.item()) == pytest.approx(0.05)
        assert math.exp(-model.text_logit_scale.item()) == pytest.approx(0.2)
    # One tower's weights alone tell no temperature.
    shape = "{patch: 8, width: 32, layers: 1, heads: 2}"
    alone = [f"model.text_weights={ours}/text", "model.weights=null", f"model.vision={shape}"]
    for setting, expected in ((), 0.07), (("model.temperature=0.3",), 0.3):
        model = build_model(recipe_from(*alone, *setting), 1)
        assert math.exp(-model.logit_scale.item()) == pytest.approx(expected)


def test_a_published_models_temperature_and_adapter_are_honoured(tmp_path, recipe_from):
    """jina-clip-v2's own directory, small: one file for both towers and the scale."""
    from safetensors.torch import load_file, save_file

    shape = {"vocab_size": 60, "width": 64, "layers": 1, "heads": 1, "mlp_width": 96, "rope_theta": 777.0}
    text = TextTower(TextTowerConfig(**shape, adapters=("retrieval.query",), lora_rank=4, lora_alpha=4.0))
    text.save_pretrained(tmp_path / "text", layout="remote-code")
    vision = VisionTower(VisionTowerConfig(resolution=16, patch=8, width=64, layers=1, heads=1))
    eva = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "mlp.norm": "mlp.ffn_ln", "attn.norm": "attn.inner_attn_ln",
           "q_proj.bias": "q_bias", "v_proj.bias": "v_bias"}  # fmt: skip
    weights = {f"text_model.transformer.{n}": t for n, t in load_file(tmp_path / "text/model.safetensors").items()}
    for name, tensor in vision.state_dict().items():
        for ours, theirs in eva.items():
            name = name.replace(ours, theirs)
        weights[f"vision_model.{name}"] = tensor
    weights["logit_scale"] = torch.tensor(math.log(1 / 0.02))
    (tmp_path / "clip").mkdir()
    save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / "clip/model.safetensors")
    options = {"lora_adaptations": ["retrieval.query"], "lora_alpha": 4, "lora_rank": 4, "rotary_emb_base": 777.0,
               "task_instructions": {"retrieval.query": "query: "}}  # fmt: skip
    config = {
        "model_type": "jina_clip", "logit_scale_init_value": 2.6592, "add_projections": False, "truncate_dim": None,
        "text_config": {"hf_model_name_or_path": "x/y", "hf_model_config_kwargs": options, "embed_dim": 64},
        "vision_config": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64,
                          "mlp_ratio": 2.6667, "intp_freq": True, "pt_hw_seq_len": 16,
                          "rope_embeddings": True, "subln": True, "naive_swiglu": True},
    }  # fmt: skip
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    dims = "loss.dims=[64]"
    for named in (
        [f"model.weights={tmp_path / 'clip'}"],
        [f"model.{t}_weights={tmp_path / 'clip'}" for t in ("text", "vision")] + ["model.weights=null"],
    ):
        model = build_model(recipe_from(*named, "model.tokenizer=unused", dims), 1)
        assert [math.exp(-s.item()) for s in (model.logit_scale, model.text_logit_scale)] == pytest.approx([0.02] * 2)
        got = model.text.config
        assert (got.rope_theta, got.instructions) == (777.0, {"retrieval.query": "query: "})
        torch.testing.assert_close(dict(model.text.state_dict()), dict(text.state_dict()), rtol=0, atol=0)


def test_where_weights_are_not_at_hand_the_recipe_and_defaults_stand_for_them(recipe_from, recipes):
    recipe = load(recipes / "finetune.yaml", ["model.weights=not-here"]).recipe
    text, vision = tower_configs(recipe, 1)
    assert (text, vision.width) == (
        TextTowerConfig(adapters=("retrieval.query",), lora_rank=4, lora_alpha=4), 1024
    )  # fmt: skip


def test_dry_run_shows_the_size_of_the_weights(ours, recipes):
    settings = ("model.text={}", "max_tokens=32", "loss.dims=[32]", f"model.weights={ours}")
    shown = dry_run(load(recipes / "finetune.yaml", settings, stage=1), 1)
    count = sum(p.numel() for p in DualEncoder.from_pretrained(ours).text.parameters())
    assert f"{count:,}" in shown
    assert "not on this machine" not in shown
    elsewhere = dry_run(load(recipes / "finetune.yaml", ["model.weights=not-here"], stage=1), 1)
    assert "(not-here is not on this machine: its sizes are the recipe's, or else the towers' defaults)" in elsewhere


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.weights=null"], "'model.tokenizer' is missing"),
        (["model.weights=null", "model.tokenizer=x", "model.override.text={rope_theta: 5}"], "no weights to override"),
        (["model.temperature=0"], "model.temperature.? is 0.0; .*above 0"),
        (["model.weights=null", "model.tokenizer=x", "model.vision=null"], "'model.vision' is missing"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused_on_reading(recipe_from, settings, message):
    with pytest.raises(UserError, match=message):
        recipe_from(*settings)


def test_weights_that_are_absent_or_damaged_are_named_by_their_key(ours, recipe_from):
    (ours / "vision/config.json").write_text("{")
    with pytest.raises(UserError, match=r"model.weights: .*vision/config.json is not valid JSON"):
        build_model(recipe_from(f"model.weights={ours}"), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.dims=[64, 32]"], r"loss.dims is \[64, 32\]; expected prefixes of 1 to 32"),
        (["max_tokens=97"], "max_tokens is 97, more than the text tower takes"),
        (["model.override={text: {width: 64}}"], "model.override.text.width is 64.*a shape cannot be overridden"),
        (["model.override={vision: {patch: 4}}"], "model.override.vision.patch is 4.*a shape cannot be overridden"),
    ],
)
def test_the_dry_run_finds_what_local_weights_cannot_do_as_training_does(ours, recipes, settings, message):
    """`plan` asks the same function."""
    stage = ("resolution=[[0, 24]]", "max_tokens=32", "loss.dims=[32, 16]", "model.text={}", "model.vision={}")
    loaded = load(recipes / "finetune.yaml", [*stage, f"model.weights={ours}", *settings], stage=1)
    with pytest.raises(UserError, match=message):
        dry_run(loaded, 1)


def test_a_masked_stage_does_not_judge_the_stages_after_it(ours, recipe_from):
    """They get adapters and an image tower that it does not have."""
    recipe = recipe_from(f"model.weights={ours}", "model.vision={checkpointing: true}", keep=True)
    pairs = recipe.stages[0]
    assert pairs.trainable.text == "adapters"
    masked = dataclasses.replace(
        pairs, batch=dataclasses.replace(pairs.batch, masked_lm=8, image_text=0), trainable=type(pairs.trainable)()
    )
    make_task(dataclasses.replace(recipe, stages=(masked, pairs)), 1).check_configs()


def test_the_shape_of_timms_towers_is_known_without_their_weights(recipe_from):
    name = "timm/eva02_base_patch16_clip_224.merged2b"
    others = ("model.weights=null", "model.tokenizer=none", "resolution=[[0, 224]]", "trainable.text=all")
    recipe = recipe_from("model.text={width: 768, heads: 12}", f"model.vision_weights={name}", *others)
    _, vision = tower_configs(recipe, 1)
    assert (vision.width, vision.layers, vision.patch) == (768, 12, 16)


def test_both_towers_of_one_hub_name_bring_its_temperature(ours, recipe_from, monkeypatch):
    """The name is no folder; what is fetched for it is."""
    monkeypatch.setattr(hub, "local", lambda name: ours)
    recipe = recipe_from("model.text_weights=some/hub-name", "model.vision_weights=some/hub-name", "model.weights=null")
    assert weights.log_scales(recipe.model) == pytest.approx((math.log(1 / 0.05), math.log(1 / 0.2)))


@pytest.mark.parametrize("name", ["lit", "joined", "teacher", "documents", "smaller", "margins"])
def test_a_recipe_whose_weights_are_elsewhere_is_shown_by_a_dry_run(recipes, name):
    """Adapters that it chooses from those weights have their rank."""
    said = dry_run(load(recipes / f"{name}.yaml", (), 1), 1)
    assert " is not on this machine: its sizes are the recipe's, or else the towers' defaults" in said
    assert ("text with adapter" in said) == (name in ("lit", "joined"))
