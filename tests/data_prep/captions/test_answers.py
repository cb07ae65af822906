"""What is no caption, on made sets of answers in thirty languages.

The rules were written on `answers/seen_*.json`, and none of them on `answers/held_out.json`. A set holds for each
language an ordinary caption; `good`: sentences that look dangerous, around it (`{}`), which make a caption; `bad`: by
kind, what makes it none, or is none. `any` holds what is the same in all languages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_prep.captions.judge import Limits, judge
from data_prep.captions.texts import read_prompt
from data_prep.languages import LANGUAGES

from .conftest import completion

ANSWERS = Path(__file__).parent / "answers"
SETS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ANSWERS.glob("*.json"))}
SEEN = [name for name in SETS if name != "held_out"]


def verdict(language: str, text: object, limits: Limits, finish: str | None = "stop"):
    raw = json.dumps(completion(text, finish=finish)).encode()
    return judge(raw, language, limits, prompts=[read_prompt("v1", language).text])


def bad(name: str) -> Iterator[tuple[str, str, str, str, str | None]]:
    """(language, kind, text, the caption in it, finish_reason) of the answers that are no captions."""
    made = SETS[name]
    for number, language in enumerate(LANGUAGES):
        caption = made[language]["caption"]
        for kind, texts in [*made[language]["bad"].items(), *made["any"]["bad"].items()]:
            if kind in made["any"]["bad"]:  # each is tried in three languages
                texts = [text for place, text in enumerate(texts) if (place - number) % 10 == 0]
            if language != "en" or kind != "english":
                yield from ((language, kind, text.replace("{}", caption), caption, "stop") for text in texts)
        prompt = read_prompt("v1", language).text
        yield language, "prompt", prompt if number % 2 else f"{caption} {prompt[: len(prompt) // 2]}", caption, "stop"
        finish = made["any"]["finish"][number % len(made["any"]["finish"])]
        yield language, "finish", caption, caption, finish


def good(name: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the answers that are captions."""
    made = SETS[name]
    for language in LANGUAGES:
        for text in ["{}", *made[language]["good"]]:
            yield language, text.replace("{}", made[language]["caption"])


@pytest.mark.parametrize("name", ["held_out", *(pytest.param(name, marks=pytest.mark.full) for name in SEEN)])
def test_what_is_no_caption_is_rejected_and_what_is_one_is_not(name):
    """At most 1 % and 2 %. `-rP` shows the counts and what was wrong.

    Length is no help against what is no caption: any is allowed there.
    """
    accepted, rejected, cut = [], [], 0
    answers, captions = list(bad(name)), list(good(name))
    for language, kind, text, caption, finish in answers:
        found = verdict(language, text, Limits(1), finish).caption
        cut += found == caption
        if found not in (None, caption):  # thoughts may be cut off before the caption
            accepted.append((language, kind, text[:90], text[-60:]))
    for language, text in captions:
        reason = verdict(language, text, Limits()).reason
        if reason:
            rejected.append((language, reason, text[:90], text[-60:]))
    print(*accepted, *rejected, sep="\n")
    print(
        f"{name}: {len(accepted)} of {len(answers)} that are no captions were accepted ({cut} without their thoughts)"
    )
    print(f"{name}: {len(rejected)} of {len(captions)} captions were rejected")
    assert len(answers) >= 290
    assert len(captions) >= 100
    assert len(accepted) <= 0.01 * len(answers)
    assert len(rejected) <= 0.02 * len(captions)
