"""What a process draws in, counted in modules: PyTorch's compiler takes four seconds of each rank's start, timm with
torchvision five, setuptools comes with a C compiler that is tried. Nothing that is not compiled or read from timm needs
them."""

import json
import subprocess
import sys

from .conftest import RECIPE

HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.tensor", "sympy", "setuptools"),
    *("timm", "torchvision", "transformers", "sentence_transformers", "scipy", "sklearn", "pandas", "pyarrow"),
}
COMMANDS = """
import json, sys
from importlib.util import cache_from_source
from pathlib import Path
from stage_trainer.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
files = [path for path in files if "site-packages" in path and path.endswith(".py")]
compiled = [Path(cache_from_source(path)).exists() for path in files]
print("COMPILED", sum(compiled), len(compiled))
print("LOADED", *sys.modules)
"""


def test_a_rank_and_the_commands_of_a_model_load_no_compiler_and_no_library_of_models(tmp_path, drawn_corpus):
    here = ["--recipe", str(RECIPE), f"corpus={drawn_corpus}", f"model.tokenizer={drawn_corpus}/tokenizer.model"]
    quick = ["steps=2", "warmup_steps=1", "resolution=[[0, 32]]", "checkpoint.every=1", "workers=1"]
    (tmp_path / "lines.txt").write_text("a red circle\n")
    commands = [
        ["train", "--stage", "1", *here, *quick],
        ["train", "--stage", "1", *here, *quick, "output=adamw", "optimizer.name=adamw"],
        ["export", "runs/drawn/stage1", "model"],
        ["evaluate", "model", str(drawn_corpus)],
        ["search", "model", str(drawn_corpus), "a red circle", "--out", "found.png"],
        ["encode", "model", "lines.txt", "--out", "vectors.npy"],
    ]
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, files = map(int, done.stdout.rpartition("COMPILED")[2].split()[:2])
    assert compiled > 0.9 * files > 900, "each process compiles what it imports; launch/environment.sh does it once"
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert {"torch", "deepspeed", "stage_trainer.bulk.vectors"} <= loaded
    assert not HEAVY & loaded
