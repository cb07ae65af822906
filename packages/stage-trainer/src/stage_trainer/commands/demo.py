"""`stage-trainer demo`: a page in a browser that searches a collection."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_trainer.commands.common import MODEL, a_path, add_max_pixels, find_model, max_pixels_of, say
from stage_trainer.errors import UserError

_INDEX = Path("~/.cache/trilith/index")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "demo",
        help="search a collection in a browser, by text or by image",
        description="Serves a page on this machine that searches DATA: by a text in any language or by an image, with "
        "vectors cut to any dim, images and texts ranked together if asked. DATA is embedded once, as `stage-trainer "
        "encode` does it; the vectors are kept in --index. What cannot be read is left out, and said. Needs gradio: "
        "the extra `demo`.",
    )
    p.add_argument("model", type=a_path, help=MODEL)
    p.add_argument(
        "data",
        type=a_path,
        nargs="+",
        help="folders of images, text files (a text a line), data sets in our shards, or a corpus (its held-out data)",
    )
    p.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (default: %(default)s)")
    p.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, without a password (default: %(default)s)"
    )
    p.add_argument("--index", type=a_path, default=_INDEX, help="folder of the vectors (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one")
    add_max_pixels(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from stage_trainer.files import check_can_write

    max_pixels = max_pixels_of(arguments)
    if not 1 <= arguments.port <= 65535:
        raise UserError(f"--port is {arguments.port}; expected 1 to 65535")
    if not arguments.host.strip():
        raise UserError("--host is empty, which would let every machine in; name 127.0.0.1 or 0.0.0.0")
    _check_free(arguments.host, arguments.port)
    index = arguments.index.expanduser()
    check_can_write(index / "vectors.npy")
    if missing := [path for path in arguments.data if not path.exists()]:
        raise UserError(f"there is no {missing[0]}; expected images, texts or data sets to search")
    model, _ = find_model(arguments.model)
    from stage_trainer.pages import demo

    demo.gradio_needed()
    from stage_trainer.dual_encoder import DualEncoder
    from stage_trainer.pages.collection import open_collection
    from stage_trainer.run.device import uses_gpu

    device = "cuda" if uses_gpu(arguments.device, "fp32") else "cpu"
    towers = DualEncoder.from_pretrained(model).eval().to(device)
    options = {"max_pixels": max_pixels}
    collection = open_collection(model, arguments.data, index, options, device, say)
    for name, reason in collection.left_out[:5]:
        say(f"left out: {name}: {reason}")
    if (more := len(collection.left_out) - 5) > 0:
        say(f"left out: {more:,} more")
    searcher = demo.Searcher(towers, collection, max_pixels)
    page = demo.page_of(searcher, demo.title_of(arguments.model), towers.matryoshka_dims)
    try:
        demo.serve(page, arguments.host, arguments.port, lambda url: print(f"open {url} (Ctrl-C ends it)", flush=True))
    except KeyboardInterrupt:
        say("ended")


def _check_free(host: str, port: int) -> None:
    """UserError if something listens there, before the work rather than after it."""
    import errno
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a page that has just ended would be in the way
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "another program listens there" if taken else error.strerror or str(error)
            raise UserError(f"{host}:{port} cannot be used: {why}; name another --port or --host") from error
