import dataclasses

import pytest
from stage_trainer.errors import UserError
from stage_trainer.recipe import at_step
from stage_trainer.recipe.read import load

THREE = ("drawn", "jina-clip-v1", "jina-clip-v2", "laptop")


def test_every_recipe_of_the_project_loads(recipes):
    for path in recipes.glob("*.yaml"):
        assert len(load(path).recipe.stages) == (3 if path.stem in THREE else 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer:", "optimiser:", "unknown key 'optimiser'; did you mean 'optimizer'"),
        ("warmup_steps:", "warm_up_steps:", r"unknown key 'stages.1.warm_up_steps'; did you mean 'warmup_steps'"),
        ("image_text: 48", "image_txt: 48", r"unknown key 'stages.1.batch.image_txt'; did you mean 'image_text'"),
        ("seed: 0", "seed: many", "'seed': .*found 'many'"),
        ("name: drawn\n", "", "'name' is missing"),
        ("resolution: [[0, ", "resolution: [[5, ", "stage 1: 'resolution' should be"),
        ("precision: fp32", "precision: fp8", "'precision'"),
        ("max_tokens: 32", "max_tokens: 32\n    gradient_cache: {images: -1}", "stage 1: 'gradient_cache' should give"),
        ("seed: 0", "seed: [", "not valid YAML"),
    ],
)
def test_a_bad_recipe_names_the_key_and_the_remedy(recipe_file, old, new, message):
    with pytest.raises(UserError, match=message):
        load(recipe_file(old, new))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.text=8", "batch.masked_lm and batch.text are both set"),
        ("data.masked_lm=[]", "batch.masked_lm is 128 but data.masked_lm names no data"),
        ("batch={text: 8}", "trains both towers, and 'model.vision' is missing"),
        ("trainable.text=adapters", "trainable.text is 'adapters'; masked-language-model training is for all weights"),
        ("masking.share=1.5", "masking.share is 1.5; expected above 0 and below 1"),
        ("masking.language_exponent=2", "masking.language_exponent is 2.0; expected at least 0 and at most 1"),
        ("masking.shares=0.2", "no key 'masking.shares'; did you mean 'masking.share'"),
        ("data.masked_lm=[a, a]", "data.masked_lm names 'a' more than once"),
        ("lr={image: 1e-4}", "lr.text is missing, and the text tower trains at it"),
        ("data.masked_lm=[{path: a}]", "'stages.1.data.masked_lm.0'.*valid string"),
    ],
)
def test_a_bad_stage_of_masked_language_modelling_names_the_remedy(recipes, override, message):
    with pytest.raises(UserError, match=message):
        load(recipes / "masked-lm.yaml", [override], stage=1)


def test_masked_language_modelling_does_not_follow_other_training(recipes):
    with pytest.raises(UserError, match="stage 2: masked-language-model training follows .* put it first"):
        load(recipes / "drawn.yaml", ["batch={masked_lm: 8}", "data={masked_lm: [text-pairs/drawn]}"], stage=2)


def test_a_missing_recipe_lists_those_beside_it(recipes):
    with pytest.raises(UserError, match=r"laptop\.yaml"):
        load(recipes / "labtop.yaml")


