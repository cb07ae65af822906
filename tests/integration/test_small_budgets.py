"""The recipes for small budgets, each in small on the drawn corpus, from towers that were finished before."""

import pytest
from bert_words import cross_encoder

SMALL = (
    "steps=4", "warmup_steps=0", "precision=fp32", "device=cpu", "workers=0", "evaluation.every=0",
    "checkpoint.best=null", "resolution=[[0, 32]]", "max_tokens=32", "loss.dims=[64, 32]", "log_every=1",
    "gradient_cache={images: 8, tokens: 200}",
)  # fmt: skip
IMAGES = "data.image_text=[{path: image-short/drawn}]"
DRAWN = {
    "lit": (
        "model.vision_weights=finished/vision", "model.text_weights=finished/text", "batch={image_text: 16}", IMAGES,
        "embedding_cache=kept", "model.text={dropout: 0.1}",
    ),
    "teacher": (
        "model.weights=finished", "teacher.model=finished", "teacher.folder=said", "batch={text: 16}",
        "data.text=[{path: text-pairs/drawn}]",
    ),
    "smaller": (
        "model.vision_weights=finished/vision", "model.text_weights=finished/text", "teacher.model=finished",
        "teacher.folder=said", "batch={image_text: 16}", IMAGES, "model.text={}",
    ),
    "margins": (
        "model.weights=finished", "teacher.model=scorer", "teacher.folder=said", "batch={text: 8}",
        "data.text=[{path: text-triplets/drawn}]",
    ),
    "joined": (
        "model.vision_weights=finished/vision", "model.text_weights=finished/text", "batch={image_text: 16}", IMAGES,
        "model.text={adapters: [retrieval.query], lora_rank: 2}",
    ),
    "documents": (
        "model.weights=finished", "batch={image_text: 16, text: 8}", "data.image_text=[{path: image-long/drawn}]",
        "data.text=[{path: text-triplets/drawn}]",
    ),
}  # fmt: skip


@pytest.mark.full
def test_each_recipe_runs_in_small_from_finished_towers(train, run, scalars, tmp_path):
    recipes = train.recipe.parent
    train(1, "steps=4", "warmup_steps=0", "resolution=[[0, 32]]", "evaluation.every=0", output="before")
    run("stage-trainer", "export", "before/stage1", "finished")
    cross_encoder(tmp_path / "scorer")
    for name, settings in DRAWN.items():
        recipe = recipes / f"{name}.yaml"
        here = ("corpus={corpus}", "model.tokenizer={corpus}/tokenizer.model", f"output={name}")
        if "stage-trainer embed" in recipe.read_text():
            run("stage-trainer", "embed", "--recipe", recipe, "--stage", 1, *here, *SMALL, *settings)
        train(1, *SMALL, *settings, output=name, recipe=recipe)
        assert any(tag.startswith("loss/") for tag in scalars(f"{name}/stage1"))
        run("stage-trainer", "export", f"{name}/stage1", f"{name}-model")
        assert (tmp_path / f"{name}-model" / "config.json").exists()
