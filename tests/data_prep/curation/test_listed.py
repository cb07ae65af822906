"""Curation lists every sample that goes, and every text that goes while its sample stays."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import encoded, photo, run, text


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_texts_and_samples_in_another_language_than_said(write_images, tmp_path):
    german = "Ein kleiner Hund läuft am Morgen schnell durch den grünen Park."
    english = "A small dog runs quickly through the green park in the morning."
    samples = [
        (encoded(photo(0)), [text(english), text(german, "en")]),
        (encoded(photo(1)), [text(english)]),
        (encoded(photo(2)), [text(german, "en")]),
    ]
    source = write_images("web", samples)
    run("languages", source, "--out", tmp_path / "out", "--name", "n", "--workers", "1")
    out = "text out: clearly in another language than said"
    assert [(line["where"], line["reason"], line["excerpt"]) for line in listed(tmp_path / "out/image-short/n")] == [
        (f"{source}: web-0", out, f"en: {german}"),
        (f"{source}: web-2", out, f"en: {german}"),
        (f"{source}: web-2", "no text in a language that is known for sure", german),
    ]


def test_duplicates_with_what_each_fell_to_more_than_the_receipt_has_room_for(write_pairs, tmp_path, capsys):
    source = write_pairs("texts", [("What is frozen water called?", f"Ice number {n % 2}") for n in range(20)])
    run("dedup", source, "--out", tmp_path / "out", "--name", "n", "--workers", "1", "--exact")
    folder = tmp_path / "out/text-pairs/n"
    lines = listed(folder)
    assert [line["where"] for line in lines] == [
        f"{source}: texts-{n}, like {source}: texts-{n % 2}" for n in range(2, 20)
    ]
    assert {(line["source"], line["reason"]) for line in lines} == {(source, "the same as an earlier one")}
    assert lines[0]["excerpt"] == "What is frozen water called? | Ice number 0"
    assert f"each that was dropped: {folder / 'dropped.jsonl'}" in capsys.readouterr().out
