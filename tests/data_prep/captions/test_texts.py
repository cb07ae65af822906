"""The prompts and the checks, in all thirty languages."""

from __future__ import annotations

import hashlib

import pytest
from data_prep.captions.judge import Limits, fault, in_language, repeated
from data_prep.captions.ledger import request_id
from data_prep.captions.money import image_tokens
from data_prep.captions.texts import PROMPTS, read_prompt, refusal_phrases
from data_prep.corpus.items import LANGUAGES
from data_prep.shaping.languages import identify

# A version's texts never change: captions that were made with them name it. To change a prompt, add a version.
V1 = "17cc06a7416210607eaf00016bab0d946a95a4f11df0332cd6bed7fa09e4bf54"


def test_version_1_of_the_prompts_is_what_it_always_was():
    digests = [read_prompt("v1", language).sha256 for language in LANGUAGES]
    assert hashlib.sha256("".join(digests).encode()).hexdigest() == V1
    assert sorted(path.stem for path in (PROMPTS / "v1").iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_prompt_is_written_in_its_language(language):
    found, probability = identify(read_prompt("v1", language).text)
    assert found == language
    assert probability > 0.99


@pytest.mark.parametrize("language", LANGUAGES)
def test_good_prose_passes_and_a_refusal_does_not(language):
    prose = read_prompt("v1", language).text  # not a caption, but prose in the language of a caption's length
    limits = Limits(shortest=200)
    assert fault(prose, language, limits) is None
    own = refusal_phrases(language)[0]
    assert fault(f"{own.capitalize()}, {prose}", language, limits) == "refusal"
    assert fault(prose[: int(len(prose) * 0.1)], language, limits) == "length"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_other_languages_prose_passes(language):
    for other in LANGUAGES:
        assert in_language(read_prompt("v1", other).text, language) == (other == language)


def test_a_language_that_changes_half_way_is_seen():
    german, english = read_prompt("v1", "de").text, read_prompt("v1", "en").text
    assert in_language(german + " " + german, "de")
    assert not in_language(german + " " + english[:300], "de")


def test_repetition_is_the_share_of_what_was_there_before():
    prose = read_prompt("v1", "en").text
    assert repeated(prose) < 0.05
    assert repeated(prose + prose) == pytest.approx(0.5, abs=0.05)
    assert repeated("short") == 0


def test_a_request_is_another_one_if_anything_of_it_is():
    base = ("a" * 64, "en", "v1", "m", {"max_tokens": 1, "detail": None, "body": {"temperature": 0.1}})
    others = [
        ("b" * 64, *base[1:]),
        (base[0], "de", *base[2:]),
        (*base[:2], "v2", *base[3:]),
        (*base[:3], "n", base[4]),
        (*base[:4], {**base[4], "detail": "low"}),
    ]
    assert len({request_id(*one) for one in (base, *others)}) == 6
    assert request_id(*base) == request_id(*base[:4], dict(reversed(base[4].items())))


def test_image_tokens_are_those_of_the_published_examples():
    # From OpenAI's guide: 1024 × 1024 is 765, 2048 × 4096 is 1105, any image at low detail 85.
    assert image_tokens((1024, 1024), "high") == 765
    assert image_tokens((2048, 4096), "high") == 1105
    assert image_tokens((4096, 8192), "low") == 85
