"""Languages of texts of unknown origin: found, or undetermined, rather than wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from data_prep.curation.language_id import MIN_LETTERS, identify, letters
from data_prep.curation.relabel import SURE
from data_prep.curation.scandinavian import contradictions
from data_prep.languages import LANGUAGES

SENTENCES = {
    "zh": ["今天天气很好，我们一起去公园散步吧。", "这家餐厅的菜很好吃，价格也不贵。"],
    "ja": ["今日は天気がいいので公園へ行きましょう。", "図書館で新しい本を三冊借りました。"],
    "ar": ["ذهبت إلى السوق لشراء الخبز والحليب.", "يلعب الأطفال الكرة في الحديقة القريبة من المدرسة."],
    "ur": ["بچے اسکول کے قریب میدان میں کھیل رہے ہیں۔", "میں نے بازار سے روٹی اور دودھ خریدا۔"],
    "id": ["Saya pergi ke pasar untuk membeli roti dan susu.", "Anak-anak bermain bola di lapangan dekat sekolah."],
    "hi": ["बच्चे स्कूल के पास के मैदान में खेल रहे हैं।", "मैंने बाज़ार से रोटी और दूध खरीदा।"],
    "uk": ["Діти граються на майданчику біля школи.", "Я купив хліб і молоко на ринку."],
    "ko": ["오늘은 날씨가 좋아서 공원에 갔습니다."],
    "no": ["Barna leker på lekeplassen ved siden av skolen, og jeg kjøpte brød og melk."],
    "da": ["Børnene leger på legepladsen ved siden af skolen, og jeg købte brød og mælk."],
}


@pytest.mark.parametrize("language", SENTENCES)
def test_an_ordinary_sentence_gets_its_language_though_others_are_near(language):
    """Wu, Cantonese, Egyptian and Moroccan Arabic, Malay and Nynorsk used to share the probability."""
    for sentence in SENTENCES[language]:
        found, probability = identify(sentence, among_all=True)
        assert (found, probability >= SURE) == (language, True), sentence


@pytest.mark.parametrize(
    "text",
    [
        "東京都庁",  # Japanese, in kanji alone
        "hotel",
        "СССР",
        "12, 13!",
        "",
        "Mlinzi wa zamani wa mnara wa taa anahesabu boti kumi na saba nyeupe baharini.",  # Swahili
        "Децата играят на площадката до училището и аз купих хляб.",  # Bulgarian
        "मुले शाळेजवळील मैदानात खेळत आहेत आणि मी बाजारातून भाकरी विकत घेतली.",  # Marathi
        "کودکان در زمین نزدیک مدرسه بازی می‌کنند و من نان خریدم.",  # Persian
        "აბ",
        "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima, pa i u ovom gradu.",  # Bosnian
        "Žena u plavom kaputu čeka autobus ispred pekare.",  # Serbian in Latin letters
    ],
)
def test_too_little_or_another_language_is_undetermined(text):
    found, probability = identify(text, among_all=True)
    assert found == "und" or probability < SURE


def test_a_script_of_one_language_needs_few_letters():
    for language, text in (("ka", "სახლი"), ("th", "บ้าน"), ("el", "σπίτι"), ("ko", "나무집"), ("ja", "ねこのこ")):
        assert letters(text) < MIN_LETTERS
        assert identify(text, among_all=True) == (language, pytest.approx(1.0)), text


@pytest.mark.parametrize("among_all", [False, True])
def test_danish_norwegian_and_swedish_are_told_apart(among_all):
    texts = {
        "da": "Den gamle fyrpasser tæller sytten hvide både på det grå hav, mens aftenen falder på.",
        "no": "Den gamle fyrvokteren teller sytten hvite båter på det grå havet mens kvelden faller på.",
        "sv": "Den gamle fyrvaktaren räknar sjutton vita båtar på det grå havet medan kvällen faller.",
    }
    assert {language: identify(line, among_all=among_all)[0] for language, line in texts.items()} == {
        language: language for language in texts
    }


SHORT = json.loads((Path(__file__).parent / "scandinavian.json").read_text(encoding="utf-8"))
CAPTIONS = [json.loads(path.read_text()) for path in sorted((Path(__file__).parents[1] / "captions/answers").iterdir())]


def counts(texts: list[str], language: str) -> Counter[str]:
    """How many texts are "right", "undetermined" or "wrong"."""
    found = [identify(text, among_all=True) for text in texts]
    return Counter("undetermined" if sure < SURE else "right" if code == language else "wrong" for code, sure in found)


@pytest.mark.parametrize("language", SHORT)
def test_a_short_scandinavian_sentence_is_told_by_its_spelling_and_never_wrongly(language):
    """The same 36 sentences of 36 to 100 characters in each; some are spelled alike. `-rP` shows the counts."""
    found = counts(SHORT[language], language)
    print(language, dict(found))
    assert not found["wrong"]
    assert found["right"] >= 0.9 * len(SHORT[language])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_of_a_caption_is_never_taken_for_another_language(language):
    """Of 40 characters or more, 20 in Chinese, Japanese and Korean; seven captions a language."""
    sentences = [one for made in CAPTIONS for one in re.split(r"(?<=[.۔।])\s+|(?<=。)", made[language]["caption"])]
    texts = [one for one in sentences if len(one) >= (20 if language in ("zh", "ja", "ko") else 40)]
    found = counts(texts, language)
    print(language, dict(found))
    assert not found["wrong"]
    assert found["right"] >= (0.9 if language == "no" else 0.98) * len(texts)


def test_a_name_or_a_quotation_speaks_for_no_language():
    assert contradictions("hvid og hvide") == {"da": 0, "no": 2, "sv": 3}
    assert contradictions("Hoffmann, «tack» og “nickel”") == {"da": 0, "no": 0, "sv": 1}
    assert contradictions("en to fire") == {"da": 0, "no": 0, "sv": 0}
