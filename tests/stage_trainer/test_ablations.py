"""The ablations' logic on made data: statistics, resuming, pages; and all of it in miniature."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_trainer.recipe.read import load

FOLDER = Path(__file__).parents[2] / "packages" / "stage-trainer" / "benchmarks"
ROOT = FOLDER.parents[2]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def measured(items, mark="m"):
    from ablation_measure import Measured

    return Measured(mark, items, {"gap": 0.5}, {"temperature/text": [(0, 0.07), (5, 0.06)]})


def test_a_difference_that_every_item_has_is_found_and_chance_is_not():
    from ablation_report import paired

    rng = np.random.default_rng(1)
    low, high, p = paired(rng.normal(5, 5, 200))
    assert low > 3
    assert high < 7
    assert p < 0.001
    low, high, p = paired(rng.normal(0, 5, 200))
    assert low < 0 < high
    assert p > 0.05
    assert paired(np.zeros(10)) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("seeds", "gain", "verdict"),
    [(3, 0.1, "shows"), (3, -0.1, "the opposite shows"), (3, 0.0, "does not show"), (1, 0.1, "a tendency")],
)
def test_a_finding_shows_only_with_three_seeds_and_a_sure_difference(seeds, gain, verdict):
    from ablation_report import Question, answer

    rng = np.random.default_rng(0)
    worse = {seed: rng.uniform(0.3, 0.5, 240) for seed in range(seeds)}
    found = {
        seed: {
            "a/1": measured({"m, 128": of + gain + rng.normal(0, 0.02, 240), "m, 8": of}),
            "b/1": measured({"m, 128": of}),
        }
        for seed, of in worse.items()
    }
    assert answer(found, Question("f", "m", "a/1", "b/1"), 10).verdict == verdict
    assert answer(found, Question("f", "m", "a/1@8", "b/1"), 10).difference == 0
    assert answer(found, Question("f", "m", "a/1", "c/1"), 10) is None


def test_one_seed_that_disagrees_keeps_a_finding_from_showing():
    from ablation_report import Question, answer

    gains = (0.3, 0.3, -0.1)
    found = {
        seed: {"a/1": measured({"m, 8": np.full(50, 0.5 + gain)}), "b/1": measured({"m, 8": np.full(50, 0.5)})}
        for seed, gain in enumerate(gains)
    }
    assert answer(found, Question("f", "m", "a/1", "b/1"), 1).verdict == "does not show"


def test_what_was_not_measured_is_named_and_the_rest_is_written(tmp_path):
    from ablation_report import TEXTS, TO_IMAGES, report

    rng = np.random.default_rng(0)
    found = {0: {f"multi-task/{stage}": measured({f"{name}, 128": rng.uniform(size=30) for name in (TO_IMAGES, TEXTS)})
                 for stage in (1, 2)}}  # fmt: skip
    given = report(found, tmp_path / "ablations", tmp_path)
    assert {a["finding"] for a in given["answers"]} == {"stages: 2 adds to 1"}
    assert "resolution: 384 above 224" in given["not_measured"]
    assert "Not measured: " in (tmp_path / "ablations.md").read_text()
    assert (tmp_path / "ablations.csv").read_text().count("\n") == 1 + len(given["answers"])
    assert (tmp_path / "ablations-stages.png").exists()
    assert not (tmp_path / "ablations-resolution.png").exists()
    json.dumps(given, allow_nan=False)


def test_what_is_measured_is_read_back_and_not_trained_again(tmp_path, monkeypatch):
    import ablations

    job = ablations.Job(ablations.Run("multi-task", 1, ("steps=3",)), tmp_path, tmp_path, 0, True)
    trained = []

    def train(command, **options):
        trained.append(command)

    monkeypatch.setattr(ablations.subprocess, "run", train)
    monkeypatch.setattr(ablations, "measure", lambda *given: measured({"m, 8": np.arange(3.0)}, mark=given[-1]))
    assert job.kept() is None
    job.trained_and_measured()
    assert len(trained) == 1
    found = job.kept()
    assert found.items["m, 8"].tolist() == [0, 1, 2]
    assert found.curves == {"temperature/text": [[0, 0.07], [5, 0.06]]}
    assert replace(job, run=replace(job.run, overrides=("steps=4",))).kept() is None  # other settings, other figures
    assert replace(job, seed=1).kept() is None


@pytest.mark.parametrize("small", [False, True])
def test_every_run_is_a_recipe_that_passes_its_checks(small):
    from ablations import runs_of

    for scale in (0.1, 1.0):
        for run in runs_of(scale, small):
            file = ROOT / "launch/recipes" / ("drawn.yaml" if small else "laptop.yaml")
            load(file, run.overrides, stage=run.stage)


def test_items_have_the_figures_of_evaluate():
    """Where every image has one text in each language, and no two are the same, means over items are evaluate's."""
    from ablation_measure import of_pool
    from stage_trainer.evaluation import retrieval

    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(12, 8)), rng.normal(size=(24, 8))
    names = {language: [(i, f"{language}{i}") for i in range(12)] for language in ("en", "de")}
    pool = retrieval.Pool("made", [b""] * 12, names)
    embedded = retrieval.EmbeddedPool(images, texts, {text: i for i, text in enumerate(pool.all_texts())})
    recalls, _ = retrieval.score(pool, embedded, [8, 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ablation_measure.embed", lambda model, pool: embedded)
        to_images, to_texts = of_pool(None, pool, [8, 4], {})
    for dim in (8, 4):
        assert to_images[dim].mean() == pytest.approx(recalls["text→image"][str(dim)]["mean"])
        assert to_texts[dim].mean() == pytest.approx(recalls["image→text"][str(dim)]["mean"])


def test_held_out_pages_share_no_figure_and_are_in_languages_that_the_font_writes():
    import random

    from ablation_pages import FIGURES, drawn_pages
    from PIL import Image

    red = Image.new("RGB", (44, 44), "red")
    emoji = [(red, {"en": f"thing {i}"}) for i in range(9)]
    content = {"query": [{"language": "en", "text": "A title. What it says."}, {"language": "ja", "text": "題"}],
               "target": [{"language": "en", "text": "body"}, {"language": "ja", "text": "本文"}]}  # fmt: skip
    helps = [{"json": json.dumps(content).replace("A title", f"Title {i}").encode()} for i in range(5)]
    pages = list(drawn_pages(helps, emoji, 5, random.Random(0), once=True))
    assert len(pages) == 2  # nine emoji are enough for two pages of four
    names = [of["en"] for page in pages for _, of in page.figures]
    assert len(set(names)) == 2 * FIGURES
    assert {page.language for page in pages} == {"en"}  # no font here writes Japanese


@pytest.mark.full
def test_the_ablations_run_in_miniature_and_go_on(tmp_path):
    corpus, results = tmp_path / "corpus", tmp_path / "results" / "ablations.json"
    subprocess.run(
        [Path(sys.executable).with_name("data-prep"), "corpus", str(corpus), "--drawn"], check=True, capture_output=True
    )
    script = [sys.executable, str(FOLDER / "ablations.py"), "--small", "--corpus", str(corpus), "--seeds", "1"]
    more = ["--steps-scale", "0.01", "--out", str(tmp_path / "runs"), "--results", str(results)]
    outputs = [subprocess.run([*script, *more], capture_output=True, text=True, timeout=900) for _ in range(2)]
    assert outputs[0].returncode == 0, outputs[0].stderr[-3000:]
    assert "seed 0: frozen-text, stage 2" in outputs[0].stdout
    assert outputs[1].returncode == 0
    assert "seed 0:" not in outputs[1].stdout  # all of it is there
    content = json.loads(results.read_text())
    assert set(content["results"]["means"]["0"]) >= {"multi-task/3", "unified/1", "frozen-image/2"}
