"""One `encode` for texts and images of any kind: the towers' rows, in the order of the list."""

import base64
import contextlib
import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.encoding.fetch import UrlLimits
from stage_trainer.errors import UserError
from vision_tower import ImageError


@pytest.fixture
def model(reader):
    return reader


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture
def data(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def serve():
    """Starts a server on loopback: `serve({path: what})`, bytes or a function of the handler; its URL."""
    servers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def __init__(self, answers, *rest):
            self.answers = answers
            super().__init__(*rest)

        def do_GET(self):
            answer = self.answers.get(self.path.partition("?")[0])
            if callable(answer):
                with contextlib.suppress(OSError):  # the client has gone
                    answer(self)
                return
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_):
            pass

    def start(answers):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, answers))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def redirect(to):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_a_list_that_mixes_all_kinds_gives_the_towers_rows_in_its_order(
    model, picture, data, serve, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    picture.save(tmp_path / "a dog.png")
    picture.save(tmp_path / "dog.png")
    url = serve({"/dog": data, "/moved": redirect("/dog")})
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    texts = ["a red disk", "ein Kreis", "see https://example.com/ for more", "https: a red one", "not a dog.png"]
    images = [
        tmp_path / "dog.png", "dog.png", "a dog.png", f"{url}/dog", f"{url}/moved?key=secret", uri, data,
        bytearray(data), picture, np.array(picture), torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        {"image": "dog.png"}, {"image": data},
    ]  # fmt: skip
    mixed = [texts[0], *images, *texts[1:], {"text": "dog.png"}]
    found = model.encode(mixed)
    assert found.dtype == np.float32
    expected = model.encode_text([*texts, "dog.png"])
    image = model.encode_image([picture])[0]
    assert np.abs(found[1 : 1 + len(images)] - image).max() < 1e-6
    assert np.abs(np.delete(found, range(1, 1 + len(images)), 0) - expected).max() < 1e-6
    # One that is in no list gives one row.
    for one, row in (("a red disk", expected[0]), (picture, image), (data, image), (np.array(picture), image),
                     ({"text": "a red disk"}, expected[0]), (tmp_path / "dog.png", image)):  # fmt: skip
        assert model.encode(one).shape == (16,)
        assert np.abs(model.encode(one) - row).max() < 1e-6
    batch = np.stack([np.array(picture)] * 2)
    assert np.abs(model.encode(batch) - image).max() < 1e-6
    assert model.encode([]).shape == (0, 16)


def test_options_have_our_names_and_sentence_transformers(model, picture, capsys):
    mixed = ["a disk", picture]
    plain = model.encode(mixed)
    assert np.allclose(
        model.encode(mixed, truncate_dim=8), plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1)[:, None]
    )
    for name in ("normalize", "normalize_embeddings"):
        assert np.abs(np.linalg.norm(model.encode(mixed, **{name: False}), axis=1) - 1).max() > 0.01
    for name in ("task", "prompt_name"):
        asked = model.encode(mixed, **{name: "query"})
        assert np.array_equal(asked[0], model.encode_text(["a disk"], task="query")[0])
        assert np.array_equal(asked[1], plain[1])
    assert capsys.readouterr().err == ""
    for name in ("show_progress", "show_progress_bar"):
        model.encode(mixed, **{name: True})
        assert "2/2" in (err := capsys.readouterr().err) or err.count("1/1") == 2
    model.encode(mixed, show_progress_bar=None)
    assert capsys.readouterr().err == ""
    tensor = model.encode(mixed, convert_to_tensor=True, device="cpu", batch_size=1, precision="float32")
    assert torch.allclose(tensor, torch.from_numpy(plain), atol=1e-6)
    rows = model.encode(mixed, convert_to_numpy=False)
    assert [type(row) for row in rows] == [torch.Tensor] * 2
    assert torch.allclose(model.similarity(tensor, plain[0]), torch.from_numpy(plain @ plain[:1].T), atol=1e-6)
    assert torch.allclose(model.similarity(rows, plain), torch.from_numpy(plain @ plain.T), atol=1e-6)
    twice = {"normalize": False}
    assert torch.allclose(
        model.similarity(model.encode(mixed, **twice), plain), model.similarity(rows, rows), atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int4"}, "precision is 'int4'; expected one of float32, float16, int8"),
        ({"prompt": "x"}, "encode has no option 'prompt'; it has task, truncate_dim"),
        ({"task": "query", "prompt_name": "other"}, "prompt_name is 'other', and task, which means the same, 'query'"),
        ({"errors": "ignore"}, "errors is 'ignore'; expected 'raise' or 'skip'"),
        ({"task": "passage"}, r"unknown task 'passage'; this model knows \['query'\]"),
        ({"truncate_dim": 17}, "truncate_dim is 17"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_there_are_not_are_refused_by_name(model, picture, options, words):
    for inputs in (["a"], [picture], ["a", picture]):
        with pytest.raises(ValueError, match=words):
            model.encode(inputs, **options)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, r"inputs\[1\] is None, a NoneType; expected a text or an image"),
        (float("nan"), r"inputs\[1\] is nan, a float"),
        ({"text": "a", "image": "b"}, r"inputs\[1\] is a dict with 'text', 'image'; expected"),
        ({"text": 3}, r"inputs\[1\] is a dict with 'text'"),
        ({}, r"inputs\[1\] is a dict with nothing"),
        (b"no image", r"inputs\[1\]: an image given as bytes cannot be decoded"),
        ("gone.png", r"inputs\[1\]: gone.png: there is no such file; if it is a text, write .'text'"),
        ("data:image/png;base64,@@@@", r"inputs\[1\]: a data URI of 26 characters: the data URI cannot be decoded"),
        ("data:image/png", r"there is no comma"),
        (np.zeros((2, 2), complex), r"inputs\[1\]: .*complex128"),
    ],
)
def test_what_is_neither_text_nor_image_is_named_by_its_place(model, entry, words):
    with pytest.raises(ValueError, match=words):
        model.encode(["a", entry])


