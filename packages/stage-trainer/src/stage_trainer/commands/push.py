"""`stage-trainer push`: uploads an exported model to a hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_trainer.commands.common import a_path, say
from stage_trainer.errors import UserError
from stage_trainer.hub import NAME


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "push",
        help="upload an exported model to the Hugging Face hub, or to a server with its interface",
        description="Uploads a directory that `stage-trainer export` wrote, as one commit; the repository is made if "
        "there is none. It asks the server that HF_ENDPOINT names (https://huggingface.co without one), with the "
        "token of `hf auth login` or of HF_TOKEN. Read the model card first: its licence is published with it.",
    )
    p.add_argument("model", type=a_path, help="an exported model")
    p.add_argument("repository", help="OWNER/NAME on the hub")
    p.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    p.add_argument("--message", default="Upload model", help="of the commit (default: %(default)s)")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if not NAME.fullmatch(arguments.repository):
        raise UserError(f"{arguments.repository!r} is no repository; expected OWNER/NAME, of up to 96 characters each")
    if not arguments.message.strip():
        raise UserError("--message is empty; say what is uploaded, or leave it out")
    _check(arguments.model, arguments.repository)
    say("loading the hub's client …")
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(arguments.repository, private=arguments.private or None, exist_ok=True)
        done = hub.upload_folder(
            repo_id=arguments.repository, folder_path=arguments.model, commit_message=arguments.message
        )
    except Exception as error:  # those of its HTTP library among them
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"could not upload {arguments.model} to {hub.endpoint}/{arguments.repository}: {told[0]}. Check the "
            "network, the token (`hf auth login`, or HF_TOKEN) and its right to write there, and push again"
        ) from error
    print(f"uploaded {arguments.model}: {done.commit_url}")


def _check(model: Path, repository: str) -> None:
    """That it is a whole export: what is published should open."""
    if not (model / "README.md").is_file() or not (model / "config.json").is_file():
        raise UserError(
            f"{model} is no exported model: it has no README.md beside a config.json; write one with "
            "`stage-trainer export`"
        )
    open_clip = model / "open_clip_config.json"
    if open_clip.is_file() and f'"hf-hub:{repository}"' not in open_clip.read_text(encoding="utf-8"):
        raise UserError(
            f"{open_clip} names another place than {repository}, from which open_clip would make the towers; "
            f"export it again with `--format open-clip --repository {repository}`"
        )
    say("reading the model …")
    from stage_trainer.formats.onnx import check_installed, graphs_in

    if graphs := graphs_in(model):
        check_installed()
        from stage_trainer.formats.onnx.parity import check_opens

        for file in graphs:
            check_opens(file)
        return
    from stage_trainer.dual_encoder import DualEncoder

    DualEncoder.from_pretrained(model)
