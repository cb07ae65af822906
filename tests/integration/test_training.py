"""Training as a user runs it: real processes, real DeepSpeed, the drawn corpus."""

import io
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from data_prep.shards import Dataset, DatasetWriter
from safetensors.torch import load_file
from stage_trainer import dual_encoder

from .conftest import until

QUICK = ("steps=8", "warmup_steps=2", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]")


def weights(stage):
    last = max(stage.glob("step-*"))
    return {f"{f.relative_to(last)}:{k}": v for f in last.rglob("*.safetensors") for k, v in load_file(f).items()}


def newest(stage):
    return max(stage.glob("step-*")) / "optimizer.safetensors"


def equal(one, two):
    return one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_two_processes_give_one_process_curve(train, scalars):
    """Dropout, patch dropout and augmentation on, under the launcher, to 1e-5 over the first 20 steps; with gradient
    caching too. What two measure of held-out images, each of a part of them, is what one measures."""
    options = (
        *QUICK, "steps=20", "model.text.dropout=0.1", "patch_dropout=[[0, 0.5]]",
        "augmentation={scale: [0.5, 1.0], flip: true, color: 0.2}",
        "evaluation={every: 20, pools: [image-short/drawn]}",
    )  # fmt: skip
    train(1, *options, output="one")
    train(1, *options, output="two", ranks=2)
    for tag in ("validation_recall_at_5_drawn/text to image", "modality_gap/drawn"):
        assert scalars("two/stage1", tag) == pytest.approx(scalars("one/stage1", tag), abs=0.02)
    train(1, *options, "gradient_cache={images: 5, tokens: 60}", output="cached", ranks=2)
    for tag in ("loss/text", "loss/image_text", "temperature/text", "temperature/image_text"):
        one = scalars("one/stage1", tag)
        assert list(one) == list(range(20))
        assert scalars("two/stage1", tag) == pytest.approx(one, rel=1e-5)
        assert scalars("cached/stage1", tag) == pytest.approx(one, rel=1e-5)


def test_a_unified_batch_trains_and_two_cached_processes_give_one_process_curve(train, scalars):
    """Section 5.2's ablation beside the multi-task loss: one loss, one temperature that learns, views of the images."""
    options = (*QUICK, "loss.kind=unified", "patch_dropout=[[0, 0.5]]")
    train(1, *options, output="one")
    train(1, *options, "gradient_cache={images: 5, tokens: 60}", output="two", ranks=2)
    one = scalars("one/stage1", "loss/unified")
    assert one[7] < one[0]
    assert scalars("two/stage1", "loss/unified") == pytest.approx(one, rel=1e-5)
    temperatures = [scalars("one/stage1", f"temperature/{task}") for task in ("image_text", "text")]
    assert [len(set(each.values())) > 1 for each in temperatures] == [True, False]


@pytest.mark.full
def test_a_sigmoid_loss_trains_its_biases_which_a_resume_and_the_next_stage_go_on_from(train, scalars, tmp_path):
    """Two cached processes give one process' curve; a resume and the next stage go on from the biases."""
    loss = "loss={kind: sigmoid, dims: [64, 16], weights: [1, 0.5], bias: -5, false_negative_margin: 0.1}"
    options = (*QUICK, loss, "checkpoint={every: 4, keep: 2}")
    train(1, *options, output="one")
    train(1, *options, "gradient_cache={images: 5, tokens: 60}", output="two", ranks=2)
    for tag in ("loss/text", "loss/image_text", "bias/text", "bias/image_text"):
        one = scalars("one/stage1", tag)
        assert len(set(one.values())) == 8
        assert scalars("two/stage1", tag) == pytest.approx(one, rel=1e-5)
    learnt = dual_encoder.read_config(tmp_path / "one/stage1/step-0000008/model").biases
    assert -5 != learnt[0] != learnt[1] != -5
    shutil.rmtree(tmp_path / "one/stage1/step-0000008")
    train(1, *options, output="one")
    assert dual_encoder.read_config(tmp_path / "one/stage1/step-0000008/model").biases == learnt
    before = ("stages.1.steps=8", "stages.1.warmup_steps=2", "stages.1.resolution=[[0, 32]]")
    train(2, *QUICK, *before, "lr={image: 1e-9, text: 1e-9}", "loss={kind: sigmoid, dims: [64]}", output="one")
    assert scalars("one/stage2", "bias/text")[0] == pytest.approx(learnt[1], rel=1e-6)


