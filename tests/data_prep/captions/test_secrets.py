"""Keys and passwords reach no screen, log or ledger: in URLs, headers, proxies and what a service says of them."""

from __future__ import annotations

import base64
import html
import json
import logging
from pathlib import Path
from urllib.parse import quote

import pytest
from data_prep.captions.secrets import Secrets, of_url, shown_url
from data_prep.cli import main

from .conftest import KEY, Reply, completion, good, states

WORD = "hunter2-secret"
BASIC = base64.b64encode(f"team:{WORD}".encode()).decode()


def nowhere(*shown: str, ledger: str, secrets: tuple[str, ...] = (WORD, BASIC, KEY)) -> bool:
    """Whether none of the secrets is in what was shown or in the ledger's files."""
    files = [path.read_bytes() for path in Path(ledger).parent.glob(Path(ledger).name + "*")]
    everything = b"".join([*files, *(text.encode() for text in shown)])
    return not any(secret.encode() in everything for secret in secrets)


@pytest.fixture
def at(seer):
    """The service's URL, with this before the host and after the path."""
    return lambda before="", after="": seer.url.replace("//", f"//{before}") + after


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
@pytest.mark.parametrize(("before", "after"), [(f"team:{WORD}@", ""), ("", f"?api-key={WORD}")])
@pytest.mark.parametrize("step", ["run", "batch submit"])
def test_what_is_in_the_url_is_not_shown_when_the_service_refuses(
    seer, planned, ledger, at, capsys, caplog, monkeypatch, step, before, after, status
):
    monkeypatch.setattr("data_prep.captions.rate_limit._LONGEST_BACKOFF", 0.001)
    caplog.set_level(logging.DEBUG)
    planned(12, languages=["en"])
    seer.authorization = "nothing"
    if status != 401:
        seer.authorization = f"Basic {BASIC}" if before else f"Bearer {KEY}"
        echo = f"{WORD} {BASIC if before else ''} {KEY} {KEY[:9]}****{KEY[-8:]} at {seer.url}{after}"
        seer.behave = lambda asked: Reply(status, json.dumps({"error": {"message": echo}}).encode())
        seer.odd["/v1/files"] = json.dumps({"error": {"message": echo, "code": status}}).encode()
    assert main(["captions", *step.split(), ledger, "--url", at(before, after)]) == 2
    assert main(["captions", "status", ledger]) == 0
    out, err = capsys.readouterr()
    assert seer.paths
    assert nowhere(out, err, caplog.text, ledger=ledger, secrets=(WORD, BASIC, KEY, KEY[-8:]))
    assert "127.0.0.1" in err


@pytest.mark.parametrize(("before", "after"), [(f"team:{WORD}@", ""), ("", f"?api-key={WORD}&v=1")])
def test_a_url_with_a_password_or_a_parameter_works(seer, planned, ledger, at, capsys, before, after):
    planned(2)
    seer.authorization = f"Basic {BASIC}" if before else f"Bearer {KEY}"
    seer.behave = lambda asked: Reply(body=good(asked).body, drop=asked.number == 1)
    assert main(["captions", "run", ledger, "--url", at(before, after)]) == 0
    assert states(ledger) == {"accepted": 5, "sent": 1}
    assert all(path == f"/v1/chat/completions{after}" for path in seer.paths)
    assert nowhere(*capsys.readouterr(), ledger=ledger)


def test_what_a_service_puts_of_the_key_into_an_answer_is_not_kept(seer, planned, run, ledger, capsys):
    planned(1, languages=["en"])
    body = {**completion(f"{KEY} {base64.b64encode(KEY.encode()).decode()}"), "model": KEY, "system_fingerprint": KEY}
    seer.behave = lambda asked: Reply(body=json.dumps(body).encode())
    assert run() == 0
    encoded = base64.b64encode(KEY.encode()).decode().rstrip("=")
    assert nowhere(*capsys.readouterr(), ledger=ledger, secrets=(KEY, encoded))


def test_a_proxys_password_is_not_shown(seer, planned, ledger, capsys, monkeypatch):
    planned(1, languages=["en"])
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    address = seer.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("http_proxy", f"http://team:{WORD}@{address}")
    monkeypatch.setenv("HTTP_PROXY", f"http://team:{WORD}@{address}")
    seer.authorization = "what the proxy wants"
    assert main(["captions", "run", ledger, "--url", "http://captions.invalid/v1"]) == 2
    out, err = capsys.readouterr()
    assert seer.paths == ["http://captions.invalid/v1/chat/completions"]
    assert "Proxy-Authorization" in err
    assert nowhere(out, err, ledger=ledger)


