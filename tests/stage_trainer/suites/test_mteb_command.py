"""`stage-trainer mteb`, on copies of hub repositories that are made here, and with what users and disks do to it."""

import io
import json
import shutil
from pathlib import Path

import mteb
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from safetensors.torch import load_file, save_file
from stage_trainer.cli import main
from stage_trainer.evaluation import cross_modal, mteb_model, mteb_run
from stage_trainer.evaluation.models import Asked, Ours
from stage_trainer.evaluation.sets import find_sets, known_as
from vision_tower import load_image

from .conftest import Known, evalset, jpg, random_vector

WORDS = ["Flickr", "sentence", "COCO", "again", "query", "title", "text", "1", "2", "3", "4", "5", "6", "7"]
XM = {"bn": 1, "de": 3}  # captions of an image
TASKS = ("XM3600T2IRetrieval", "XM3600I2TRetrieval")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` keeps of the folders that it reads, apart from the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def png(number: int) -> bytes:
    """mteb writes this task's pictures anew while it loads them, each in its own format: a JPEG loses by that."""
    buffer = io.BytesIO()
    load_image(jpg(number)).save(buffer, "png")
    return buffer.getvalue()


def caption(language: str, image: int, number: int) -> str:
    draw = np.random.default_rng((len(language) + ord(language[0]), image, number))
    return " ".join(draw.choice(WORDS, 6))


@pytest.fixture(scope="module")
def xm3600(tmp_path_factory) -> tuple[Path, Path]:
    """Crossmodal-3600 in miniature: Google's files, brought in by `data-prep evalset`, and mteb's repository."""
    root = tmp_path_factory.mktemp("xm3600")
    (root / "images").mkdir()
    keys = [f"{n:016x}" for n in range(24)]
    texts = {language: [[caption(language, n, k) for k in range(of)] for n in range(24)] for language, of in XM.items()}
    for number, key in enumerate(keys):
        (root / f"images/{key}.jpg").write_bytes(png(number))
    lines = [
        {"image/key": key, "image/locale": "en", **{code: {"caption": texts[code][n]} for code in XM}}
        for n, key in enumerate(keys)
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evalset("xm3600", root / "captions.jsonl", root / "images", "--out", root / "eval")
    several = Sequence(Value("string"))
    form = Features({
        "image_id": Value("string"), "image_locale": Value("string"), "captions": several,
        "captions_tokenized": several, "captions_tokenized_lowercase": several, "image": Image(),
    })  # fmt: skip
    for task in TASKS:
        for code, of in texts.items():
            rows = {
                "image_id": keys, "image_locale": ["en"] * 24, "captions": of, "captions_tokenized": of,
                "captions_tokenized_lowercase": of, "image": [{"bytes": png(n), "path": None} for n in range(24)],
            }  # fmt: skip
            Dataset.from_dict(rows, form).to_parquet(root / f"hub/{task}/data/{code}-00000-of-00001.parquet")
        splits = "".join(f"  - split: {code}\n    path: data/{code}-*\n" for code in XM)
        (root / f"hub/{task}/README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n"
        )
    return root / "eval", root / "hub"


def sts(folder: Path, scores: list[float]) -> Path:
    """mteb's STSBenchmark in miniature, below `folder`."""
    (folder / "STSBenchmark").mkdir(parents=True, exist_ok=True)
    files = "- config_name: default\n  data_files:\n  - split: test\n    path: test.jsonl\n"
    (folder / "STSBenchmark/README.md").write_text(f"---\nconfigs:\n{files}---\n")
    pairs = [
        {"sentence1": caption("a", n, 0), "sentence2": caption("b", n, 1), "score": score}
        for n, score in enumerate(scores)
    ]
    (folder / "STSBenchmark/test.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def run(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["mteb", *map(str, words)])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return status, shown.out, shown.err


def kept(out: Path, task: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.rglob(f"{task}.json"))]


def test_bengali_has_one_caption_an_image_so_mtebs_hits_are_the_papers_recall(xm3600, export, tmp_path, capsys):
    ours, hub = xm3600
    folder = find_sets(ours)["Crossmodal-3600"]
    figures = cross_modal.measure(Ours(export, "small", Asked()), known_as("Crossmodal-3600"), folder).figures
    words = [f"{task}:bn,de" for task in TASKS]
    status, out, _ = run(capsys, export, *words, "--data", hub, "--out", tmp_path, "--dim", 8)
    assert status == 0
    assert "at dim 8, max_length 512, instruction of queries none" in out
    for task, name in zip(TASKS, (cross_modal.TEXT_TO_IMAGE, cross_modal.IMAGE_TO_TEXT), strict=True):
        (found,) = kept(tmp_path, task)
        hits = {of["hf_subset"]: of["hit_rate_at_5"] for of in found["scores"]["test"]}
        assert hits["bn"] == round(figures[name]["bn"]["8"], 5)
        assert 0.05 < hits["bn"] < 0.95
        # Elsewhere mteb asks by all captions, the paper by the first of each image.
        assert hits["de"] != round(figures[name]["de"]["8"], 5)
        assert f"hit_rate_at_5  {100 * np.mean(list(hits.values())):.3f}        2\n" in out


def test_a_part_of_what_is_kept_is_shown_as_that_part(xm3600, export, tmp_path, capsys):
    shown = {}
    for subsets in ("bn,de", "bn"):
        words = (f"{TASKS[0]}:{subsets}", "--data", xm3600[1], "--out", tmp_path)
        status, shown[subsets], error = run(capsys, export, *words)
        assert status == 0
        assert ("measuring" in error) == (subsets == "bn,de")
    by_language = {of["hf_subset"]: of["hit_rate_at_5"] for of in kept(tmp_path, TASKS[0])[0]["scores"]["test"]}
    assert f"hit_rate_at_5  {100 * by_language['bn']:.3f}\n" in shown["bn"]
    assert by_language["bn"] != by_language["de"]


def test_other_weights_under_the_same_name_and_other_data_are_measured_again(export, tmp_path, capsys):
    model = shutil.copytree(export, tmp_path / "model")
    data = sts(tmp_path / "data", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    words = ("STSBenchmark", "--data", data, "--out", tmp_path / "out")
    first, again = run(capsys, model, *words), run(capsys, model, *words)
    assert "measuring" in first[2]
    assert "measuring" not in again[2]
    assert first[1] == again[1]
    weights = next(path for path in model.rglob("*.safetensors"))
    save_file({name: tensor.neg() + 0.3 for name, tensor in load_file(weights).items()}, weights)
    other = run(capsys, model, *words)
    assert "measuring" in other[2]
    assert len(kept(tmp_path / "out", "STSBenchmark")) == 2
    assert other[1] != first[1]
    sts(data, [5.0, 1.0, 4.0, 0.0, 2.0, 3.0])
    changed = run(capsys, model, *words)
    assert "is of other data (local-" in changed[2]
    assert changed[1].splitlines()[1] != other[1].splitlines()[1]


def test_an_interrupted_evaluation_goes_on_with_what_is_missing(xm3600, tmp_path):
    def measure(out, break_at=None):
        known = Known(random_vector, (8,))
        if break_at:
            known.vector = lambda item: random_vector(item) if known.calls < break_at else (_ for _ in ()).throw(stop)
        task = mteb_run.asked_tasks([f"{TASKS[0]}:bn,de"], xm3600[1])[0]
        result = mteb_run.measure(mteb_model.load(known), task, mteb.ResultCache(out), said.append)
        return {of["hf_subset"]: of["ndcg_at_10"] for of in result.scores["test"]}, known.calls

    said, stop = [], KeyboardInterrupt()
    whole, calls = measure(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "out", break_at=calls // 2 + 1)
    rest, of_rest = measure(tmp_path / "out")
    assert rest == whole
    assert 0 < of_rest < calls, "the first language should be kept"
    assert measure(tmp_path / "out")[1] == 0
    path = next((tmp_path / "out").rglob(f"{TASKS[0]}.json"))
    path.write_bytes(path.read_bytes()[:300])  # as a full disk or a kill leaves it
    (path.parent / "run_settings.jsonl").write_text('{"task": "XM36')
    said.clear()
    assert measure(tmp_path / "out") == (whole, calls)
    assert f"{path} is damaged" in said[0]


def beir(folder: Path, shift: int) -> None:
    """A text set as mteb's repositories have it."""
    folder.mkdir(parents=True)
    rows = {
        "corpus": [{"_id": f"d{n}", "title": "", "text": caption("d", n, shift)} for n in range(20)],
        "queries": [{"_id": f"q{n}", "text": caption("q", n, shift)} for n in range(3)],
        "qrels": [{"query-id": f"q{n}", "corpus-id": f"d{(n + shift) % 20}", "score": 1} for n in range(3)],
    }
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)))
    configs = "".join(
        f"- config_name: {'default' if name == 'qrels' else name}\n  data_files:\n"
        f"  - split: {'test' if name == 'qrels' else name}\n    path: {name}.jsonl\n"
        for name in rows
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.mark.full
def test_a_task_of_twelve_sets_is_their_mean_and_missing_without_one_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    parts = [part.metadata.name for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks]
    for number, part in enumerate(parts):
        beir(tmp_path / "data" / part, number)
    model, cache, said = mteb_model.load(Known(random_vector, (8,))), mteb.ResultCache(tmp_path / "out"), []

    def measure():
        (task,) = mteb_run.asked_tasks(["CQADupstackRetrieval"], tmp_path / "data")
        return mteb_run.scores_of(task, mteb_run.measure(model, task, cache, said.append))["ndcg_at_10"][0]

    def mean():
        return np.mean([kept(tmp_path / "out", part)[0]["scores"]["test"][0]["ndcg_at_10"] for part in parts])

    first = measure()
    assert len(parts) == 12
    assert first == pytest.approx(mean(), abs=1e-12)
    shutil.rmtree(tmp_path / "data" / parts[0])
    beir(tmp_path / "data" / parts[0], 15)
    assert measure() == pytest.approx(mean(), abs=1e-12)
    assert mean() != first
    shutil.rmtree(tmp_path / "data" / parts[5])
    with pytest.raises(mteb_run.Missing, match=f"{parts[5]}: its data, mteb/cqadupstack-"):
        measure()
    assert all(
        part.metadata.dataset["path"].startswith("mteb/") for part in mteb.get_task("CQADupstackRetrieval").tasks
    )


def test_a_task_without_its_data_is_named_after_the_others_are_measured(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    data = sts(tmp_path / "data", [0.0, 1.0, 2.0, 3.0])
    (data / "SICK-R").mkdir()
    status, out, error = run(
        capsys, export, "SICK-R", "BIOSSES", "STSBenchmark", "--data", data, "--out", tmp_path / "out"
    )
    assert status == 2
    assert "STSBenchmark  cosine_spearman" in out
    assert f"SICK-R: its data, {data / 'SICK-R'} at local-" in error
    assert "BIOSSES: its data, mteb/biosses-sts at d3fb88f8f02e40887cd149695127462bbcf29b4a, cannot be had" in error
    assert "hf download --repo-type dataset mteb/biosses-sts" in error


def test_what_cannot_be_meant_is_refused_before_the_model_is_loaded(export, tmp_path, capsys):
    for words, message in {
        (tmp_path / "none", "STSBenchmark"): "there is no",
        (export, "STSBenchmark", "--data", tmp_path / "none"): "there is no such folder",
        (export, "STSBenchmark", "--max-length", "1"): "--max-length is 1; expected a whole number from 2",
        (export, "NoSuchTask"): "has no task or benchmark 'NoSuchTask'",
        (export, "STSBenchmark", "--dim", "5"): "has no dim 5; it has 16, 8",
    }.items():
        status, _, error = run(capsys, *words, "--out", tmp_path / "out")
        assert status == 2
        assert message in error
    assert not (tmp_path / "out").exists()


def test_without_mteb_the_way_to_install_it_is_said(export, monkeypatch, capsys):
    monkeypatch.setattr("stage_trainer.commands.mteb.find_spec", lambda name: None)
    status, _, error = run(capsys, export, "STSBenchmark")
    assert status == 2
    assert "mteb is not installed: pip install './packages/stage-trainer[mteb]'" in error
