"""Parallel corpora: Moses files and TMX, as OpusTools and translate-toolkit write them, and broken ones."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from data_prep.errors import UserError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from translate.storage.tmx import tmxfile

SENTENCES = {
    "de": ["Guten Tag & hallo", "Zwei  Leerzeichen", 'Er sagte: "ja" <leise>', "Grüße ‘an’ alle\u00a0…"],
    "en": ["Good day & hello", "Two  spaces", 'He said: "yes" <softly>', "Greetings ‘to’ all\u00a0…"],
}


EXPECTED = list(zip(SENTENCES["de"], SENTENCES["en"], strict=True))


@pytest.fixture(scope="module")
def opus(tmp_path_factory) -> Path:
    """b.de, b.en and b.tmx, as OPUS has them."""
    root, memory = tmp_path_factory.mktemp("opus"), tmxfile(sourcelanguage="de", targetlanguage="en")
    for code, sentences in SENTENCES.items():
        (root / f"b.{code}").write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
    for german, english in EXPECTED:
        memory.addtranslation(german, "de", english, "en")
    (root / "b.tmx").write_bytes(bytes(memory))
    return root


WRITER = """
import sys
from opustools import OpusRead
for mode, names in {"tmx": ["b.tmx"], "moses": ["b.de", "b.en"]}.items():
    write = [f"{sys.argv[1]}/{name}" for name in names]
    place = dict(directory="Books", source="de", target="en", preprocess="raw", download_dir=sys.argv[1])
    OpusRead(**place, write_mode=mode, write=write, suppress_prompts=True).printPairs()