def test_a_killed_run_goes_on_to_the_same_bits(train, start, tmp_path):
    """kill -9 after the first checkpoint, then the same command; across a change of resolution, before the images'
    task has started."""
    options = (
        "steps=24",
        "checkpoint={every: 8, keep: 2}",
        "task_start={image_text: 10}",
        "resolution=[[0, 32], [12, 40]]",
        "warmup_steps=2",
        "evaluation.every=0",
    )
    train(1, *options, output="straight")
    process = start(1, *options, output="killed")
    while not list((tmp_path / "killed/stage1").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/stage1/step-0000024").exists()
    train(1, *options, output="killed")
    assert equal(weights(tmp_path / "straight/stage1"), weights(tmp_path / "killed/stage1"))
    for run in ("straight", "killed"):
        assert sorted(p.name for p in (tmp_path / run / "stage1").glob("step-*")) == ["step-0000016", "step-0000024"]
    counts = {n: v for n, v in load_file(newest(tmp_path / "killed/stage1")).items() if n.endswith("|step")}
    assert {float(v) for n, v in counts.items() if n.startswith(("vision.", "logit_scale"))} == {24 - 10}
    assert {float(v) for n, v in counts.items() if n.startswith("text")} == {24}


@pytest.mark.full
def test_a_temperature_stops_at_its_floor(train, scalars, tmp_path):
    """It starts below, as the stage before left it; ZeRO's own copy of it would pass the floor unseen, and come back
    late. The everyday suite has it in tests/stage_trainer/test_rest.py."""
    options = (*QUICK, "optimizer.name=adamw")
    train(1, *options, "model.temperature=0.02", output="plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "zero")
    before = ("stages.1.steps=8", "stages.1.warmup_steps=2", "stages.1.resolution=[[0, 32]]")
    train(2, *options, *before, "loss.min_temperature=0.05", output="plain")
    zero = "deepspeed={zero_optimization: {stage: 1}}"
    train(2, *options, *before, "loss.min_temperature=0.05", zero, output="zero")
    for task, name in (("image_text", "logit_scale"), ("text", "text_logit_scale")):
        plain, zero = (scalars(f"{run}/stage2", f"temperature/{task}") for run in ("plain", "zero"))
        assert plain[0] == pytest.approx(0.05, rel=1e-6)
        assert min(plain.values()) >= 0.05 * (1 - 1e-6)
        assert zero == pytest.approx(plain, rel=1e-5)
        for run in ("plain", "zero"):
            saved = json.loads((newest(tmp_path / run / "stage2").parent / "model/config.json").read_text())
            assert saved[name] == pytest.approx(-math.log(plain[7]), rel=1e-5)


@pytest.mark.full
def test_twenty_kills_at_random_moments_leave_no_trace(train, start, tmp_path):
    """kill -9 in a step, in a save, in the start; two checkpoints are kept, saved every third step. How long to wait is
    told by the undisturbed run, so that a fast machine does not come to the end first."""
    options = ("steps=200", "checkpoint={every: 3, keep: 2}", "resolution=[[0, 32], [70, 40]]", "evaluation.every=0")

    def last(run: str) -> Path | None:  # also one that is being saved
        return max((tmp_path / run / "stage1").glob("step-*"), default=None)

    begun = time.monotonic()
    process = start(1, *options, output="straight")
    until(lambda: last("straight"), process)
    to_start = time.monotonic() - begun
    assert process.wait() == 0, process.stdout.read()
    step = (time.monotonic() - begun - to_start) / 200
    moments = random.Random(0)
    for kill in range(20):
        process = start(1, *options, output="killed")
        if kill % 5:  # most of the time once it trains again, else whenever it may be
            before = last("killed")
            until(lambda before=before: last("killed") != before, process)
            time.sleep(moments.uniform(0, 4 * step))
        else:
            time.sleep(moments.uniform(0, to_start))
        assert process.poll() is None, "the stage was too short"
        process.kill()
        process.wait()
    train(1, *options, output="killed")
    assert equal(weights(tmp_path / "straight/stage1"), weights(tmp_path / "killed/stage1"))


def test_a_stopped_run_saves_and_goes_on_past_a_damaged_checkpoint(train, start, tmp_path):
    """SIGTERM, then a checkpoint of which some bytes changed: the end has the bits of a run that nobody disturbed."""
    options = (
        "steps=24",
        "checkpoint={every: 8, keep: 3}",
        "resolution=[[0, 32]]",
        "evaluation.every=0",
        "log_every=1",
    )
    train(1, *options, output="straight")
    process = start(1, *options, output="stopped")
    while not list((tmp_path / "stopped/stage1").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 75
    assert "as asked; the same command goes on" in process.stdout.read()
    newest = max((tmp_path / "stopped/stage1").glob("step-*"))
    assert newest.name > "step-0000008"
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"12345678")
    done = train(1, *options, output="stopped")
    assert f"{newest.relative_to(tmp_path)} is damaged: optimizer.safetensors is not what was written" in done.stdout
    assert equal(weights(tmp_path / "straight/stage1"), weights(tmp_path / "stopped/stage1"))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(1, *QUICK, f"seed={seed}", output=name)
    a, b, c = (weights(tmp_path / name / "stage1") for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


def opens_elsewhere(folder, corpus):
    """sentence-transformers gives the vectors of a trained model, and its card says how it was trained."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.evaluation.retrieval import DIRECTIONS, Pool

    pool = Pool.open(corpus / "test/image-short/drawn")
    texts, images = pool.all_texts(), [Image.open(io.BytesIO(content)) for content in pool.images]
    ours, theirs = DualEncoder.from_pretrained(folder), SentenceTransformer(str(folder), device="cpu")
    vectors = [(ours.encode_text(texts), theirs.encode(texts)), (ours.encode_image(images), theirs.encode(images))]
    for mine, found in vectors:
        np.testing.assert_allclose(found, mine, rtol=0, atol=1e-6)
    card = (folder / "README.md").read_text()
    assert all(f"| stage{number} |" in card for number in (1, 2, 3))
    assert f"`drawn`, recall@5, {DIRECTIONS[0]}, %" in card


def test_three_stages_end_in_a_model_that_finds_held_out_items(train, run, scalars, tmp_path, drawn_corpus):
    """Stage by stage, the first through its launch file, then export, evaluate, report and search, as quickstart does.
    A third of its steps are enough by far: nine of ten items are among the first five."""
    fewer = ("stages.1.steps=80", "stages.1.resolution=[[0, 32], [64, 40]]", "stages.2.steps=30", "stages.3.steps=30")
    for stage in (1, 2, 3):
        train(stage, *fewer, ranks=2 if stage == 1 else 1, launcher=stage == 1)
        run("stage-trainer", "evaluate", f"run/stage{stage}", "{corpus}")
    run("stage-trainer", "export", "run/stage3", "model")
    table = run("stage-trainer", "evaluate", "model", "{corpus}", "--json", "figures.json", "--by-language").stdout
    assert "text→image" in table
    assert "blind guess" in table
    exported = json.loads((tmp_path / "figures.json").read_text())
    of_stage = json.loads((tmp_path / "run/stage3/evaluation.json").read_text())
    assert of_stage == {name: {**its, "checkpoint": "step-0000030"} for name, its in exported.items()}
    opens_elsewhere(tmp_path / "model", drawn_corpus)
    assert {its["kind"] for its in exported.values()} == {"image-short", "image-long", "text-pairs", "text-triplets"}
    pool = exported["drawn"]
    for direction, by_dim in pool["recall_at_5"].items():
        assert set(by_dim) == {"64", "32", "16"}
        assert by_dim["64"]["mean"] > 2 * pool["chance"][direction]["mean"], direction

    run("stage-trainer", "report", "--recipe", train.recipe, "output=run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert set(report["stages"]) == {"stage1", "stage2", "stage3"}
    assert report["stages"]["stage3"] == of_stage
    assert report["parts"]["stage1"]["seconds"] > 0
    assert report["parts"]["stage1"]["peak_memory_bytes"] > 1e8

    lacking = run("stage-trainer", "report", "run").stderr.count("lacking: ")
    page = (tmp_path / "run/report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in ("Training", "Matryoshka", "Languages", "Searches"))
    assert lacking == page.count("no predicted time of a step") == 1, "on a CPU nothing predicts it, and that is said"

    run("stage-trainer", "search", "model", "{corpus}", "--out", "search.png")
    run("stage-trainer", "search", "model", "{corpus}", "--out", "asked.png", "a red circle")
    from PIL import Image

    assert Image.open(tmp_path / "search.png").size[1] > 300

    tags = scalars("run/stage1")
    wanted = {
        "loss/text", "loss/image_text", "temperature/text", "temperature/image_text", "learning_rate_adamw/image",
        "learning_rate_muon/text", "gradient_norm/image", "gradient_norm/text", "speed/samples_per_second",
        "validation_recall_at_5_drawn/text to image", "train_accuracy_text/16",
    }  # fmt: skip
    assert wanted <= tags
    losses = scalars("run/stage1", "loss/image_text")
    assert losses[max(losses)] < 0.7 * losses[min(losses)]
    assert max(scalars("run/stage1", "learning_rate_adamw/image").values()) == pytest.approx(1e-3)

    again = train(3, *fewer)
    assert "stage 3 of drawn is complete" in again.stdout


def test_a_stage_needs_the_one_before(train):
    done = train(2, fails=True)
    assert done.returncode == 2
    assert "stage 2 starts from stage 1, which has not run" in done.stderr
    assert "launch/stage1.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_knows_the_model_that_it_grew_from(train, tmp_path):
    first = ("stages.1.steps=8", "stages.1.warmup_steps=2", "stages.1.resolution=[[0, 32]]")
    second = (*first, "steps=4", *QUICK[1:], "model.text.dropout=0.1")
    train(1, *QUICK)
    train(2, *second, "carry_optimizer=true")
    config = json.loads((tmp_path / "run/stage2/step-0000004/model/text/config.json").read_text())
    assert 0.1 in config.values(), "the recipe's dropout is that of the model that stage 1 left behind"
    moments = load_file(tmp_path / "run/stage2/step-0000004/optimizer.safetensors")
    assert moments["vision.pos_embed|step"] == 8 + 4, "it goes on with stage 1's moments, resampled with the table"
    train(2, *second, "--start-over")
    moments = load_file(tmp_path / "run/stage2/step-0000004/optimizer.safetensors")
    assert moments["vision.pos_embed|step"] == 4
    train(1, *QUICK, "lr.image=5e-4", "--start-over")
    assert "the model of stage 1 was" in train(2, *second, fails=True).stderr
    shutil.rmtree(tmp_path / "run/stage1")
    assert "stage 2 of drawn is complete" in train(2, *second).stdout


def test_other_settings_are_refused_and_starting_over_keeps_the_old_run(train, tmp_path):
    train(1, *QUICK)
    before = weights(tmp_path / "run/stage1")
    done = train(1, *QUICK, "lr.image=5e-4", fails=True)
    assert "stage.lr.image was 0.001 and is now 0.0005" in done.stderr
    path = tmp_path / "run/stage1/step-0000008/state.json"
    state = json.loads(path.read_text())
    for name in ("kind", "weights"):  # as a release wrote it that did not know these settings; one is a list
        del state["settings"][f"stage.loss.{name}"]
    del state["sha256"]
    path.write_text(json.dumps(state))
    assert "is complete" in train(1, *QUICK).stdout
    assert equal(before, weights(tmp_path / "run/stage1"))
    train(1, *QUICK, "lr.image=5e-4", "--start-over")
    assert equal(before, weights(tmp_path / "run/stage1.old-1"))
    assert not equal(before, weights(tmp_path / "run/stage1"))


def test_a_run_of_a_release_without_lanes_does_not_go_on_with_other_samples(train, tmp_path):
    """But once it is finished there is nothing to go on with."""
    options = (*QUICK, "checkpoint={every: 4, keep: 2}")
    train(1, *options)
    for step in (4, 8):
        path = tmp_path / f"run/stage1/step-000000{step}/state.json"
        state = json.loads(path.read_text())
        del state["settings"]["stage.data.lanes"], state["sha256"]
        path.write_text(json.dumps(state))
    assert "is complete" in train(1, *options).stdout
    shutil.rmtree(tmp_path / "run/stage1/step-0000008")
    refused = train(1, *options, fails=True).stderr
    assert "drew samples in another order (its settings have no 'data.lanes'); finish it with that release" in refused
    assert "Traceback" not in refused
    assert "is complete" in train(1, *options, "--start-over").stdout


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.full), 3, pytest.param(4, marks=pytest.mark.full)])
def test_any_number_of_ranks_goes_on_though_lanes_do_not_divide(train, scalars, tmp_path, copy_of_corpus, ranks):
    """Of images five lanes and of texts seven, batches that the ranks share unequally, across epochs."""
    for path, shards in (("image-short/drawn", 5), ("text-pairs/drawn", 7)):
        in_shards(copy_of_corpus / "train" / path, shards)
    options = (*QUICK, f"corpus={copy_of_corpus}", "batch={image_text: 46, text: 50}", "checkpoint={every: 4, keep: 2}")
    train(1, *options, output="one")
    shutil.copytree(tmp_path / "one/stage1/step-0000004", tmp_path / "more/stage1/step-0000004")
    train(1, *options, output="more", ranks=ranks)
    for tag in ("loss/text", "loss/image_text", "temperature/text", "temperature/image_text"):
        rest = {step: value for step, value in scalars("one/stage1", tag).items() if step >= 4}
        assert len(rest) == 4
        assert scalars("more/stage1", tag) == pytest.approx(rest, rel=1e-5)


def in_shards(folder, count):
    """Writes a data set again, in so many shards."""
    data = Dataset.open(folder)
    samples = [(data.row(i), data.read(i)) for i in range(len(data))]
    kind, source = data.kind, data.source
    shutil.rmtree(folder)
    with DatasetWriter(folder, kind=kind, source=source, samples_per_shard=-(-len(samples) // count)) as writer:
        for row, members in samples:
            writer.write(row.key, members, languages=row.languages, tokens=row.tokens)
    assert len(Dataset.open(folder).shard_sizes) == count


def test_a_full_disk_is_one_message_and_loses_nothing(train, tmp_path):
    """The limit on a file's size stands for a disk that takes no more."""
    options = (*QUICK, "checkpoint.every=4")
    train(1, *options, "steps=4", output="run")
    before = weights(tmp_path / "run/stage1")
    done = train(1, *options, "steps=4", "--start-over", limit="ulimit -f 300", fails=True)
    assert "could not write" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert equal(before, weights(tmp_path / "run/stage1.old-1"))
    assert not list((tmp_path / "run/stage1").glob("step-*"))
    assert not list((tmp_path / "run/stage1").glob(".step-*"))


def test_damaged_data_and_wrong_sizes_are_named(train, copy_of_corpus):
    here = (f"corpus={copy_of_corpus}", *QUICK)
    assert "too few for one batch of 100000" in train(1, *here, "batch.image_text=100000", fails=True).stderr.replace(
        ",", ""
    )
    assert "vocab" in train(1, *here, "model.text.vocab_size=100", fails=True).stderr
    tar = next((copy_of_corpus / "train/image-short/drawn").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    done = train(1, *here, fails=True)
    assert str(tar) in done.stderr
    tar.unlink()
    done = train(1, *here, fails=True)
    assert done.returncode == 2
    assert str(tar) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_gives_the_plain_curve_and_goes_on_anywhere(train, scalars, tmp_path, zero):
    """Two ranks, AdamW, triplets among the losses, with and without gradient caching; then from the checkpoint in the
    middle, under the same ZeRO stage, in one plain process, and from ZeRO 0 under 3."""
    options = (
        *QUICK, "optimizer.name=adamw", "batch.text=32", "data.text=[{path: text-triplets/drawn}]",
        "checkpoint={every: 4, keep: 2}",
    )  # fmt: skip

    def under(stage):
        return f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"

    train(1, *options, output="plain")
    train(1, *options, under(zero), output="zero", ranks=2)
    plain = {tag: scalars("plain/stage1", tag) for tag in ("loss/text", "loss/image_text", "temperature/text")}
    train(1, *options, under(zero), "gradient_cache={images: 5, tokens: 60}", output="cached", ranks=2)
    for tag, curve in plain.items():
        assert scalars("zero/stage1", tag) == pytest.approx(curve, rel=1e-5)
        assert scalars("cached/stage1", tag) == pytest.approx(curve, rel=1e-5)
    for other, ranks in ((zero, 2), (0, 1), *([(3, 2)] if zero == 0 else [])):
        output = f"on-{other}-{ranks}"
        shutil.copytree(tmp_path / "zero/stage1/step-0000004", tmp_path / output / "stage1/step-0000004")
        train(1, *options, under(other), output=output, ranks=ranks)
        for tag, curve in plain.items():
            rest = {step: value for step, value in curve.items() if step >= 4}
            assert scalars(f"{output}/stage1", tag) == pytest.approx(rest, rel=1e-5), output


@pytest.mark.full
def test_zero_3_trains_text_alone(train, scalars):
    """The temperature of the task that rests is cut up too, and nobody may read a part of it."""
    options = (*QUICK, "optimizer.name=adamw", "batch.image_text=0")
    train(1, *options, output="plain")
    train(1, *options, "deepspeed={zero_optimization: {stage: 3}}", output="zero", ranks=2)
    for tag in ("loss/text", "temperature/text", "temperature/image_text"):
        assert scalars("zero/stage1", tag) == pytest.approx(scalars("plain/stage1", tag), rel=1e-5)
