"""`data-prep import SOURCE`, `index` and `evalset SET`: public data to shards."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from data_prep.commands import Subcommands
from data_prep.commands.execution import add_execution, execution_of, made, target_of
from data_prep.image_rule import ENCODINGS, FITS, KERNELS, ImageRule
from data_prep.shards.format import JsonObject
from data_prep.sources import EVALSETS, SOURCES
from data_prep.sources.text_evalsets import FOLDER, TEXT_EVALSETS, write_text_set


def add(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "import",
        help="public data sets to shards, one importer a source",
        description="Writes the data sets OUT/KIND/NAME, folders that a recipe can name; KIND is text-pairs, "
        "text-triplets, image-short or image-long. They appear when complete; to resume, run the command again.",
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE", prog="data-prep import")
    for name, source in SOURCES.items():
        one = _add_source(sources, name, source, out="folder of the data sets, data/train for example")
        one.set_defaults(run=_import)
    _add_index(commands)
    _add_evalset(commands)


def _add_index(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "index",
        help="use existing webdataset tars as they are, with sidecars",
        description="Makes the data set OUT/KIND/NAME of links to webdataset tars and a sidecar for each: where every "
        "sample lies, and its hash. The tars are neither copied nor changed; they must stay where they are. Samples "
        "that training would refuse (no image, no caption, not UTF-8, broken) are left out and counted.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="uncompressed tars, or folders of them")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the data sets")
    parser.add_argument("--name", default="indexed", help="name of the data set (default: %(default)s)")
    parser.add_argument(
        "--kind",
        choices=("image-short", "image-long", "text-pairs", "text-triplets"),
        default="image-short",
        help="what the tars hold (default: %(default)s)",
    )
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        help="field of the .json that holds a caption, or a list of them: a name, or a path (meta.alt); commas part "
        "several (default: a .json of our format, else the .txt)",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, metavar="N", help="refuse larger images (default: %(default)s)"
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="look at the headers of images alone, which is much faster"
    )
    add_execution(parser, cuts=False)
    parser.set_defaults(run=_index)


def _add_evalset(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "evalset",
        help="evaluation sets, laid out for `stage-trainer evaluate`",
        description="Writes OUT/test/image-short/NAME, which `stage-trainer evaluate MODEL OUT` reads, or of texts "
        f"OUT/test/{FOLDER}/NAME; `stage-trainer evaluate MODEL OUT --suite all` measures both by the paper's tables. "
        "A recipe's evaluation.pools, which are measured in training, are those of OUT/validation: --split validation.",
    )
    sets = parser.add_subparsers(required=True, metavar="SET", prog="data-prep evalset")
    for name, source in EVALSETS.items():
        one = _add_source(sets, name, source, out="folder of the pools")
        one.add_argument(
            "--split",
            choices=("test", "validation"),
            default="test",
            help="of OUT: test for `stage-trainer evaluate`, validation for a recipe's pools (default: %(default)s)",
        )
        one.set_defaults(run=_evalset)
    for name, texts in TEXT_EVALSETS.items():
        summary, _, more = (texts.__doc__ or "").partition("\n")
        one = sets.add_parser(name, help=summary, description=f"{summary}. {' '.join(more.split())}")
        _add_values(one, texts)
        one.add_argument("--out", required=True, metavar="OUT", help="folder of the sets")
        one.add_argument("--name", required=True, help="of the set, as its task in MTEB")
        one.set_defaults(run=_text_evalset, source=texts)


def _add_source(sources: Subcommands, name: str, source: type[Any], *, out: str) -> argparse.ArgumentParser:
    """Register a source as a subcommand, with all its options; `out` explains --out."""
    summary, _, more = (source.__doc__ or "").partition("\n")
    one: argparse.ArgumentParser = sources.add_parser(
        name, help=summary, description=f"{summary}. {' '.join(more.split())}"
    )
    _add_values(one, source)
    one.add_argument("--out", required=True, metavar="OUT", help=out)
    one.add_argument("--name", default=name, help="name of what comes out (default: %(default)s)")
    if source.image is not None:
        _add_image_rule(one, source.image)
    add_execution(one)
    one.set_defaults(source=source, title=name)
    return one


def _add_values(parser: argparse.ArgumentParser, source: type[Any]) -> None:
    """Add arguments for the fields of a source: positional ones without a default, the others as --name."""
    for value in dataclasses.fields(source):
        explanation, choices = value.metadata["help"], value.metadata.get("choices")
        many: JsonObject = {"nargs": "+"} if str(value.type).startswith("tuple") else {}
        if value.default is dataclasses.MISSING:
            parser.add_argument(value.name, metavar=value.name.upper(), help=explanation, **many)
            continue
        flag = f"--{value.name.replace('_', '-')}"
        if isinstance(value.default, bool):
            parser.add_argument(flag, action="store_true", help=explanation)
            continue
        explanation += "" if not value.default or "default" in explanation else " (default: %(default)s)"
        metavar = None if choices else value.name.rpartition("_")[2].upper()
        parser.add_argument(
            flag, default=value.default, type=type(value.default), choices=choices, metavar=metavar, help=explanation
        )


def _add_image_rule(parser: argparse.ArgumentParser, rule: ImageRule) -> None:
    """Add options for how images are stored, with the source's rule as the default."""
    group = parser.add_argument_group("images", "How images are stored.")
    group.add_argument("--image-size", type=int, default=rule.size, metavar="PIXELS", help="default: %(default)s")
    group.add_argument(
        "--fit",
        choices=FITS,
        default=rule.fit,
        help="which side gets that size; shortest and longest keep the shape and never enlarge (default: %(default)s)",
    )
    group.add_argument(
        "--image-encoding",
        choices=ENCODINGS,
        default=rule.encoding,
        help="of images that cannot stay as they are (default: %(default)s)",
    )
    group.add_argument("--quality", type=int, default=rule.quality, help="of jpg and webp (default: %(default)s)")
    group.add_argument(
        "--kernel",
        choices=KERNELS,
        default=rule.kernel,
        help="hamming is faster, bicubic is sharper (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels", type=int, default=rule.max_pixels, metavar="N", help="refuse larger ones (default: %(default)s)"
    )


