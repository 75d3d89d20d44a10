"""The launcher's link to the host of a run: made as soon as the host's socket is there, and not waited for.

Invariants: a message that cannot be read is counted and dropped; a send waits for nobody.

Not handled here: what messages mean (launcher/lifecycle.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import zmq

from launcher.rundir import RunDir
from proto import link, wire

MESSAGES_PER_TURN: Final = 64


class HostLink:
    """``key``: the secret of the run (proto/link.py). The poller hears of messages."""

    def __init__(self, run_dir: RunDir, key: bytes, poller: zmq.Poller) -> None:
        self._run_dir = run_dir
        self._key = key
        self._poller = poller
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._dealer: zmq.Socket[bytes] | None = None
        self.expected = False
        """The host has been started, and its socket is not there yet."""
        self.bad_messages = 0

    @property
    def is_there(self) -> bool:
        """Whether there is a host to talk to."""
        return self._dealer is not None

    def look(self) -> None:
        """Connect, if the host's socket has come."""
        if self.expected and self._run_dir.socket.exists():
            self.expected = False
            self._context = link.new_context()
            identity = link.launcher_identity(self._key)
            self._dealer = link.connect_dealer(self._context, self._run_dir.endpoint, identity)
            self._poller.register(self._dealer, zmq.POLLIN)
            self.tell(wire.Hello(wire.Role.LAUNCHER, 0, 0, os.getpid()))

    def hear(self) -> Iterator[wire.Message]:
        """What has come, at most `MESSAGES_PER_TURN`."""
        if self._dealer is None:
            return
        for _ in range(MESSAGES_PER_TURN):
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode(parts[0])
            except wire.WireError:
                self.bad_messages += 1
                continue
            yield message

    def tell(self, message: wire.Message) -> bool:
        """False: the host does not read what it is sent."""
        if self._dealer is None:
            return True  # there is no host yet that would have to know
        try:
            self._dealer.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """What was not sent is lost."""
        if self._dealer is not None:
            self._dealer.close(linger=0)
        if self._context is not None:
            self._context.term()
