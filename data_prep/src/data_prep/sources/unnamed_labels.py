"""Labels and scores under names that nobody knows: the user is asked, so that no negative becomes a positive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.errors import UserError
from data_prep.shards.format import JsonObject
from data_prep.sources.labels import Labels, is_known, is_no, is_yes, number_of, said_of, says_match, says_other
from data_prep.sources.records import Row

_MOST = 12  # different labels of a column; more are texts
# That say no beside any other value; alone "no" is Norwegian, and "n" a noun.
_AGAINST = ("bad", "incorrect", "invalid", "wrong", "fail", "failed", "reject", "rejected", "disagree", "distinct")
_AMBIGUOUS = ("no", "n", "f")


def check_others(labels: Labels, rows: Sequence[Row]) -> None:
    """Refuse a column or field of another name that may be a label, where none is named and none has a usual name.

    Raises:
        UserError: besides its texts, a table has a column that says yes in some rows and no in others, or shares
            between 0 and 1, or an object with a label in it.
    """
    tables = [row for row in rows if isinstance(row[1], dict)]
    if not tables or labels.column or labels.columns(tables[0][1]):
        return
    where, first = tables[0]
    values: dict[str, list[Any]] = {}
    for _, row in tables:
        for name, value in _fields(row):
            values.setdefault(name, []).append(value)
    for name, found in values.items():
        if name in labels.texts:
            continue
        named = "." in name and name not in first and says_match(name.rpartition(".")[2])
        example = _example(found, named=named, shares=not says_other(name))
        if example:
            raise UserError(
                f"{where}: {name} is {example}, and may say whether the texts match, or how much; if it does, say "
                f"--label-column {name}, else --label-column none"
            )


def check_lists(labels: Labels, rows: Sequence[Row]) -> None:
    """Refuse lists in which one place holds labels, not texts.

    Raises:
        UserError: there is one, and none of the options says that it is a text.
    """
    lists = [row for row in rows if isinstance(row[1], list)]
    lengths = {len(value) for _, value in lists}
    if len(lists) < 2 or len(lengths) != 1 or labels.column == "none":
        return
    where, first = lists[0]
    for place in range(len(first)):
        said = [said_of(value[place]) for _, value in lists]
        if len(first) > 2 and len({*said}) < len(said) and _example(said):
            raise UserError(
                f"{where}: element {place + 1} of the lists is {_example(said)}, and may be a label; lists hold texts "
                'alone: write objects ({"query": …, "target": …, "label": …}), or say --label-column none'
            )


def _fields(row: JsonObject) -> Iterator[tuple[str, Any]]:
    """The values of a row, and those of its objects, as "annotation.label"."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        elif value is not None:
            yield name, value


def _example(values: Sequence[Any], *, named: bool = False, shares: bool = True) -> str:
    """What shows that values are labels or scores: "1 in some rows and 0 in others"; "" if nothing does.

    named: their name says so; any value shows it. shares: whether numbers between 0 and 1 do.
    """
    said = [said_of(value) for value in values]
    different = list(dict.fromkeys(said))
    numbers = {one: number_of(one) for one in different if one}
    if named and (len(different) <= _MOST or None not in numbers.values()):
        return different[0] or "no text"
    if numbers and None not in numbers.values():
        return _of_numbers(numbers, len(said), shares=shares)
    return _of_words(different) if len(different) <= _MOST else ""


def _of_numbers(numbers: dict[str, float | None], count: int, *, shares: bool) -> str:
    """Of `count` values that are these numbers."""
    share = next((one for one, number in numbers.items() if number is not None and 0 < number < 1), "")
    if share and all(number is not None and 0 <= number <= 1 for number in numbers.values()):
        return f"a number between 0 and 1 in all rows ({share})" if shares else ""
    yes, no = (next((one for one, number in numbers.items() if number in marks), "") for marks in ((1,), (0, -1)))
    few = set(numbers.values()) <= {0, 1, -1} and len(numbers) < count  # each once may be ids
    return f"{yes} in some rows and {no} in others" if few and yes and no else ""


def _of_words(different: Sequence[str]) -> str:
    digits = ("0", "1", "0.0", "1.0")
    known = all(is_known(one) or one in digits for one in different)
    if known:
        yes = [one for one in different if is_yes(one) or one in ("1", "1.0")]
        no = [one for one in different if is_no(one) or one in ("0", "0.0")]
    else:
        no = [one for one in different if (is_no(one) and one not in _AMBIGUOUS) or one in _AGAINST]
        yes = [one for one in different if one and one not in no]
    return f"{yes[0]} in some rows and {no[0]} in others" if yes and no else ""
