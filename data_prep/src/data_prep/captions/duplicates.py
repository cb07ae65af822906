"""Rejects captions that nearly repeat another image's: the model did not look at the image."""

from __future__ import annotations

from data_prep.captions.ledger import RequestLedger
from data_prep.curation.minhash import Signatures, near_duplicates, signatures

_AT_A_TIME = 2000


def reject_duplicates(ledger: RequestLedger, *, similarity: float = 0.8) -> int:
    """Reject accepted captions that are nearly those of another image in the same language, all but the first planned.

    Returns how many. The ledger keeps the signatures, so that only new captions are read.
    """
    _sign(ledger)
    rejected = 0
    languages = ledger.db.execute("SELECT DISTINCT language FROM request WHERE state = 'accepted'").fetchall()
    for (language,) in languages:
        rows = ledger.db.execute(
            "SELECT id, image, signature, caption FROM request WHERE state = 'accepted' AND language = ? "
            "ORDER BY rowid",
            (language,),
        ).fetchall()
        signed = Signatures.from_bytes(b"".join(row["signature"] for row in rows))
        first = near_duplicates(signed, similarity=similarity, text_of=lambda n: rows[n]["caption"]).tolist()  # noqa: B023
        later = [row["id"] for row, n in zip(rows, first, strict=True) if row["image"] != rows[n]["image"]]
        with ledger.transaction() as db:
            db.executemany(
                "UPDATE request SET state = 'rejected', reason = 'duplicate' WHERE id = ?", [(one,) for one in later]
            )
        rejected += len(later)
    return rejected


def _sign(ledger: RequestLedger) -> None:
    """Give every accepted caption its signature."""
    unsigned = "SELECT id, caption FROM request WHERE state = 'accepted' AND signature IS NULL LIMIT ?"
    while rows := ledger.db.execute(unsigned, (_AT_A_TIME,)).fetchall():
        signed = signatures([row["caption"] for row in rows]).to_bytes()
        with ledger.transaction() as db:
            db.executemany(
                "UPDATE request SET signature = ? WHERE id = ?",
                [(one, row["id"]) for one, row in zip(signed, rows, strict=True)],
            )