def _run_import(options: argparse.Namespace, *, out: str, evalset: bool = False) -> JsonObject | None:
    """Import the source of the command line into `out`; returns the receipt."""
    from data_prep.sources.importing import import_source

    receipt = import_source(
        made(options.source, options),
        target_of(options, out),
        title=options.title,
        evalset=evalset,
        image=made(ImageRule, options, size=options.image_size, encoding=options.image_encoding)
        if options.source.image is not None
        else None,
        execution=execution_of(options),
    )
    _say_what_is_lost(receipt, out, options.name)
    return receipt


def _say_what_is_lost(receipt: JsonObject | None, out: str, name: str) -> None:
    """A line if more than a twentieth of what came in was dropped: two files that do not belong together look so."""
    dropped: dict[str, int] = (receipt or {}).get("dropped", {})
    if receipt and sum(dropped.values()) * 20 > receipt["came_in"]:
        share, most = sum(dropped.values()) / receipt["came_in"], max(dropped, key=dropped.__getitem__)
        place = Path(out) / next(iter(receipt["went_out"])) / name / receipt.get("listed", "receipt.json")
        print(f"WARNING: {share:.0%} of what came in was dropped, most of it for: {most} (all of it: {place})")


def _import(options: argparse.Namespace) -> int:
    if not getattr(options, "held_out", 0.0):
        _run_import(options, out=options.out)
        return 0
    for split in [options.split] if options.split else ["train", "validation"]:
        options.split = split
        print(f"{split}:")
        _run_import(options, out=f"{options.out}/{split}")
    return 0


def _index(options: argparse.Namespace) -> int:
    from data_prep.sources.indexing import IndexRule, index_shards

    rule = IndexRule(
        options.kind,
        caption_keys=tuple(options.caption_key.split(",")) if options.caption_key else (),
        max_pixels=options.max_pixels,
        decode=not options.no_decode,
    )
    index_shards(options.shards, options.out, name=options.name, rule=rule, execution=execution_of(options))
    return 0


def _evalset(options: argparse.Namespace) -> int:
    root = Path(options.out)
    receipt = _run_import(options, out=str(root / options.split), evalset=True)
    if receipt is not None:
        if receipt.get("dropped"):
            print("not the whole set: figures on it cannot be compared with those of others")
        pools = root if options.split == "test" else root / options.split / "image-short"
        print(f"stage-trainer evaluate MODEL {pools}")
    return 0


def _text_evalset(options: argparse.Namespace) -> int:
    root = Path(options.out)
    described = write_text_set(made(options.source, options), root / "test", options.name)
    counts = ", ".join(f"{count:,} {what}" for what, count in described["counts"].items())
    print(f"{root / 'test' / FOLDER / options.name}: {counts}")
    print(f"stage-trainer evaluate MODEL {root} --suite text")
    return 0
