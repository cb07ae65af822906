"""`stage-trainer demo`: what its search finds, what it refuses, and the page itself over HTTP and in a browser."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from data_prep.shards import DatasetWriter
from PIL import Image
from stage_trainer.cli import main
from stage_trainer.errors import UserError
from stage_trainer.pages import collection
from stage_trainer.pages.collection import open_collection
from stage_trainer.pages.demo import Searcher, cards
from vision_tower import ImageError

ROOT = Path(__file__).parents[2]
COLORS = ("red", "blue", "green", "yellow", "black")
# A shell starts what it runs in the background deaf to SIGINT, and its children inherit that; the test sends it.
signal.signal(signal.SIGINT, signal.default_int_handler)
LINES = ["a red disk", "ein roter Kreis", "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def model(reader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mine"
    reader.save_pretrained(folder)
    return folder


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of images, one of them none, and a text file."""
    folder = tmp_path / "mixed"
    (folder / "images").mkdir(parents=True)
    for number, color in enumerate(COLORS):
        picture = Image.new("RGB", (24, 20), "white")
        picture.paste(color, (number, number, number + 12, number + 9))
        picture.save(folder / f"images/{color}.png")
    (folder / "images/broken.png").write_bytes(b"no picture")
    (folder / "texts.txt").write_text("\n".join([*LINES, LINES[0]]) + "\n")
    return folder


def searcher_of(reader, model, folder: Path, index: Path, said: list[str] | None = None) -> Searcher:
    data = [folder / "images", folder / "texts.txt"]
    found = open_collection(model, data, index, {"max_pixels": 10**6}, "cpu", (said if said is not None else []).append)
    return Searcher(reader, found, 10**6)


def test_it_finds_what_the_vectors_say_at_any_dim(reader, model, mixed, tmp_path):
    searcher = searcher_of(reader, model, mixed, tmp_path / "index")
    assert [name.partition("broken.png")[1] for name, _ in searcher.collection.left_out] == ["broken.png"]
    files = sorted(p for p in (mixed / "images").iterdir() if p.stem != "broken")
    vectors = np.asarray(reader.encode([*files, *({"text": line} for line in LINES)]))
    names = [*map(str, files), *LINES]
    for dim in (1, 5, 16):
        for kind, part in (("images", slice(0, 5)), ("texts", slice(5, 8)), ("images and texts", slice(0, 8))):
            query = reader.encode_text(["ein Kreis"], truncate_dim=dim)[0]
            cut = vectors[part, :dim] / np.linalg.norm(vectors[part, :dim], axis=1, keepdims=True)
            scores = dict(zip(names[part], cut @ query, strict=True))
            hits = searcher.search("ein Kreis", None, dim, kind, 60)
            found = {str(hit.entry.value): hit.score for hit in hits}
            assert found == pytest.approx(scores, abs=1e-5)
            assert sorted(found.values(), reverse=True) == list(found.values())
            assert searcher.search("ein Kreis", None, dim, kind, 2) == hits[:2]
    for file in files:
        (first, *_) = searcher.search("", str(file), 16, "images", 3)
        assert first.entry.value == str(file)
        assert first.score == pytest.approx(1, abs=1e-5)


def test_the_index_is_made_once_and_anew_when_something_changed(reader, model, mixed, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(collection, "run", lambda job, say, run=collection.run: runs.append(job) or run(job, say))
    first = searcher_of(reader, model, mixed, tmp_path / "index")
    said: list[str] = []
    second = searcher_of(reader, model, mixed, tmp_path / "index", said)
    assert len(runs) == 1
    assert said[0].startswith("the index is there")
    assert second.collection.left_out == first.collection.left_out
    np.testing.assert_array_equal(first.collection.vectors, second.collection.vectors)
    Image.new("RGB", (9, 9), "brown").save(mixed / "images/broken.png")
    assert not searcher_of(reader, model, mixed, tmp_path / "index").collection.left_out
    assert len(runs) == 2
    for file in (tmp_path / "index").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="remove it, and it is made anew"):
        searcher_of(reader, model, mixed, tmp_path / "index")


def test_what_two_data_sets_share_is_found_once(reader, model, png, tmp_path):
    other = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(other, "png")
    for kind, files in (("image-short", [png]), ("image-long", [png, other.getvalue()])):
        captions = {"captions": [{"text": "a red disk", "language": "en", "role": "name"}]}
        with DatasetWriter(tmp_path / "corpus/test" / kind / "x", kind=kind, source="x") as writer:
            for number, file in enumerate(files):
                members = {"png": file, "json": json.dumps(captions).encode()}
                writer.write(f"s{number}", members, languages=["en"], tokens=5 if kind == "image-long" else None)
    found = open_collection(model, [tmp_path / "corpus"], tmp_path / "index", {}, "cpu", print)
    assert [entry.kind for entry in found.entries] == ["image", "text", "image"]
    hits = Searcher(reader, found, 10**6).search("a red disk", None, 16, "images and texts", 9)
    assert hits[0].entry.value == "a red disk"
    assert cards(hits, "x").count('<img src="data:image/jpeg;base64,') == 2


