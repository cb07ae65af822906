"""Rejects captions that nearly repeat another image's: the model did not look at the image."""

from __future__ import annotations

from data_prep.captions.ledger import RequestLedger
from data_prep.curation.minhash import Signatures, near_duplicates, signatures

_AT_A_TIME = 2000


def reject_duplicates(ledger: RequestLedger, *, similarity: float = 0.8) -> int:
    """Reject accepted captions that are nearly those of another image in the same language, all but the first planned.

    Returns how many. The ledger keeps the signatures, so that only new captions are read, and those compared.
    """
    _sign(ledger)
    rejected = 0
    languages = ledger.db.execute("SELECT DISTINCT language FROM request WHERE state = 'accepted'").fetchall()
    for (language,) in languages:
        rows = ledger.db.execute(
            "SELECT signature.* FROM request JOIN signature ON signature.request = place "
            "WHERE state = 'accepted' AND language = ? ORDER BY place",
            (language,),
        ).fetchall()

        def text_of(number: int) -> str:
            found = "SELECT caption FROM request WHERE place = ?"
            text: str = ledger.db.execute(found, (rows[number]["request"],)).fetchone()[0]  # noqa: B023
            return text

        signed = Signatures.from_bytes(b"".join(row["minima"] for row in rows))
        first = near_duplicates(signed, similarity=similarity, text_of=text_of).tolist()
        later = [row["request"] for row, n in zip(rows, first, strict=True) if row["image"] != rows[n]["image"]]
        with ledger.transaction() as db:
            db.executemany(
                "UPDATE request SET state = 'rejected', reason = 'duplicate' WHERE place = ?", [(one,) for one in later]
            )
        rejected += len(later)
    return rejected


def _sign(ledger: RequestLedger) -> None:
    """Give every accepted caption its signature."""
    unsigned = "SELECT place, image, caption FROM request WHERE state = 'accepted' AND signed IS NULL LIMIT ?"
    while rows := ledger.db.execute(unsigned, (_AT_A_TIME,)).fetchall():
        signed = signatures([row["caption"] for row in rows]).to_bytes()
        with ledger.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO signature VALUES (?, ?, ?)",
                [(row["place"], row["image"], one) for one, row in zip(signed, rows, strict=True)],
            )
            db.executemany("UPDATE request SET signed = 1 WHERE place = ?", [(row["place"],) for row in rows])
