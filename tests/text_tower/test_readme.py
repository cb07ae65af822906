import re
import subprocess
import sys
from pathlib import Path

HEAVY = {"transformers", "peft", "timm", "torchvision", "torch._dynamo", "sympy"}
README = Path(__file__).parents[2] / "packages/text-tower/README.md"


def test_readme_example_runs_as_it_stands(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 5
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"


def loaded_by(code):
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    return set(loaded)


def test_importing_loads_no_other_model_library_no_tokenizer_library_and_no_compiler():
    code = "import sys; from text_tower import TextTower, Tokenizer; print(*sys.modules)"
    assert not {"tokenizers", "sentencepiece", *HEAVY} & loaded_by(code)


def test_a_tower_is_made_saved_read_and_run_without_other_model_libraries_and_the_compiler(tmp_path):
    """The compiler alone takes some four seconds to import; PyTorch imports it to draw numbers on the meta device."""
    assert not HEAVY & loaded_by(f"""
import sys, torch
from text_tower import MaskedLM, PackedTokens, TextTower, TextTowerConfig
config = TextTowerConfig(vocab_size=20, width=16, layers=1, heads=2, mlp_width=16, adapters=("a",), lora_rank=2)
with torch.device("meta"):
    MaskedLM(TextTower(TextTowerConfig(vocab_size=20, width=16, layers=1, heads=2, mlp_width=16)))
TextTower(config).save_pretrained({str(tmp_path / "tower")!r})
tower = TextTower.from_pretrained({str(tmp_path / "tower")!r})
for each in (tower, tower.merged()):
    each(PackedTokens.from_lists([[5, 6], [7]])).sum().backward()
print(*sys.modules)
""")
