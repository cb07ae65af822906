"""One process of a machine looks at the files of a run's data sets: few before the first step, many beside training."""

import threading

import pytest
from data_prep.shards import Dataset, DatasetWriter
from stage_trainer.data import file_checks
from stage_trainer.data.file_checks import FileChecks
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.tasks import make_task


@pytest.fixture
def directory(tmp_path):
    """Ten shards of one pair."""
    made = tmp_path / "train/text-pairs/made"
    with DatasetWriter(made, kind="text-pairs", source="made", samples_per_shard=1) as writer:
        side = b'[{"text": "a", "language": "en"}]'
        for number in range(10):
            writer.write(f"k{number}", {"json": b'{"query": %b, "target": %b}' % (side, side)}, languages=[], tokens=2)
    return made


@pytest.fixture
def batches(tmp_path, recipes):
    def execute(rank=0, world=1):
        stage = ["data={text: [{path: text-pairs/made}]}", "batch={image_text: 0, text: 4}"]
        recipe = load(recipes / "drawn.yaml", [f"corpus={tmp_path}", *stage], 1).recipe
        return make_task(recipe, 1).make_batches(lambda texts, max_length: [[0, 1, 2] for _ in texts], rank, world)

    return execute


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(file_checks, "AT_ONCE", 9)


def checked():
    """Returns once no thread looks at files."""
    for thread in threading.enumerate():
        if thread.name == "file checks":
            thread.join()


@pytest.mark.parametrize("name", ["00007.tar", "00007.index.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_few_files_are_looked_at_before_the_first_step(directory, batches, name, damage):
    path = directory / name
    raw = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"{name}: (missing, though the manifest lists it|has [0-9]+ bytes)"):
        batches()


def test_many_files_are_looked_at_while_training_begins_and_end_it(directory, batches, many):
    sound = batches()
    checked()
    assert sound[0]
    (directory / "00007.index.npy").unlink()
    made = batches()  # nothing is asked for before
    checked()
    with pytest.raises(UserError, match=r"00007\.index\.npy: missing, though the manifest lists it"):
        made.joined(0, [])


@pytest.mark.parametrize("number", [4, 12])
def test_other_ranks_of_the_machine_look_at_no_file(directory, monkeypatch, many, number):
    looked = []
    monkeypatch.setattr(Dataset, "check", lambda data: looked.append(data))
    data = [Dataset.open(directory, check=False)] * (number // 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    FileChecks(data).raise_fault()
    assert looked == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    FileChecks(data)
    checked()
    assert looked == data
