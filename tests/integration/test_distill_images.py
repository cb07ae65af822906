"""A model whose images and captions learn from a model of open_clip, which `stage-trainer embed` asked."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from data_prep.shards import Dataset
from PIL import Image

HERE = ("model.tokenizer={corpus}/tokenizer.model", "corpus={corpus}")
COMMON = ("warmup_steps=0", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]", "patch_dropout=[[0, 0]]")
STEPS = 10
PAIRS = (*COMMON, f"steps={STEPS}", "seed=3", "lr={image: 2e-3, text: 2e-3}", "batch={image_text: 24}")
TAUGHT = (*PAIRS, "teacher={model: teacher, folder: said, of: [images, captions]}")


def of_open_clip(folder, data):
    """A teacher's embeddings of a data set's images, and of all captions, by open_clip's own way from files."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    samples = [data.read(index) for index in range(len(data))]
    captions = [[c["text"] for c in json.loads(sample["json"])["captions"]] for sample in samples]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(sample["png"])).convert("RGB")) for sample in samples])
        images = model.eval().encode_image(pixels)
        texts = [model.encode_text(tokenizer(some)).numpy() for some in captions]
    return images.numpy(), texts


@pytest.mark.full
def test_images_and_captions_go_where_the_teacher_has_them(train, run, scalars, tmp_path, drawn_corpus):
    train(1, *COMMON, "steps=20", output="of-teacher")
    run("stage-trainer", "export", "of-teacher/stage1", "teacher", "--format", "open-clip")
    assert "run `stage-trainer embed` with this recipe and stage" in train(1, *TAUGHT, fails=True).stderr
    embed = ["stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *TAUGHT]
    said = run(*embed).stderr
    assert "images of shard 1 of" in said
    assert "captions of shard 1 of" in said
    assert "shard 1 of" not in run(*embed).stderr  # it is there

    data = Dataset.open(drawn_corpus / "train/image-short/drawn")
    images, texts = of_open_clip(tmp_path / "teacher", data)
    stored = {}
    for folder in (tmp_path / "said").iterdir():
        rows = [np.load(path) for path in sorted(folder.glob("*.npy"))]
        stored[json.loads((folder / "origin.json").read_text())["of"]] = [row for shard in rows for row in shard]
    np.testing.assert_allclose(np.concatenate(stored["images"]), images, rtol=1e-3, atol=1e-4)
    for rows, expected in zip(stored["captions"], texts, strict=True):
        np.testing.assert_allclose(rows[: len(expected)], expected, rtol=1e-3, atol=1e-4)

    # Alone, it is learned, and no temperature moves.
    train(1, *TAUGHT, "teacher.alone=true", output="alone")
    losses = scalars("alone/stage1", "loss/teacher_image_text")
    assert losses[STEPS - 1] < 0.7 * losses[0]
    assert "loss/image_text" not in scalars("alone/stage1")
    assert len(set(scalars("alone/stage1", "temperature/image_text").values())) == 1
    # Beside the contrastive loss: in chunks, by two ranks, and resumed, one curve.
    beside = (*TAUGHT, "teacher.loss=relational", "teacher.weight=3", "checkpoint={every: 4, keep: 9}")
    train(1, *beside, output="beside")
    train(1, *beside, "gradient_cache={images: 5, tokens: 60}", output="ranks", ranks=2)
    train(1, *beside, output="resumed")
    shutil.rmtree(tmp_path / f"resumed/stage1/step-{STEPS:07}")
    shutil.rmtree(tmp_path / "resumed/stage1/step-0000008")
    assert "going on from step 4 of" in train(1, *beside, output="resumed").stdout
    for tag in ("loss/teacher_image_text", "loss/image_text"):
        expected = scalars("beside/stage1", tag)
        assert scalars("ranks/stage1", tag) == pytest.approx(expected, rel=1e-4), tag
        assert scalars("resumed/stage1", tag) == expected, tag
    # Another teacher of that name is not taken for the one that was asked; without it, what it said stands for it.
    config = tmp_path / "teacher/open_clip_config.json"
    config.write_text(config.read_text() + "\n")
    assert "made by other weights or settings" in run(*embed, fails=True).stderr
    assert "made by other weights or settings" in train(1, *beside, output="beside", fails=True).stderr
    shutil.rmtree(tmp_path / "teacher")
    train(1, *beside, output="beside")


@pytest.mark.full
def test_one_tower_learns_alone_and_the_other_does_not_run(train, run, scalars, tmp_path):
    """Images without captions, also by a projector after a tower whose embeddings are kept; captions without images."""
    train(1, *COMMON, "steps=20", output="of-teacher")
    run("stage-trainer", "export", "of-teacher/stage1", "teacher")
    images = (*PAIRS, "teacher={model: teacher, folder: said, of: [images], alone: true}", "trainable.text=none")
    kept = (
        *images, "trainable.image=projector", "model.vision.projector=64", "embedding_cache=kept",
        "augmentation.views=1",
    )  # fmt: skip
    captions = (
        *PAIRS, "teacher={model: teacher, folder: said, of: [captions], language: en, alone: true}",
        "trainable.image=none", "seed=4",
    )  # fmt: skip
    for name, settings in {"images": images, "kept": kept, "captions": captions}.items():
        run("stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *settings)
        train(1, *settings, output=name)
        train(1, *settings, "gradient_cache={images: 5, tokens: 60}", output=f"{name}-ranks", ranks=2)
        losses = scalars(f"{name}/stage1", "loss/teacher_image_text")
        assert losses[STEPS - 1] < 0.9 * losses[0], name
        assert scalars(f"{name}-ranks/stage1", "loss/teacher_image_text") == pytest.approx(losses, rel=1e-4), name
        plan = run("stage-trainer", "plan", "--recipe", train.recipe, "--stage", 1, *HERE, *settings).stdout
        assert (
            f"a device has {0 if name == 'captions' else 24} images and {24 if name == 'captions' else 0} texts" in plan
        )


@pytest.mark.full
def test_a_teacher_without_an_image_tower_is_refused_for_images(run, train, tmp_path):
    from bert_words import SPECIAL, word_piece
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_piece([]), **SPECIAL, model_max_length=64)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    embed = ["stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *TAUGHT]
    assert "the teacher teacher has no image tower, and teacher.of is ['images', " in run(*embed, fails=True).stderr
    run(*embed, "teacher.of=[captions]")
