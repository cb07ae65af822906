"""`stage-trainer encode`: files of texts and images to a file of vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_trainer.commands.common import MODEL, a_path, add_max_pixels, check_output, find_model, max_pixels_of, say
from stage_trainer.errors import UserError

AUTO = "auto"
PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")  # `metrics.quantization`, without numpy


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "encode",
        help="embed files of texts and images into a parquet or npy file",
        description="Embeds what FILES hold, in their order: image files and folders of them, text files (one text a "
        "line), tables (JSON lines, CSV, TSV, also .gz, and parquet; --column), and data sets in our shards. Stopped "
        "or killed at any moment, the same command goes on where it was; OUT appears when it is whole. parquet: the "
        "columns id and vector. npy: [N, D], the ids in NAME.ids.jsonl, one a line, and in NAME.vectors.json how they "
        "are stored, as a parquet file's metadata say. `stage-trainer search` reads both.",
    )
    p.add_argument("model", type=a_path, help=MODEL)
    p.add_argument("files", type=a_path, nargs="+", metavar="FILES", help="files and folders")
    p.add_argument("--out", type=a_path, required=True, help="NAME.parquet or NAME.npy; it must not exist")
    p.add_argument("--column", metavar="NAME", help="of tables: what is embedded")
    p.add_argument("--id", metavar="NAME", help="of tables: the column of the ids (default: FILE:NUMBER of the row)")
    p.add_argument(
        "--kind",
        choices=("text", "image"),
        help="what lines, cells and samples are; images are paths (from the file's own folder), URLs or bytes "
        "(default: texts; images in data sets of images and columns of bytes)",
    )
    p.add_argument(
        "--errors",
        choices=("raise", "skip"),
        default="raise",
        help="at what cannot be encoded: stop and name it, or leave it out and list it in NAME.skipped.jsonl (default: "
        "%(default)s)",
    )
    _add_vectors(p)
    _add_machine(p)
    add_max_pixels(p)
    p.set_defaults(run=run)


def _add_vectors(p: argparse.ArgumentParser) -> None:
    p.add_argument("--task", "--prompt-name", help="of the texts: its instruction, and its adapter if there is one")
    p.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N dims (default: all)")
    p.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a text (default: %(default)s)")
    p.add_argument("--no-normalize", action="store_true", help="leave vectors as they are (default: length one)")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the file, as sentence-transformers has it: int8 and uint8 divide each dim's range into 256 steps, "
        "binary and ubinary keep the signs, eight dims in a byte (default: %(default)s)",
    )
    p.add_argument(
        "--calibration",
        type=a_path,
        metavar="FILE",
        help="of int8 and uint8: a file of vectors whose ranges are taken, so that both can be searched together "
        "(default: the ranges of the vectors themselves)",
    )


def _add_machine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch-size", type=int, metavar="N", help="most texts or images in one forward pass")
    p.add_argument("--device", choices=(AUTO, "cpu"), default=AUTO, help="auto: all GPUs that there are, or the CPU")
    p.add_argument("--processes", type=int, metavar="N", help="default: one a GPU, or one on the CPU")
    p.add_argument("--threads", type=int, metavar="N", help="that read images, of each process")
    p.add_argument(
        "--dtype",
        choices=(AUTO, "float32", "bfloat16", "float16"),
        default=AUTO,
        help="of the computation; auto: bfloat16 on GPUs (float16 on old ones), float32 on CPUs; the vectors' own "
        "is --precision",
    )


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.bulk.entries import open_inputs
    from stage_trainer.bulk.tables import Columns

    max_pixels = max_pixels_of(arguments)
    for name in ("truncate_dim", "max_length", "batch_size", "processes", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected a whole number from 1")
    for name in ("task", "column", "id"):
        if (word := getattr(arguments, name)) is not None and not word.strip():
            raise UserError(f"--{name} is {word!r}; name one, or leave it out")
    if arguments.calibration is not None and not arguments.precision.endswith("int8"):
        raise UserError(f"--calibration is of int8 and uint8, and --precision is {arguments.precision}; leave it out")
    _check_out(arguments.out)
    files = [Path(file) for file in arguments.files]  # those after an option are strings still
    inputs = open_inputs(files, arguments.kind, Columns(arguments.column, arguments.id))
    model, _ = find_model(arguments.model)
    from stage_trainer.bulk.encoder import EncoderSettings
    from stage_trainer.bulk.job import Job, run

    devices = _devices(arguments)
    options = {
        "task": arguments.task,
        "truncate_dim": arguments.truncate_dim,
        "max_length": arguments.max_length,
        "normalize": not arguments.no_normalize,
        "batch_size": arguments.batch_size,
        "dtype": _dtype(arguments.dtype, devices[0]),
        "threads": arguments.threads or _threads(len(devices)),
        "max_pixels": max_pixels,
    }
    settings = EncoderSettings(model, options, arguments.precision, arguments.calibration)
    job = Job(inputs, arguments.out, settings, devices, skipping=arguments.errors == "skip")
    vectors, left_out = run(job, say)
    print(f"wrote {arguments.out}: {vectors:,} vectors")
    _say_companions(arguments.out, left_out, skipping=job.skipping)


def _check_out(out: Path) -> None:
    from stage_trainer.bulk.tables import parquet_library
    from stage_trainer.bulk.vectors import SUFFIXES
    from stage_trainer.files import writing

    if out.suffix not in SUFFIXES:
        raise UserError(f"--out is {out}; expected a name that ends in {' or '.join(SUFFIXES)}")
    with writing(out):
        if out.exists():
            raise UserError(f"{out} exists already; name another place or move it away")
    if out.suffix == ".parquet":
        parquet_library()
    check_output(out)


def _devices(arguments: argparse.Namespace) -> list[str]:
    """The device of each process."""
    import torch

    from stage_trainer.run.device import uses_gpu

    if not uses_gpu(arguments.device, "fp32"):
        return ["cpu"] * (arguments.processes or 1)
    gpus = torch.cuda.device_count()
    return [f"cuda:{number % gpus}" for number in range(arguments.processes or gpus)]


def _dtype(asked: str, device: str) -> str:
    import torch

    from stage_trainer.encoding.precision import DTYPES, dtype_of

    found = dtype_of(asked, torch.device(device))
    return next(name for name, dtype in DTYPES.items() if dtype == found)


def _threads(processes: int) -> int:
    from stage_trainer.encoding.ahead import available

    return max(1, available() // processes)


def _say_companions(out: Path, left_out: int, *, skipping: bool) -> None:
    from stage_trainer.bulk.vectors import companions

    skipped, ids, stated = companions(out)
    if ids is not None:
        print(f"  their ids, in order: {ids}")
        print(f"  how they are stored: {stated}")
    if skipping:
        print(
            f"  left out: {left_out:,}, listed in {skipped}" if left_out else f"  left out: none ({skipped} is empty)"
        )
