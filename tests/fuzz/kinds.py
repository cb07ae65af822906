"""All kinds of input, by name."""

from __future__ import annotations

from fuzz import data_sets, images, importers, model_folders, recipes, remote, sources, tables
from fuzz.harness import Kind

_MODULES = (data_sets, recipes, model_folders, tables, importers, sources, images, remote)

KINDS: dict[str, Kind] = {kind.name: kind for module in _MODULES for kind in module.KINDS}
