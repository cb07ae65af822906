"""Recipes and overrides: read and checked, as before every start."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fuzz.harness import Files, Kind
from fuzz.values import DEEP, DIGITS, changed, damaged
from hypothesis import strategies as st

_RECIPES = Path(__file__).parents[2] / "launch/recipes"
_SCALARS = (
    "2020-01-01", "2020-01-01 25:61:61", "12:30:45", "0x", "0b2", "1_000", "1e400", ".nan", "-.inf", "~", "yes",
    "!!timestamp x",
    "!!int x", "!!float x", "!!binary 'a'", "!!python/object/apply:os.system [id]", "!!set {a}", "!ours",
    "!ours !ours 1",
    "!ours {a: 1}", "!ours [1]", "!!map 1", "&a [*a]", "*nobody", "<<", "? a", "{<<: 1}", "{<<: [1]}", "{<<: *x}",
    "{[1]: 2}",
    "{{}: 1}", "{a: 1, a: 2}", "\"\\ud800\"", "\"\\x00\"", "!<tag:yaml.org,2002:float> 1_", "=", "-0o7", "9" * 5000,
    "[" * 2000, "&x [1, 2]", "!!omap [a: 1]", "!!null x", "!!bool maybe", "- ", ": ", "%YAML 9.9", "'", "|\n  a", "\t",
)  # fmt: skip


def _load(folder: Path) -> None:
    from stage_trainer.recipe.read import load

    overrides = json.loads((folder / "overrides.json").read_bytes()) if (folder / "overrides.json").is_file() else []
    load(folder / "recipe.yaml", overrides, stage=1)


@cache
def _whole() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(_RECIPES.glob("*.yaml"))}


def _text(document: Any) -> bytes:
    text = yaml.safe_dump(document, allow_unicode=True) if document is not None else ""
    return text.replace(DIGITS, "9" * 5000).replace(DEEP, "[" * 900 + "]" * 900).encode("utf-8", "surrogatepass")


@st.composite
def _in_a_line(draw: st.DrawFn, text: str) -> bytes:
    """Some values written as YAML's own constructors find them hard to read."""
    lines = text.splitlines()
    places = [n for n, line in enumerate(lines) if ":" in line and not line.strip().startswith("#")]
    for place in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        key = lines[place].partition(":")[0]
        value = draw(st.one_of(st.sampled_from(_SCALARS), st.text(max_size=6)))
        lines[place] = f"{key}: {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def _cases(draw: st.DrawFn) -> Files:
    name = draw(st.sampled_from(sorted(_whole())))
    text = _whole()[name]
    document = yaml.safe_load(text.replace("!ours", ""))
    content = draw(
        st.one_of(
            changed(document).map(_text),
            _in_a_line(text),
            _in_a_line(text),
            damaged(text.encode()),
            st.sampled_from(("utf-16", "latin-1", "utf-8-sig", "utf-32")).map(
                lambda c: f"{text}# ü".encode(c, "replace")
            ),
            st.binary(max_size=40),
        )
    )
    keys = ("steps", "batch.text", "model.text.width", "stages.1.lr", "optimizer", "stages.9.steps", "seed",
    "checkpoint.keep",
            "data.text", "deepspeed.zero", "stages", "output", "", "a.b.c", "sinks", "remote.gigabytes",
            "cache_megabytes")  # fmt: skip
    scalar = st.one_of(st.sampled_from(_SCALARS), st.text(max_size=6), st.integers().map(str))
    override = st.builds(
        lambda key, equals, value: f"{key}{equals}{value}", st.sampled_from(keys), st.sampled_from("== :"), scalar
    )
    overrides = draw(st.lists(override, max_size=2))
    plain = draw(st.booleans())  # the recipe itself is whole
    files = {"recipe.yaml": text.encode() if plain and overrides else content}
    return files if not overrides else {**files, "overrides.json": json.dumps(overrides).encode()}


def _valid() -> list[Files]:
    return [{"recipe.yaml": text.encode()} for name, text in _whole().items() if name != "finetune-small"]


KINDS = [Kind("recipes", _load, _valid, _cases)]