"""


@pytest.mark.full
def test_what_opustools_writes_from_a_release_is_read_alike(opus, run, tmp_path):
    """In a folder of its own: its wheel has a package `tests`, which hides ours."""
    for code, sentences in SENTENCES.items():
        marked = "".join(f'<s id="{number}">{escape(text)}</s>\n' for number, text in enumerate(sentences, 1))
        with zipfile.ZipFile(tmp_path / f"Books_latest_raw_{code}.zip", "w") as file:
            file.writestr(f"Books/raw/{code}/a.xml", f'<?xml version="1.0" encoding="utf-8"?>\n<text>\n{marked}</text>')
    links = "".join(f'<link xtargets="{number};{number}" id="SL{number}"/>\n' for number in range(1, 5))
    with gzip.open(tmp_path / "Books_latest_xml_de-en.xml.gz", "wt") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<cesAlign version="1.0">\n<linkGrp targType="s" ')
        file.write(f'fromDoc="de/a.xml.gz" toDoc="en/a.xml.gz">\n{links}</linkGrp>\n</cesAlign>\n')
    uv, site = Path(sys.executable).with_name("uv"), tmp_path / "site"
    wanted = ["opustools", "ruamel.yaml"]
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--target", site, *wanted], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", WRITER, tmp_path], check=True, env=environment)
    for code in SENTENCES:
        assert (tmp_path / f"b.{code}").read_bytes() == (opus / f"b.{code}").read_bytes()
    assert pairs(run("tmx", files=[tmp_path / "b.tmx"])) == EXPECTED


def pairs(outcome) -> list[tuple[str, str]]:
    return [(s.content["query"][0]["text"], s.content["target"][0]["text"]) for s in outcome.samples["text-pairs"]]


@pytest.mark.parametrize("form", ["plain", "gzip", "mixed", "zip", "folder"])
def test_files_of_opus_become_pairs_word_for_word(opus, run, tmp_path, form):
    raw = {code: (opus / f"b.{code}").read_bytes() for code in ("de", "en")}
    names = {"de": "Books.de-en.de", "en": "Books.de-en.en"}
    if form == "zip":
        given = [tmp_path / "de-en.txt.zip"]
        with zipfile.ZipFile(given[0], "w", zipfile.ZIP_DEFLATED) as file:
            others = {"LICENSE": b"free", "Books.de-en.xml": b"<x/>", "__MACOSX/._Books.de-en.de": b"\0"}
            for name, data in others.items():
                file.writestr(name, data)
            for code in raw:
                file.writestr(names[code], raw[code])
    else:
        packed = {"gzip": ("de", "en"), "mixed": ("en",)}.get(form, ())
        for code, data in raw.items():
            path = tmp_path / "in" / (names[code] + (".gz" if code in packed else ""))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(data) if code in packed else data)
            path.with_name(f"._{path.name}").write_bytes(b"\0")
        given = [tmp_path / "in"] if form == "folder" else sorted((tmp_path / "in").glob("B*"))
    found = run("moses", files=given)
    assert pairs(found) == EXPECTED
    assert found.samples["text-pairs"][0].row.languages == ("de", "en")
    turned = run("moses", files=given[::-1] if len(given) == 2 else given, out=tmp_path / "turned",
                 languages="" if len(given) == 2 else "en,de")  # fmt: skip
    assert pairs(turned) == [(b, a) for a, b in EXPECTED]


def test_pieces_keep_the_lines_together_and_a_bad_line_costs_its_pair(run, tmp_path, monkeypatch):
    import data_prep.sources.moses as module

    monkeypatch.setattr(module, "_LINES", 7)
    first = [f"Zeile {n}\u2028\x0b{'x' * n}".encode() for n in range(50)]
    second = [f"line {n}\x85\x1c".encode() for n in range(50)]
    first[11], second[30], first[40] = b"latin \xe9", b"", b" "
    (tmp_path / "c.de").write_bytes(b"\n".join(first))  # the last line has no end
    (tmp_path / "c.pt_BR").write_bytes(b"\r\n".join(second) + b"\r\n")
    found = run("moses", files=[tmp_path / "c.de", tmp_path / "c.pt_BR"])
    kept = [n for n in range(50) if n not in (11, 30, 40)]
    assert pairs(found) == [(first[n].decode(), second[n].decode()) for n in kept]
    assert found.receipt["job"]["units"] == 8
    assert found.dropped == {"not UTF-8": 1, "empty line": 2}
    assert found.receipt["examples"]["not UTF-8"] == ["c.de, line 12"]
    assert found.samples["text-pairs"][0].row.languages == ("de", "pt")


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_different_lengths_are_refused(run, tmp_path, packed):
    names = [tmp_path / f"c.{code}{'.gz' if packed else ''}" for code in ("de", "en")]
    for path, raw in zip(names, (b"a\nb\n", b"a\n"), strict=True):
        path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(UserError, match=r"c\.en.* (has )?1( lines|: line by line)"):
        run("moses", files=names)
    assert not (tmp_path / "out" / "text-pairs").exists()


def test_what_are_no_two_files_of_two_languages_is_said(run, tmp_path):
    for name in ("a.de", "a.en", "b.de", "b.en", "notes.txt"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(UserError, match="expected two files such as corpus.de and corpus.en, found a.de, a.en"):
        run("moses", files=[tmp_path])
    with pytest.raises(UserError, match="3 files: expected two"):
        run("moses", files=[tmp_path / "a.de"] * 3)
    with pytest.raises(UserError, match="expected two files, or a zip or folder of two"):
        run("moses", files=[tmp_path / "a.de"])
    with pytest.raises(UserError, match="do not end in languages"):
        run("moses", files=[tmp_path / "notes.txt", tmp_path / "a.1"])
    assert run("moses", files=[tmp_path / "notes.txt", tmp_path / "a.de"], languages="en,de").samples


def test_tmx_of_opus_becomes_pairs_word_for_word(opus, run, tmp_path):
    assert pairs(run("tmx", files=[opus / "b.tmx"])) == EXPECTED
    (tmp_path / "b.tmx.gz").write_bytes(gzip.compress((opus / "b.tmx").read_bytes()))
    assert pairs(run("tmx", files=[tmp_path / "b.tmx.gz"], out=tmp_path / "gz", languages="en,de")) == [
        (b, a) for a, b in EXPECTED
    ]


_TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="\ufffe\uffff"), min_size=1, max_size=40
).filter(lambda text: text == text.strip() and text)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.tuples(_TEXTS, _TEXTS), min_size=1, max_size=8))
def test_tmx_of_translate_toolkit_comes_back_letter_for_letter(texts, tmp_path_factory):
    from data_prep.sources import SOURCES

    place = tmp_path_factory.mktemp("tmx") / "t.tmx"
    memory = tmxfile()
    for source, target in texts:
        memory.addtranslation(source, "en", target, "zh_CN")
    memory.savefile(str(place))
    source = SOURCES["tmx"]((str(place),))
    found = [record for piece in source.pieces() for record in source.read(piece)]
    assert [(r.query[0].text, r.target[0].text, r.query[0].language, r.target[0].language) for r in found] == [
        (a, b, "en", "zh") for a, b in texts
    ]


def unit(*variants: tuple[str, str], more: str = "") -> str:
    return (
        "<tu>" + "".join(f'<tuv xml:lang="{code}"><seg>{text}</seg></tuv>' for code, text in variants) + more + "</tu>"
    )


def memory(*units: str) -> str:
    return (
        f'<?xml version="1.0"?>\n<tmx version="1.4"><header srclang="fr"/><body>\n{chr(10).join(units)}\n</body></tmx>'
    )


GOOD = unit(("de", "Tag"), ("fr", "jour"))
UNITS = [
    GOOD,
    unit(("de", "a & b"), ("fr", "c")),
    unit(("de", "nur"), ("de", "doppelt")),
    unit(("de", " "), ("fr", "leer")),
    "<!-- " + unit(("de", "weg"), ("fr", "parti")) + " -->",
    unit(("de", "<bpt i='1'>{b}</bpt>fett<ept i='1'>{/b}</ept> und <hi>mehr</hi><ph>{x}</ph>!"), ("fr", "gras")),
    unit(("de", "x"), ("fr", "y"), ("it", "z")),
    "<tu segtype='block'>" + GOOD[4:],
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_a_bad_unit_costs_itself_alone_wherever_pieces_end(run, tmp_path, monkeypatch, encoding, piece):
    import data_prep.sources.tmx as module

    monkeypatch.setattr(module, "_BYTES", piece)
    (tmp_path / "t.tmx").write_bytes(memory(*UNITS).replace("\n", "\r\n").encode(encoding))
    found = run("tmx", files=[tmp_path])
    assert pairs(found) == [("jour", "Tag"), ("gras", "fett und mehr!"), ("jour", "Tag")]
    assert found.dropped == {
        "unit that is not XML": 1,
        "unit in one language": 1,
        "empty text": 1,
        "unit in several languages: say --languages": 1,
    }


def test_a_memory_that_is_cut_short_gives_what_it_has(run, tmp_path):
    raw = memory(GOOD, GOOD).encode()
    (tmp_path / "t.tmx").write_bytes(raw[: raw.rindex(b"</seg>")])
    found = run("tmx", files=[tmp_path])
    assert (found.receipt["went_out"], found.dropped) == ({"text-pairs": 1}, {"unit that does not end": 1})
    packed = gzip.compress(memory(*[unit(("de", f"{n:x<900}"), ("fr", "b")) for n in range(2000)]).encode(), 0)
    (tmp_path / "t.tmx").unlink()
    (tmp_path / "t.tmx.gz").write_bytes(packed[:-50_000])
    found = run("tmx", files=[tmp_path], out=tmp_path / "out2")
    assert found.receipt["went_out"]["text-pairs"] > 1000
    assert found.dropped["rest of a packed file that is cut short or damaged"] == 1
    (tmp_path / "t.tmx").write_text("<html/>")
    with pytest.raises(UserError, match="is no TMX"):
        run("tmx", files=[tmp_path / "t.tmx"], out=tmp_path / "out3")


def test_codes_of_translators_are_the_house_s(run, tmp_path):
    codes = {
        "en-US": "en",
        "DE-de": "de",
        "zh_Hans_CN": "zh",
        "deu_Latn": "de",
        "nb": "no",
        "cmn": "zh",
        "cs-CZ": "cs",
    }
    units = [unit((code, "a"), ("fr-CA", "b")) for code in codes]
    (tmp_path / "t.tmx").write_text(memory(*units))
    found = run("tmx", files=[tmp_path])
    assert [s.content["target"][0]["language"] for s in found.samples["text-pairs"]] == list(codes.values())
    assert {s.content["query"][0]["language"] for s in found.samples["text-pairs"]} == {"fr"}


def test_the_encoding_that_a_memory_states_is_its_encoding(run, tmp_path):
    def memory(name: str, encoding: str) -> Path:
        text = f'<?xml version="1.0" encoding="{encoding}"?><tmx version="1.4"><header srclang="de"/><body>' + "".join(
            f'<tu><tuv xml:lang="de"><seg>{first}</seg></tuv><tuv xml:lang="en"><seg>{second}</seg></tuv></tu>'
            for first, second in [("grün", "green"), ("gr\x81n", "broken")]
        )
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        return tmp_path / name

    found = run("tmx", files=[memory("a.tmx", "windows-1252")])
    assert [sample.content["query"][0]["text"] for sample in found.samples["text-pairs"]] == ["grün"]
    assert found.dropped == {"unit that is not XML": 1}  # windows-1252 has no 0x81
    converted = memory("c.tmx", "UTF-16")  # it was, until someone converted it
    converted.write_bytes(converted.read_bytes().decode("latin-1").replace("\x81", "ü").encode())
    assert len(run("tmx", files=[converted], out=tmp_path / "third").samples["text-pairs"]) == 2
    with pytest.raises(UserError, match="states the encoding 'ebcdic-cp-us', which is not read here"):
        run("tmx", files=[memory("b.tmx", "ebcdic-cp-us")], out=tmp_path / "again")


@pytest.mark.parametrize("stated", ["ISO-8859-1", "us-ascii"])
def test_a_memory_in_utf_8_is_that_whatever_it_states(run, tmp_path, stated):
    unit = "<tu><tuv xml:lang='de'><seg>schön</seg></tuv><tuv xml:lang='en-UK'><seg>nice</seg></tuv></tu>"
    head = f'<?xml version="1.0" encoding="{stated}"?><tmx version="1.4"><header srclang="de"/><body>'
    (tmp_path / "a.tmx").write_text(f"{head}{unit}</body></tmx>", encoding="utf-8")
    (pair,) = run("tmx", files=[tmp_path / "a.tmx"], languages="de,en").samples["text-pairs"]
    assert pair.content["query"][0]["text"] == "schön"
