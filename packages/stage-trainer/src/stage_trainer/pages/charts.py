"""Charts of a report: each as SVG, whose colours are the page's own in light and dark, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stage_trainer.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2a7f78", "#b8722c", "#5b63b7", "#b04a6f", "#5f7d2e", "#7a5a43", "#3b7fb0", "#8a5fa8")
"""Of runs, or of lines if there is one run, on a light page; the page has a variable --c0, --c1, … for each."""
INK, MUTED, GRID = "#2b2f33", "#757b80", "#e4e2dd"
_VARIABLES = {**{color: f"var(--c{n})" for n, color in enumerate(COLORS)}, INK: "var(--ink)", MUTED: "var(--muted)",
              GRID: "var(--grid)"}  # fmt: skip
_WIDTH = 4.6  # inches; a column of the page
Dash = Literal["-"] | tuple[float, tuple[float, ...]]
_DASHES: tuple[Dash, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4)))
_FEW, _MANY = 16, 120
"""Up to so many points of a line are marked; from so many on its running mean is drawn over it."""
_STYLE: dict[Any, Any] = {
    "font.size": 9.5, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.linewidth": 0.8, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.major.size": 3, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "svg.fonttype": "none", "svg.hashsalt": "trilith",
    "text.parse_math": False,  # a name with dollars is no formula
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `name` for its file, `title` for people, SVG to stand in a page, PNG as a file."""

    name: str
    title: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """A line of a chart: x and y `[N]`, the number of its run, and of its kind among those of a run."""

    label: str
    x: np.ndarray
    y: np.ndarray
    run: int
    kind: int = 0

    @property
    def drawable(self) -> bool:
        return bool(np.isfinite(self.y).any())


@dataclass(frozen=True)
class Bars:
    """Bars of a run, one for each of a chart's labels; nan: there is none."""

    label: str
    values: np.ndarray
    run: int


