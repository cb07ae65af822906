"""A model that learns from a teacher's embeddings, which `stage-trainer embed` made."""

import shutil

import pytest

HERE = ("model.tokenizer={corpus}/tokenizer.model", "corpus={corpus}")
COMMON = ("warmup_steps=0", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]", "patch_dropout=[[0, 0]]")
STEPS = 12
TAUGHT = (
    *COMMON, f"steps={STEPS}", "seed=3", "lr.text=3e-3", "batch={image_text: 0, text: 32}",
    "teacher={model: teacher, folder: said, language: en}",
)  # fmt: skip


@pytest.fixture
def taught(train, run):
    """A teacher in `teacher`, and what it says in `said`."""
    train(1, *COMMON, "steps=20", output="of-teacher")
    run("stage-trainer", "export", "of-teacher/stage1", "teacher")
    done = train(1, *TAUGHT, fails=True)
    assert "run `stage-trainer embed` with this recipe and stage" in done.stderr
    embed = ["stage-trainer", "embed", "--recipe", train.recipe, "--stage", 1, *HERE, *TAUGHT]
    assert "shard 1 of" in run(*embed).stderr
    assert "shard 1 of" not in run(*embed).stderr  # it is there
    return embed


@pytest.mark.full
def test_texts_of_all_languages_go_where_the_teacher_has_the_english_one(taught, train, run, scalars, tmp_path):
    train(1, *TAUGHT, "teacher.alone=true", output="alone")
    losses = scalars("alone/stage1", "loss/teacher")
    assert losses[STEPS - 1] < 0.8 * losses[0]
    names = scalars("alone/stage1")
    assert "loss/text" not in names
    # Beside the contrastive loss, in chunks, by two ranks: one curve.
    train(1, *TAUGHT, "teacher.loss=relational", "teacher.weight=2", output="beside")
    chunks = "gradient_cache={images: 0, tokens: 150}"
    train(1, *TAUGHT, "teacher.loss=relational", "teacher.weight=2", chunks, output="ranks", ranks=2)
    for tag in ("loss/teacher", "loss/text"):
        expected = scalars("beside/stage1", tag)
        assert scalars("ranks/stage1", tag) == pytest.approx(expected, rel=1e-4), tag
    # Another teacher of that name is not taken for the one that was asked; without it, what it said stands for it.
    config = tmp_path / "teacher/text/config.json"
    config.write_text(config.read_text() + "\n")
    assert "made by other weights or settings" in run(*taught, fails=True).stderr
    assert "made by other weights or settings" in train(1, *TAUGHT, output="beside", fails=True).stderr
    shutil.rmtree(tmp_path / "teacher")
    train(1, *TAUGHT, "teacher.alone=true", output="alone")
