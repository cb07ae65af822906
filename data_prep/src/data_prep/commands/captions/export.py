"""`data-prep captions export`: from the ledger to a data set."""

from __future__ import annotations

import argparse

from data_prep.commands import Subcommands


def add(steps: Subcommands) -> None:
    export = steps.add_parser("export", help="write accepted captions as a data set of images with long captions")
    export.add_argument("ledger", metavar="LEDGER")
    export.add_argument("out", metavar="OUT", help="folder of the data set; must not exist")
    export.add_argument("--source", default="synthetic", metavar="NAME", help="source's name (default: synthetic)")
    export.add_argument(
        "--tokenizer", metavar="PATH", help="count tokens with this sentencepiece model or tokenizer.json"
    )
    export.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="(default: 1000)")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from data_prep.captions.duplicates import reject_duplicates
    from data_prep.captions.export import export
    from data_prep.captions.ledger import RequestLedger
    from data_prep.curation.tokens import TokenCounter
    from data_prep.execute.progress import Progress

    ledger = RequestLedger(options.ledger)
    with ledger.exclusive():
        reject_duplicates(ledger)
        (images,) = ledger.db.execute("SELECT count(DISTINCT image) FROM request WHERE state = 'accepted'").fetchone()
        progress = Progress(max(1, images))
        counts = export(
            ledger,
            options.out,
            source=options.source,
            tokenizer=TokenCounter(options.tokenizer) if options.tokenizer else None,
            samples_per_shard=options.samples_per_shard,
            tick=lambda: progress.add(1),
        )
    progress.finish()
    print(f"{options.out}: {sum(counts.values())} captions")
    print(", ".join(f"{language} {count}" for language, count in sorted(counts.items())))
    return 0
