"""The process in which pages of PDF files are drawn; `pdf_pages` starts it, and ends it where a page takes too long.

    python -m data_prep.sources.pdf_process DESCRIPTOR

It answers requests of JSON on that descriptor: {"file", "seconds"} with {"pages"}, and with "page" and "side" besides
with {"text"} and the PNG, or {"refused"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_prep.errors import needs
from data_prep.image_rule import ImageRule
from data_prep.images import encode_image
from data_prep.shards.format import JsonObject, parse_json
from data_prep.sources.pdf_pages import MAX_SIDE, OUT_OF_MEMORY

_MEMORY = 2 * 2**30  # bytes; a page of MAX_SIDE with a photo of 100 million pixels needs a third of it
_STORED = ImageRule(encoding="png")


def main(descriptor: int) -> None:
    """Answer requests until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_watch_memory, daemon=True).start()
    pdfium = needs("pypdfium2", extra="pdf", what="reading PDF")
    connection = Connection(descriptor)
    path, document = "", None
    with suppress(EOFError, BrokenPipeError):
        connection.send_bytes(b"ready")
        while True:
            request = parse_json(connection.recv_bytes())
            _allow(request["seconds"])
            answer: JsonObject
            image = b""
            try:
                if request["file"] != path or document is None:
                    path, document = request["file"], pdfium.PdfDocument(request["file"])
                if "page" in request:
                    image, text = _drawn(pdfium, document[request["page"]], request["side"])
                    answer = {"text": text}
                else:
                    answer = {"pages": len(document)}
            except _TooLarge as error:
                answer = {"refused": str(error)}
            except (pdfium.PdfiumError, ValueError, OSError, MemoryError):
                answer = {"refused": ""}
            connection.send_bytes(json.dumps(answer).encode())
            connection.send_bytes(image)


class _TooLarge(Exception):
    """A page that is not drawn because of what is on it."""


def _drawn(pdfium: Any, page: Any, side: int) -> tuple[bytes, str]:
    """A page as a PNG whose shortest side has at least `side` pixels, and its text."""
    for image in page.get_objects(filter=[pdfium.raw.FPDF_PAGEOBJ_IMAGE]):  # of the file's words, before it is decoded
        width, height = image.get_px_size()
        if width * height > _STORED.max_pixels:
            raise _TooLarge("with an image of more pixels than allowed")
    width, height = page.get_size()
    scale = min(side / max(min(width, height), 1), MAX_SIDE / max(width, height, 1))
    image = page.render(scale=scale).to_pil().convert("RGB")
    text = page.get_textpage().get_text_bounded()
    return encode_image(image, _STORED), " ".join(text.replace("\ufffe", "").replace("\0", "").split())


def _allow(seconds: int) -> None:
    """Let the system end this process after so much more processor time; pdfium cannot be interrupted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _watch_memory() -> None:
    """End the process when it needs too much. A limit of the system's would give pages without their images."""
    while _resident() < _MEMORY:
        time.sleep(0.02)
    os._exit(OUT_OF_MEMORY)


def _resident() -> int:
    """Bytes of memory in use; where the system does not say, the most that there were."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


if __name__ == "__main__":
    main(int(sys.argv[1]))
