"""What others call the thirty languages, at every door: codes become the house's, and what is no code is counted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from data_prep.captions.texts import check_languages
from data_prep.cli import main
from data_prep.languages import LANGUAGES, house_language
from data_prep.shards import Dataset, DatasetWriter


@pytest.mark.parametrize(
    ("codes", "ours"),
    [
        ("en-US en_GB EN eng eng_Latn English", "en"),
        ("pt-BR pt_PT pt_BR.UTF-8 por_Latn", "pt"),
        ("zh-CN zh_Hant zh-Hant-TW zho_Hans cmn chi yue", "zh"),
        ("de-AT deu ger deu_Latn de_DE@euro", "de"),
        ("nb nn no-NO nob_Latn nno", "no"),
        ("ara arb_Arab ar-EG arz", "ar"),
        ("lvs_Latn lav", "lv"),
        ("gre el-GR ell_Grek", "el"),
        ("in ind_Latn id-ID", "id"),
        ("iw he-IL heb_Hebr", "he"),  # not one of the thirty, and one language all the same
        ("jp ja-JP jpn_Jpan", "ja"),
        ("fil tl", "fil"),
        ("und unknown None NULL nan NaN N/A unk x-default", "und"),  # nan is a missing value more often than Min Nan
        ("nan_Hant zh-min-nan zh-classical Mandarin Chinese_(Simplified) chinese-traditional zht 中文", "zh"),
        ("Brazilian-Portuguese Portuguese_(Brazil) Português pt;q=0.9", "pt"),
        ("Norwegian-Bokmål Nynorsk norsk nb_NO.UTF-8", "no"),
        ("__label__de __label__deu_Latn lang_de 'de' (de) Deutsch German ＤＥ de-DE-1996 \ufeffde", "de"),
        ("English-US en-GB-oed simple", "en"),
        ("Tiếng\u00a0Việt vi_VN", "vi"),
        ("de-en", "de-en"),  # two languages
        ("sr-Latn sr", "sr"),
        ("mul", "mul"),
    ],
)
def test_codes_of_one_language_are_one(codes, ours):
    assert {house_language(code) for code in codes.split(" ")} == {ours}


@pytest.mark.parametrize("code", ["", "klingon!!", "a/b", "\x1b[31m", "\ud800", "x-house", "quz"])
def test_what_is_no_code_or_has_no_shorter_one_stays(code):
    assert house_language(code) == code


def test_the_thirty_need_no_library():
    program = (
        "import sys; from data_prep.languages import *; print([*map(house_language, LANGUAGES)] == [*LANGUAGES])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "print('langcodes' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]


def test_an_import_writes_the_houses_codes_and_counts_unknown_ones(tmp_path, capsys):
    rows = [{"query": "a", "positive": "b"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["import", "texts", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--language", "pt-BR,deu_Latn", "--name", "a"]) == 0
    data = Dataset.open(tmp_path / "out/text-pairs/a")
    assert data.row(0).languages == ("de", "pt")
    content = json.loads(data.read(0)["json"])
    assert [content[part][0]["language"] for part in ("query", "target")] == ["pt", "de"]
    assert main([*command, "--language", "klingon", "--name", "b"]) == 0
    assert "none of the thirty" in capsys.readouterr().out


def test_labels_of_regions_are_kept_by_languages_and_options_may_be_regions_too(tmp_path):
    texts = {"pt-BR": "Um cachorro pequeno corre pelo parque verde de manhã cedo",
             "nb": "En liten hund løper gjennom den grønne parken om morgenen",
             "zh_CN": "一只小狗早上在绿色的公园里奔跑，旁边有很多孩子"}  # fmt: skip
    with DatasetWriter(tmp_path / "data", kind="text-pairs", source="theirs") as writer:
        for code, text in texts.items():
            one = {"text": text, "language": code, "origin": "human", "role": "body"}
            content = json.dumps({"query": [one], "target": [one]}).encode()
            writer.write(code, {"json": content}, languages=[code], tokens=None)
    command = ["languages", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--name", "all"]) == 0
    data = Dataset.open(tmp_path / "out/text-pairs/all")
    assert sorted(code for n in range(len(data)) for code in data.row(n).languages) == ["no", "pt", "zh"]
    assert main([*command, "--name", "some", "--without", "pt-PT"]) == 0
    assert len(Dataset.open(tmp_path / "out/text-pairs/some")) == 2
    assert check_languages(["zh-CN", "nb", "zh"]) == ["zh", "no"]
    assert set(check_languages(["all"])) == set(LANGUAGES)


def test_a_region_that_looks_like_a_language_is_a_region_and_two_languages_are_none():
    assert [house_language(code) for code in ("en_UK", "en-EN", "ja_JA", "uk_UK")] == ["en", "en", "ja", "uk"]
    assert [house_language(code) for code in ("de-en", "de-uk")] == ["de-en", "de-uk"]
