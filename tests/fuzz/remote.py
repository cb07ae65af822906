"""Data sets under a URL, from a server that answers with what was drawn."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

from fuzz import guard
from fuzz.data_sets import whole
from fuzz.harness import Files, Kind, all_of
from fuzz.values import damaged, dumped, json_bytes, values
from hypothesis import strategies as st

_SECONDS = 0.5  # of silence that the client bears


def _fetch(folder: Path) -> None:
    """Open the data set that the server has, and read all of it."""
    from stage_trainer.data.remote_data import RemotePlace
    from stage_trainer.recipe import RemoteConfig
    from stage_trainer.recipe.address import Address

    with _Server(folder) as server:
        settings = RemoteConfig(cache=str(folder.parent / "cache"), timeout=_SECONDS, retries=0, downloads=1)
        data = RemotePlace(Address(f"http://127.0.0.1:{server.port}", "train/text-pairs/made"), settings).open()
        for index in range(min(len(data), 4)):
            all_of(lambda index=index: data.row(index), lambda index=index: data.read(index))


class _Server:
    """Answers each request for NAME with the bytes of the case's file NAME.answer,
    or with its file NAME as HTTP should."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = guard.SERVER_PORT[0] = self._socket.getsockname()[1]

    def __enter__(self) -> _Server:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(2)
            try:
                request = connection.recv(65536)
                name = request.split(b" ")[1].decode().rpartition("/")[2].partition("?")[0]
                connection.sendall(self._content(name))
            except (OSError, IndexError, ValueError):
                return

    def _content(self, name: str) -> bytes:
        answer, file = self._folder / f"{name}.answer", self._folder / name
        if answer.is_file():
            raw = answer.read_bytes()
            return raw.replace(b"{port}", str(self.port).encode())
        if not file.is_file():
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        content = file.read_bytes()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content) + content


_HEADERS = (
    b"Content-Length: {size}", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: x",
    b"Content-Length: 3",
    b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Retry-After: 99999999", b"Retry-After: \xff",
    b"Retry-After: -1",
    b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", b"Retry-After: Mon, 99 Foo", b"X: " + b"a" * 70_000, b"\xff: \xff",
    b": x", b"nothing",
    b"Location: http://127.0.0.1:1/x", b"Location: file:///etc/passwd", b"Location: ftp://127.0.0.1:1/x",
    b"Location: //[::1]:x/",
    b"Location: http://127.0.0.1:{port}/train/text-pairs/made/manifest.json", b"Location: http://[",
    b"Location: \xff\x00",
    b"Location: http://127.0.0.2:{port}/x", b"Location: http://127.0.0.1:99999/", b"Connection: keep-alive",
    b"Set-Cookie: \x1b[31m",
)  # fmt: skip
_STATUS = (
    b"HTTP/1.1 200 OK", b"HTTP/1.1 302 Found", b"HTTP/1.1 301 Moved", b"HTTP/1.1 307 Again",
    b"HTTP/1.1 404 \x1b[31mNo", b"HTTP/1.1 500 \xff",
    b"HTTP/1.1 503 Wait", b"HTTP/1.1 416 Range", b"HTTP/1.1 206 Part", b"HTTP/1.1 204 None", b"HTTP/1.1 100 Continue",
    b"HTTP/9 200 OK",
    b"HTTP/1.1 999999 No", b"HTTP/1.1 -1", b"HTTP/1.1 200", b"ICY 200 OK", b"", b"HTTP/1.1 401 No",
    b"HTTP/1.1 200 " + b"a" * 70_000,
)  # fmt: skip


@st.composite
def _answers(draw: st.DrawFn, content: bytes) -> bytes:
    headers = draw(st.lists(st.sampled_from(_HEADERS), max_size=4))
    body = draw(st.one_of(st.just(content), damaged(content), st.binary(max_size=40)))
    if b"Transfer-Encoding: chunked" in headers:
        sizes = draw(
            st.sampled_from((b"%x" % len(body), b"-1", b"ffffffffffffffff", b"zz", b"", b"1", b"%x;a=b" % len(body)))
        )
        body = sizes + b"\r\n" + body + b"\r\n0\r\n\r\n"
    head = b"\r\n".join([draw(st.sampled_from(_STATUS * 1 + (_STATUS[0],) * 12)), *headers])
    return head.replace(b"{size}", str(len(body)).encode()) + b"\r\n\r\n" + body


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    files: Files = dict(whole("text-pairs"))
    manifest = json.loads(files["manifest.json"])
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(("answer", "answer", "content", "manifest", "both")))
    if how in ("manifest", "both"):
        files["manifest.json"] = draw(json_bytes(manifest))
    if how == "content":
        files[name] = draw(st.one_of(damaged(files[name]), values.map(dumped)))
    if how in ("answer", "both"):
        files[f"{name}.answer"] = draw(_answers(files[name]))
    return files


def _valid() -> list[Files]:
    return [whole("text-pairs")]


KINDS: list[Any] = [Kind("remote", _fetch, _valid, _cases)]
