"""What cannot be meant is refused when the recipe is read: each rule once, and what stands at its edge."""

import json
import os
import re
import subprocess
import sys

import pytest
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load

OFF = "evaluation.every=0"
ONE = ("resolution=[[0, 32]]", "patch_dropout=[[0, 0.0]]", "warmup_steps=0")  # short stages have no changes


def refused(recipe, overrides, message, **options):
    with pytest.raises(UserError, match=message) as error:
        load(recipe, overrides, 1, **options)
    assert "stage-trainer" not in str(error.value)


MASKED = ("batch={masked_lm: 8}", "data={masked_lm: [text-pairs/drawn]}", OFF)


NO_LANES = "'stages.1.data.lanes': a whole number from 1 to 1,024 is expected here, or 'auto'; found "
OUT_OF_RANGE = {
    **{f"data.lanes={value}": NO_LANES for value in (0, -1, 1025, 2.5, "many", ".inf")},
    "data.lanes=true": NO_LANES,
    "seed=-1": "seed is -1; expected at least 0",
    "workers=-1": "workers is -1",
    "cache_megabytes=-1": "cache_megabytes is -1",
    "max_corrupt=1.5": "max_corrupt is 1.5; expected at least 0 and at most 1",
    "max_skipped=0": "max_skipped is 0; expected at least 1",
    "log_every=0": "log_every is 0",
    "model.temperature=0": "model.temperature is 0.0; expected above 0",
    "model.temperature=-0.1": "model.temperature is -0.1",
    "remote.gigabytes=0": "remote.gigabytes is 0.0",
    "remote.downloads=0": "remote.downloads is 0",
    "remote.timeout=0": "remote.timeout is 0.0",
    "remote.retries=-1": "remote.retries is -1",
    "optimizer.betas=[0.9, 1.0]": "optimizer.betas is [0.9, 1.0]; expected each at least 0 and below 1",
    "optimizer.betas=[-0.1, 0.9]": "optimizer.betas is [-0.1, 0.9]",
    "optimizer.eps=0": "optimizer.eps is 0.0; expected above 0",
    "optimizer.weight_decay=-0.1": "optimizer.weight_decay is -0.1",
    "optimizer.weight_decay=2": "optimizer.weight_decay is 2.0",
    "optimizer.gradient_clipping=-1": "optimizer.gradient_clipping is -1.0",
    "optimizer.embedding_lr_scale=-1": "optimizer.embedding_lr_scale is -1.0",
    "optimizer.muon_lr_scale=0": "optimizer.muon_lr_scale is 0.0",
    "optimizer.muon_momentum=1": "optimizer.muon_momentum is 1.0",
    "evaluation.every=-1": "evaluation.every is -1",
    "checkpoint.every=-1": "checkpoint.every is -1",
    "checkpoint.keep=0": "checkpoint.keep is 0",
    "steps=0": "stage 1: steps is 0; expected at least 1",
    "steps=-5": "stage 1: steps is -5",
    "max_tokens=2": "max_tokens is 2; expected at least 3",
    "batch.image_text=-1": "batch.image_text is -1",
    "batch.text=-1": "batch.text is -1",
    "batch.masked_lm=-1": "batch.masked_lm is -1",
    "lr.image=-1e-3": "lr.image is -0.001",
    "lr.text=2": "lr.text is 2.0; expected at least 0 and at most 1",
    "layer_decay.image=0": "layer_decay.image is 0.0; expected above 0 and at most 1",
    "layer_decay.text=1.01": "layer_decay.text is 1.01",
    "warmup_steps=-1": "warmup_steps is -1",
    "min_lr_ratio=1.1": "min_lr_ratio is 1.1",
    "min_lr_ratio=-0.1": "min_lr_ratio is -0.1",
    "task_start.text=-1": "task_start.text is -1",
    "task_start.image_text=-1": "task_start.image_text is -1",
    "loss.dims=[64, 0]": "loss.dims is [64, 0]; expected each at least 1",
    "loss.min_temperature=0": "loss.min_temperature is 0.0",
    "loss.weights=[1, 0]": "loss.weights is [1.0, 0.0]; expected each above 0",
    "loss.false_negative_margin=3": "loss.false_negative_margin is 3.0; expected at least -2 and at most 2",
    "augmentation.scale=[0, 1]": "augmentation.scale is [0.0, 1.0]; expected each above 0 and at most 1",
    "augmentation.scale=[0.5, 1.2]": "augmentation.scale is [0.5, 1.2]",
    "augmentation.ratio=[0, 1]": "augmentation.ratio is [0.0, 1.0]",
    "augmentation.color=1": "augmentation.color is 1.0; expected at least 0 and below 1",
}  # fmt: skip


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_refused_with_the_range(recipes, override):
    refused(recipes / "drawn.yaml", [override], re.escape(OUT_OF_RANGE[override]))