def test_what_cannot_be_asked_is_refused(reader, model, mixed, tmp_path):
    searcher = searcher_of(reader, model, mixed, tmp_path / "index")
    good = {"text": "a", "image": None, "dim": 16, "what": "images", "most": 3}
    for wrong, said in [
        ({"text": "  "}, "write some words"), ({"dim": 0}, "the dim is 0"), ({"dim": 17}, "1 to 16"),
        ({"dim": 1.5}, "the dim is 1.5"), ({"most": 0}, "1 to 60"), ({"what": "sounds"}, "'images' or 'texts'"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            searcher.search(**{**good, **wrong})
    with pytest.raises(ImageError, match="the image"):
        searcher.search(**{**good, "image": str(mixed / "images/broken.png")})
    with pytest.raises(ImageError, match="more than the 100 allowed"):
        Searcher(reader, searcher.collection, 100).search(**{**good, "image": str(mixed / "images/red.png")})


def test_a_page_shows_letters_and_no_markup(reader, model, mixed, tmp_path):
    searcher = searcher_of(reader, model, mixed, tmp_path / "index")
    shown = cards(searcher.search("x", None, 16, "images and texts", 60), "<b>")
    assert "<script" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "nearest to &lt;b&gt;" in shown
    (mixed / "images/red.png").unlink()
    assert "No such file" in cards(searcher.search("x", None, 16, "images", 60), "x")


def refusal(capsys, *words: object) -> str:
    assert main(["demo", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_said(reader, model, mixed, tmp_path, monkeypatch, capsys):
    index = ("--index", tmp_path / "index")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used: another program" in refusal(
            capsys, model, mixed, *index, "--port", port
        )
    free = (*index, "--port", port)
    reader.text.save_pretrained(tmp_path / "text-alone")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "the demo needs gradio 6" in refusal(capsys, model, mixed, *free)
    monkeypatch.setitem(sys.modules, "gradio", sys)  # so that it comes further
    assert "a model of two towers" in refusal(capsys, tmp_path / "text-alone", mixed, *free)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(capsys, model, tmp_path / "empty", *free)
    (tmp_path / "empty.txt").write_text("")
    assert "the collection is empty" in refusal(capsys, model, tmp_path / "empty.txt", *free)
    (tmp_path / "bad").mkdir()
    for name in "ab":
        (tmp_path / f"bad/{name}.png").write_bytes(b"no picture")
    said = refusal(capsys, model, tmp_path / "bad", *free)
    assert "none of the 2 images and texts can be used, the first one because: " in said
    assert re.search(r"\S+\.skipped\.jsonl lists them all", said)


# The page itself. Gradio is no part of the test environment: launch/demo.sh fetches it.

CLIENT = """
import json, sys
from gradio_client import Client, handle_file
url, red, broken = sys.argv[1:]
client = Client(url, verbose=False)
found = {}
for name, query in {"text": ("ein roter Kreis", None, 16, "images", 3), "image": ("", handle_file(red), 8, "images", 9),
                    "both": ("a red disk", None, 16, "images and texts", 60), "nothing": ("", None, 16, "images", 3),
                    "broken": ("", handle_file(broken), 16, "images", 3)}.items():
    try:
        found[name] = client.predict(*query, api_name="/search")[1]
    except Exception as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def asked_by_hand(url: str, path: Path) -> str:
    """What the page answers to a search by a file of its machine that nobody has uploaded."""
    body = json.dumps({"data": ["", {"path": str(path), "meta": {"_type": "gradio.FileData"}}, 16, "images", 3]})
    asked = urllib.request.Request(f"{url}gradio_api/call/search", body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/search/{event}") as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def launched(model, tmp_path_factory):
    """Starts launch/demo.sh on a folder; gives its address."""
    ready = subprocess.run(["bash", "launch/demo.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    if ready.returncode:
        pytest.skip(f"gradio cannot be installed here: {ready.stderr[-300:]}")
    assert "usage: stage-trainer demo" in ready.stdout
    processes = []

    def start(*data: Path) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        index = tmp_path_factory.mktemp("index")
        words = ["bash", "launch/demo.sh", model, *data, "--port", str(port), "--index", index, "--device", "cpu"]
        processes.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        line = processes[-1].stdout.readline()
        assert re.fullmatch(r"open http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line), line
        return line.split()[1]

    yield start
    for process in processes:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(120) == 0, "Ctrl-C ends it without a complaint"
        finally:
            process.kill()


@pytest.mark.full
def test_the_page_answers_a_client_and_a_browser(launched, reader, model, mixed, tmp_path):
    url = launched(mixed / "images", mixed / "texts.txt")
    words = [sys.executable, "-c", CLIENT, url, mixed / "images/red.png", mixed / "images/broken.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".venv/demo")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = searcher_of(reader, model, mixed, tmp_path / "index")
    for name, query in {"text": ("ein roter Kreis", None, 16, "images", 3),
                        "both": ("a red disk", None, 16, "images and texts", 60)}.items():  # fmt: skip
        hits = ours.search(*query)
        assert [each["id"] for each in found[name]] == [hit.entry.id for hit in hits]
        assert [each["score"] for each in found[name]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    assert found["image"][0]["label"].endswith("red.png")
    assert "write some words" in found["nothing"]
    assert found["broken"].startswith("the image cannot be decoded")
    assert asked_by_hand(url, mixed / "images/red.png").startswith("event: error")

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium here to open the page with (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for width, scheme in ((400, "dark"), (1400, "light")):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            tab.on("console", lambda message, said=said: said.append(message.text) if message.type == "error" else 0)
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on("request", lambda asked, said=said: said.append(asked.url) if not asked.url.startswith(url) else 0)
            tab.goto(url)
            tab.get_by_label("Text", exact=True).fill("ein roter Kreis")
            tab.get_by_label("images and texts").check()
            tab.get_by_role("button", name="Search", exact=True).click()
            tab.wait_for_selector(".hit", timeout=120_000)
            assert tab.locator(".hit").count() == 8
            assert tab.locator(".hit img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")
            assert tab.locator(".nearest").inner_text() == "nearest to “ein roter Kreis”"
            tab.locator("input[type=file]").set_input_files(mixed / "images/blue.png")
            tab.get_by_text("nearest to the image").wait_for(timeout=120_000)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert [what for what in said if not what.startswith("data:")] == []
        browser.close()