@pytest.mark.parametrize("proxy", [f"http://team:{WORD}@host:port", f"socks9://team:{WORD}@host", f"team:{WORD}@[h"])
def test_a_proxy_that_cannot_be_used_is_one_line_without_its_password(planned, ledger, capsys, monkeypatch, proxy):
    planned(1, languages=["en"])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("all_proxy", proxy)
    monkeypatch.setenv("ALL_PROXY", proxy)
    capsys.readouterr()
    assert main(["captions", "run", ledger, "--url", "http://127.0.0.1:9/v1", "--tries", "1"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert nowhere(out, err, ledger=ledger)


@pytest.mark.parametrize(
    "url",
    [
        f"http://team:{WORD}@host:port/v1", f"team:{WORD}@host/v1", f"//team:{WORD}@host", f"http://t:{WORD}/x@host/v1",
        f"http://t:{WORD}#x@host/v1", f"http://t:{WORD}?x@host/v1", f"ftp://host/v1?key={WORD}", f"http://?{WORD}",
        f"http://:{WORD}@/v1", f"https:/{WORD}@host/v1", f"http://host:x/v1;a=1?b=2&token={WORD}",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_refused_without_its_secrets(planned, ledger, capsys, url, monkeypatch):
    planned(1, languages=["en"])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for given in ([f"--url={url}"], []):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        capsys.readouterr()
        assert main(["captions", "run", ledger, *given]) == 2
        out, err = capsys.readouterr()
        assert "--url" in err
        assert nowhere(out, err, ledger=ledger)


@pytest.mark.parametrize("name", [KEY, "sk_0123456789abcdef", "Bearer x"])
def test_a_key_where_its_variables_name_belongs_is_not_repeated(planned, ledger, capsys, name):
    planned(1, languages=["en"])
    capsys.readouterr()
    assert main(["captions", "run", ledger, "--url", "http://127.0.0.1:9/v1", "--key-env", name]) == 2
    out, err = capsys.readouterr()
    assert "not the key" in err
    assert nowhere(out, err, ledger=ledger, secrets=(name,))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://x.azure.com/a/b?api-version=2024-10-21", "https://x.azure.com/a/b?api-version=2024-10-21"),
        ("https://u:p@h/v1?key=k&api-version=1#f", "https://[hidden]@h/v1?key=[hidden]&api-version=1"),
        ("https://h/0123456789abcdef0123456789abcdef/v1", "https://h/[hidden]/v1"),
        ("https://token@h", "https://[hidden]@h"),
    ],
)
def test_what_is_shown_of_a_url(url, shown):
    assert shown_url(url) == shown


@pytest.mark.parametrize("password", ['a"b\\c/d1', "grün&süß<7>", "tab\t12345"])
def test_a_password_is_hidden_in_every_form_in_which_a_body_may_repeat_it(password):
    secrets = Secrets("", of_url(f"http://team:{quote(password, safe='')}@host/v1"))
    forms = [
        password, quote(password), html.escape(password), json.dumps(password)[1:-1],
        json.dumps(password, ensure_ascii=False)[1:-1], json.dumps(password)[1:-1].replace("/", "\\/"),
    ]  # fmt: skip
    for form in forms:
        for message in (True, False):
            assert secrets.hide(f"wrong password {form}!", message=message) == "wrong password [hidden]!"


def test_a_password_that_is_a_word_stays_in_captions():
    secrets = Secrets("", of_url("http://team:harbour@host/v1"))
    assert secrets.hide_in(b"a harbour", message=False) == b"a harbour"
    assert secrets.hide_in(b"wrong password harbour", message=True) == b"wrong password [hidden]"
    assert secrets.hide_in(b"\xff", message=True) == b"\xff"


@pytest.mark.parametrize(
    "body", [{"api_key": WORD}, {"extra": [{"headers": {"Authorization": WORD}}]}, {"Token": WORD}]
)
def test_a_secret_in_the_body_is_refused_before_the_ledger_has_it(make_images, ledger, capsys, body):
    plan = ["captions", "plan", ledger, str(make_images(1)), "--model", "m", "--languages", "en", "--body"]
    assert main([*plan, json.dumps(body)]) == 2
    out, err = capsys.readouterr()
    assert "the ledger would keep that secret" in err
    assert nowhere(out, err, ledger=ledger)
    assert main([*plan, '{"max_new_tokens": 5, "stop_token_ids": [2]}']) == 0
