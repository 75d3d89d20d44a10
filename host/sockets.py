"""Sockets on which the host is found: one ROUTER for all processes of the run, by ipc and, if the topology wants it, by loopback tcp.

Invariants: a send waits for nobody; over tcp nobody is let in without the password of the run.

Not handled here: daemons elsewhere, to which the host connects (host/remote.py), who a peer is and what he may say (host/peers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import zmq

from proto import link, wire
from proto.door import Door, guard_with_password
from proto.run import RunContext
from proto.wire import Message

DESCRIPTORS: Final = 64
"""Beside those of the vCPUs."""
DESCRIPTORS_PER_VCPU: Final = 4


class HostSockets:
    """See the module. ``opened`` gives back what is opened here, whatever fails meanwhile."""

    def __init__(self, ctx: RunContext, opened: ExitStack) -> None:
        link.raise_descriptor_limit(DESCRIPTORS + DESCRIPTORS_PER_VCPU * ctx.topology.total_vcpus)
        self.context = link.new_context()
        opened.callback(self.context.destroy)
        self.router = link.bind_router(self.context, ctx.endpoint)
        self.poller = zmq.Poller()
        """Of every socket that the shell waits for; links to daemons elsewhere are added to it."""
        self.poller.register(self.router, zmq.POLLIN)
        self._door: Door | None = None
        if ctx.tcp_endpoint:
            # Every user of the machine can connect to the port; the ipc socket lies in a directory of the user's own.
            self._door = Door(self.context, password=link.tcp_password(ctx.key))
            self.poller.register(self._door.socket, zmq.POLLIN)
            guard_with_password(self.router)
            self.router.bind(ctx.tcp_endpoint)

    def wait(self, timeout_ms: int) -> bool:
        """Until something has come; False: nothing has."""
        return bool(self.poller.poll(timeout_ms))

    def take(self) -> list[bytes] | None:
        """The next message, routing id first; None when none is left."""
        router = self.router
        try:
            parts = [router.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return None
        while router.get(zmq.RCVMORE):
            parts.append(router.recv())
        return parts

    def send(self, identity: bytes, message: Message, pages: Sequence[memoryview] = ()) -> bool:
        """False when the peer is gone or reads nothing."""
        try:
            if pages:
                self.router.send_multipart([identity, wire.encode(message), *pages], zmq.NOBLOCK)
            else:
                self.router.send(identity, zmq.NOBLOCK | zmq.SNDMORE)
                self.router.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def turn_away(self) -> int:
        """Answer who asks to come in over tcp; how many may not."""
        return len(self._door.answer()) if self._door is not None else 0
