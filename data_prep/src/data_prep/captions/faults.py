"""What an error of a caption service means, whatever it comes as.

Services of this API agree on little: an error may be a 200 with no answer in it, a wrong key a 400, an empty account a
429 or 403, and what its headers should say of limits stands in its body.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.shards.format import JsonObject, parse_json

NO_KEY, NO_MONEY, NO_MODEL, LIMITED, FAILED = 401, 402, 404, 429, 500  # what an error may mean, as a status
STOPPING = {NO_KEY, NO_MONEY, NO_MODEL}  # no other request would be answered either

# `code`, `type` or `status` of an error, in lower case without separators.
_CODES = {
    NO_KEY: "invalidapikey incorrectapikey apikeyinvalid authenticationerror invalidauthentication "
    "invalidauthenticationerror unauthenticated expiredapikey accountdeactivated",
    NO_MONEY: "insufficientquota billinghardlimitreached billingnotactive insufficientbalance insufficientcredits "
    "insufficientfunds exceededcurrentquotaerror arrearage paymentrequired",
    NO_MODEL: "modelnotfound modelnotexist deploymentnotfound modelnotfounderror",
    LIMITED: "ratelimitexceeded ratelimiterror ratelimit ratelimited ratelimitreached ratelimitreachederror "
    "toomanyrequests resourceexhausted throttling throttlingratequota throttlingallocationquota limitrequests",
}
_MEANS = {code: status for status, codes in _CODES.items() for code in codes.split()}
_PHRASES = (
    (
        NO_KEY,
        r"(invalid|incorrect|wrong|missing|expired|no) api[ _-]?key|api[ _-]?key (is )?(not valid|invalid|missing)"
        r"|authentication (error|fail)",
    ),
    (
        NO_MONEY,
        r"insufficient (balance|credits?|funds|quota)|exceeded your current quota|account .{0,20}arrears|余额不足|欠费",
    ),
    (
        LIMITED,
        r"rate[ _-]?limit|too many requests|throttl|requests? per (minute|second|day)|qps|request limit"
        r"|速率限制|限流|频率|频繁",
    ),
    (
        NO_MODEL,
        r"\bmodel [`'\"]?[^\s`'\"]+[`'\"]? (was |is )?(not found|does not exist)|(no such|unknown) model\b|"
        r"is not a valid model",
    ),
)
# Names of the fields of a body that say that, and what, went wrong.
_TOLD = re.compile(r"err|message|msg|detail|fault|base_resp")
_MESSAGES = (
    "message", "msg", "error_msg", "error_message", "errorMessage", "errmsg", "status_msg", "faultstring", "detail",
    "error",
)  # fmt: skip
_NO_JSON = re.compile(rb"\s*(<[!?A-Za-z]|[A-Za-z][a-z]+ [a-z]+ )")
_HINTS = re.compile(r"retry-after(-ms)?|x-ratelimit-[a-z-]+")


def stopping(status: int, raw: bytes) -> int | None:
    """One of `STOPPING` if an error means that no other request (of this model) would be answered either, else None."""
    if (sure := _by_code(raw)) in STOPPING:
        return sure
    if status in (NO_KEY, NO_MONEY):
        return status
    among = (NO_KEY, NO_MONEY, NO_MODEL) if status in (400, 404) else (NO_KEY, NO_MONEY)
    return None if limited(status, raw) else _by_phrase(raw, among)


def limited(status: int, raw: bytes) -> bool:
    """Whether an error means that too much was asked for at once, and not that this one request is too large."""
    too_large = re.search(r"request (is )?too large|reduce (the|your)", error_message(raw).lower())
    return not too_large and (status == LIMITED or _by_code(raw) == LIMITED)


def disguised(path: str, raw: bytes) -> int | None:
    """The status that a 2xx should have had: it holds an error, and nothing of what was asked for at `path`."""
    try:
        body = parse_json(_first_event(raw))
    except ValueError:  # a page or a sentence of something on the way to the service; half an answer may be paid
        return FAILED if _NO_JSON.match(raw) else None
    if isinstance(body, str) and _NO_JSON.match(body.encode("utf-8", "replace")):
        return FAILED
    if isinstance(body, list) and len(body) == 1:  # as Google's
        (body,) = body
    if not isinstance(body, dict):
        return None
    if path.endswith("/chat/completions"):
        if (choices := body.get("choices")) and not (body := _failed_choice(choices)):
            return None
    elif body.get("id") or isinstance(body.get("data"), list):
        return None
    inner = _error(body)
    told = any(_TOLD.search(name.lower()) for name, value in body.items() if value and not _is_said(value))
    if not told and inner is body and body.get("object") != "error" and _status(body) is None:
        return None
    own = next(filter(None, (_status(holder) for holder in (inner, body))), None)
    return own or _by_code(raw) or _by_phrase(raw, (NO_KEY, NO_MONEY, NO_MODEL, LIMITED)) or FAILED


def hints_inside(raw: bytes) -> dict[str, str]:
    """The headers about limits that an error's body repeats, as OpenRouter's do (`metadata.headers`)."""
    metadata = _error(_parsed(raw)).get("metadata")
    headers = metadata.get("headers") if isinstance(metadata, dict) else None
    pairs = headers.items() if isinstance(headers, dict) else ()
    return {str(name).lower(): str(value) for name, value in pairs if _HINTS.fullmatch(str(name).lower())}


def error_message(raw: bytes) -> str:
    """The message of an error's body, in one short line."""
    body = _parsed(raw)
    inner = _error(body)
    found = next((inner[name] for name in _MESSAGES if inner.get(name)), None)
    message = raw.decode("utf-8", "replace") if found is None and not body else found
    return " ".join(str(message or "").split())[:300].encode("utf-8", "replace").decode() or "no message"


