"""The evaluation sets of the paper and of ViDoRe's later versions: names, counts as published, and where they lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.shards import MANIFEST, Dataset, ShardError

from stage_trainer.errors import UserError

SPLITS = ("test", "validation")
"""Of a corpus only the first of these that exists is evaluated."""
SET = "set.json"
"""What `data-prep evalset` writes beside a set of texts."""
CLASS_NAMES = "classnames.txt"
"""What makes a folder of labelled images a set for classification."""
_DEPTH = 4  # DATA/test/image-short/NAME, and DATA/cqadupstack/android


@dataclass(frozen=True)
class EvalSet:
    """A set that figures are published of.

    Attributes:
        name: as in the paper's tables, or its task's in MTEB.
        kind: "captions" (photos), "pages" (documents), "retrieval" or "pairs" (texts), "classes" (labelled images).
        also: other names of its folder; letters and digits count, their case does not.
        languages: of its captions or queries.
        counts: as published, by what is counted; several numbers where sources differ. Of "texts" in each language.
    """

    name: str
    kind: str
    also: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def names(self) -> set[str]:
        return {plain(name) for name in (self.name, *self.also)}


_XM3600 = "ar bn da de el en es fi fr hi id it ja ko nl no pl pt ro ru sv th tr uk vi zh"
XM3600 = tuple(_XM3600.split())
XTD10 = ("de", "en", "es", "fr", "it", "ko", "pl", "ru", "tr", "zh")
_FOUR = ("de", "en", "es", "fr")
_SIX = ("de", "en", "es", "fr", "it", "pt")


def _captions() -> Iterator[EvalSet]:
    yield EvalSet("Flickr30K", "captions", (), ("en",), {"images": (1000,), "texts": (5000,)})
    coco = ("coco", "mscoco_captions")
    yield EvalSet("MS COCO", "captions", coco, ("en",), {"images": (5000,), "texts": (25_010, 25_000)})
    of_each = {"images": (3600,), "texts": (3600,)}
    yield EvalSet("Crossmodal-3600", "captions", ("xm3600",), XM3600, of_each)
    xtd = ("xtd10", "multilingual_mscoco_captions")
    yield EvalSet("multilingual MS COCO", "captions", xtd, XTD10, {"images": (1000,), "texts": (1000,)})


_RETRIEVAL = """
    ArguAna arguana 1406 8674 | ClimateFEVER climate-fever 1535 5416593 | DBPedia dbpedia,dbpedia-entity 400 4635922
    FEVER fever 6666 5416568 | FiQA2018 fiqa 648 57638 | HotpotQA hotpotqa 7405 5233329 | MSMARCO msmarco 6980 8841823
    NFCorpus nfcorpus 323 3633 | NQ nq 3452 2681468 | QuoraRetrieval quora 10000 522931 | SCIDOCS scidocs 1000 25657
    SciFact scifact 300 5183 | TRECCOVID trec-covid 50 171332 | Touche2020 touche2020,webis-touche2020 49 382545"""
_CQA = "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix Webmasters Wordpress"
CQA = tuple(_CQA.split())  # CQADupstackRetrieval is the mean of these twelve
SAME_IDS_LEFT_OUT = frozenset({"ArguAna", "FEVER", "FiQA2018", "MSMARCO", "QuoraRetrieval"})
"""MTEB's `ignore_identical_ids`: a document with the query's own id is not ranked."""

_PAIRS = """
    BIOSSES biosses-sts 100 | SICK-R sickr-sts 9927 | STS12 sts12-sts 3108 | STS13 sts13-sts 1500 | STS14 sts14-sts 3750
    STS15 sts15-sts 3000 | STS16 sts16-sts 1186 | STS17 sts17-crosslingual-sts 250 | STS22 sts22-crosslingual-sts 197
    STSBenchmark stsbenchmark-sts 1379"""

_PAGES_1 = """
    ArxivQ arxivqa 500 500 | DocQ docvqa 451 500 | InfoQ infovqa 494 500 | TabF tabfquad 280 70 | TATQ tatdqa 1646 277
    Shift shiftproject 100 1000 | AI syntheticDocQA_artificial_intelligence 100 968
    Energy syntheticDocQA_energy 100 977 | Gov syntheticDocQA_government_reports 100 972
    Health syntheticDocQA_healthcare_industry 100 965"""
_TASKS_1 = {
    "ArxivQ": "ArxivQA", "DocQ": "DocVQA", "InfoQ": "InfoVQA", "TabF": "Tabfquad", "TATQ": "Tatdqa",
    "Shift": "ShiftProject", "AI": "SyntheticDocQAAI", "Energy": "SyntheticDocQAEnergy",
    "Gov": "SyntheticDocQAGovernmentReports", "Health": "SyntheticDocQAHealthcareIndustry",
}  # fmt: skip
_PAGES_2 = {"esg_reports_v2": (57, 1538), "economics_reports_v2": (58, 452), "biomedical_lectures_v2": (160, 1016)}
_PAGES_3 = ["finance_en", "finance_fr", "industrial", "pharmaceuticals", "computer_science", "hr", "energy", "physics"]


def _rows(table: str) -> Iterator[list[str]]:
    return (row.split() for line in table.splitlines() for row in line.split("|") if row.strip())


def _texts() -> Iterator[EvalSet]:
    for name, folders, queries, documents in _rows(_RETRIEVAL):
        counts = {"queries": (int(queries),), "documents": (int(documents),)}
        yield EvalSet(name, "retrieval", tuple(folders.split(",")), ("en",), counts)
    for name in CQA:
        yield EvalSet(f"CQADupstack{name}Retrieval", "retrieval", (f"cqadupstack-{name}",))
    for name, folder, pairs in _rows(_PAIRS):
        yield EvalSet(name, "pairs", (folder,), ("en",), {"pairs": (int(pairs),)})


def _pages() -> Iterator[EvalSet]:
    for name, folder, queries, pages in _rows(_PAGES_1):
        also = [folder, *(f"{folder}_test{more}" for more in ("", "_beir", "_subsampled", "_subsampled_beir"))]
        also += [f"vidore-{each}" for each in also] + [f"vidore-{name}", f"Vidore{_TASKS_1[name]}Retrieval"]
        # Two of the ten are French, and mteb calls all of them English: a language says nothing here.
        counts = {"queries": (int(queries),), "pages": (int(pages),)}
        yield EvalSet(name, "pages", tuple(also), (), counts)
    for name, (asked, held) in _PAGES_2.items():
        yield EvalSet(name, "pages", (f"vidore-{name}",), _FOUR, {"queries": (asked,), "pages": (held,)})
    human = "esg_reports_human_labeled_v2"
    yield EvalSet(human, "pages", (f"vidore-{human}",), ("en",), {"queries": (52,), "pages": (1538,)})
    for name in _PAGES_3:
        called = f"vidore_v3_{name}"
        yield EvalSet(called, "pages", (f"{called}_mteb_format",), _SIX)


SETS: dict[str, EvalSet] = {each.name: each for of in (_captions, _texts, _pages) for each in of()}
V1 = tuple(row[0] for row in _rows(_PAGES_1))
V2 = (*_PAGES_2, "esg_reports_human_labeled_v2")
V3 = tuple(f"vidore_v3_{name}" for name in _PAGES_3)
STS = tuple(row[0] for row in _rows(_PAIRS))


def known_as(name: str) -> EvalSet:
    """The set of that name; one that is not in `SETS` is of labelled images."""
    return SETS.get(name) or EvalSet(name, "classes", languages=())


def captions_of(source: str, languages: Collection[str]) -> EvalSet | None:
    """The published set of photos that a data set is by its source, if it has all of its languages."""
    for known in SETS.values():
        if known.kind == "captions" and plain(source) in known.names() and set(known.languages) <= set(languages):
            return known
    return None


def plain(name: str) -> str:
    """A name's letters and digits, small: what is the same in "MS COCO" and "ms_coco"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find_sets(data: Path) -> dict[str, Path]:
    """{name in `SETS`, or of a set of labelled images: its folder} of what lies below `data`: of its `test` folder, or
    else of its `validation` folder, where it has one of them.

    Raises:
        UserError: there is no such folder, or it has a set twice.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}; give a folder of evaluation sets, as `data-prep evalset` makes it")
    alone = (data / CLASS_NAMES).is_file()  # a set itself, whose tars are in its test folder
    root = data if alone else next((data / split for split in SPLITS if (data / split).is_dir()), data)
    found: dict[str, Path] = {}
    for folder in _set_folders(root):
        for name in _names(folder):
            if name in found:
                raise UserError(f"{root} has {name} twice, {found[name]} and {folder}; move one of them away")
            found[name] = folder
    return found


def _names(folder: Path) -> list[str]:
    if (folder / CLASS_NAMES).is_file():
        return [folder.resolve().name]
    called = {plain(folder.name), plain(folder.parent.name + folder.name), *_source(folder)}
    return [name for name, known in SETS.items() if called & known.names()]


def _source(folder: Path) -> set[str]:
    """What a data set in shards says it is; its folder may have been renamed."""
    if not (folder / MANIFEST).is_file():
        return set()
    try:
        return {plain(Dataset.open(folder).source)}
    except ShardError as error:
        raise UserError(str(error)) from error


def _set_folders(root: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(root, followlinks=True):
        here = Path(where)
        held = {MANIFEST, SET, CLASS_NAMES, "corpus.jsonl", "test.jsonl"} & set(files)
        if held or len(here.relative_to(root).parts) >= _DEPTH:
            folders.clear()
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if held:
            yield here
