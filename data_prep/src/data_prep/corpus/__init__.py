"""The laptop corpus: real pictures with real captions in thirty languages from Debian packages, or a drawn one."""

from data_prep.corpus.build import CORPUS_VERSION, build_corpus
from data_prep.corpus.items import Settings

__all__ = ["CORPUS_VERSION", "Settings", "build_corpus"]
