"""Training on shards that the recipe names one by one: killed, and gone on with on another number of ranks."""

import os
import shutil
import signal

import pytest
import webdataset

SHARDS = 5


@pytest.fixture
def plain(copy_of_corpus):
    """The drawn corpus' images, as someone else's shards, without a manifest."""
    (directory,) = (copy_of_corpus / "train/image-short").iterdir()
    (copy_of_corpus / "train/plain").mkdir()
    samples = list(webdataset.WebDataset([str(path) for path in sorted(directory.glob("*.tar"))], shardshuffle=False))
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(copy_of_corpus / f"train/plain/{shard:02d}.tar")) as tar:
            for sample in samples[shard::SHARDS]:
                tar.write({name: sample[name] for name in sample if name == "__key__" or not name.startswith("__")})
    return copy_of_corpus


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)])
def test_a_killed_run_goes_on_alike(train, start, scalars, tmp_path, plain, ranks):
    options = (
        f"corpus={plain}", 'data.image_text=[{path: "plain/{00..04}.tar", shuffle_buffer: 16}]', "steps=12",
        "warmup_steps=2", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]", "checkpoint={every: 4, keep: 3}",
        "workers=1", "batch={image_text: 46, text: 50}",
    )  # fmt: skip
    train(1, *options, output="straight")
    process = start(1, *options, output="killed")
    while not list((tmp_path / "killed/stage1").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for later in sorted((tmp_path / "killed/stage1").glob("step-*"))[1:]:
        shutil.rmtree(later)
    train(1, *options, output="killed", ranks=ranks)
    for tag in ("loss/text", "loss/image_text"):
        straight, killed = (scalars(f"{run}/stage1", tag) for run in ("straight", "killed"))
        assert killed == pytest.approx(straight, rel=1e-5)
