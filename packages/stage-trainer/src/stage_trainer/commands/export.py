"""`stage-trainer export`: takes the model out of a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from stage_trainer.commands.common import a_path, find_model
from stage_trainer.errors import UserError
from stage_trainer.hub import NAME

if TYPE_CHECKING:
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.formats.common import Adapters

FORMATS = {
    "common": "one directory for Trilith, sentence-transformers, transformers and timm, with a model card",
    "trilith": "for stage_trainer.DualEncoder alone; any model, adapters as they are",
    "jina-clip": "the layout of the published jina-clip-v2, for its code and what is built on that",
    "jina-clip-v1": "the layout of the published jina-clip-v1, likewise; of a JinaBERT text tower",
    "open-clip": "for open_clip 3.3; the default adapter is merged",
    "onnx": "graphs for ONNX Runtime and transformers.js; needs onnx, onnxscript and onnxruntime",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    p = commands.add_parser(
        "export",
        help="take the model out of a checkpoint or a finished stage, for other libraries too",
        description="Writes a directory that stage_trainer.DualEncoder, sentence-transformers, transformers and timm "
        "open; its README.md says how. Of a stage's folder it takes the newest checkpoint, and says so; name a "
        "step-… folder for another. What `stage-trainer evaluate` found of a stage goes into the card.",
    )
    p.add_argument(
        "checkpoint",
        type=a_path,
        help="a checkpoint, a stage's folder (its newest checkpoint), or a model or its name on the hub",
    )
    p.add_argument("out", type=a_path, help="the directory to write; it must not exist")
    p.add_argument("--format", choices=FORMATS, default="common", help=f"{formats} (default: %(default)s)")
    p.add_argument(
        "--lora",
        choices=("merged", "kept"),
        help="merged: the text tower's default adapter is added to its weights, and every library gives its vectors; "
        "kept: adapters stay apart (common: a PEFT folder each, text/NAME, for further training; not for "
        "sentence-transformers) (default: merged; of jina-clip: kept; of jina-clip-v1, onnx and open-clip merged "
        "alone)",
    )
    p.add_argument(
        "--dtype",
        choices=("float16", "float32", "int8", "q4"),
        help="of the weights: of jina-clip's float16, as published, or float32 (jina-clip-v1's default); of onnx one "
        "instead of all four",
    )
    p.add_argument(
        "--task", help='of onnx: whose adapter is added to the weights (default: the first; "none" leaves all out)'
    )
    p.add_argument(
        "--repository",
        metavar="OWNER/NAME",
        help="of open-clip: where on a hub it will stand, which its files name (default: it is loaded from OUT)",
    )
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.files import check_can_write, writing

    _check(arguments)
    with writing(arguments.out):
        if arguments.out.exists():
            raise UserError(f"{arguments.out} exists already; name another place or move it away")
    check_can_write(arguments.out)
    found, checkpoint = find_model(arguments.checkpoint)
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.formats import common, history
    from stage_trainer.formats.card import card

    model = DualEncoder.from_pretrained(found)
    if model.logit_bias is not None and arguments.format == "onnx":
        print("not in this directory: the sigmoid loss's biases, for which graphs have no place; vectors need none")
    if model.vision.config.lora_rank and arguments.format != "trilith":
        print("the image tower's adapter is merged into its weights")
    name = arguments.repository or arguments.out.resolve().name

    def card_of(become: common.Adapters) -> str:
        past = history.of(found, checkpoint, str(arguments.checkpoint))
        return card(name, model, become, past, arguments.format, arguments.dtype)

    if arguments.format == "trilith":
        model.save_pretrained(arguments.out)
    elif arguments.format in ("jina-clip", "jina-clip-v1"):
        _write_jina_clip(model, arguments, card_of)
    elif arguments.format == "onnx":
        return _write_onnx(model, arguments, card_of)
    elif arguments.format == "open-clip":
        from stage_trainer.formats import open_clip

        adapters = open_clip.write(model, arguments.out, arguments.repository, card_of)
        _say_adapters(adapters.merged, adapters.left_out, ", since open_clip has none", can_be_kept=False)
    else:
        adapters = common.write(model, arguments.out, arguments.lora or "merged", card_of)
        _say_adapters(adapters.merged, adapters.left_out, "; --lora kept exports all of them")
        if adapters.kept:
            kept = ", ".join(adapters.kept)
            print(f"the adapters {kept} are PEFT folders; sentence-transformers needs --lora merged")
    if arguments.format == "open-clip" and (model.vision.config.projector or model.text.config.projector):
        print(f"wrote {arguments.out}, for open_clip alone: Trilith reads a projector from --format trilith")
        return
    print(
        f"wrote {arguments.out}\n"
        f"  in Python:  stage_trainer.DualEncoder.from_pretrained({str(arguments.out)!r})\n"
        f"  figures:    stage-trainer evaluate {shlex.quote(str(arguments.out))} DATA\n"
        f'  picture:    stage-trainer search {shlex.quote(str(arguments.out))} DATA "some words"'
    )
    if arguments.format != "trilith":
        print(f"  elsewhere:  {arguments.out / 'README.md'} has an example for each library")


def _check(arguments: argparse.Namespace) -> None:
    """UserError for options that the format has no use for, or packages that it needs."""
    form = arguments.format
    if arguments.dtype and form not in ("jina-clip", "jina-clip-v1", "onnx"):
        raise UserError("--dtype is for --format jina-clip and onnx; leave it out")
    if form != "onnx" and arguments.dtype not in (None, "float16", "float32"):
        raise UserError(f"--dtype {arguments.dtype} is for --format onnx; jina-clip's weights are float16 or float32")
    if arguments.lora and form == "trilith":
        raise UserError("--lora is not for --format trilith, which keeps adapters as they are; leave it out")
    if arguments.lora == "kept" and form == "onnx":
        raise UserError("a graph has no adapters: --format onnx merges one; leave --lora out, --task chooses which")
    if arguments.task is not None and form != "onnx":
        raise UserError("--task is for --format onnx; leave it out")
    _check_open_clip(arguments)
    if form == "onnx":
        from stage_trainer.formats.onnx import check_installed

        check_installed()


def _check_open_clip(arguments: argparse.Namespace) -> None:
    if arguments.format == "open-clip" and arguments.lora == "kept":
        raise UserError("open_clip has no adapters: leave --lora out, and the default one is merged")
    if arguments.repository is None:
        return
    if arguments.format != "open-clip":
        raise UserError("--repository is for --format open-clip; leave it out")
    if not NAME.fullmatch(arguments.repository):
        raise UserError(f"--repository is {arguments.repository!r}; expected OWNER/NAME")


def _write_onnx(model: DualEncoder, arguments: argparse.Namespace, card_of: Callable[[Adapters], str]) -> None:
    from stage_trainer.formats.onnx import PRECISIONS, directory

    precisions = (arguments.dtype,) if arguments.dtype else tuple(PRECISIONS)
    adapters = directory.write(model, arguments.out, task=arguments.task, precisions=precisions, card=card_of)
    _say_adapters(adapters.merged, adapters.left_out, "; --task chooses the one that is merged", can_be_kept=False)
    print(
        f"wrote {arguments.out}: text_model, vision_model and model (both) in {', '.join(precisions)}\n"
        f"  elsewhere:  {arguments.out / 'README.md'} has an example for ONNX Runtime and one for transformers.js"
    )


def _write_jina_clip(model: DualEncoder, arguments: argparse.Namespace, card_of: Callable[[Adapters], str]) -> None:
    from stage_trainer.formats import jina_clip, jina_clip_v1

    options = {key: value for key in ("lora", "dtype") if (value := getattr(arguments, key))}
    write = jina_clip.write if arguments.format == "jina-clip" else jina_clip_v1.write
    written = write(model, arguments.out, **options, card=card_of)
    _say_adapters((written.merged,) if written.merged else (), written.left_out, ", for which its layout has no place")
    if written.rounded:
        to = arguments.dtype or "float16"
        print(f"{len(written.rounded)} tensors are rounded to {to}; --dtype float32 keeps every number")


def _say_adapters(merged: tuple[str, ...], left_out: tuple[str, ...], why: str, *, can_be_kept: bool = True) -> None:
    if merged:
        kept = "; --lora kept leaves it apart" if can_be_kept else ""
        print(f"the adapter {merged[0]} is merged into the text tower's weights{kept}")
    if left_out:
        print(f"not in this directory: the adapters {', '.join(left_out)}{why}")