def curves(name: str, title: str, lines: Sequence[Line], ends: Sequence[int] = (), runs: int = 1) -> Chart | None:
    """Lines over training steps; None if there is nothing to draw.

    Args:
        ends: steps at which a stage ends and the next one begins.
        runs: how many the page has; of several each has a colour, of one each line.
    """
    lines = [line for line in lines if line.drawable]
    if not lines:
        return None

    def draw(figure: Figure, axes: Axes) -> None:
        for end in ends:
            axes.axvline(end, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        for line in lines:
            color, dash = _look(line, runs)
            marked = {"marker": "o", "markersize": 3.5} if len(line.x) <= _FEW else {}
            smooth = len(line.x) > _MANY
            axes.plot(line.x, line.y, color=color, linestyle=dash, linewidth=0.7 if smooth else 1.6,
                      alpha=0.35 if smooth else 1, **marked)  # type: ignore[arg-type]  # fmt: skip
            if smooth:
                axes.plot(line.x, _running_mean(line.y), color=color, linestyle=dash, linewidth=1.7)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        _legend(figure, lines, runs)

    return _drawn(name, title, 2.7, draw)


def by_dim(name: str, title: str, lines: Sequence[Line], chance: float | None, runs: int = 1) -> Chart | None:
    """Figures in percent over Matryoshka dims, which are evenly spaced, with the level of a blind guess."""
    lines = [line for line in lines if line.drawable]
    if not lines:
        return None
    dims = sorted({int(dim) for line in lines for dim in line.x})
    place = {dim: number for number, dim in enumerate(dims)}

    def draw(figure: Figure, axes: Axes) -> None:
        for line in lines:
            color, dash = _look(line, runs)
            x = [place[int(dim)] for dim in line.x]
            axes.plot(x, line.y, color=color, linestyle=dash, linewidth=1.6, marker="o", markersize=4)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate("blind guess", (0, chance), (0, 3), textcoords="offset points", color=MUTED, fontsize=8)
        axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
        axes.margins(x=0.06)
        axes.set_ylim(0, 1.08 * max(max(np.nanmax(line.y) for line in lines), chance or 0, 1e-9))
        axes.grid(axis="y")
        axes.set_xlabel("dims")
        axes.set_ylabel("%")
        _legend(figure, lines, runs)

    return _drawn(name, title, 2.7, draw)


def bars(
    name: str, title: str, labels: Sequence[str], series: Sequence[Bars], chance: np.ndarray | None = None
) -> Chart | None:
    """Horizontal bars in percent, a group for each label, the first one on top, with a mark at the level of a blind
    guess (`[labels]`, nan: none)."""
    series = [each for each in series if np.isfinite(each.values).any()]
    if not labels or not series:
        return None
    thick = 0.8 / len(series)
    height = 0.7 + len(labels) * max(0.17, 0.1 * len(series) + 0.05)

    def draw(figure: Figure, axes: Axes) -> None:
        rows = np.arange(len(labels))
        for number, each in enumerate(series):
            shift = (number - (len(series) - 1) / 2) * thick
            axes.barh(rows + shift, np.nan_to_num(each.values), thick * 0.86, color=COLORS[each.run % len(COLORS)])
        if chance is not None and np.isfinite(chance).any():
            axes.vlines(chance, rows - 0.45, rows + 0.45, color=INK, linewidth=1.4)
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("%")
        if len(series) > 1:
            _legend(figure, [Line(each.label, rows, rows, each.run) for each in series], len(series))

    return _drawn(name, title, height, draw)


def _drawn(name: str, title: str, height: float, draw: Callable[[Figure, Axes], None]) -> Chart:
    with _matplotlib() as new:
        figure = new((_WIDTH, height))
        axes = figure.add_subplot()
        draw(figure, axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        axes.set_title(title, fontsize=10, color=INK, loc="left")  # in the page it stands above the chart
        figure.savefig(png, format="png", dpi=160, facecolor="white")
    return Chart(name, title, _for_page(svg.getvalue(), name), png.getvalue())


@contextmanager
def _matplotlib() -> Iterator[Callable[[tuple[float, float]], Figure]]:
    """Makes figures in this module's style, whatever the user's matplotlibrc says; without a window or global state."""
    matplotlib_needed()
    import matplotlib
    from matplotlib.figure import Figure

    def new(size: tuple[float, float]) -> Figure:
        return Figure(figsize=size, layout="constrained")

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield new


def matplotlib_needed() -> None:
    """UserError if a library that draws or writes the page is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"a report needs matplotlib and jinja2 ({error}): pip install matplotlib jinja2, or the trainer with "
            "its extra `report`"
        ) from error


def _for_page(svg: str, name: str) -> str:
    """An SVG that fills its column and takes colours and font from the page; its ids are unique there."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)


def _look(line: Line, runs: int) -> tuple[str, Dash]:
    """(colour, dashes)."""
    if runs == 1:
        return COLORS[line.kind % len(COLORS)], _DASHES[line.kind // len(COLORS) % len(_DASHES)]
    return COLORS[line.run % len(COLORS)], _DASHES[line.kind % len(_DASHES)]


def _legend(figure: Figure, lines: Sequence[Line], runs: int) -> None:
    from matplotlib.lines import Line2D

    looks = {line.label: _look(line, runs) for line in lines}
    if len(looks) < 2:
        return
    handles = [Line2D([], [], color=color, linestyle=dash, linewidth=1.8) for color, dash in looks.values()]
    columns = 2 if max(map(len, looks)) < 28 else 1
    # A label that begins with an underscore would be left out.
    names = [f" {_short(label)}" for label in looks]
    figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=1.8, columnspacing=1.2)


def _short(label: str, most: int = 52) -> str:
    return label if len(label) <= most else f"{label[: most // 2]}…{label[-most // 2 + 1 :]}"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Over a fortieth of the points, of which those that are not finite do not count."""
    width = max(3, len(values) // 40) | 1
    finite = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(float), kernel, mode="same")
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / np.where(counts > 0, counts, np.nan))
