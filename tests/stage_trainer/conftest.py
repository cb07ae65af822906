import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def recipes() -> Path:
    return Path(__file__).parents[2] / "launch" / "recipes"


@pytest.fixture
def recipe_file(tmp_path: Path, recipes: Path):
    """Writes a variant of the drawn recipe: the text with one string replaced by another."""

    def write(old: str = "", new: str = "") -> Path:
        text = (recipes / "drawn.yaml").read_text()
        assert old in text
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return path

    return write


@pytest.fixture
def png() -> bytes:
    """A small picture, encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def two_ranks() -> Callable[..., None]:
    def run(file: str, folder: Path, *more: str) -> None:
        """Runs a test file as a program, once as each of two ranks: FILE RANK FOLDER …. Both have to end well."""
        ranks = [subprocess.Popen([sys.executable, file, str(rank), str(folder), *more]) for rank in (0, 1)]
        assert [process.wait(timeout=550) for process in ranks] == [0, 0]  # a busy machine takes its time

    return run
