import io
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
