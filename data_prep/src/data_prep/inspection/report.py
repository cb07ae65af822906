"""The report of `data-prep inspect`: one self-contained HTML file, without scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from html import escape
from math import log2

from data_prep.inspection.summary import Example, Summary

_STYLE = """
:root { --ink: #1a1d21; --soft: #5d6670; --line: #d9dee3; --ground: #fff; --bar: #2f6f9f; --band: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ae; --line: #363d44; --ground: #16191c; --bar: #6aa9d6; --band: #1f2428; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: var(--ground);
  font: 15px/1.5 system-ui, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:first-child, td:first-child, td.text { text-align: left; }
.wide { margin-top: 1rem; overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { color: var(--soft); } svg { display: block; max-width: 100%; height: auto; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); } svg text { fill: var(--soft); font-size: 11px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.example { background: var(--band); border-radius: 6px; padding: .75rem; overflow: hidden; }
.example img { display: block; max-width: 100%; max-height: 168px; margin: 0 auto .5rem; background: #fff; }
.example p { overflow-wrap: anywhere; max-height: 9rem; overflow-y: auto; } .example .soft { font-size: .8rem; }
nav a { margin-right: 1rem; } a { color: var(--bar); }
"""


def html_report(findings: Sequence[Summary], *, title: str) -> str:
    """The HTML of the report."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{_number(sum(one.samples for one in findings))} samples in {len(findings)} data sets</p>',
        '<nav><a href="#counts">counts</a><a href="#lengths">lengths</a><a href="#images">images</a>'
        '<a href="#duplicates">duplicates</a><a href="#dropped">dropped</a><a href="#examples">examples</a></nav>',
        *_overview(findings),
        *_languages(findings),
        *_lengths(findings),
        *_images(findings),
        *_duplicates(findings),
        *_dropped(findings),
        *_examples(findings),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _overview(findings: Sequence[Summary]) -> Iterable[str]:
    yield '<h2 id="counts">Data sets</h2>'
    rows = [
        [
            one.name,
            _number(one.samples),
            _number(one.shards),
            f"{one.size / 1e6:,.1f} MB",
            str(len(one.by_language)),
            _number(one.sampled),
            ", ".join(f"{name} {n / one.by_origin.total():.0%}" for name, n in one.by_origin.most_common(4)),
        ]
        for one in findings
    ]
    yield _table(
        ["data set", "samples", "shards", "size", "languages", "samples read", "origin of texts"], rows, texts={6}
    )
    unreadable = [f"{one.name}: {what}" for one in findings for what in one.unreadable]
    if unreadable:
        yield f"<p><strong>{len(unreadable)} samples cannot be read</strong>: {escape('; '.join(unreadable[:5]))}</p>"


def _languages(findings: Sequence[Summary]) -> Iterable[str]:
    yield "<h2>Samples by language</h2>"
    total: Counter[str] = sum((one.by_language for one in findings), Counter())
    rows = [
        [language, _number(count), *(_number(one.by_language[language]) for one in findings)]
        for language, count in sorted(total.items(), key=lambda entry: (-entry[1], entry[0]))
    ]
    yield _table(["language", "all", *(one.name for one in findings)], rows)


def _lengths(findings: Sequence[Summary]) -> Iterable[str]:
    yield '<h2 id="lengths">Lengths of texts</h2><div class="charts">'
    for one in findings:
        if one.lengths:
            yield _histogram(one.lengths, f"{one.name}: characters of a text")
        if one.tokens:
            yield _histogram(one.tokens, f"{one.name}: tokens of a sample's longest text")
    yield "</div>"


def _images(findings: Sequence[Summary]) -> Iterable[str]:
    pictured = [one for one in findings if one.sizes]
    yield '<h2 id="images">Image sizes</h2>'
    if not pictured:
        yield '<p class="soft">No images.</p>'
        return
    yield '<div class="charts">'
    for one in pictured:
        sides = [min(size) for size, count in one.sizes.items() for _ in range(count)]
        yield _histogram(sides, f"{one.name}: shortest side in pixels")
    yield "</div>"
    rows = [
        [one.name, ", ".join(f"{w} × {h}: {_number(count)}" for (w, h), count in one.sizes.most_common(6))]
        for one in pictured
    ]
    yield _table(["data set", "most frequent sizes"], rows)


def _duplicates(findings: Sequence[Summary]) -> Iterable[str]:
    yield '<h2 id="duplicates">Duplicates</h2>'
    rows = [
        [one.name, _number(one.same_samples), _number(one.same_images), _number(one.same_texts), _number(one.sampled)]
        for one in findings
    ]
    yield _table(["data set", "equal samples (of all)", "equal images", "equal texts", "of samples read"], rows)


def _dropped(findings: Sequence[Summary]) -> Iterable[str]:
    yield '<h2 id="dropped">Dropped by the import</h2>'
    rows = [
        [one.name, _number(count), reason, where]
        for one in findings
        for reason, count, where in sorted(one.dropped, key=lambda entry: -entry[1])
    ]
    if rows:
        yield _table(["data set", "dropped", "reason", "for example"], rows, texts={2, 3})
    else:
        yield '<p class="soft">Nothing, or there is no receipt beside the manifest.</p>'


def _examples(findings: Sequence[Summary]) -> Iterable[str]:
    yield '<h2 id="examples">Examples in each language</h2>'
    for one in findings:
        yield f"<h3>{escape(one.name)}</h3>"
        for language, examples in sorted(one.examples.items()):
            shown = " open" if len(one.examples) <= 3 or language == "en" else ""
            yield f"<details{shown}><summary>{escape(language)}</summary>"
            yield '<div class="examples">'
            yield from map(_example, examples)
            yield "</div></details>"


def _example(example: Example) -> str:
    picture = f'<img src="{example.picture}" alt="">' if example.picture else ""
    texts = "".join(
        f'<p lang="{escape(language)}" dir="auto"><span class="soft">{escape(role)}</span> {escape(text[:2000])}</p>'
        for language, role, text in example.texts
    )
    return f'<div class="example">{picture}{texts}<p class="soft">{escape(example.key)}</p></div>'


def _histogram(values: Sequence[int], caption: str, *, width: int = 360, height: int = 130) -> str:
    """A histogram with bins of doubling width, as inline SVG; the numbers are also in the bars' titles."""
    bins = Counter(int(log2(value)) if value > 0 else -1 for value in values)
    low, high = min(bins), max(bins)
    most = max(bins.values())
    step = min(width / (high - low + 1), 48)
    bars = []
    for place, number in enumerate(range(low, high + 1)):
        count = bins[number]
        tall = (height - 36) * count / most
        edges = "0" if number < 0 else f"{2**number} to {2 ** (number + 1) - 1}"
        bars.append(
            f'<rect x="{place * step + 1:.1f}" y="{height - 18 - tall:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{tall:.1f}"><title>{edges}: {_number(count)}</title></rect>'
            f'<text x="{(place + 0.5) * step:.1f}" y="{height - 4}" text-anchor="middle">'
            f"{0 if number < 0 else 2**number}</text>"
        )
        if count:
            share = f"{count / len(values):.0%}"
            bars.append(
                f'<text x="{(place + 0.5) * step:.1f}" y="{height - 22 - tall:.1f}" text-anchor="middle">{share}</text>'
            )
    middle = sorted(values)[len(values) // 2]
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f'<line x1="0" y1="{height - 18}" x2="{width}" y2="{height - 18}"/>{"".join(bars)}</svg>'
        f"<figcaption>{escape(caption)}; median {_number(middle)}, longest {_number(max(values))}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Collection[int] = ()) -> str:
    def cell(place: int, value: str) -> str:
        return f"<td{' class=text' if place in texts else ''}>{escape(value)}</td>"

    head = "".join(
        f"<th{' style=text-align:left' if n in texts else ''}>{escape(h)}</th>" for n, h in enumerate(header)
    )
    body = "".join("<tr>" + "".join(cell(n, value) for n, value in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")  # narrow no-break space
