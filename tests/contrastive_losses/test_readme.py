import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "contrastive-losses" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_has_an_example_of_five_lines():
    assert len([line for line in EXAMPLES[0].splitlines() if line]) == 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_examples_run_as_they_stand(example):
    exec(compile(example, "README.md", "exec"), {})
