"""What requests cost, estimated before they are sent and counted after."""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil

from data_prep.captions.images import ImageReader
from data_prep.captions.ledger import RequestLedger
from data_prep.captions.request import Request, Usage
from data_prep.errors import UserError
from data_prep.shards import ShardError

_ENOUGH = 20  # answers to learn a mean from
_MEASURED = 10_000  # attempts are looked at, the last ones
_SAMPLE = 200


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in the currency of the budget; a batch costs `batch_factor` of them."""

    input: float
    output: float
    batch_factor: float = 0.5

    def __post_init__(self) -> None:
        if min(self.input, self.output, self.batch_factor) < 0:
            raise UserError(f"prices {self.input} and {self.output}, a batch {self.batch_factor}: expected 0 or more")

    def cost(self, prompt_tokens: float, completion_tokens: float, *, batch: bool = False) -> float:
        """The cost of so many tokens."""
        cost = (prompt_tokens * self.input + completion_tokens * self.output) / 1e6
        return cost * self.batch_factor if batch else cost

    def of(self, usage: Usage, *, batch: bool = False) -> float | None:
        """The cost of an answer; None if the service gave no token counts."""
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            return None
        return self.cost(usage.prompt_tokens, usage.completion_tokens, batch=batch)


class Estimate:
    """An upper bound of the tokens of a request.

    An image counts by the rule that OpenAI publishes for its GPT-4 models (detail high: fitted into 2048 × 2048, its
    shorter side to 768, then 85 tokens and 170 for each tile of 512; low: 85). Other models count differently: give
    `image_tokens`, or rely on the first answers: the estimate is never below the largest count in the ledger.
    """

    def __init__(self, ledger: RequestLedger, image_tokens: int | None = None) -> None:
        self._image_tokens = image_tokens
        self._seen: dict[str, int] = dict(
            ledger.db.execute("SELECT model, max(most_tokens) FROM recipe GROUP BY model").fetchall()
        )

    def learn(self, model: str, usage: Usage) -> None:
        """Take the token count of an answer into account."""
        self._seen[model] = max(self._seen.get(model, 0), usage.prompt_tokens or 0)

    def tokens(self, request: Request, image: bytes | None) -> tuple[int, int]:
        """(prompt tokens, completion tokens), at most. Without its bytes an image counts as the largest."""
        text = ceil(len(request.text.encode()) / 2)  # an upper bound for prose in any common tokenizer
        own = self._image_tokens
        if own is None:
            own = image_tokens(_size(image), request.options["detail"])
        return max(own + text, self._seen.get(request.model, 0)), request.options["max_tokens"]


def price_unpriced(ledger: RequestLedger, prices: Prices, image_tokens: int | None) -> None:
    """Set the cost of attempts that were made without prices, so that all count against the budget.

    From the tokens that the service counted, else from the upper bound.
    """
    estimate, reader = Estimate(ledger, image_tokens), ImageReader()
    with ledger.transaction():
        for row in ledger.unpriced():
            tokens = row["prompt_tokens"], row["completion_tokens"]
            if None in tokens:
                request = ledger.request(row["request"])
                tokens = estimate.tokens(request, _image_of(reader, request))
            ledger.priced(row["id"], prices.cost(*tokens, batch=row["in_batch"]))


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
            "JOIN request ON request.place = attempt.request WHERE prompt_tokens IS NOT NULL "
            f"AND attempt.id > (SELECT max(id) FROM attempt) - {_MEASURED} GROUP BY 1"
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
        most = estimate.tokens(request, _image_of(reader, request))
        prompt, completion = prompt + most[0], completion + most[1]
    scale = total / max(1, len(drawn))
    return prompt * scale, completion * scale


def image_tokens(size: tuple[int, int], detail: str | None) -> int:
    """Tokens of an image of (width, height) pixels by OpenAI's published rule for tiles."""
    if detail == "low":
        return 85
    width, height = size
    fit = min(1.0, 2048 / max(width, height))
    fit *= min(1.0, 768 / (min(width, height) * fit))
    return 85 + 170 * ceil(width * fit / 512) * ceil(height * fit / 512)


def _image_of(reader: ImageReader, request: Request) -> bytes | None:
    """The image of a request; None if it cannot be read, which a run says of each."""
    try:
        return reader.of(request)[1]
    except (UserError, ShardError):
        return None


def _size(image: bytes | None) -> tuple[int, int]:
    from PIL import Image

    if image is None:
        return 2048, 2048
    try:
        with Image.open(io.BytesIO(image), formats=("PNG", "JPEG", "WEBP")) as opened:  # the header alone is read
            return opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 2048, 2048  # the service will refuse it; no image counts more than this