@pytest.mark.parametrize(
    "key", ["lr.image", "optimizer.eps", "model.temperature", "model.text.rope_theta", "loss.min_temperature"]
)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_no_number_is_infinite_or_none(recipes, key, value):
    refused(recipes / "drawn.yaml", [f"{key}={value}"], f"{key} is .*expected")


CANNOT_BE_MEANT = {
    "steps=true": "'stages.1.steps': a number is expected here, and true or false is none",
    "lr.image=yes": "'stages.1.lr.image': a number is expected here",
    "warmup_steps=201": "warmup_steps is 201, more than the 200 steps",
    "lr={text: 1e-3}": "lr.image is missing, and the image tower and the temperature of the image-text loss",
    "lr={image: 1e-3}": "lr.text is missing, and the text tower and the temperature of the text loss train at it",
    "lr={}": "lr.image is missing",
    "lr={image: 0, text: 0}": "every rate under 'lr' at which a tower trains is 0",
    "trainable={image: none, text: none}": "nothing would be trained but a temperature",
    "batch={image_text: 0, text: 0}": "all batch sizes are 0",
    "batch.image_text=1": "batch.image_text is 1, and a single pair has no negatives",
    "data.text=[]": "batch.text is 48 but data.text names no data",
    "data.text.0.rate=0": "every rate of data.text should be above 0",
    "data.image_text.0.rate=-1": "every rate of data.image_text should be above 0",
    "resolution=[[0, 7]]": "the resolution from step 0 on is 7 pixels, below one patch",
    "resolution=[[0, 32], [160, 7]]": "the resolution from step 160 on is 7 pixels",
    "resolution=[[0, -32]]": "is -32 pixels, below one patch",
    "resolution=[[0, 32], [200, 40]]": "'resolution' changes at step 200, but the stage ends after 200 steps",
    "resolution=[]": "'resolution' should be",
    "resolution=[[0, 32], [160, 40], [160, 48]]": "'resolution' should be .* rising steps",
    "patch_dropout=[[0, 0.5], [300, 0]]": "'patch_dropout' changes at step 300",
    "patch_dropout=[[0, 1.0]]": "'patch_dropout' rates",
    "patch_dropout=[[0, -0.1]]": "'patch_dropout' rates",
    "patch_dropout=[]": "'patch_dropout' should be",
    "task_start.image_text=200": "task_start.image_text is 200, but the stage ends after 200 steps",
    "task_start={image_text: 5, text: 7}": "no task takes part before step 5",
    "augmentation.scale=[0.9, 0.5]": "augmentation.scale is [0.9, 0.5]; expected the lower one first",
    "augmentation.ratio=[2, 1]": "augmentation.ratio is [2, 1]; expected the lower one first",
    "loss.dims=[]": "loss.dims is []",
    "loss.dims=[64, 64]": "loss.dims is [64, 64]; expected .* each once",
    "loss.dims=[65]": "loss.dims is [65]; expected prefixes of 1 to 64",
    "loss.min_temperature=0.1": "model.temperature is 0.07, below loss.min_temperature, 0.1",
    "loss.weights=[1]": "loss.weights has 1 numbers for 3 dims",
    "loss.temperature=other": "Input should be 'each', 'shared' or 'fixed'",
    "max_tokens=129": "max_tokens is 129, more than the text tower takes",
    "trainable.text=adapters": "model.text.adapters names none",
    "trainable.image=adapters": "model.vision.lora_rank is 0",
    "model.vision=null": "'model.vision' is missing",
    "model.vision.width=128": "texts have 64 numbers (model.text.width or its projector's) and images 128",
    "model.vision.resolution=32": "model.vision.resolution is set by each stage's 'resolution'",
    "model.vision.patch=0": "model.vision: patch is 0",
    "model.vision.heads=3": "model.vision: width 64 over heads 3",
    "model.text.heads=3": "model.text: heads is 3 and width 64",
    "model.text.dropout=1": "model.text: dropout is 1",
    "model.text.lora_rank=4": "lora_rank is 4 and adapters is ()",
    "model.text.adapters=[a]": "lora_rank is 0 and adapters is ('a',)",
    "evaluation={every: 5}": "evaluation.every is 5, but evaluation.pools names nothing to measure",
    "evaluation.pools=[image-short/drawn, image-short/drawn]": "names 'image-short/drawn' more than once",
    "carry_optimizer=true": "'carry_optimizer' continues with",
    "gradient_cache={images: 0}": "'gradient_cache' should give",
    "fp8=true": "'fp8' is for towers in bfloat16, and precision is 'fp32'",
    "fp8=first": "'stages.1.fp8': .*found 'first'",
    "precision=fp8": "'precision'",
    "name=": "'name': Input should be a valid string",
    "output=''": "output is empty",
    "corpus='  '": "corpus is empty",
    "model.tokenizer=''": "model.tokenizer is empty",
    "model.text_weights=''": "model.text_weights is empty",
    "data.text.0.path=''": "stages.1.data.text.0.path is empty",
    "data.text.0.target_language=''": "target_language is empty",
    'output="a\\0b"': "output is .* without NUL",
    "stages=[]": "'stages' is empty",
}  # fmt: skip