def test_overrides_reach_the_recipe_and_the_chosen_stage(recipes):
    recipe = load(recipes / "drawn.yaml", ["steps=7", "optimizer.eps=2e-7", "stages.3.batch.text=24"], stage=2).recipe
    assert [s.steps for s in recipe.stages][1] == 7
    assert recipe.stages[0].steps != 7
    assert recipe.optimizer.eps == 2e-7
    assert recipe.stages[2].batch.text == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not of the form key=value"),
        ("stages.1.stepz=7", "override 'stages.1.stepz=7': .* did you mean 'stages.1.steps'"),
        ("stepz=7", "override 'stepz=7': .* did you mean 'steps'"),
        ("optimiser.name=adamw", "override 'optimiser.name=adamw': .* 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.nam=adamw", "did you mean 'optimizer.name'"),
        ("betas=[0.9, 0.99]", "did you mean 'optimizer.betas'"),
        ("image_text=8", "did you mean 'batch.image_text' or 'data.image_text' or 'task_start.image_text'"),
        ("batch.txt=8", "no key 'batch.txt'; did you mean 'batch.text'"),
        ("data.image_text.0.rte=2", "did you mean 'data.image_text.0.rate'"),
        ("model.text.widht=64", "did you mean 'model.text.width'"),
        ("zzz=1", "no key 'zzz'; there are name, output, .* steps"),
        ("steps=many", "override 'steps=many': 'stages.1.steps': .* found 'many'"),
        ("batch={txt: 8}", "override 'batch={txt: 8}': unknown key 'stages.1.batch.txt'; did you mean 'text'"),
        ("gradient_cache={imagess: 8}", "^override '[^;]*; did you mean 'images'\\?$"),
        ("seed=[", "override 'seed=\\[': the value is not valid YAML"),
        ("stages.9.steps=7", "stages has 3 entries and none numbered '9'"),
        ("stages.0.steps=7", "stages are counted from 1"),
        ("stages.-1.steps=7", "stages are counted from 1"),
        ("data.text.-1.rate=2", "none numbered '-1'"),
        ("name.first=x", "name is 'drawn', which has no keys"),
        ("stages.1=7", "stages is a list"),
    ],
)
def test_an_override_that_goes_nowhere_is_named_with_what_was_meant(recipes, override, message):
    with pytest.raises(UserError, match=message):
        load(recipes / "drawn.yaml", [override], stage=1)


def test_a_stage_key_without_a_stage_says_how_to_choose_one(recipes):
    with pytest.raises(UserError, match="'steps' is a stage's; write stages.1.steps, or choose a stage with --stage"):
        load(recipes / "drawn.yaml", ["steps=7"])


def test_what_the_file_has_wrong_is_not_blamed_on_an_override(recipe_file):
    with pytest.raises(UserError, match=r"^\S*recipe.yaml: 'seed': .*found 'many'$"):
        load(recipe_file("seed: 0", "seed: many"), ["steps=200"], stage=1)


def test_numbers_in_exponent_form_are_numbers(recipes):
    assert load(recipes / "jina-clip-v2.yaml").recipe.stages[0].lr.image == 2e-4


def test_the_paper_recipe_is_table_6(recipes):
    """Table 6 of arXiv 2412.08802, typed a second time from the paper."""
    recipe = load(recipes / "jina-clip-v2.yaml").recipe
    rows = [
        (
            s.steps,
            s.max_tokens,
            s.batch.image_text,
            s.batch.text,
            s.lr.image,
            s.lr.text,
            s.layer_decay.image,
            s.layer_decay.text,
        )
        for s in recipe.stages
    ]
    assert rows == [
        (100_000, 77, 16_384, 16_384, 2e-4, 1e-4, 1, 1),
        (6_000, 512, 8_192, 8_192, 5e-5, 5e-5, 0.98, 0.98),
        (16_000, 512, 1_024, 128, 5e-6, 1e-4, 1, 1),
    ]
    assert [tuple(r for _, r in s.resolution) for s in recipe.stages] == [(224, 384), (384,), (512,)]
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (
        "adamw",
        (0.9, 0.98),
        1e-6,
        0.02,
    )
    assert recipe.precision == "bf16"
    assert all(sorted(s.loss.dims) == [64, 128, 256, 512, 768, 1024] for s in recipe.stages)


def test_what_the_paper_leaves_open_is_marked_as_ours(recipes):
    ours = load(recipes / "jina-clip-v2.yaml").ours
    for stage in range(3):
        for name in ("warmup_steps", "patch_dropout", "trainable"):
            assert f"stages.{stage}.{name}" in ours
        for name in ("steps", "batch", "lr", "layer_decay", "max_tokens"):
            assert f"stages.{stage}.{name}" not in ours
    assert "optimizer.gradient_clipping" in ours
    for name in ("rope_theta", "lora_rank", "lora_alpha", "adapters"):
        assert f"model.text.{name}" in ours
    assert "model.text_weights" in ours  # what the paper started from is not published
    assert "model.vision_weights" not in ours


