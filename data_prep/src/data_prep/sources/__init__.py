"""Importers: what others publish, turned into records that become samples. One module a family of sources.

`SOURCES` is the list, in the order in which `data-prep import --help` shows it; `EVALSETS` that of `data-prep evalset`.
"""

from __future__ import annotations

from typing import Any

from .captions import ArxivCap, Karpathy, ShareGpt4v
from .evalsets import Coco, Flickr30k, Xm3600, Xtd10
from .folder import Folder
from .img2dataset import DataComp, Img2dataset
from .pdf import PdfFolder, TatDqa
from .questions import ArxivQa, DocVqa, InfographicsVqa, SciGraphQa
from .records import Source
from .texts import Texts
from .vidore import Vidore, VidoreBenchmark
from .wit import Wit

SOURCES: dict[str, type[Any]] = {
    "images": Folder,
    "texts": Texts,
    "img2dataset": Img2dataset,
    "datacomp": DataComp,
    "wit": Wit,
    "pdf": PdfFolder,
    "vidore": Vidore,
    "docvqa": DocVqa,
    "infographicsvqa": InfographicsVqa,
    "tatdqa": TatDqa,
    "scigraphqa": SciGraphQa,
    "arxivqa": ArxivQa,
    "arxivcap": ArxivCap,
    "sharegpt4v": ShareGpt4v,
    "karpathy": Karpathy,
}

EVALSETS: dict[str, type[Any]] = {
    "xm3600": Xm3600,
    "xtd10": Xtd10,
    "flickr30k": Flickr30k,
    "coco": Coco,
    "vidore": VidoreBenchmark,
}


def source_of(options: dict[str, Any]) -> Source:
    """The source that a unit's options name."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options["values"].items()}
    return (EVALSETS if options["evalset"] else SOURCES)[options["source"]](**values)


__all__ = ["EVALSETS", "SOURCES", "Source", "source_of"]
