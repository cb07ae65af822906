"""An export on a hub is what it was on the disk: against a server on loopback that speaks the hub's language."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stage_trainer.cli import main


class Hub(ThreadingHTTPServer):
    """Keeps what is committed, of one repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self):
        content = self.body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/model", "sha": "a" * 40, "siblings": []})

    def do_POST(self):
        hub, content = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.refuses:
            return self.answer({"error": "you may not write here"}, 403)
        if self.path == "/api/repos/create":
            hub.made.append(json.loads(content))
            return self.answer({"url": f"{hub.url}/me/model"})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            kinds = {True: "lfs", False: "regular"}
            return self.answer(
                {
                    "files": [
                        {"path": p, "uploadMode": kinds[p.endswith(".safetensors")], "shouldIgnore": False}
                        for p in paths
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            return self.answer({"success": True, "commitOid": "b" * 40, "commitUrl": f"{hub.url}/me/model/commit/b"})
        return self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def push(hub, tmp_path):
    def run(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = Path(sys.executable).with_name("stage-trainer")
        words = [command, "push", model, "me/model", *options]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_is_pushed_is_the_directory_with_weights_once(exported, hub, push):
    done = push(exported, "--private", "--message", "first")
    assert done.returncode == 0, done.stderr
    assert f"uploaded {exported}: {hub.url}/me/model/commit/b" in done.stdout
    assert hub.files == {
        str(file.relative_to(exported)): file.read_bytes() for file in exported.rglob("*") if file.is_file()
    }
    assert len(hub.blobs) == 2  # the towers' weights
    assert (hub.made[0]["name"], hub.made[0]["organization"], hub.messages) == ("model", "me", ["first"])
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_mine"}


def test_a_hub_that_refuses_is_one_message(exported, hub, push):
    hub.refuses = True
    done = push(exported)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"could not upload {exported} to {hub.url}/me/model: " in done.stderr
    assert "HF_TOKEN" in done.stderr


def test_what_is_no_whole_export_is_not_pushed(exported, tmp_path, capsys):
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "vision/model.safetensors").write_bytes(b"x")
    for words, source, repository in (
        ("is no repository; expected OWNER/NAME", exported, "model"),
        ("is no exported model: it has no README.md", tmp_path, "me/model"),
        ("vision/model.safetensors cannot be read", broken, "me/model"),
    ):
        assert main(["push", str(source), repository]) == 2
        assert words in capsys.readouterr().err
