"""The former name of `data_prep.curation`, for scripts that import from it."""

import importlib
import sys
import warnings

warnings.warn("data_prep.shaping is data_prep.curation now", DeprecationWarning, stacklevel=2)

_SAME = ("dedup", "minhash", "mix", "passes", "phash", "relabel", "similarity", "split_long", "tokens")
_NOW = {**dict(zip(_SAME, _SAME, strict=True)), "languages": "language_id", "stored": "signature_store"}
for _old, _new in _NOW.items():  # a name in sys.modules can be imported, so that both names are one module
    sys.modules[f"{__name__}.{_old}"] = globals()[_old] = importlib.import_module(f"data_prep.curation.{_new}")
