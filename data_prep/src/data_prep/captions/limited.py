"""The HTTP client of the caption service, with limits for what an answer may take.

The timeouts of httpx are for single reads: a server that sends a byte a second outlives them all, and one that sends
without an end fills memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

from data_prep.captions.faults import disguised, hints_inside

MOST_BYTES = 16 * 2**20  # of an answer, unpacked; a caption has some kilobytes
MOST_FILE = 2**30  # of the answers to a batch
_SLOWEST = 64 * 1024  # bytes a second that a large request or answer may be expected to move
_CONNECTING = 30.0  # seconds


def limited_client(openai: Any, seconds: float) -> Any:
    """An `httpx` client for `openai.AsyncOpenAI`, whichever version of httpx that uses.

    Args:
        openai: the module.
        seconds: for a whole answer. Connecting has its own (30 at most) on top, so that a call that ends by this limit
            has left; and each 64 KiB sent or received a second more.

    Its `send` raises `openai.APIConnectionError` for an answer that is not there in time, or over `MOST_BYTES`
    (`MOST_FILE` of a file): whatever was asked for has left, and may be paid. An error that comes as a 200 gets the
    status that it should have had, and every error the headers about limits that its body repeats.
    """
    connecting = min(seconds, _CONNECTING)

    class Limited(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            """The answer, read whole; `stream` makes no difference."""
            most = MOST_FILE if request.url.path.endswith("/content") else MOST_BYTES
            sent = request.headers.get("content-length", "")
            allowed = seconds + connecting + (int(sent) / _SLOWEST if sent.isdigit() else 0.0)
            started = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(allowed) as clock:
                    response = await super().send(request, stream=True, **options)
                    parts, size = [], 0
                    try:
                        async for part in response.aiter_bytes():
                            size += len(part)
                            if size > most:
                                raise openai.APIConnectionError(
                                    message=f"an answer of more than {most} bytes", request=request
                                )
                            parts.append(part)
                            clock.reschedule(started + allowed + size / _SLOWEST)
                    finally:
                        await response.aclose()
            except TimeoutError:
                raise openai.APIConnectionError(
                    message=f"no whole answer within {allowed:g} seconds", request=request
                ) from None
            packing = ("content-encoding", "content-length", "transfer-encoding")  # what was read is unpacked
            headers = {name: value for name, value in response.headers.items() if name.lower() not in packing}
            content, status = b"".join(parts), response.status_code
            if 200 <= status < 300 and not request.url.path.endswith("/content"):
                status = disguised(request.url.path, content) or status
            return type(response)(
                status,
                headers={**hints_inside(content), **headers} if status >= 400 else headers,
                content=content,
                request=response.request,
                extensions=response.extensions,
                history=response.history,
            )

    return Limited(timeout=openai.Timeout(seconds, connect=connecting))
