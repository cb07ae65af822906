"""An image's bytes from a URL or a data URI."""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.error
import urllib.parse
from dataclasses import dataclass

from stage_trainer.data.download import CHUNK
from stage_trainer.data.http import Deadline, Failure, opener_with, request_of
from stage_trainer.errors import UserError
from stage_trainer.recipe.address import without_credentials


@dataclass(frozen=True)
class UrlLimits:
    """What an image behind a URL may cost.

    Args:
        megabytes: most of an image, in millions of bytes.
        timeout: seconds without an answer.
        deadline: seconds until the whole image is there.
    """

    megabytes: float = 32.0
    timeout: float = 10.0
    deadline: float = 60.0


def bytes_of_url(url: str, limits: UrlLimits) -> bytes:
    """What is behind an http or https URL. Redirections are followed within http and https only, and to no address of
    this machine or its network that the URL itself does not name.

    Raises:
        UserError: it cannot be fetched within the limits; the message shows no credentials.
    """
    try:
        return _fetched(url, limits)
    except UserError:
        raise
    except (urllib.error.HTTPError, Failure, OSError, ValueError, http.client.HTTPException) as error:
        reason: object = error
        if isinstance(error, urllib.error.HTTPError):
            reason = f"{error.code} {error.reason}"
            error.close()
        elif isinstance(error, urllib.error.URLError):
            reason = error.reason
        if isinstance(reason, TimeoutError):
            reason = f"no answer for {limits.timeout:g} s"
        elif isinstance(reason, http.client.IncompleteRead):
            reason = "the connection was cut"
        raise UserError(without_credentials(str(reason) or type(reason).__name__, url)) from error


def _fetched(url: str, limits: UrlLimits) -> bytes:
    deadline, most, content = Deadline(limits.deadline), int(limits.megabytes * 1e6), bytearray()
    late = UserError(f"it is not whole after {limits.deadline:g} s; UrlLimits(deadline=…) is the limit")
    try:
        with deadline, opener_with(deadline).open(request_of(url), timeout=limits.timeout) as response:
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > most:
                    raise UserError(f"it has more than {limits.megabytes:g} MB; UrlLimits(megabytes=…) is the limit")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise late if deadline.passed else error from error
    if deadline.passed:  # a body without a length ends where its connection does
        raise late
    return bytes(content)


def bytes_of_data_uri(uri: str) -> bytes:
    """What a `data:` URI (RFC 2397) holds.

    Raises:
        UserError: it is none.
    """
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError("there is no comma")
        if not head.endswith(";base64"):
            return urllib.parse.unquote_to_bytes(data)
        return base64.b64decode(urllib.parse.unquote(data).translate({9: None, 10: None, 13: None}), validate=True)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"the data URI cannot be decoded ({error}); expected data:image/png;base64,…") from error
