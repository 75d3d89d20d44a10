"""The process of a daemon elsewhere: it listens, and works for one host at a time.

A host says ATTACH and is answered with OFFER: incarnation, contents, size. From then on the messages are those of any daemon, and pages
travel in them. The host's session is in the file's header from its first ATTACH to its BYE: only that host may name blocks meanwhile,
also in the next incarnations. After BYE the process ends, and its successor (a new epoch, new contents) is there for anybody.

Invariants: a message from anybody but the attached host changes nothing; a session is taken from a host only for another one, and only
when nothing was heard of it for `RELEASE_NS`; with a key, only clients on the list get as far as a message.

Not handled here: starting, watching and fencing this process (launcher/swapd_alone.py).
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import zmq

from proto import link, remote, wire
from proto.curve import Endpoint, KeyPair
from proto.door import Door
from proto.topology import Swapd
from proto.wire import Nack, WireError
from swapd.engine import open_engine
from swapd.kept_file import Header, KeptFile
from swapd.machine import RequestQueue
from swapd.service import Buffers, Service, service_model

POLL_MS: Final = 250
DRAIN_MAX: Final = 64
RELEASE_NS: Final = 10_000_000_000
"""A host that was silent for this long, twenty heartbeats, loses the daemon to another host that asks."""
LOG_EVERY_NS: Final = 1_000_000_000
NO_FRAMES: Final = 1 << 31
"""The host's frame numbers mean nothing here: pages lie in buffers."""
_ALIVE: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Incarnation:
    """What one process is given. alive: shared memory whose first word says when it was last at work, monotonic ns."""

    listen_fd: int
    endpoint: Endpoint
    kept: KeptFile
    header: Header
    spec: Swapd
    engine: str
    seed: int
    pair: KeyPair | None
    allowed: frozenset[bytes]
    alive: mmap.mmap


def last_alive_ns(alive: mmap.mmap) -> int:
    """When the process was last at work."""
    at: int = _ALIVE.unpack_from(alive)[0]
    return at


def be_alive(alive: mmap.mmap, now_ns: int) -> None:
    """Say that it is at work."""
    _ALIVE.pack_into(alive, 0, now_ns)


class _Clock:
    """A Lamport counter without an event file: the run's directory is on another machine."""

    __slots__ = ("lamport",)

    def __init__(self) -> None:
        self.lamport = 0

    def observe(self, lamport: int) -> None:
        self.lamport = max(self.lamport, lamport) + 1


