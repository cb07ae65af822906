"""Labelled images, in folders and in LAION's wds layout, by CLIP_benchmark's formula."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.evaluation.classification import BY_CLASS, FIRST, FIVE, measure
from stage_trainer.evaluation.sets import find_sets, known_as

from .conftest import Known, jpg, random_vector

NAMES = ["cat", "dog", "fox", "owl", "pig", "yak"]
TEMPLATES = ["a photo of a {c}.", "{c}"]
LABELS = [n % 6 for n in range(17)]


def folders(root: Path) -> Path:
    for number, label in enumerate(LABELS):
        (root / f"n{label:02}").mkdir(parents=True, exist_ok=True)
        (root / f"n{label:02}/{number}.jpg").write_bytes(jpg(number))
    return with_names(root)


def wds(root: Path) -> Path:
    """As `webdataset` writes what CLIP_benchmark reads: test/0.tar, beside the train split."""
    for split in ("test", "train"):
        (root / split).mkdir(parents=True)
        with webdataset.TarWriter(str(root / split / "0.tar")) as writer:
            for number, label in enumerate(LABELS):
                writer.write({"__key__": f"s{number:04}", "jpg": jpg(number), "cls": label})
    return with_names(root)


def with_names(root: Path) -> Path:
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "classnames.de.txt").write_text("\n".join(name.upper() for name in NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def clip_benchmark(templates: list[str], names: list[str], dim: int, order: list[int]) -> tuple[float, float, float]:
    """acc1, acc5 and mean_per_class_recall in CLIP_benchmark's own arithmetic."""

    def units(rows: torch.Tensor) -> torch.Tensor:
        return rows / rows.norm(dim=-1, keepdim=True)

    def vectors(items: list) -> torch.Tensor:
        return torch.from_numpy(np.stack([random_vector(item) for item in items]).astype("f")[:, :dim])

    classes = [units(units(vectors([t.replace("{c}", name) for t in templates])).mean(0)) for name in names]
    logits = units(vectors([jpg(n) for n in order])) @ torch.stack(classes, dim=1)
    target = torch.tensor([LABELS[n] for n in order])
    correct = logits.topk(5, dim=1).indices == target[:, None]
    recalls = [correct[target == label, 0].double().mean() for label in range(6)]
    return correct[:, 0].double().mean().item(), correct.any(1).double().mean().item(), float(np.mean(recalls))


@pytest.mark.parametrize(("layout", "order"), [(folders, sorted(range(17), key=lambda n: LABELS[n])), (wds, range(17))])
def test_classification_is_clip_benchmarks(tmp_path, layout, order):
    layout(tmp_path / "animals")
    sets = find_sets(tmp_path)
    found = measure(Known(random_vector), known_as("animals"), sets["animals"])
    for language, templates, names in (("en", TEMPLATES, NAMES), ("de", ["{c}"], [name.upper() for name in NAMES])):
        for dim in (8, 4):
            expected = clip_benchmark(templates, names, dim, list(order))
            shown = [found.figures[name][language][str(dim)] for name in (FIRST, FIVE, BY_CLASS)]
            assert shown == pytest.approx(expected, abs=1e-12)
    assert found.counts == {"images": 17, "classes": 6, "languages": 2}


def test_a_set_may_be_named_itself_and_has_its_name_alone(tmp_path):
    wds(tmp_path / "a/animals")
    assert find_sets(tmp_path / "a/animals") == {"animals": tmp_path / "a/animals"}
    wds(tmp_path / "b/animals")
    with pytest.raises(UserError, match="has animals twice"):
        find_sets(tmp_path)


def test_a_perfect_model_is_always_right(tmp_path):
    pictures = {jpg(n): label for n, label in enumerate(LABELS)}
    model = Known(lambda item: np.eye(8)[pictures[item] if isinstance(item, bytes) else NAMES.index(item[-3:].lower())])
    root = folders(tmp_path / "animals")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}")
    for rows in measure(model, known_as("animals"), root).figures.values():
        assert {value for dims in rows.values() for value in (dims["8"],)} == {1.0}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: shutil.rmtree(root / "n03"), "has 5 folders and 6 class names"),
        (lambda root: (root / "classnames.de.txt").write_text("Katze"), "different numbers of class names"),
        (lambda root: (root / "classnames.txt").write_text("cat\n\ndog"), "line 2 is empty"),
        (lambda root: (root / "zeroshot_classification_templates.txt").write_text("a photo"), "has no {c}"),
        (lambda root: [path.unlink() for path in root.rglob("*.jpg")], "class names and no images"),
    ],
)
def test_a_set_whose_parts_do_not_fit_is_refused(tmp_path, spoil, said):
    spoil(folders(tmp_path / "animals"))
    with pytest.raises(UserError, match=said):
        measure(Known(random_vector), known_as("animals"), tmp_path / "animals")


@pytest.mark.parametrize(
    ("sample", "said"), [({"cls": 9}, "is of class 9; there are 6"), ({"txt": "x"}, "expected an image")]
)
def test_a_tar_with_other_samples_is_refused(tmp_path, sample, said):
    root = wds(tmp_path / "animals")
    with webdataset.TarWriter(str(root / "test/1.tar")) as writer:
        writer.write({"__key__": "odd", "jpg": jpg(0), **sample})
    with pytest.raises(UserError, match=said):
        measure(Known(random_vector), known_as("animals"), root)


def test_the_command_prints_a_row_for_each_language(export, tmp_path, capsys):
    folders(tmp_path / "data/animals")
    words = ["--suite", "classification", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(export), str(tmp_path / "data"), *words]) == 0
    shown = capsys.readouterr().out
    assert "classification: Zero-shot classification [%]" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("animals")] == 3 * [
        ["animals,", "en"], ["animals,", "de"]
    ]  # fmt: skip


def test_the_last_images_may_look_alike(tmp_path, monkeypatch):
    """Of blank pictures, say. They are embedded apart from the others; that all are the same is asked of all."""
    folders(tmp_path / "animals")
    blank = [jpg(98), jpg(99)]
    for number, image in enumerate(blank):
        (tmp_path / f"animals/n05/9{number}.jpg").write_bytes(image)
    monkeypatch.setattr("stage_trainer.evaluation.classification._AT_ONCE", 17)
    model = Known(lambda item: random_vector("blank" if item in blank else item))
    found = measure(model, known_as("animals"), tmp_path / "animals")
    assert found.counts["images"] == 19
    with pytest.raises(UserError, match="embeddings of 19 images are all the same"):
        measure(Known(lambda item: np.ones(8)), known_as("animals"), tmp_path / "animals")
