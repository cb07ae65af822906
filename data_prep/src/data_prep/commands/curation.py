"""`data-prep split-long`, `dedup`, `languages`, `similarity`, `mix` and `negatives`: from data sets to better ones."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect

from data_prep.commands import Subcommands
from data_prep.commands.execution import add_datasets, execution_of, made, target_of


def add(commands: Subcommands) -> None:
    _add_split_long(commands)
    _add_dedup(commands)
    _add_languages(commands)
    _add_similarity(commands)
    _add_mix(commands)
    _add_negatives(commands)


def _command(commands: Subcommands, name: str, summary: str, description: str, work: str) -> argparse.ArgumentParser:
    """A command that calls `work`, "module:function" of `curation`, with the options that are parameters of it."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    add_datasets(parser)
    parser.set_defaults(run=functools.partial(_run, work))
    return parser


def _run(work: str, options: argparse.Namespace) -> int:
    module, _, function = work.partition(":")
    call = getattr(importlib.import_module(f"data_prep.curation.{module}"), function)
    own = {name: value for name, value in vars(options).items() if name in inspect.signature(call).parameters}
    call(options.shards, target_of(options), execution=execution_of(options), **own)
    return 0


def _add_split_long(commands: Subcommands) -> None:
    parser = _command(
        commands,
        "split-long",
        "move captions over 256 tokens to the long set",
        "Counts the tokens of captions: images with captions of up to --longest tokens go to OUT/image-short/NAME, "
        "those with longer ones to OUT/image-long/NAME, those with both to both.",
        "split_long:split_long",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="sentencepiece model, tokenizer.json or folder"
    )
    parser.add_argument(
        "--longest", type=int, default=256, metavar="N", help="tokens of a short caption (default: 256)"
    )


def _add_dedup(commands: Subcommands) -> None:
    parser = _command(
        commands,
        "dedup",
        "remove duplicates, and samples that evaluation sets hold",
        "Writes SHARDS, all of one kind, without duplicates, of which the first stays: images by their bytes, or by "
        "perceptual hash, colours and pixels; text pairs and triplets by all their queries and targets, or by MinHash "
        "and exact Jaccard similarity. An image that stays takes over the captions of those that go.",
        "dedup:deduplicate",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="EVAL",
        help="evaluation sets, of texts also those of `evalset beir` and `sts`; what they hold is removed",
    )
    parser.add_argument(
        "--similarity", type=float, default=0.8, metavar="X", help="of near-duplicate texts (default: 0.8)"
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=4,
        metavar="BITS",
        help="between near-duplicate images, 0 to 15 of 64 (default: 4)",
    )
    parser.add_argument(
        "--exact",
        dest="near",
        action="store_false",
        help="exact duplicates only (the hashes of pages of text are all alike)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would go, each with what it falls to, and write no data set"
    )


def _add_languages(commands: Subcommands) -> None:
    parser = _command(
        commands,
        "languages",
        "identify and check the language of every text",
        "Identifies the language of texts without one and drops texts that are clearly in another than their label.",
        "relabel:relabel",
    )
    parser.add_argument("--sure", type=float, default=0.9, metavar="P", help="probability to act on (default: 0.9)")
    parser.add_argument("--without", nargs="+", default=[], metavar="LANGUAGE", help="leave texts in these out")


def _add_similarity(commands: Subcommands) -> None:
    parser = _command(
        commands,
        "similarity",
        "remove captions that do not fit their image",
        "Scores every caption against its image and keeps those above a threshold, or the best share in each language.",
        "similarity:filter_by_similarity",
    )
    parser.add_argument("--model", required=True, help="a directory of ours, or open_clip:ARCHITECTURE:WEIGHTS")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--threshold", type=float, metavar="X", help="least cosine similarity")
    which.add_argument("--top", type=float, metavar="SHARE", help="share of the captions of each language that stays")
    parser.add_argument("--dim", type=int, metavar="N", help="compare the first N dims only (models of ours)")


def _add_negatives(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "negatives",
        help="text pairs to triplets with hard negatives",
        description="Writes OUT/text-triplets/NAME: each pair of SHARDS with the answers of other pairs that MODEL "
        "finds nearest to its query, except those that are right, or nearly so. Pairs with too few are dropped.",
    )
    add_datasets(parser, shards="data sets of text pairs")
    parser.add_argument("--model", required=True, metavar="DIR", help="a text tower, or a model of ours with its text/")
    parser.add_argument("--count", type=int, default=7, metavar="N", help="negatives for each query (default: 7)")
    parser.add_argument(
        "--ranks",
        nargs=2,
        type=int,
        default=[10, 200],
        metavar=("FROM", "TO"),
        help="among the neighbours that are no known answers; the first are often right (default: 10 200)",
    )
    parser.add_argument(
        "--margin", type=float, default=0.05, metavar="X", help="below the answer's own similarity (default: 0.05)"
    )
    parser.add_argument(
        "--similarity", type=float, default=0.8, metavar="X", help="of texts that count as the same (default: 0.8)"
    )
    parser.add_argument("--query-task", metavar="NAME", help="the tower's task for queries, such as retrieval.query")
    parser.add_argument("--target-task", metavar="NAME", help="the tower's task for answers, if it has one")
    parser.add_argument("--dim", type=int, metavar="N", help="search by the first N dims only")
    parser.add_argument(
        "--exact-up-to", type=int, default=200_000, metavar="N", help="pairs; more: inverted lists (default: 200000)"
    )
    parser.set_defaults(run=_negatives)


def _negatives(options: argparse.Namespace) -> int:
    from data_prep.negatives import Embedding, Guards, mine_negatives

    mine_negatives(
        options.shards,
        target_of(options),
        made(Embedding, options),
        guards=made(Guards, options),
        similarity=options.similarity,
        exact_up_to=options.exact_up_to,
        execution=execution_of(options),
    )
    return 0


def _add_mix(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "mix",
        help="measure a mix of data sets",
        description="Reports shares of data sets and languages and mean token counts, from the sidecars alone.",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one each (default: numbers of samples)")
    parser.set_defaults(run=_mix)


def _mix(options: argparse.Namespace) -> int:
    from data_prep.curation.mix import languages_of, mix

    shares = mix(options.shards, options.weights)
    print(f"{'share':>7} {'samples':>10} {'tokens':>7}  kind           data set")
    for one in shares:
        tokens = f"{one.mean_tokens:.0f}" if one.mean_tokens is not None else "?"
        print(f"{one.share:7.1%} {one.samples:>10} {tokens:>7}  {one.kind:14} {one.directory}")
    print("\nlanguages of what is drawn")
    for language, share in languages_of(shares).items():
        print(f"{share:7.1%}  {language}")
    return 0