class RemoteShell:
    """See the module docstring."""

    def __init__(self, given: Incarnation) -> None:
        self._opened = ExitStack()
        """What `close` gives back, the last one first, whatever fails meanwhile."""
        try:
            self._build(given)
        except BaseException:
            self._opened.close()
            raise

    def _build(self, given: Incarnation) -> None:
        self.given = given
        self.header = given.header
        self.epoch = given.header.epoch
        buffers = Buffers()
        queue = RequestQueue(
            NO_FRAMES,
            given.header.slots,
            service_model(given.spec, given.seed),
            own_buffers=True,
        )
        queue.model(on=True)
        engine = open_engine(given.engine, given.kept.file.fd, buffers.memory, given.spec.queue_depth)
        self._opened.callback(engine.close)
        self.service = Service(queue, engine, buffers, self.epoch, _Clock(), self._to_host)
        self._opened.callback(self.service.close)
        self.host = b""
        """Routing id of the attached host."""
        self.heard_ns = time.monotonic_ns()
        self.leaving = False
        self.bad_messages = 0
        self.lost_messages = 0
        self.turned_away = 0
        self._log_due_ns = 0
        self._unsaid = ""
        self.context = link.new_context()
        self._opened.callback(self.context.destroy)
        self.door = Door(self.context, keys=given.allowed) if given.pair is not None else None
        self.socket, self.monitor = remote.listen(self.context, given.listen_fd, given.endpoint, given.pair)
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.poller.register(self.monitor, zmq.POLLIN)
        if self.door is not None:
            self.poller.register(self.door.socket, zmq.POLLIN)
        self.service.register(self.poller)

    def loop(self) -> None:
        """Until the session is over, or taken."""
        while not self.leaving:
            self.once()

    def once(self) -> None:
        """Wait for something, and do what it wants."""
        events = dict(self.poller.poll(POLL_MS))
        now_ns = time.monotonic_ns()
        be_alive(self.given.alive, now_ns)
        if self.door is not None and self.door.socket in events:
            self._turned_away(self.door.answer())
        if self.monitor in events:
            failed = [e for e in remote.events_of(self.monitor) if e != zmq.EVENT_HANDSHAKE_FAILED_AUTH]
            self._turned_away(["a client without our keys"] * len(failed))
        if self.socket in events:
            self._drain()
        self.service.turn(events)
        if self._unsaid and now_ns >= self._log_due_ns:
            self._log_due_ns = now_ns + LOG_EVERY_NS
            say(f"{self._unsaid} ({self.turned_away} turned away so far)")
            self._unsaid = ""

    def _turned_away(self, who: Sequence[str]) -> None:
        if who:
            self.turned_away += len(who)
            self._unsaid = f"refused {who[-1]}"

    # -- receiving -----------------------------------------------------------------------------------------
    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.take(parts)

    def take(self, parts: Sequence[bytes]) -> None:
        """One message, whoever sent it, whatever it is; routing id first."""
        try:
            self._receive(parts)
        except WireError as error:
            self.bad_messages += 1
            self._send(parts[0], wire.NackMsg(error.code, error.kind, error.text))

    def _receive(self, parts: Sequence[bytes]) -> None:
        identity = parts[0]
        session = remote.session_of(identity)
        if session is None or len(parts) < 2:
            raise WireError(Nack.STRANGER, "not a host")
        message = wire.decode(parts[1])
        if isinstance(message, wire.Attach):
            self._attach(identity, session, message)
        elif identity != self.host:
            if self.header.session in (0, session):
                raise WireError(Nack.STALE_EPOCH, f"epoch {self.epoch} knows nothing of you yet: ATTACH")
            raise WireError(Nack.BUSY, "this daemon works for another host")
        else:
            self.heard_ns = time.monotonic_ns()
            self._handle(message, parts[2:])

    def _attach(self, identity: bytes, session: int, message: wire.Attach) -> None:
        if message.session != session:
            raise WireError(Nack.FIELD, "session and routing id differ", wire.Kind.ATTACH)
        if self.header.session not in (0, session):
            self._asked_by_another()
            raise WireError(Nack.BUSY, "this daemon works for another host", wire.Kind.ATTACH)
        if self.header.session == 0:
            self.header = dataclasses.replace(self.header, session=session)
            self.given.kept.put(self.header)
        if identity != self.host:
            say(f"epoch {self.epoch} works for host {session:016x}")
        self.host = identity
        self.heard_ns = time.monotonic_ns()
        self._send(identity, wire.Offer(self.epoch, self.header.file, self.header.slots, os.getpid()))

    def _asked_by_another(self) -> None:
        if time.monotonic_ns() - self.heard_ns > RELEASE_NS:
            say(f"host {self.header.session:016x} is silent and loses its pages: another one asks")
            self.leaving = True

    def _handle(self, message: wire.Message, extra: Sequence[bytes]) -> None:
        """Messages of the attached host."""
        if isinstance(message, wire.Io):
            self.service.io(message, extra)
        elif isinstance(message, wire.Ping):
            if message.epoch != self.epoch:
                raise WireError(
                    Nack.STALE_EPOCH, f"epoch {message.epoch}, this is {self.epoch}", wire.Kind.PING
                )
            self._to_host(wire.Pong(self.epoch, message.nonce))
        elif isinstance(message, wire.Bye):
            say(f"host {self.header.session:016x} has said goodbye")
            self.leaving = True
        elif isinstance(message, wire.NackMsg):
            self.bad_messages += 1
        elif not isinstance(message, wire.Welcome | wire.Model):
            # The model is this side's own, and on from the start.
            raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for a daemon")

    # -- sending -------------------------------------------------------------------------------------------
    def _to_host(self, message: wire.Message, pages: Sequence[bytes] = ()) -> None:
        self._send(self.host, message, pages)

    def _send(self, identity: bytes, message: wire.Message, pages: Sequence[bytes] = ()) -> None:
        """A peer that is gone, or reads nothing, loses it: the host asks again for what it misses."""
        try:
            self.socket.send_multipart([identity, wire.encode(message), *pages], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.lost_messages += 1

    def close(self) -> None:
        """Engine, sockets."""
        self._opened.close()


def say(text: str) -> None:
    """A line for whoever started the daemon."""
    sys.stderr.write(f"swapd-0: {text}\n")
    sys.stderr.flush()


def main(given: Incarnation) -> None:
    """One incarnation, from its fork to the end of its session."""
    shell = RemoteShell(given)
    gc.freeze()
    try:
        shell.loop()
    finally:
        shell.close()