def _failed_choice(choices: Any) -> JsonObject | None:
    """The first choice, if it holds an error and no text."""
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict) or not choice.get("error"):
        return None
    message = choice.get("message")
    return None if isinstance(message, dict) and message.get("content") else choice


def _parsed(raw: bytes) -> JsonObject:
    """The object of an error's body; empty if it is none."""
    try:
        body = parse_json(_first_event(raw))
    except ValueError:
        return {}
    if isinstance(body, list) and len(body) == 1:
        (body,) = body
    if isinstance(body, dict) and isinstance(body.get("choices"), list) and body["choices"]:
        return _failed_choice(body["choices"]) or body
    return body if isinstance(body, dict) else {}


def _first_event(raw: bytes) -> bytes:
    """The data of the first event, where a service streams though it was not asked to; else `raw`."""
    found = re.match(rb"\s*(?:event:[^\n]*\n)?data:([^\n]*)", raw)
    return found[1] if found else raw


def _error(body: JsonObject) -> JsonObject:
    """The error inside of a body, which may be the body itself."""
    for name in ("error", "errors", "base_resp", "fault", "detail"):
        error = body.get(name)
        if isinstance(error, list) and len(error) == 1:
            (error,) = error
        if isinstance(error, dict) and error:
            return error
        if isinstance(error, str) and error:
            return {**body, "message": error}
    nested = (each for each in body.values() if isinstance(each, dict) and each.get("error"))
    return next(map(_error, nested), body)


def _is_said(value: Any) -> bool:
    """Whether this is the message of an assistant, in whatever API's answer, and not that of an error."""
    return isinstance(value, dict) and "content" in value


def _status(holder: JsonObject) -> int | None:
    """The status of an error that an object names."""
    for name in ("code", "status", "status_code", "statusCode", "http_status", "error_code"):
        value = holder.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
            value = int(value)
        if type(value) is int and 400 <= value < 600:
            return value
    return None


def _by_code(raw: bytes) -> int | None:
    body = _parsed(raw)
    for holder in (_error(body), body):
        for name in ("code", "type", "status"):
            code = re.sub(r"[^a-z]", "", str(holder.get(name)).lower())
            if code in _MEANS:
                return _MEANS[code]
    return None


def _by_phrase(raw: bytes, among: tuple[int, ...]) -> int | None:
    message = error_message(raw).lower()
    return next((status for status, words in _PHRASES if status in among and re.search(words, message)), None)
