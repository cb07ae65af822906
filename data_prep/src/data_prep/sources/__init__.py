"""Importers: published data to records, which become samples. One module for each family of sources.

`SOURCES` lists them in the order of `data-prep import --help`; `EVALSETS` lists those of `data-prep evalset`.
"""

from __future__ import annotations

from typing import Any

from data_prep.sources.beir import Beir
from data_prep.sources.captions import ArxivCap, Karpathy, ShareGpt4v
from data_prep.sources.evalsets import Coco, Flickr30k, WdsPhotos, Xm3600, Xtd10
from data_prep.sources.folder import Folder
from data_prep.sources.hf import Hf
from data_prep.sources.hub_evalsets import VidoreRows, Xm3600Parquet
from data_prep.sources.img2dataset import DataComp, Img2dataset
from data_prep.sources.mds import Mds
from data_prep.sources.moses import Moses
from data_prep.sources.pdf import PdfFolder, TatDqa
from data_prep.sources.questions import ArxivQa, DocVqa, InfographicsVqa, SciGraphQa
from data_prep.sources.texts import Texts
from data_prep.sources.tmx import Tmx
from data_prep.sources.vidore import Vidore, VidoreBenchmark
from data_prep.sources.wit import Wit

SOURCES: dict[str, type[Any]] = {
    "images": Folder,
    "texts": Texts,
    "hf": Hf,
    "mds": Mds,
    "beir": Beir,
    "moses": Moses,
    "tmx": Tmx,
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
    "xm3600-parquet": Xm3600Parquet,
    "xtd10": Xtd10,
    "flickr30k": Flickr30k,
    "coco": Coco,
    "wds": WdsPhotos,
    "vidore": VidoreBenchmark,
    "vidore-rows": VidoreRows,
}

__all__ = ["EVALSETS", "SOURCES"]