@pytest.mark.parametrize("override", CANNOT_BE_MEANT)
def test_what_cannot_be_meant_is_refused_when_it_is_read(recipes, override):
    message = re.escape(CANNOT_BE_MEANT[override]).replace(r"\.\*", ".*").replace(r"\ ", " ")
    refused(recipes / "drawn.yaml", [override], message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss={kind: unified, dims: [64]}", "batch={image_text: 8}"], "a unified loss is over both tasks; give"),
        (["loss={kind: unified, dims: [64]}", "task_start={image_text: 5}"], "over both tasks in every step"),
        (["data.image_text.0.graded=true"], "'graded' is for text pairs; leave it out of data.image_text"),
        (["loss={kind: sigmoid, dims: [64]}", "data.text.0.graded=true"], "'graded' pairs, .*loss.kind is 'sigmoid'"),
        (["loss.temperature=shared", "batch={image_text: 8}"], "only batch.image_text is above 0"),
        (["loss.temperature=fixed", "loss.kind=sigmoid", "trainable={image: none}", "lr={text: 1e-3}"],
         "lr.image is missing, and the bias of the image-text loss trains at it"),
        # What trains at which rate: both towers, their adapters, and a temperature for each loss.
        (["trainable={image: none}", "lr={text: 1e-3}"], "lr.image .*the temperature of the image-text loss trains at"),
        (["trainable={text: none}", "lr={image: 1e-3}"], "lr.text .*the temperature of the text loss trains at"),
        (["batch={text: 8}", "trainable={text: none}", "lr={text: 1e-3}"], "image tower takes no part"),
        (["batch={image_text: 8}", "lr={image: 1e-3}"], "lr.text is missing, and the text tower trains at it"),
        (["batch={text: 8}", "lr={image: 1e-3}"], "lr.text is missing, and the text tower and the temperature of the"),
        (["model.text.adapters=[a]", "model.text.lora_rank=2", "trainable.text=adapters", "lr={image: 1e-3}"],
         "lr.text is missing, and the text tower's adapters and"),
        (["batch={text: 8}", "lr={image: 1e-3, text: 0}"], "every rate under 'lr' at which a tower trains is 0"),
        (["trainable={image: none}", "lr={image: 1e-3, text: 0}"], "every rate under .* at which a tower trains"),
        (["teacher={model: a, folder: b, loss: relational}", "loss.exchange=ring"], "teacher.loss 'relational' comp"),
        (["teacher={model: a}"], "teacher.folder is missing; name a folder for what a says"),
        (["teacher={loss: cosine}"], "teacher.model is missing; .* whose embeddings teacher.loss 'cosine' compares"),
        (["teacher={loss: margin_mse, folder: b}"], "teacher.folder is 'b' and there is no teacher.model, so"),
        (["teacher={loss: margin_mse, language: en}"], "teacher.language is 'en' and there is no teacher.model"),
        (["teacher={loss: margin_mse}", "loss.kind=unified", "loss.temperature=each"], "for triplets with hard negat"),
        (["teacher={loss: margin_mse, alone: true}", "trainable.image=none", "lr={image: 1e-3}", "batch={text: 8}",
          "model.text.adapters=[a]", "model.text.lora_rank=2"], "and the temperature of the text loss train at it"),
        *(([*MASKED, setting], f"'{setting.partition('=')[0]}' is for stages of pairs, and batch.masked_lm")
          for setting in ("embedding_cache=a", "teacher={model: a, folder: b}", "loss.exchange=ring")),
        (["checkpoint.best=loss/image_text"], "which is not measured on held-out data; .*modality_gap"),
        (["checkpoint.best=a", OFF], "checkpoint.best is 'a', but evaluation.every is 0"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused(recipes, overrides, message):
    refused(recipes / "drawn.yaml", overrides, message)


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        ("loss: cosine", [], "texts of data.text, and batch.text is 0; raise it, or let teacher.of name images or cap"),
        ("of: [images]", ["batch={text: 8}"], "for the images of data.image_text, and batch.image_text is 0; .* texts"),
        ("of: []", [], r"teacher.of is \[\]; expected one or more of texts, images and captions, each once"),
        ("of: [images, images]", [], "of texts, images and captions, each once"),
        ("of: [images], language: en", [], r"language is 'en', and teacher.of is \[images\], which have no language"),
        ("of: [images, captions]", ["trainable.image=none"], "draws the image tower by images, and trainable.image is"),
        ("of: [images, captions]", ["trainable.text=none"], "draws the text tower by captions, and trainable.text is"),
        ("of: [images], loss: margin_mse", [], r"\['images'\], and teacher.loss 'margin_mse' is for triplets of texts"),
        ("of: [images], alone: true", [], "nothing reads captions, and trainable.text is 'all'; set it to 'none', add"),
        ("of: [captions], alone: true", ["batch.text=8"], "nothing reads images, and trainable.image is 'all'; set"),
        ("of: [images], alone: true", ["batch.text=8", "loss.temperature=shared"], "leaves image-text pairs no temper"),
        ("of: [images], alone: true", ["batch.text=8", "loss.kind=unified"], "contrasted or ranked by loss.kind 'unif"),
        ("of: [images], alone: true", ["trainable.text=none", "embedding_cache=a"], r"'none' \(no loss reads a text"),
        ("of: [captions], alone: true", ["trainable.image=none", "embedding_cache=a"], r"'none' \(no loss reads an im"),
        ("of: [images, captions], alone: true", ["lr={image: 1e-3}"], "lr.text is missing, and the text tower trains"),
        ("of: [images]", ["data.image_text=[{path: 'a/{0..3}.tar'}]"], "of shards without a manifest .* of teacher.of"),
    ],
)  # fmt: skip
def test_what_a_teacher_of_images_cannot_be_asked_is_refused(recipes, teacher, more, message):
    overrides = ["batch={image_text: 8}", f"teacher={{model: a, folder: b, {teacher}}}", *more]
    refused(recipes / "drawn.yaml", overrides, message)