def test_sets_and_tables_have_no_order_and_are_refused(model):
    import pandas

    for inputs in ({"a", "b"}, pandas.DataFrame({"caption": ["a"]})):
        with pytest.raises(UserError, match="encode takes a list of texts and images and got a"):
            model.encode(inputs)
    assert model.encode(pandas.Series(["a", "b"])).shape == (2, 16)


def test_images_that_are_none_among_good_ones_are_skipped_and_said(model, picture, data, tmp_path):
    mixed = ["a disk", b"none", *[picture] * 40, tmp_path / "gone.png", "ein Kreis", data[:60]]
    found = model.encode(mixed, errors="skip", batch_size=7)
    assert [(s.place, s.name) for s in found.skipped] == [
        (1, "an image given as bytes"), (42, str(tmp_path / "gone.png")), (44, "an image given as bytes")
    ]  # fmt: skip
    assert found.skipped[1].reason == "there is no such file"
    assert found.kept == [0, *range(2, 42), 43]
    assert np.abs(found.embeddings - model.encode([mixed[i] for i in found.kept])).max() < 1e-6
    nothing = model.encode([b"none"], errors="skip")
    assert (nothing.embeddings.shape, nothing.kept, len(nothing.skipped)) == ((0, 16), [], 1)
    with pytest.raises(ImageError, match=r"inputs\[1\]: an image given as bytes"):
        model.encode(mixed)


def test_urls_have_limits_and_lead_to_no_other_local_place(model, data, serve):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    def silent(handler):
        gate.wait(30)

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not gate.wait(0.05):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    gate = threading.Event()
    other = serve({"/dog.png": data})
    url = serve({
        "/elsewhere": redirect(f"{other}/dog.png"), "/file": redirect("file:///etc/passwd"), "/endless": endless,
        "/silent": silent, "/drip": drip, "/loop": redirect("/loop"), "/page": b"<html>",
        "/large": b"x" * 200_000,
    })  # fmt: skip
    limits = {"/silent": UrlLimits(timeout=0.5), "/drip": UrlLimits(deadline=1.0)}
    secret = url.replace("http://", "http://user:password@")
    for place, words in (
        ("/elsewhere", "redirects to .*, which is not followed"), ("/file", "file|not allowed|not followed"),
        ("/endless", r"more than 0.1 MB; UrlLimits\(megabytes=…\)"), ("/large", "more than 0.1 MB"),
        ("/silent", "no answer for 0.5 s"), ("/drip", r"not whole after 1 s; UrlLimits\(deadline=…\)"),
        ("/loop", "302|infinite|redirect"), ("/page", "cannot be decoded as an image"), ("/gone", "404"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=rf"inputs\[1\]: http://127.*{place}:? .*({words})") as caught:
            model.encode(["a", f"{secret}{place}?key=secret"], urls=limits.get(place, UrlLimits(megabytes=0.1)))
        assert "secret" not in str(caught.value)
        assert "password" not in str(caught.value)
    gate.set()
    with pytest.raises(ImageError, match=r"inputs\[0\]: http://127.0.0.1:9/a: .*refused"):
        model.encode(["http://127.0.0.1:9/a"])
