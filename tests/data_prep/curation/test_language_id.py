"""Languages of texts of unknown origin: found, or undetermined, rather than wrong."""

from __future__ import annotations

import pytest
from data_prep.curation.language_id import MIN_LETTERS, identify, letters
from data_prep.curation.relabel import SURE

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
