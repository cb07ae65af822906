import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "packages/text-tower/README.md"


def test_readme_example_runs_as_it_stands(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 5
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"


def test_importing_loads_no_other_model_library_no_tokenizer_library_and_no_compiler():
    code = "import sys; from text_tower import TextTower, Tokenizer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    others = {"transformers", "peft", "timm", "tokenizers", "sentencepiece", "torch._dynamo"}
    assert not others & set(loaded)