def test_the_best_of_a_stage_that_measures_nothing_is_refused(recipes):
    masked_then_pairs = [
        "stages.1.batch={masked_lm: 8}", "stages.1.data={masked_lm: [text-pairs/drawn]}",
        "evaluation={every: 5}", "checkpoint.best=validation_loss_masked_lm/all",
    ]  # fmt: skip
    assert load(recipes / "drawn.yaml", masked_then_pairs, 1).recipe.checkpoint.best
    refused(recipes / "drawn.yaml", [*masked_then_pairs, "checkpoint.best=modality_gap/drawn"], "is not measured")
    with pytest.raises(UserError, match="stage 2 measures nothing: evaluation.pools is empty"):
        load(recipes / "drawn.yaml", masked_then_pairs, 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ["warmup_steps=200"],
        ["warmup_steps=0", "min_lr_ratio=1"],
        ["resolution=[[0, 8], [199, 13]]"],  # one patch, and pixels that fill none
        ["resolution=[[0, 40], [10, 32]]"],
        ["task_start.image_text=199"],
        ["task_start={text: 1000}", "batch={image_text: 8}", "data={image_text: [{path: image-short/drawn}]}"],
        ["loss.dims=[1, 64]"],
        ["max_tokens=128"],
        ["steps=1e2", *ONE],
        ["batch={image_text: 8}", "lr={image: 1e-3}", "trainable={text: none}"],
        ["batch={text: 8}", "lr={text: 1e-3}"],
        ["batch={text: 8}", "lr={text: 1e-3}", "trainable={image: none}"],
        ["trainable={image: none}"],
        ["trainable={text: none}"],
        ["lr={image: 0, text: 1e-3}"],
        ["loss={kind: unified, dims: [64]}", "trainable={text: none}", "lr={image: 1e-3}"],
        ["loss.temperature=shared", "trainable={text: none}", "lr={image: 1e-3}"],
        ["loss.temperature=fixed", "trainable={text: none}", "lr={image: 1e-3}"],
        ["loss.temperature=fixed", "loss.min_temperature=0.1"],
        ["loss={kind: sigmoid, dims: [64, 32], weights: [1, 2], false_negative_margin: 0.1}"],
        ["evaluation={every: 0, pools: [image-short/drawn]}"],
        ["evaluation.every=10000"],
        ["optimizer={weight_decay: 0, gradient_clipping: 0}"],
        ["max_corrupt=0"],
        # What the weights decide need not be stated, and what is stated cannot be held against it.
        ["model.text_weights=somewhere", "model.text={}", "trainable.text=adapters"],
        ["model.text_weights=somewhere", "model.text={heads: 7}", "max_tokens=4096"],
        ["model.text_weights=somewhere", "model.text={adapters: [a]}", "trainable.text=adapters"],
        ["model.text_weights=somewhere", "model.text={lora_rank: 4}"],
        ["model.vision_weights=somewhere", "model.vision={lora_rank: 4}", "trainable.image=adapters"],
        ["model.vision_weights=somewhere", "model.vision={}", "resolution=[[0, 13]]"],
    ],
)
def test_what_can_be_meant_is_read(recipes, overrides):
    load(recipes / "drawn.yaml", overrides, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.text={width: 66}"], "loss.dims is .*prefixes of 1 to 64|texts have 66 numbers"),
        (["model.text={dropout: 2}"], "model.text: dropout is 2"),
        (["model.text={widht: 64}"], "did you mean 'width'"),
        (["model.text={adapters: []}", "trainable.text=adapters"], "names none"),
        (["model.text={max_length: 16}"], "max_tokens is 32, more than"),
    ],
)
def test_what_is_stated_beside_weights_still_has_to_hold(recipes, overrides, message):
    refused(recipes / "drawn.yaml", ["model.text_weights=somewhere", *overrides], message)


