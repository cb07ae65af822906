"""What reaches the ranks of other machines: all arguments, and the variables that matter, but no secrets."""

import base64
import json
import os
import subprocess
import sys

import pytest
from stage_trainer.run.forwarding import OPTION, pack

ARGUMENTS = [
    "--recipe",
    "a b.yaml",
    "batch={image_text: 8, text: 4}",
    "corpus=https://h/x?a=1&b=$HOME",
    'name="q"',
    "ä",
]
HERE = {
    "HF_HOME": "/shared/hf home", "GLOO_SOCKET_IFNAME": "eth1", "TOKENIZERS_PARALLELISM": "false", "https_proxy": "http://p",
    "HF_TOKEN": "secret-1", "AWS_SECRET_ACCESS_KEY": "secret-2", "HTTP_PROXY": "http://me:secret-3@p", "EDITOR": "vi",
    "TORCHELASTIC_RUN_ID": "7",
}  # fmt: skip
SECRET = ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HTTP_PROXY"]

# A `deepspeed` that starts one rank as pdsh would: through a shell that reads the words again, with no variables.
DEEPSPEED = f"""#!{sys.executable}
import os, subprocess, sys
script = next(i for i, word in enumerate(sys.argv) if word.endswith("stage2.sh"))
words = ['"' + word.replace('"', '\\\\"') + '"' if " " in word else word for word in sys.argv[script + 1 :]]
print(os.environ["PDSH_SSH_ARGS_APPEND"], flush=True)
line = " ".join([{sys.executable!r}, sys.argv[script], "--local_rank=0", *words])
sys.exit(subprocess.run(["bash", "-c", line], env={{"PATH": os.environ["PATH"], "HF_DATASETS": "own"}}).returncode)
"""
STAGE = """
import json, os, sys
from stage_trainer import cli
cli.main = lambda words: print(json.dumps([words, dict(os.environ)])) or 0
cli.launch(stage=2)
"""


def test_a_remote_rank_gets_the_arguments_as_they_are_and_the_variables(tmp_path):
    """RECIPE is an argument there: launch/stage2.sh makes it one."""
    for name, content in {"deepspeed": DEEPSPEED, "stage2.sh": STAGE}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    words = ["--hostfile", "hosts", "--venv_script", "activate.sh", str(tmp_path / "stage2.sh"), *ARGUMENTS]
    done = subprocess.run(
        [sys.executable, "-m", "stage_trainer.run.launcher", *words],
        env={**os.environ, **HERE, "HF_DATASETS": "sent", "PATH": f"{tmp_path}:{os.environ['PATH']}",
             "PDSH_SSH_ARGS_APPEND": "-p 2222"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (said, of_ssh), (found, variables) = done.stdout.splitlines()[:2], json.loads(done.stdout.splitlines()[-1])
    assert found == ["train", "--stage", "2", "--local_rank=0", *ARGUMENTS]
    for name in ("HF_HOME", "GLOO_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "https_proxy"):
        assert variables[name] == HERE[name]
    assert not {"EDITOR", "TORCHELASTIC_RUN_ID", *SECRET} & variables.keys()
    assert variables["HF_DATASETS"] == "own"
    assert of_ssh == "-p 2222 -o ServerAliveInterval=10 -o ServerAliveCountMax=3", "a machine that is lost ends ssh"
    assert said == f"{', '.join(SECRET)} stay on this machine; set them, or log in, on each of the others"


def test_no_secret_stands_in_a_command_line():
    words, secret = pack(["deepspeed", "-H", "hosts", "launch/stage1.sh", "a=b"], HERE)
    assert secret == SECRET
    assert words[:4] == ["deepspeed", "-H", "hosts", "launch/stage1.sh"]
    (only,) = words[4:]
    assert only.startswith(OPTION)
    assert b"secret" not in base64.urlsafe_b64decode(only.removeprefix(OPTION))


@pytest.mark.parametrize("words", [["deepspeed", "--help"], ["deepspeed", "train.py", "a=b"]])
def test_what_starts_no_stage_is_left_alone(words):
    assert pack(words, HERE) == (words, [])
