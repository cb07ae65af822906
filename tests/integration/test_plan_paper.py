"""The README's table of the paper's recipe against what is predicted now."""

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "packages/stage-trainer/benchmarks"
HOW = "python packages/stage-trainer/benchmarks/plan_paper.py --write"


def numbers(row: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", row)]


@pytest.mark.full
def test_the_readme_says_what_is_predicted_for_the_papers_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        import plan_paper
    finally:
        sys.modules.pop("plan_paper", None)
    readme = plan_paper.README.read_text()
    table = readme.partition(plan_paper.BEGIN)[2].partition(plan_paper.END)[0].splitlines()
    found = plan_paper.columns()
    expected = plan_paper.as_markdown(found).splitlines()
    assert [row.split("|")[1] for row in table] == [row.split("|")[1] for row in expected], HOW
    for row, now in zip(table, expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(now), rel=0.03, abs=0.011), f"{HOW}: {row} is now {now}"
    times = [column.time.total for column in found]
    assert times == sorted(set(times), reverse=True)
