"""A daemon elsewhere and what comes in over its socket: floods, a host that never reads, peers that lie, clients without our keys."""

from __future__ import annotations

import mmap
import re
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from proto import curve, link, remote, wire
from proto.curve import Endpoint, KeyPair
from proto.topology import Swapd
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE, Nack
from swapd import remote as swapd_remote
from swapd.kept_file import open_kept
from swapd.remote import Incarnation, RemoteShell
from swapd.service import TCP_BUFFERS

BOUND_S = 20.0
SLOTS = 64
FLOOD = 1500
MIB = 1 << 20
SESSION = 0x1234
BATCH = 16
DAEMON = KeyPair(*zmq.curve_keypair())
FRIEND = KeyPair(*zmq.curve_keypair())


class Peer:
    """A DEALER at the daemon's address."""

    def __init__(
        self, world: World, session: int = SESSION, keys: KeyPair | None = None, name: bytes = b""
    ) -> None:
        self.session = session
        self.world = world
        world.peers.append(self)
        self.socket = world.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IDENTITY, name or remote.host_identity(session))
        if keys is not None:
            curve.connect_with(self.socket, keys, DAEMON.public)
        self.socket.connect(str(world.endpoint))

    def say(self, message: Any, *pages: bytes) -> bool:
        """False when there is no room."""
        raw = message if isinstance(message, bytes) else wire.encode(message)
        try:
            self.socket.send_multipart([raw, *pages], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def hear(self) -> list[bytes] | None:
        """The parts of a message, if there is one."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def answer(self) -> Any:
        """The next message."""
        got: list[list[bytes]] = []

        def heard() -> bool:
            parts = self.hear()
            if parts is not None:
                got.append(parts)
            return bool(got)

        self.world.until(heard)
        return wire.decode(got[0][0])

    def attach(self) -> wire.Offer:
        """Become the host that the daemon works for."""
        self.say(wire.Attach(self.session))
        offer = self.answer()
        assert isinstance(offer, wire.Offer)
        return offer


class World:
    """A daemon in this process, and whoever connects to it."""

    def __init__(self, folder: Path, *, keys: bool = False) -> None:
        self._opened = ExitStack()
        self.peers: list[Peer] = []
        """Their sockets are closed with the context."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.setblocking(False)
        self.endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
        kept = open_kept(folder / "swap", SLOTS, allow_tmpfs=True)
        self._opened.callback(kept.close)
        alive = mmap.mmap(-1, mmap.PAGESIZE)
        self.shell = RemoteShell(
            Incarnation(
                listener.detach(), self.endpoint, kept, kept.next_epoch(keep_session=True), Swapd(), "pread", 0,
                DAEMON if keys else None, frozenset([FRIEND.public]) if keys else frozenset(), alive,
            )
        )  # fmt: skip
        self._opened.callback(self.shell.close)
        self.context = link.new_context()
        self._opened.callback(self.context.destroy, 0)

    def until(self, over: Callable[[], bool]) -> None:
        """Have the daemon work until something is so."""
        deadline_s = time.monotonic() + BOUND_S
        while not over():
            assert time.monotonic() < deadline_s
            self.shell.once()

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.shell.once()

    def io(self, number: int, op: int, settled: int = 0, count: int = BATCH) -> wire.Io:
        """Requests number, number + 1, ... of the first blocks."""
        records = np.array([(number + k, op, 0, k % SLOTS) for k in range(count)], wire.IO_DTYPE)
        return wire.Io(self.shell.epoch, 1, settled, records)

    def close(self) -> None:
        self._opened.close()


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapd_remote, "POLL_MS", 2)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, keys=True)
    yield made
    made.close()


