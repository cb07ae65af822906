"""Training on data behind a URL, as a user runs it: the corpus served on loopback, real processes, real DeepSpeed."""

import collections
import contextlib
import functools
import http.server
import shutil
import threading

import pytest
from data_prep.shards import Dataset, DatasetWriter
from safetensors.torch import load_file

QUICK = (
    "steps=6", "warmup_steps=2", "evaluation={every: 6, pools: [image-short/drawn]}", "log_every=1",
    "resolution=[[0, 32]]", "checkpoint={every: 3, keep: 2}",
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path, drawn_corpus):
    """The drawn corpus in shards of 25."""
    for kind in ("image-short", "text-pairs"):
        whole = Dataset.open(drawn_corpus / "train" / kind / "drawn")
        target = tmp_path / "corpus/train" / kind / "drawn"
        with DatasetWriter(target, kind=kind, source="drawn", samples_per_shard=25) as writer:
            for index in range(len(whole)):
                row = whole.row(index)
                writer.write(row.key, whole.read(index), languages=row.languages, tokens=row.tokens)
    shutil.copytree(drawn_corpus / "validation", tmp_path / "corpus/validation")
    return tmp_path / "corpus"


@pytest.fixture
def served(corpus):
    """(URL, requests by path) of the corpus."""
    requests = collections.Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests[self.path] += 1
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(corpus)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server):
        server.close = lambda: (server.shutdown(), server.server_close())
        yield f"http://127.0.0.1:{server.server_port}", requests


def weights(stage):
    last = max(stage.glob("step-*"))
    return {f"{f.relative_to(last)}:{k}": v for f in last.rglob("*.safetensors") for k, v in load_file(f).items()}


def equal(one, two):
    return one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_url_trains_to_the_bits_of_its_folder(train, scalars, corpus, served, tmp_path, ranks):
    """Ranks of two workers, the server seeing each file once; a run begun on the folder goes on with the URL."""
    url, requests = served
    elsewhere = (f"corpus={url}", f"remote.cache={tmp_path}/cache", "workers=2")
    by_path = f"data.text=[{{path: '{url}/train/text-pairs/drawn?signed=1'}}]"
    train(1, *QUICK, f"corpus={corpus}", ranks=ranks, output="folder")
    folder = weights(tmp_path / "folder/stage1")
    train(1, *QUICK, *elsewhere, ranks=ranks, output="url")
    for tag in ("loss/text", "loss/image_text", "temperature/text"):
        assert scalars("url/stage1", tag) == scalars("folder/stage1", tag)
        assert len(scalars("url/stage1", tag)) == 6
    recall = [tag for tag in scalars("folder/stage1") if tag.startswith("validation_recall")]
    assert recall
    assert all(scalars("url/stage1", tag) == scalars("folder/stage1", tag) for tag in recall)
    assert equal(weights(tmp_path / "url/stage1"), folder)
    files = {name: n for name, n in requests.items() if not name.endswith("manifest.json")}
    train_data = sum(
        p.stat().st_size for kind in ("image-short", "text-pairs") for p in (corpus / "train" / kind).rglob("*")
    )
    assert 0 < max(scalars("url/stage1", "fetched_gigabytes/machine 0").values()) <= train_data / 1e9
    assert not [tag for tag in scalars("folder/stage1") if tag.startswith("fetched")]
    assert len(files) > 20
    assert set(files.values()) == {1}

    shutil.rmtree(max((tmp_path / "folder/stage1").glob("step-*")))
    train(1, *QUICK, *elsewhere, by_path, ranks=ranks, output="folder")
    assert not [p for p in (tmp_path / "folder").rglob("state.json") if "signed=1" in p.read_text()]
    assert equal(weights(tmp_path / "folder/stage1"), folder)
