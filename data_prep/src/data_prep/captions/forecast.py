"""The cost of the planned requests, estimated without sending any."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.captions.images import ImageReader
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.pricing import Estimate, Prices

_ENOUGH = 20  # answers to learn a mean from
_SAMPLE = 200


@dataclass(frozen=True)
class Forecast:
    """Tokens and cost of the planned requests.

    measured: the number of answers that the estimate rests on; 0 if there are too few. Then it is an upper bound, from
    a sample of images and the longest answer allowed. cost: None without prices.
    """

    requests: int
    measured: int
    prompt_tokens: float
    completion_tokens: float
    cost: float | None


def forecast(ledger: RequestLedger, prices: Prices | None, *, image_tokens: int | None = None) -> Forecast:
    """Project the cost of everything planned: from the ledger's own answers, language by language, or from a sample."""
    rows = ledger.db.execute("SELECT language, count(*) FROM request WHERE state = 'planned' GROUP BY 1")
    planned = dict(rows.fetchall())
    total = sum(planned.values())
    means = {
        row[0]: (row[1], row[2], row[3])
        for row in ledger.db.execute(
            "SELECT language, avg(prompt_tokens), avg(completion_tokens), count(*) FROM attempt "
            "JOIN request ON request.id = attempt.request WHERE prompt_tokens IS NOT NULL GROUP BY 1"
        )
    }
    measured = sum(count for *_, count in means.values())
    if measured >= _ENOUGH:
        whole = tuple(sum(mean[side] * mean[2] for mean in means.values()) / measured for side in (0, 1))
        prompt, completion = (
            sum(count * means.get(language, whole)[side] for language, count in planned.items()) for side in (0, 1)
        )
    else:
        measured = 0
        prompt, completion = _from_sample(ledger, image_tokens, total)
    cost = prices.cost(prompt, completion) if prices else None
    return Forecast(total, measured, prompt, completion, cost)


def _from_sample(ledger: RequestLedger, image_tokens: int | None, total: int) -> tuple[float, float]:
    estimate, reader = Estimate(ledger, image_tokens), ImageReader()
    drawn = ledger.sample(_SAMPLE)
    prompt = completion = 0
    for request in drawn:
        most = estimate.tokens(request, reader.of(request)[1])
        prompt, completion = prompt + most[0], completion + most[1]
    scale = total / max(1, len(drawn))
    return prompt * scale, completion * scale
