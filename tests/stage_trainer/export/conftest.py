"""A small trained model, a checkpoint that holds it, and other libraries in processes that do not see our packages."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from stage_trainer.checkpoint.save import write
from stage_trainer.cli import main
from stage_trainer.dual_encoder import DualEncoder
from text_tower import TextTower, TextTowerConfig, Tokenizer
from vision_tower import VisionTower, VisionTowerConfig

LANGUAGES = Path(__file__).parents[2] / "text_tower" / "languages.json"
TASK, OTHER = "retrieval.query", "separation"
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
OURS = ("stage_trainer", "text_tower", "vision_tower", "contrastive_losses", "data_prep")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """A sentence in each of thirty languages, and a text that is longer than what is kept of it."""
    found = list(json.loads(LANGUAGES.read_text(encoding="utf-8")).values())
    return [*found, " ".join(found * 4), ""]


@pytest.fixture(scope="session")
def tokenizer(sentences, tmp_path_factory) -> Tokenizer:
    from sentencepiece import SentencePieceTrainer

    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences[:30] * 3), model_writer=content, vocab_size=480, character_coverage=0.995,
        minloglevel=2,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    file.write_bytes(content.getvalue())
    return Tokenizer.from_file(file)


@pytest.fixture(scope="session")
def make_model(tokenizer) -> Callable[..., DualEncoder]:
    """Two towers in which every parameter matters, with adapters, an instruction, and preprocessing of its own."""

    def make(adapters=(TASK,), text=None, vision=None) -> DualEncoder:
        lora = {"adapters": adapters, "lora_rank": 2, "lora_alpha": 3.0} if adapters else {}
        shape = {"vocab_size": tokenizer.vocab_size, "width": 32, "layers": 2, "heads": 4, "mlp_width": 48}
        said = {"max_length": 2000, "instructions": {TASK: "find: "}, "rope_theta": 500.0}
        torch.manual_seed(0)
        images = {"resolution": 48, "patch": 8, "width": 32, "layers": 2, "heads": 2}
        images |= {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25), "crop_pct": 0.875, "interpolation": "bilinear"}
        model = DualEncoder(
            TextTower(TextTowerConfig(**{**shape, **lora, **said, **(text or {})}), tokenizer),
            VisionTower(VisionTowerConfig(**{**images, **(vision or {})})),
            matryoshka_dims=(32, 16),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model) -> DualEncoder:
    return make_model()


SETTINGS = {
    "model.weights": None, "model.text_weights": None, "model.vision_weights": None, "optimizer.name": "adamw",
    "stage.max_tokens": 64, "stage.resolution": [[0, 48]], "stage.batch.image_text": 8, "stage.loss.dims": [32, 16],
}  # fmt: skip


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    def save(stage: Path, model: DualEncoder, data: dict[str, str] | None = None, **settings) -> Path:
        """A checkpoint of four steps in a stage's folder."""
        state = {
            "step": 4, "seconds": 7.5, "data": {"image-short/drawn": "abc", **(data or {})},
            "versions": {"torch": "2"}, "texts_drawn": {"image-short/drawn": 32},
            "settings": {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}},
        }  # fmt: skip
        write(stage, model, {}, state)
        return stage / "step-0000004"

    return save


@pytest.fixture(scope="session")
def exported(model, save, tmp_path_factory) -> Path:
    """The export of a stage's checkpoint, `model`, in a folder that also holds `photo.jpg`."""
    folder = tmp_path_factory.mktemp("exported")
    save(folder / "run" / "stage1", model)
    assert main(["export", str(folder / "run" / "stage1"), str(folder / "model")]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(folder / "photo.jpg")
    return folder / "model"


class Picture(NamedTuple):
    """A picture, and the square of it that transformers gives the model: its crop begins at a whole number of pixels
    that is rounded down, torchvision's, timm's and ours at the nearest."""

    image: Image.Image
    theirs: Image.Image


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    """Of every mode, with and without the surplus of which the crops differ."""
    draw = np.random.default_rng(1)
    modes = [("RGB", 40, 40), ("RGB", 60, 40), ("RGB", 40, 71), ("L", 50, 80), ("P", 50, 80), ("RGBA", 70, 50),
             ("LA", 33, 90), ("RGB", 57, 54)]  # fmt: skip
    found = []
    for mode, width, height in modes:
        small = Image.fromarray(draw.integers(0, 256, (5, 4, 4), dtype=np.uint8), "RGBA")
        image = small.resize((width, height), Image.Resampling.BICUBIC).convert("RGB" if mode == "P" else mode)
        image = image.convert(mode)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        short = min(width, height)
        flat = flat.resize((54 * width // short, 54 * height // short), Image.Resampling.BILINEAR)
        left, top = (flat.width - 48) // 2, (flat.height - 48) // 2
        found.append(Picture(image, flat.crop((left, top, left + 48, top + 48))))
    assert any((p.theirs.size, round((54 * p.image.width // min(p.image.size) - 48) / 2)) for p in found)
    return found


@pytest.fixture(scope="session")
def elsewhere() -> Callable[..., dict[str, np.ndarray]]:
    def run(code: str, folder: Path, *absent: str) -> dict[str, np.ndarray]:
        """Runs Python where `absent` and our packages cannot be imported; gives what it leaves in `out`."""
        script = (
            "import sys, warnings\n"
            "sys.path.pop(0)\n"
            "warnings.simplefilter('ignore')\n"
            f"sys.modules.update(dict.fromkeys({(*OURS, *absent)!r}))\n"  # None: ImportError
            f"out = {{}}\n{code}\nimport numpy\nnumpy.savez('out.npz', **out)\n"
            f"assert not any(name.partition('.')[0] in {OURS!r} and sys.modules[name] for name in sys.modules)\n"
        )
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
        done = forks.run([sys.executable, "-c", script], folder, forks.FOREIGN, **offline)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "newly initialized" not in done.stderr
        assert "MISSING" not in done.stderr, done.stderr
        return dict(np.load(folder / "out.npz"))

    return run


@pytest.fixture(scope="session")
def node(tmp_path_factory) -> Path:
    """A folder in which node finds transformers.js."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    # Its script downloads libraries for GPUs from elsewhere; those for the CPU are in the package.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
