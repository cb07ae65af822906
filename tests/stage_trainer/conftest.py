import io
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from stage_trainer.dual_encoder import DualEncoder
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig


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
        ranks = [[sys.executable, file, str(rank), str(folder), *more] for rank in (0, 1)]
        done = forks.together(ranks, ".", [{}, {}])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    return run


def make_model(seed=0, resolution=24):
    torch.manual_seed(seed)
    text = TextTowerConfig(vocab_size=50, width=16, layers=1, heads=2, mlp_width=32)
    vision = VisionTowerConfig(resolution=resolution, patch=8, width=16, layers=1, heads=2, mlp_width=24)
    return DualEncoder(TextTower(text), VisionTower(vision))


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> DualEncoder:
    """A small model with a tokenizer and an instruction."""
    from sentencepiece import SentencePieceTrainer

    prefix = tmp_path_factory.mktemp("spm") / "small"
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red disk and a blue one", "ein roter Kreis"] * 9), model_prefix=str(prefix),
        vocab_size=40, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(prefix.with_suffix(".model"))
    torch.manual_seed(0)
    text = TextTowerConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, mlp_width=32,
                           instructions={"query": "a red "})  # fmt: skip
    vision = VisionTowerConfig(resolution=16, patch=8, width=16, layers=1, heads=2, mlp_width=24)
    return DualEncoder(TextTower(text, tokenizer), VisionTower(vision))


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
