"""Ports for servers that are told where to listen."""

import random
import socket

BELOW = 32768
"""Here Linux begins to give ports to whoever does not name one; it may do so between a look at a port and its use."""


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(BELOW // 2, BELOW)))
            except OSError:
                continue
            return probe.getsockname()[1]