def test_the_paper_recipe_starts_from_one_of_five_adapters(recipes, tmp_path):
    """A tiny directory as jina-embeddings-v3's: rotary base 20000, five adapters of alpha 1, of which one goes on."""
    import torch
    from stage_trainer.build import build_model
    from text_tower import TextTower, TextTowerConfig

    tasks = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
    shape = {"vocab_size": 64, "width": 32, "layers": 1, "heads": 2, "mlp_width": 64, "rope_theta": 20000.0}
    there = TextTower(TextTowerConfig(**shape, adapters=tasks, lora_rank=4, lora_alpha=1.0))
    for parameter in there.parameters():
        torch.nn.init.normal_(parameter)
    there.save_pretrained(tmp_path / "v3", layout="remote-code")
    sizes = [f"model.text.{name}={value}" for name, value in shape.items() if name != "rope_theta"]
    vision = "model.vision={patch: 14, width: 32, layers: 1, heads: 2, mlp_ratio: 2.6667}"
    here = [f"model.text_weights={tmp_path}/v3", "model.vision_weights=null", vision, "stages.1.loss.dims=[32]"]
    here += ["stages.2.loss.dims=[32]", "stages.3.loss.dims=[32]"]
    model = build_model(load(recipes / "jina-clip-v2.yaml", [*sizes, *here]).recipe, 1)
    assert model.text.config.adapters == ("retrieval.query",)
    assert (model.text.config.rope_theta, model.text.config.lora_alpha) == (20000, 1)
    for name, merged in model.text.merged().state_dict().items():
        assert torch.allclose(merged, there.merged("retrieval.query").state_dict()[name])


def test_a_schedule_holds_until_the_next_start():
    schedule = ((0, 224), (10, 384))
    assert [at_step(schedule, step) for step in (0, 9, 10, 99)] == [224, 224, 384, 384]


def test_a_recipe_is_frozen(recipes):
    recipe = load(recipes / "drawn.yaml").recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!python/object/apply:os.getpid []", "not valid YAML"),
        ("!!timestamp soon", "not valid YAML: a recipe has no tag !!timestamp"),
        ("!!int ''", "not valid YAML"),
        ("!!binary aGVsbG8=", "a recipe has no tag !!binary"),
        ("0\nsinks: !!set {a, b}", "a recipe has no tag !!set"),
        ("0\nsinks: !!omap [a: b]", "a recipe has no tag !!omap"),
        ("0\nsinks: [" + "a, " * 100_000 + "]", "more than 262,144 bytes"),
        ("0\n" + "".join(f"k{i}: 1\n" for i in range(400)), "; and 350 more"),
        ('0\nprecision: "\\udc80"', "'precision'"),
        ("0\n\tworkers: 1", "not valid YAML"),
        ("0\0", "not valid YAML"),
        ("true", "true or false is none"),
        ("[0]", "'seed'"),
        ("1" * 5000, "not valid YAML: a value that cannot be read"),
        ("1" * 400, "seed is a number of .* bits; expected at most"),
        ("&a [*a]", "an anchor that holds itself"),
        ("0\nseed: 1", "the key 'seed' appears twice"),
        ("[" * 3000, "nested too deeply"),
        ("0\n1: 2", "Keys should be strings"),
        ("&a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]", "more than 100,000 values"),
    ],
)  # fmt: skip
def test_odd_yaml_is_one_message(recipe_file, value, message):
    with pytest.raises(UserError, match=message):
        load(recipe_file("seed: 0", f"seed: {value}"))


def test_keys_below_a_merge_may_come_again(recipe_file):
    base = "stages:\n  - &first\n    steps: 200"
    again = "  - <<: *first\n    steps: 60\n    lr: {image: 1e-4, text: 3e-4}\n    resolution: [[0, 48]]\n"
    path = recipe_file("stages:\n  - steps: 200", base)
    text = path.read_text()
    path.write_text(text[: text.index("  - steps: 60")] + again + "    patch_dropout: [[0, 0.0]]\n")
    stages = load(path).recipe.stages
    assert [stage.steps for stage in stages] == [200, 60]
    assert stages[1].data == stages[0].data


def test_a_date_is_a_text(recipe_file):
    assert load(recipe_file("name: drawn", "name: 2024-13-45")).recipe.name == "2024-13-45"


@pytest.mark.parametrize(("old", "key"), [("name: drawn", "name"), ("corpus: runs/corpus-drawn", "corpus")])
def test_half_a_surrogate_pair_is_no_text(recipe_file, old, key):
    with pytest.raises(UserError, match=f"{key} is .*without halves of a surrogate pair"):
        load(recipe_file(old, f'{key}: "a\\udc80"'))


def test_a_file_that_is_not_utf_8_is_one_message(recipe_file):
    path = recipe_file()
    path.write_bytes(path.read_bytes() + "# café".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        load(path)
