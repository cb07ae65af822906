"""What the benchmarks share: the two models on the same weights, the length mix, and the results file."""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from text_tower import PackedTokens, TextTower, TextTowerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = Path(__file__).with_name("results")
SHAPES = {
    "small": TextTowerConfig(vocab_size=1000, width=384, layers=6, heads=6, mlp_width=1536),
    "large": TextTowerConfig(),  # the published one
}


def pair(config: TextTowerConfig) -> tuple[TextTower, PreTrainedModel]:
    """A fresh tower and transformers' model with the same weights, both in training mode, both tables frozen.

    The tables' dense gradients cost the same in both and would hide the rest.
    """
    from transformers import AutoModel

    torch.manual_seed(0)
    tower = TextTower(config)
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(Path(folder) / "model")
        model = AutoModel.from_pretrained(Path(folder) / "model", attn_implementation="sdpa", add_pooling_layer=False)
    for module in (tower, model):
        module.train().embeddings.word_embeddings.requires_grad_(False)
        module.embeddings.token_type_embeddings.requires_grad_(False)
    return tower, model


def log_normal_lengths(
    n: int, generator: torch.Generator, mean: float = 40.0, sigma: float = 0.8, longest: int = 512
) -> list[int]:
    """Lengths of texts as they come: log-normal with the given mean before it is cut to 3 … `longest` tokens."""
    mu = torch.tensor(mean).log() - sigma**2 / 2
    drawn = (torch.randn(n, generator=generator) * sigma + mu).exp().round()
    return drawn.clamp(3, longest).int().tolist()


def batch(
    lengths: list[int], vocab_size: int, generator: torch.Generator, device: str = "cpu"
) -> tuple[PackedTokens, torch.Tensor, torch.Tensor]:
    """The same random texts for both: packed, and as padded ids with their mask."""
    texts = [torch.randint(4, vocab_size, (n,), generator=generator) for n in lengths]
    packed = PackedTokens.from_lists([text.tolist() for text in texts]).to(device)
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1).to(device)
    return packed, ids, (ids != 1).long()


def run_ours(tower: TextTower, packed: PackedTokens) -> torch.Tensor:
    embeddings: torch.Tensor = tower(packed)
    return embeddings


def run_theirs(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def write(name: str, results: dict[str, Any]) -> None:
    """Prints the results and writes them, with the machine they were measured on, to results/NAME.json."""
    machine = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps({"machine": machine, **results}, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
