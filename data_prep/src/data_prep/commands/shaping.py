"""`data-prep split-long`, `dedup`, `languages`, `similarity` and `mix`: shards to better shards."""

from __future__ import annotations

import argparse

from .execution import add_execution, execution_of


def add(commands: argparse._SubParsersAction) -> None:
    """Register the commands."""
    split = _command(
        commands,
        "split-long",
        "captions over 256 tokens into the long set",
        "Counts the tokens of captions: images with captions of up to --longest tokens go to OUT/image-short/NAME, "
        "those with longer ones to OUT/image-long/NAME, those with both to both.",
    )
    split.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="sentencepiece model, tokenizer.json or folder"
    )
    split.add_argument("--longest", type=int, default=256, metavar="N", help="tokens of a short caption (default: 256)")
    split.set_defaults(run=_split_long)

    dedup = _command(
        commands,
        "dedup",
        "duplicates and what evaluation sets hold, out",
        "Writes SHARDS, all of one kind, without duplicates, of which the first stays: images by their bytes and by "
        "perceptual hash, text pairs and triplets by what query and target say and by MinHash.",
    )
    dedup.add_argument("--against", nargs="+", default=[], metavar="EVAL", help="evaluation sets; what is in one goes")
    dedup.add_argument(
        "--similarity", type=float, default=0.8, metavar="X", help="of near-duplicate texts (default: 0.8)"
    )
    dedup.add_argument(
        "--distance",
        type=int,
        default=4,
        metavar="BITS",
        help="between near-duplicate images, 0 to 15 of 64 (default: 4)",
    )
    dedup.add_argument("--exact", action="store_true", help="exact duplicates only; pages of text look alike to a hash")
    dedup.set_defaults(run=_dedup)

    languages = _command(
        commands,
        "languages",
        "language of every text: named, checked",
        "Names the language of texts without one and drops texts that are clearly in another than they say.",
    )
    languages.add_argument("--sure", type=float, default=0.9, metavar="P", help="probability to act on (default: 0.9)")
    languages.add_argument("--without", nargs="+", default=[], metavar="LANGUAGE", help="leave texts in these out")
    languages.set_defaults(run=_languages)

    similarity = _command(
        commands,
        "similarity",
        "captions that do not fit their image, out",
        "Scores every caption against its image and keeps those above a threshold, or the best share in each language.",
    )
    similarity.add_argument("--model", required=True, help="a directory of ours, or open_clip:ARCHITECTURE:WEIGHTS")
    which = similarity.add_mutually_exclusive_group(required=True)
    which.add_argument("--threshold", type=float, metavar="X", help="least cosine similarity")
    which.add_argument("--top", type=float, metavar="SHARE", help="share of the captions of each language that stays")
    similarity.add_argument("--dim", type=int, metavar="N", help="compare the first N dims only (models of ours)")
    similarity.set_defaults(run=_similarity)

    mix = commands.add_parser(
        "mix",
        help="what a mix of data sets holds",
        description="Reports shares of data sets and languages and mean token counts, from the sidecars alone.",
    )
    mix.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets")
    mix.add_argument("--weights", nargs="+", type=float, metavar="W", help="one each (default: numbers of samples)")
    mix.set_defaults(run=_mix)


def _command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="data sets")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the data sets, data/train for example")
    parser.add_argument("--name", required=True, help="name of the data set that comes out")
    add_execution(parser)
    return parser


def _split_long(options: argparse.Namespace) -> int:
    from ..shaping.split_long import split_long

    split_long(options.shards, tokenizer=options.tokenizer, longest=options.longest, **_common(options))
    return 0


def _dedup(options: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..shaping.dedup import deduplicate

    if not 0 <= options.distance <= 15 or not 0 < options.similarity <= 1:
        raise UserError("--distance is from 0 to 15 bits and --similarity above 0 and up to 1")
    deduplicate(
        options.shards,
        against=options.against,
        similarity=options.similarity,
        distance=options.distance,
        near=not options.exact,
        **_common(options),
    )
    return 0


def _languages(options: argparse.Namespace) -> int:
    from ..shaping.relabel import relabel

    relabel(options.shards, sure=options.sure, without=options.without, **_common(options))
    return 0


def _similarity(options: argparse.Namespace) -> int:
    from ..shaping.similarity import filter_by_similarity

    filter_by_similarity(
        options.shards,
        model=options.model,
        threshold=options.threshold,
        top=options.top,
        dim=options.dim,
        **_common(options),
    )
    return 0


def _mix(options: argparse.Namespace) -> int:
    from ..shaping.mix import languages_of, mix

    shares = mix(options.shards, options.weights)
    print(f"{'share':>7} {'samples':>10} {'tokens':>7}  kind           data set")
    for one in shares:
        tokens = f"{one.mean_tokens:.0f}" if one.mean_tokens is not None else "?"
        print(f"{one.share:7.1%} {one.samples:>10} {tokens:>7}  {one.kind:14} {one.directory}")
    print("\nlanguages of what is drawn")
    for language, share in languages_of(shares).items():
        print(f"{share:7.1%}  {language}")
    return 0


def _common(options: argparse.Namespace) -> dict:
    return {
        "out": options.out,
        "name": options.name,
        "samples_per_shard": options.samples_per_shard,
        "execution": execution_of(options),
    }
