"""The drawn corpus and its recipe, for the parts that train on real data; made once, by the first part that asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stage_trainer.recipe import Recipe
from stage_trainer.recipe.read import load

SCRATCH = Path(os.environ["GPU_SCRATCH"])
_MAKE = "from data_prep.cli import main; import sys; sys.exit(main())"


def recipe_of(output: str, cuda: bool, *overrides: str) -> Recipe:
    """Stage 1 of launch/recipes/drawn.yaml with AdamW, in bfloat16 on a GPU."""
    corpus = SCRATCH / "corpus"
    if not corpus.exists():
        subprocess.run([sys.executable, "-c", _MAKE, "corpus", str(corpus), "--drawn"], check=True, timeout=120)
    settings = [
        f"corpus={corpus}",
        f"model.tokenizer={corpus}/tokenizer.model",
        f"output={SCRATCH / output}",
        f"precision={'bf16' if cuda else 'fp32'}",
        "optimizer.name=adamw",
    ]
    return load("launch/recipes/drawn.yaml", [*settings, *overrides], stage=1).recipe
