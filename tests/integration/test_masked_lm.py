"""Masked-language-model training as a user runs it: real processes, real DeepSpeed, the drawn corpus."""

import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_trainer.data.config import DataConfig
from stage_trainer.data.masked import MaskedTexts
from stage_trainer.recipe.read import load
from text_tower import TextTower
from transformers import AutoModelForMaskedLM

RECIPE = Path(__file__).parents[2] / "launch/recipes/masked-lm.yaml"
QUICK = (
    "model.text={vocab_size: 386, width: 64, layers: 1, heads: 2, mlp_width: 256, max_length: 128, dropout: 0.1}",
    "data.masked_lm=[text-pairs/drawn]", "batch.masked_lm=32", "max_tokens=32", "lr.text=1e-3", "warmup_steps=2",
    "evaluation.every=0", "precision=fp32", "log_every=1",
)  # fmt: skip


def weights(stage):
    last = max(stage.glob("step-*"))
    return {f"{f.relative_to(last)}:{k}": v for f in last.rglob("*.safetensors") for k, v in load_file(f).items()}


def equal(one, two):
    return one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_two_processes_give_one_process_curve(train, scalars):
    """Dropout on, under the launcher, to 1e-5; with each rank's part cut into chunks."""
    options = (*QUICK, "steps=12", "evaluation.every=6")
    train(1, *options, recipe=RECIPE, output="one")
    train(1, *options, "gradient_cache={tokens: 90}", recipe=RECIPE, output="two", ranks=2)
    for tag in ("loss/masked_lm", "validation_loss_masked_lm/all", "validation_loss_masked_lm/ru"):
        one = scalars("one/stage1", tag)
        assert list(one) == (list(range(12)) if tag == "loss/masked_lm" else [5, 11])
        assert scalars("two/stage1", tag) == pytest.approx(one, rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(train, start, tmp_path):
    """kill -9 after the first checkpoint, then the same command; the held-out loss is no part of what is resumed."""
    options = (*QUICK, "steps=40", "checkpoint.every=8", "evaluation.every=16")
    train(1, *options, recipe=RECIPE, output="straight")
    process = start(1, *options, recipe=RECIPE, output="killed")
    while not list((tmp_path / "killed/stage1").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/stage1/step-0000040").exists()
    train(1, *options, recipe=RECIPE, output="killed")
    assert equal(weights(tmp_path / "straight/stage1"), weights(tmp_path / "killed/stage1"))


def test_what_was_learned_is_read_by_others_and_starts_the_next_stage(train, scalars, tmp_path, drawn_corpus):
    """One recipe: hidden words first, then both towers, the text tower growing adapters. At a rate of 0 for texts the
    second stage shows what it started from."""
    tree = yaml.safe_load(train.recipe.read_text())
    tree["model"]["text"] |= {"adapters": ["some"], "lora_rank": 2}
    words = {"steps": 60, "max_tokens": 32, "batch": {"masked_lm": 48}, "lr": {"text": 1e-3}, "warmup_steps": 5}
    tree["stages"] = [words | {"data": {"masked_lm": ["text-pairs/drawn", "text-triplets/drawn"]}}, tree["stages"][0]]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    shown = train(1, "evaluation.every=60", recipe=recipe).stdout
    assert "stage 1 of drawn is complete" in shown
    losses = scalars("run/stage1", "loss/masked_lm")
    assert losses[max(losses)] < 0.85 * losses[0]
    assert scalars("run/stage1", "validation_loss_masked_lm/all")[59] < 0.85 * losses[0]
    assert {
        "perplexity/masked_lm", "speed/text_tokens_per_second", "learning_rate_muon/text", "gradient_norm/text",
        "validation_loss_masked_lm/zh", "texts_seen/text-triplets/drawn",
    } <= scalars("run/stage1")  # fmt: skip

    model = tmp_path / "run/stage1/step-0000060/model"
    tower = TextTower.from_pretrained(model)
    assert not tower.config.adapters
    assert tower.encode(["a red circle"]).shape == (1, 64)
    settings = load(recipe, [f"corpus={drawn_corpus}"]).recipe
    texts = MaskedTexts(DataConfig.of(settings), settings.stage(1), "validation", tower.tokenizer)
    masked = texts.held_out()["ru"].masked
    theirs = AutoModelForMaskedLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = torch.cat([theirs(ids[None]).logits[0] for ids in masked.packed.ids.split(masked.packed.lengths)])
    loss = torch.nn.functional.cross_entropy(logits[masked.places], masked.labels)
    assert loss.item() == pytest.approx(scalars("run/stage1", "validation_loss_masked_lm/ru")[59], rel=1e-5)

    short = ("steps=2", "warmup_steps=0", "resolution=[[0, 32]]")
    train(2, *short, "lr={image: 1e-3, text: 0}", "evaluation.every=0", recipe=recipe)
    after = TextTower.from_pretrained(tmp_path / "run/stage2/step-0000002/model/text").state_dict()
    assert any("lora" in name for name in after)
    assert all((after[name] == value).all() for name, value in tower.state_dict().items())

    refused = train(1, "masking.share=0.3", recipe=recipe, fails=True).stderr
    assert "stage.masking.share was 0.15 and is now 0.3" in refused


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_gives_the_plain_curve_and_goes_on_anywhere(train, scalars, tmp_path, zero):
    """Two ranks, whole and in chunks; then from the checkpoint in the middle, with two ranks and in a plain process."""
    options = (*QUICK, "steps=8", "optimizer.name=adamw", "checkpoint={every: 4, keep: 2}", "evaluation.every=4")
    tags = ("loss/masked_lm", "validation_loss_masked_lm/all")

    def under(stage):
        return f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"

    train(1, *options, recipe=RECIPE, output="plain")
    train(1, *options, under(zero), recipe=RECIPE, output="zero", ranks=2)
    train(1, *options, under(zero), "gradient_cache={tokens: 90}", recipe=RECIPE, output="cut", ranks=2)
    plain = {tag: scalars("plain/stage1", tag) for tag in tags}
    for tag, curve in plain.items():
        assert scalars("zero/stage1", tag) == pytest.approx(curve, rel=1e-5)
        assert scalars("cut/stage1", tag) == pytest.approx(curve, rel=1e-5)
    for other, ranks in ((zero, 2), (0, 1)):
        output = f"on-{other}-{ranks}"
        shutil.copytree(tmp_path / "zero/stage1/step-0000004", tmp_path / output / "stage1/step-0000004")
        train(1, *options, under(other), recipe=RECIPE, output=output, ranks=ranks)
        for tag, curve in plain.items():
            rest = {step: value for step, value in curve.items() if step >= 4}
            assert scalars(f"{output}/stage1", tag) == pytest.approx(rest, rel=1e-5), output
