"""What a run says, typed as it says it: cut texts, and the commands that come next."""

import json
import re
import shlex

import pytest
from stage_trainer.build import load_tokenizer
from stage_trainer.cli import main
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task

OPTIONS = (
    "steps=4", "max_tokens=40", "data.image_text=[{path: image-long/drawn}]", "resolution=[[0, 32]]", "log_every=1",
    "evaluation.every=0", "warmup_steps=0", "batch={image_text: 24, text: 24}", "optimizer.name=adamw",
)  # fmt: skip


def test_a_run_says_what_it_cuts_and_the_commands_it_ends_with_work(
    train, scalars, tmp_path, drawn_corpus, monkeypatch, capsys
):
    """Cut texts of two ranks, counted beside it by one; then what the screen says is typed, and what that says."""
    done = train(1, *OPTIONS, ranks=2)
    here = [*OPTIONS, f"corpus={drawn_corpus}", f"model.tokenizer={drawn_corpus}/tokenizer.model"]
    recipe = load(train.recipe, here, 1).recipe
    batches = make_task(recipe, 1).make_batches(load_tokenizer(recipe), 0, 1)
    sources = list(batches.fingerprint)
    each = [batches[step][1].of_sources(sources) for step in range(4)]
    place = sources.index("image-long/drawn")
    seen, cut = (sum(counts[place + offset] for counts in each) for offset in (0, len(sources)))
    assert 0 < cut < seen
    assert f"image-long/drawn: {cut} of its {seen} texts so far" in done.stdout
    assert scalars("run/stage1", "texts_cut/image-long/drawn")[3] == pytest.approx(cut / seen)
    state = json.loads((tmp_path / "run/stage1/step-0000004/state.json").read_text())
    assert state["texts_cut"]["image-long/drawn"] == cut

    monkeypatch.chdir(tmp_path)
    typed = re.findall(r"stage-trainer ((?:evaluate|search|export) .+)", done.stdout)
    assert len(typed) == 3
    assert [main(shlex.split(words)) for words in typed] == [0, 0, 0]
    told = capsys.readouterr()
    assert "taking run/stage1/step-0000004, the newest" in told.err
    assert "the test split of" in told.err
    assert (tmp_path / "my-model/config.json").exists()
    report = ["report", "--recipe", str(train.recipe), "output=run", f"corpus={drawn_corpus}"]
    assert main(report) == 0
    assert "drawn-text-pairs (194 targets)" in capsys.readouterr().out


def test_a_stage_that_was_trained_on_after_its_evaluation_is_named(train, tmp_path, drawn_corpus, monkeypatch, capsys):
    train(1, *OPTIONS)
    stage = tmp_path / "run/stage1"
    figures = {"drawn": {"checkpoint": "step-0000002", "targets": 3, "ndcg_at_10": {"64": {"mean": 0.5}}}}
    (stage / "evaluation.json").write_text(json.dumps(figures))
    monkeypatch.chdir(tmp_path)
    report = ["report", "--recipe", str(train.recipe), "output=run", f"corpus={drawn_corpus}"]
    assert main(report) == 0
    assert "stage 1 was trained on after step-0000002 was evaluated" in capsys.readouterr().out
    (stage / "evaluation.json").write_text("{")
    assert main(report) == 2
    assert "evaluate the stage again" in capsys.readouterr().err
    (stage / "evaluation.json").write_text("{}")
    assert main(report) == 2
    capsys.readouterr()

    assert main(["evaluate", "run", str(drawn_corpus)]) == 2
    assert "its stages are run/stage1: name one" in capsys.readouterr().err
    assert main(["search", "run/stage1", str(drawn_corpus / "test/text-pairs")]) == 2
    assert "has no images to search" in capsys.readouterr().err
    assert main(["evaluate", "run/stage1", str(drawn_corpus), "--json", "nowhere/f.json"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    weights = next((stage / "step-0000004/model").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert main(["export", "run/stage1", "other"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