def own_memory() -> int:
    """Bytes of this process that are its own."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def serves(world: World, host: Peer, number: int) -> None:
    """The daemon writes a page for its host and reads it again."""
    page = bytes([number % 251]) * PAGE_SIZE
    host.say(world.io(number, OP_WRITE, number, 1), page)
    got: list[list[bytes]] = []

    def done(ident: int) -> bool:
        parts = host.hear()
        if parts is not None and isinstance(message := wire.decode(parts[0]), wire.IoDone):
            got.extend([parts] if ident in message.records["id"].tolist() else [])
        return bool(got)

    world.until(lambda: done(number))
    got.clear()
    host.say(world.io(number + 1, OP_READ, number + 1, 1))
    world.until(lambda: done(number + 1))
    assert got[0][1:] == [page]


# -- who lies ------------------------------------------------------------------------------------------------------------------
def test_who_may_not_say_what(world: World) -> None:
    host = Peer(world)
    host.say(wire.Ping(1, 1))
    assert host.answer().code == Nack.STALE_EPOCH, "nobody is attached yet"
    host.say(wire.Attach(SESSION + 1))
    assert host.answer().code == Nack.FIELD, "the session of somebody else"
    offer = host.attach()
    assert offer.slots == SLOTS
    other = Peer(world, SESSION + 5)
    for message in (wire.Attach(SESSION + 5), wire.Ping(offer.epoch, 1), world.io(2, OP_READ), wire.Bye(0)):
        other.say(message)
        assert other.answer().code == Nack.BUSY
    for name in (b"stranger", b"H" + bytes(8), b"H123", link.swapd_identity(0, 0)):
        stranger = Peer(world, name=name)
        stranger.say(wire.Attach(SESSION))
        assert stranger.answer().code == Nack.STRANGER
    for raw in (b"", b"\xff" * 50, bytes(wire.MESSAGE_BYTES_MAX + 1), wire.encode(wire.Stop("x"))):
        host.say(raw)
        assert isinstance(host.answer(), wire.NackMsg)
    host.say(wire.Ping(offer.epoch + 1, 1))
    assert host.answer().code == Nack.STALE_EPOCH
    host.say(world.io(2, OP_WRITE, count=2), bytes(PAGE_SIZE))
    assert host.answer().code == Nack.FIELD, "two writes, one page"
    host.say(world.io(2, OP_WRITE, count=1), bytes(PAGE_SIZE - 1))
    assert host.answer().code == Nack.FIELD
    serves(world, host, 10)
    assert not world.shell.leaving


# -- who sends without end --------------------------------------------------------------------------------------------------------
def test_a_flood_of_strangers_leaves_nothing_and_the_host_is_served(world: World) -> None:
    host = Peer(world)
    host.attach()
    flooders = [Peer(world, name=b"flood %d" % n) for n in range(3)]
    blocks = [b"\xff" * 40, wire.encode(wire.Attach(1)), bytes(30_000), wire.encode(wire.Bye(0))]
    levels = []
    tracemalloc.start()
    for round_ in range(3):
        for n in range(FLOOD):
            flooders[n % 3].say(blocks[n % 4])
            if n % 16 == 0:
                world.shell.once()
        serves(world, host, 2 + 4 * round_)
        levels.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert levels[2] - levels[0] < MIB
    assert world.shell.bad_messages > FLOOD
    assert world.shell.header.session == SESSION


def test_more_requests_than_there_are_buffers_are_refused_as_a_whole(world: World) -> None:
    host = Peer(world)
    host.attach()
    # Nothing is started before the daemon has read all of them.
    for first in range(0, 2 * TCP_BUFFERS, BATCH):
        host.say(world.io(10 + first, OP_READ))
    codes = []

    def refused() -> bool:
        while (parts := host.hear()) is not None:
            message = wire.decode(parts[0])
            codes.extend([message.code] if isinstance(message, wire.NackMsg) else [])
        return len(world.shell.service.queue) == 0

    world.turns(200)
    world.until(refused)
    assert set(codes) <= {Nack.NOT_EXPECTED}
    assert len(world.shell.service.queue) == 0, "what was accepted was answered"
    serves(world, host, 100_000)


# -- who never reads --------------------------------------------------------------------------------------------------------------
def test_a_host_that_never_reads_is_not_waited_for_and_costs_no_more_than_its_queue(world: World) -> None:
    host = Peer(world)
    host.attach()
    host.socket.setsockopt(zmq.RCVHWM, 1)
    before = own_memory()
    number, until_s = 10, time.monotonic() + BOUND_S
    while not world.shell.lost_messages:
        assert time.monotonic() < until_s
        host.say(world.io(number, OP_READ, number))
        number += BATCH
        world.shell.once()
    most = link.HWM * 16 * PAGE_SIZE
    assert own_memory() - before < 2 * most + 64 * MIB, (
        "its own queue and that of the reader, which is here, too"
    )
    # It comes again with the same session: a new connection takes the place of the old one.
    again = Peer(world)
    again.attach()
    serves(world, again, number + 1000)


# -- who has no key -------------------------------------------------------------------------------------------------------------
def _more_turned_away(world: World, seen: int) -> bool:
    return world.shell.turned_away > seen


def test_clients_without_our_keys_get_nowhere_however_often_they_come(
    locked: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(swapd_remote, "say", said.append)
    host = Peer(locked, keys=FRIEND)
    host.attach()
    begin_s = time.monotonic()
    for n in range(40):
        wrong = KeyPair(*zmq.curve_keypair()) if n % 2 else None
        stranger = Peer(locked, SESSION + 1 + n, keys=wrong)
        with suppress(zmq.Again):
            stranger.say(wire.Attach(SESSION + 1 + n))
        seen = locked.shell.turned_away
        locked.until(partial(_more_turned_away, locked, seen))
        assert stranger.hear() is None
        stranger.socket.close(linger=0)
    assert locked.shell.turned_away >= 40
    assert sum("refused" in line for line in said) <= 2 + time.monotonic() - begin_s, "one line a second"
    assert locked.shell.bad_messages == 0, "no message of theirs was read"
    assert locked.shell.door is not None
    assert locked.shell.door.admitted >= 1
    serves(locked, host, 10)


def test_zeromqs_own_heartbeats_are_off(world: World) -> None:
    """Their timer ends the process when it fires on a connection that has just failed; the kernel looks after connections."""
    assert world.shell.socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
    assert world.shell.socket.getsockopt(zmq.TCP_KEEPALIVE) == 1
