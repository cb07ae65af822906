"""launch/environment.sh where pip works and uv, left to itself, would not: behind a proxy with its own certificate."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A Python that makes a .venv of itself and of a uv that tells its environment; pip.conf's `cert` is $PIP_CONF_CERT.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "${0%/*}/uv" .venv/bin/uv ;;
  "-m pip config get global.cert") [ -n "${PIP_CONF_CERT:-}" ] || exit 1; echo "$PIP_CONF_CERT" ;;
  "-m pip "* | "-W ignore -c import deepspeed"*) ;;
  *) exec REAL "$@" ;;
esac
"""
UV = '#!/usr/bin/env bash\necho "${UV_SYSTEM_CERTS:-} ${SSL_CERT_FILE:-}" > uv-saw\n'


@pytest.fixture
def uv_saw(tmp_path):
    """What uv finds in UV_SYSTEM_CERTS and SSL_CERT_FILE when the environment is made with such variables set."""
    launch = ("environment.sh", "certificates.sh", "constraints.txt")
    for path in [*(f"launch/{name}" for name in launch), "pyproject.toml", "data_prep/pyproject.toml"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for package in ROOT.glob("packages/*"):
        (tmp_path / "packages" / package.name).mkdir(parents=True)
        shutil.copy(package / "pyproject.toml", tmp_path / "packages" / package.name)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, content in (("python3.13", PYTHON.replace("REAL", sys.executable)), ("uv", UV)):
        (bin / name).write_text(content)
        (bin / name).chmod(0o755)

    def make(**variables: str) -> list[str]:
        ours = ("SSL_CERT_FILE", "PIP_CERT", "UV_SYSTEM_CERTS", "PIP_CONF_CERT")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment |= {"PATH": f"{bin}:{os.environ['PATH']}", **variables}
        shutil.rmtree(tmp_path / ".venv", ignore_errors=True)
        subprocess.run(["bash", tmp_path / "launch/environment.sh"], env=environment, check=True, capture_output=True)
        return (tmp_path / "uv-saw").read_text().rstrip("\n").split(" ")

    return make


def test_uv_trusts_what_pip_trusts(uv_saw, tmp_path):
    store = ssl.get_default_verify_paths()
    system = "true" if store.cafile or (store.capath and os.listdir(store.capath)) else ""
    assert uv_saw() == [system, ""]
    assert uv_saw(PIP_CERT="/company.pem") == [system, "/company.pem"]
    assert uv_saw(PIP_CONF_CERT="/pip.pem") == [system, "/pip.pem"]
    assert uv_saw(SSL_CERT_FILE="/mine.pem", PIP_CERT="/company.pem") == [system, "/mine.pem"]
    assert uv_saw(UV_SYSTEM_CERTS="false")[0] == "false"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_uv_reads_an_index_with_a_certificate_of_its_own(tmp_path):
    """The variables do in uv what environment.sh hopes: with them the index is reached, without them it is not."""
    uv = shutil.which("uv") or pytest.fail("uv is missing; bash launch/environment.sh installs it")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    make += " -addext basicConstraints=critical,CA:FALSE"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = f"https://localhost:{server.server_port}/simple"
    command = [uv, "pip", "install", "--dry-run", "--no-cache", "--no-config", "--python", sys.executable]
    ours = ("SSL_CERT_FILE", "SSL_CERT_DIR", "UV_SYSTEM_CERTS", "UV_NATIVE_TLS")
    plain = {k: v for k, v in os.environ.items() if k not in ours and "proxy" not in k.lower()}
    plain |= {"UV_HTTP_RETRIES": "0"}

    def answer(**variables: str) -> str:
        done = subprocess.run(
            [*command, "--index-url", index, "no-such-package"],
            env={**plain, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr

    try:
        assert "certificate" in answer()
        assert "not found in the package registry" in answer(UV_SYSTEM_CERTS="true", SSL_CERT_FILE=str(certificate))
    finally:
        server.shutdown()
        server.server_close()
