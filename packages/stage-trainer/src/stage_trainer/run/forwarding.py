"""What `deepspeed` loses on the way to other machines: variables, and the quotes of arguments.

It exports only variables whose names begin with NCCL, PYTHON, PATH and a few more, and a remote shell reads the
arguments once again, which takes `batch={image_text: 8, text: 4}` apart. So both travel in one argument of plain
characters. Secrets do not: command lines are public on a machine.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence

OPTION = "--forwarded="
_SENT = re.compile(
    r"(HF|HUGGING|TRANSFORMERS|TOKENIZERS|GLOO|TORCH|PYTORCH|TRITON|OMP|MKL|AWS|GOOGLE|FSSPEC)\w*|XDG_CACHE_HOME|"
    r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_\w+|(REQUESTS|CURL)_CA_BUNDLE",
    re.IGNORECASE,
)
_SECRET = re.compile(r".*(TOKEN|SECRET|PASSWORD|KEY|KEY_ID)", re.IGNORECASE)
_OF_ONE_RANK = re.compile(r"TORCHELASTIC_\w+")
_SCRIPT = re.compile(r"(.*/)?stage\d+\.sh")


def pack(words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(`deepspeed`'s command line with everything after the launch file in one argument, names of variables that are
    not sent because they are secrets)."""
    script = next((number for number, word in enumerate(words) if _SCRIPT.fullmatch(word)), None)
    if script is None:
        return list(words), []
    wanted = {n: v for n, v in environment.items() if _SENT.fullmatch(n) and not _OF_ONE_RANK.fullmatch(n)}
    secret = sorted(name for name, value in wanted.items() if _SECRET.fullmatch(name) or "@" in value)
    sent = {name: value for name, value in wanted.items() if name not in secret}
    content = json.dumps({"arguments": words[script + 1 :], "environment": sent}).encode()
    return [*words[: script + 1], OPTION + base64.urlsafe_b64encode(content).decode()], secret


def unpack(words: Sequence[str]) -> list[str]:
    """The arguments again, on each rank; sets what variables this machine does not set itself."""
    found: list[str] = []
    for word in words:
        if not word.startswith(OPTION):
            found.append(word)
            continue
        content = json.loads(base64.urlsafe_b64decode(word.removeprefix(OPTION)))
        found += content["arguments"]
        for name, value in content["environment"].items():
            os.environ.setdefault(name, value)
    return found