@pytest.mark.parametrize("resolution", [14, 224, 384, 512])
def test_a_resolution_of_no_whole_patches_is_read(recipes, resolution):
    schedule = ["resolution=[[0, 224]]", f"resolution=[[0, {resolution}]]", "patch_dropout=[[0, 0.0]]"]
    load(recipes / "jina-clip-v2.yaml", schedule, 1)


def test_every_rank_needs_a_sample_of_each_task(recipes):
    load(recipes / "drawn.yaml", ["batch={image_text: 48, text: 0}"], 1, ranks=48)
    refused(recipes / "drawn.yaml", ["batch={image_text: 48}"], "batch.image_text is 48, fewer than the 49", ranks=49)
    with pytest.raises(UserError, match="stage 3: batch.text is 16, fewer than the 17 ranks"):
        load(recipes / "drawn.yaml", ranks=17)
    assert load(recipes / "drawn.yaml", stage=2, ranks=17)  # stage 3 may run on fewer


def test_a_stage_that_the_recipe_lacks_is_refused(recipes):
    with pytest.raises(UserError, match="has stages 1 to 3; stage 4 was asked for"):
        load(recipes / "drawn.yaml", stage=4)


COMMANDS = [
    ["train", "--stage", "1", "lr={text: 1e-3}"],
    ["train", "--stage", "1", "--dry-run", "warmup_steps=500"],
    ["train", "--stage", "1", "deepspeed={zero_optimisation: {stage: 1}}"],
    ["train", "--stage", "1", "batch.text=2"],
    ["plan", "--gpus", "2", "stages.3.batch.text=1"],
    ["plan", "--stage", "0"],
    ["plan", "model.text.heads=3"],
    ["plan", "--price=-1"],
    ["plan", "--mean-tokens", "nan"],
]


def test_commands_refuse_with_exit_code_2_before_torch_is_imported(recipes):
    """In one process, because each start costs; what one command imported would show at every later one."""
    script = f"""
import contextlib, io, json, sys
from stage_trainer.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([words[0], "--recipe", {str(recipes / "drawn.yaml")!r}, *words[1:]])
    heavy = [name for name in ("torch", "deepspeed", "timm", "transformers") if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(COMMANDS)],
        capture_output=True, text=True, check=True, env={**os.environ, "WORLD_SIZE": "3"},
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(COMMANDS)
    for words, (code, said, heavy) in zip(COMMANDS, found, strict=True):
        assert (code, heavy) == (2, []), words
        assert said.startswith("stage-trainer: "), words
        assert "Traceback" not in said, words
