"""The paper's tables with measured columns beside its own: as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from stage_trainer.evaluation.paper import Line, Table
from stage_trainer.evaluation.suite import Column
from stage_trainer.evaluation.tables import aligned

GAP = "–"
_OF_ONE = "paper: jina-clip-v2"


def as_text(table: Table, columns: Sequence[Column]) -> str:
    """The table in the paper's form, with a line on every gap and on what cannot be compared."""
    number = f"Table {table.name}" if table.name.isdigit() else table.name
    parts = []
    for title, rows, words in _grids(table, columns):
        body = aligned([rows[0], *[row for row in rows[1:] if len(row) > 1]], words).splitlines()
        shown, cells = body[:2], iter(body[2:])
        shown += [next(cells) if len(row) > 1 else row[0] for row in rows[1:]]
        parts.append("\n".join([f"{number}: {table.title}{title}", "", *shown]))
    notes = [*_notes(table, columns), *([table.note] if table.note else [])]
    return "\n\n".join([*parts, *(["\n".join(f"  {note}" for note in notes)] if notes else [])])


def as_csv(table: Table, columns: Sequence[Column]) -> str:
    """section, row, then a column for each model (of tables by dim: and dim), in percent; empty for a gap."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    heads = _heads(table, columns)
    writer.writerow(["section", "row", *heads])
    for section in table.sections:
        for line in section.lines:
            values = _values(table, columns, line)
            writer.writerow([section.heading, line.label, *(["" if v is None else f"{v:.4f}" for v in values])])
    return content.getvalue()


def as_json(tables: Sequence[Table], columns: Sequence[Column]) -> dict[str, Any]:
    """Every figure: those of the sets, from 0 to 1, and those of the tables, in percent, None for a gap."""
    shown = {
        table.name: {
            "title": table.title,
            "note": table.note,
            "sections": {
                section.heading: {
                    line.label: dict(zip(_heads(table, columns), _values(table, columns, line), strict=True))
                    for line in section.lines
                }
                for section in table.sections
            },
        }
        for table in tables
    }
    of = {
        column.name: {
            "weights": column.fingerprint,
            "settings": column.settings,
            "dims": list(column.dims),
            "sets": {
                name: {"figures": m.figures, "counts": m.counts, "as published": m.whole, "notes": list(m.notes)}
                for name, m in column.sets.items()
            },
            "gaps": column.gaps,
        }
        for column in columns
    }
    return {"paper": "arXiv 2412.08802, v1", "models": of, "tables": shown}


def settings_of(columns: Sequence[Column]) -> str:
    """What the paper leaves open, as it was here."""
    return "\n".join(
        f"  {column.name}: {', '.join(f'{name} {value}' for name, value in column.settings.items())}; weights "
        f"{column.fingerprint[:12]}"
        for column in columns
    )


def short(columns: Sequence[Column]) -> dict[str, str]:
    """Each column's name, or the last part of it where that names no other one: a path is long for a table's head."""
    last = [column.name.rstrip("/").rpartition("/")[2] for column in columns]
    return {c.name: name if name and last.count(name) == 1 else c.name for c, name in zip(columns, last, strict=True)}


def _heads(table: Table, columns: Sequence[Column]) -> list[str]:
    """By which CSV and JSON name columns."""
    if not table.by_dim:
        return [*(column.name for column in columns), *(f"paper: {name}" for name in table.columns)]
    ours = [f"{column.name}, {dim}" for column in columns for dim in column.dims]
    return [*ours, *(f"{_OF_ONE}, {dim}" for dim in table.columns)]


def _values(table: Table, columns: Sequence[Column], line: Line) -> list[float | None]:
    """In percent, by `_heads`."""
    dims = [(column, dim) for column in columns for dim in (column.dims if table.by_dim else column.dims[:1])]
    values = [line.of.value(column.sets, dim) for column, dim in dims]
    return [*(None if v is None else 100 * v for v in values), *(line.printed.get(name) for name in table.columns)]


def _grids(table: Table, columns: Sequence[Column]) -> list[tuple[str, list[list[str]], int]]:
    """(what follows the title, rows, how many first cells are words); a row of one cell is a heading."""
    names = short(columns)
    if not table.by_dim:
        rows = [[table.corner, *(names[column.name] for column in columns), *(f"paper: {n}" for n in table.columns)]]
        for section in table.sections:
            rows += [[section.heading]] if section.heading and not table.turned else []
            rows += [[line.label, *_cells(table, columns, line)] for line in section.lines]
        return [("", [list(row) for row in zip(*rows, strict=True)] if table.turned else rows, 1)]
    grids = []
    for column in columns:
        paper = [f"paper {dim}" for dim in table.columns]
        rows = [[table.corner, *map(str, column.dims), *paper]]
        for section in table.sections:
            rows += [[section.heading], *([line.label, *_cells(table, [column], line)] for line in section.lines)]
        grids.append((f" · {names[column.name]}", rows, 1))
    return grids


def _cells(table: Table, columns: Sequence[Column], line: Line) -> list[str]:
    """Two digits as in the paper; a star where a set is not the published one, a dash for a gap."""
    values = _values(table, columns, line)
    measured = len(values) - len(table.columns)
    names = {leaf.set for leaf in line.of.leaves()}
    owners = [column for column in columns for _ in (column.dims if table.by_dim else column.dims[:1])]
    stars = [any(name in c.sets and not c.sets[name].whole for name in names) for c in owners]
    cells = [GAP if v is None else f"{v:.2f}" for v in values]
    starred = [cell + "*" if star and cell != GAP else cell for cell, star in zip(cells, stars, strict=False)]
    return [*starred, *cells[measured:]]


def _notes(table: Table, columns: Sequence[Column]) -> list[str]:
    notes, names = [], short(columns)
    for column in columns:
        for name in table.sets():
            if name in column.gaps:
                notes.append(f"{GAP} {name} ({names[column.name]}): {column.gaps[name]}")
            elif name in column.sets:
                mark = GAP if column.sets[name].whole else "*"
                notes += [f"{mark} {note} ({names[column.name]})" for note in column.sets[name].notes]
    return list(dict.fromkeys(notes))
