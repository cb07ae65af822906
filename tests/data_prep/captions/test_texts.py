"""The prompts and the checks, in all thirty languages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from data_prep.captions.judge import Limits, fault, in_language, repeated
from data_prep.captions.pricing import image_tokens
from data_prep.captions.request import request_id
from data_prep.captions.talk import refuses
from data_prep.captions.texts import PROMPTS, read_prompt
from data_prep.captions.topics import phrases, words
from data_prep.curation.language_id import identify
from data_prep.languages import LANGUAGES

CAPTIONS = json.loads((Path(__file__).parent / "answers/seen_1.json").read_text(encoding="utf-8"))
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
    prose = CAPTIONS[language]["caption"]
    limits = Limits(shortest=200)
    assert fault(prose, language, limits) is None
    own = phrases(language)["sorry"][0]
    assert fault(f"{own.capitalize()}, {prose}", language, limits) == "refusal"
    assert fault(prose[: int(len(prose) * 0.1)], language, limits) == "length"


# Each holds a refusal's phrase inside a word, or (ja, th) inside a sentence about the picture.
NOT_REFUSALS = {
    "fi": "Kuvassa hehkuu punaisen voimakas auringonlasku järven yllä, ja rannalla seisoo pieni puinen laituri. Veneen "
    "vieressä istuu vanha mies, joka katselee tyyntä vettä. Taustalla kohoaa tumma metsä, jonka takana taivas on vielä "
    "kirkas ja keltainen. Laiturin päässä nukkuu ruskea koira.",
    "pt": "A fotografia mostra o isolamento térmico de uma casa antiga, com placas cinzentas presas à parede. "
    "Dois homens com capacetes amarelos trabalham num andaime de madeira. Ao fundo vê-se um jardim com árvores altas e "
    "um céu azul com poucas nuvens brancas sobre a aldeia.",
    "es": "El cuadro, titulado El lamento de Orfeo, muestra a un hombre joven con una lira entre las manos, sentado "
    "sobre una roca junto a un río. A su alrededor descansan varios animales, entre ellos un león y un ciervo. Todo "
    "está oscuro, y las montañas del fondo se pierden en la niebla.",
    "ja": "霧が深く、遠くの山を見ることはできませんが、手前には赤い屋根の小さな家が建っています。"
    "家の前には石畳の道が続き、傘をさした老人が茶色の犬を連れてゆっくり歩いています。"
    "道の両側には背の高い木が並び、葉は雨に濡れて光っています。",
    "th": "ภาพนี้แสดงชายชราที่ไม่สามารถเดินได้นั่งอยู่บนรถเข็นริมแม่น้ำ ข้างเขามีหญิงสาวสวมเสื้อสีแดงยืนถือร่มสีขาว "
    "ด้านหลังมีบ้านไม้หลังเล็กและต้นไม้สูงหลายต้น ท้องฟ้าเป็นสีเทามีเมฆมาก เรือลำเล็กสองลำจอดอยู่ที่ท่าน้ำ "
    "และมีสุนัขสีน้ำตาลนอนหลับอยู่ใกล้ประตูบ้าน",
}


@pytest.mark.parametrize("language", NOT_REFUSALS)
def test_a_caption_with_a_refusals_letters_in_it_is_none(language):
    assert fault(NOT_REFUSALS[language], language, Limits()) is None


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Unfortunately, I’m unable to describe it."),
        ("fi", "Pyydän anteeksi, mutta en voi kuvailla tätä."),
        ("pt", "Lamento, mas a imagem mostra uma pessoa."),
        ("fr", "Je suis désolée."),
        ("ja", "画像を確認しました。申し訳ありませんが、説明は控えます。"),
        ("zh", "很抱歉，我无法描述这张图片。"),
        ("ko", "죄송하지만 이 이미지를 설명해 드릴 수 없습니다."),
        ("th", "ฉันไม่สามารถอธิบายภาพนี้ได้"),
        ("hi", "मुझे खेद है, मैं इस चित्र का वर्णन नहीं कर सकता।"),
        ("ja", "I'm sorry, but I can't help with that."),
    ],
)
def test_a_refusal_is_seen_in_whole_words_and_where_a_sentence_begins(language, text):
    assert refuses(text, language)


def test_a_word_goes_on_over_its_marks():
    assert words("मुझे खेद है।") == "मुझे खेद है"  # with marks, of which a regular expression's \w knows nothing
    assert refuses("अफ़सोस, यह नहीं हो सकता।", "hi")
    assert not refuses("अफ़सोसी आदमी खड़ा है।", "hi")


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
