"""Ports for servers of tests."""

import random
import socket


def free_port() -> int:
    """A port on loopback that nobody listens on.

    Below those that the system hands out to whoever asks for any: one of these may be taken again before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
