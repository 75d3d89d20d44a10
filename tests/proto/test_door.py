"""The door of a listening socket: who comes in, and that nothing is kept of those who do not."""

from __future__ import annotations

import ctypes
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from proto import curve, link
from proto.curve import KeyPair
from proto.door import USER, Door, enter_with_password, guard_with_password

BOUND_MS = 10_000
NOTHING_MS = 300
"""How long nothing must arrive; a handshake takes a few milliseconds."""
PARTS = 4000
PART_BYTES = 60_000
MIB = 1 << 20


@pytest.fixture
def context() -> Iterator[curve.Context]:
    made = link.new_context()
    yield made
    made.destroy(linger=0)


def new_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def through(
    context: curve.Context, door: Door, server: KeyPair, client: KeyPair | None, known: bytes
) -> bool:
    """Whether a message of a client with keys arrives behind the door."""
    listener, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    curve.serve_with(listener, server)
    if client is not None:
        curve.connect_with(sender, client, known)
    return arrives(door, listener, sender)


def with_password(context: curve.Context, door: Door, password: bytes | None, user: bytes = USER) -> bool:
    """Whether a message of a client with a password arrives behind the door."""
    listener, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    guard_with_password(listener)
    if password is not None:
        enter_with_password(sender, password)
        sender.setsockopt(zmq.PLAIN_USERNAME, user)
    return arrives(door, listener, sender)


def arrives(door: Door, listener: zmq.Socket[bytes], sender: zmq.Socket[bytes]) -> bool:
    """Whether what the sender says comes out of the listener."""
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    monitor = sender.get_monitor_socket()
    sender.connect(f"tcp://127.0.0.1:{port}")
    sender.send(b"hello")
    poller = zmq.Poller()
    for socket in (listener, door.socket, monitor):
        poller.register(socket, zmq.POLLIN)
    ended = 0
    while True:
        events = dict(poller.poll(NOTHING_MS if ended else BOUND_MS))
        if door.socket in events:
            door.answer()
        if monitor in events:
            event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
            ended += event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        arrived = listener in events
        if arrived or not events or ended > 3:
            sender.disable_monitor()
            for socket in (monitor, listener, sender):
                socket.close(linger=0)
            return arrived


def test_a_key_on_the_list_comes_in_and_no_other(context: curve.Context) -> None:
    server, friend, stranger = new_pair(), new_pair(), new_pair()
    door = Door(context, [friend.public])
    assert through(context, door, server, friend, server.public)
    assert (door.admitted, door.refused) == (1, 0)
    assert not through(context, door, server, stranger, server.public)
    assert door.refused > 0
    assert door.admitted == 1
    door.close()


def test_without_a_key_or_with_another_servers_key_nothing_arrives(context: curve.Context) -> None:
    server, friend = new_pair(), new_pair()
    door = Door(context, [friend.public])
    assert not through(context, door, server, None, b"")
    assert not through(context, door, server, friend, new_pair().public)
    assert door.admitted == 0
    door.close()


def test_an_empty_list_lets_nobody_in(context: curve.Context) -> None:
    server, client = new_pair(), new_pair()
    door = Door(context, [])
    assert not through(context, door, server, client, server.public)
    door.close()


# -- the password of a run
def test_the_password_comes_in_and_nothing_else(context: curve.Context) -> None:
    right = link.tcp_password(b"secret")
    door = Door(context, password=right)
    assert with_password(context, door, right)
    assert (door.admitted, door.refused) == (1, 0)
    for wrong in (None, right[:-1], right + b"0", link.tcp_password(b"another"), b"secret"):
        assert not with_password(context, door, wrong), wrong
    assert not with_password(context, door, right, user=b"somebody")
    assert door.admitted == 1
    door.close()


def test_a_door_without_a_password_lets_nobody_in(context: curve.Context) -> None:
    door = Door(context)
    assert not with_password(context, door, None)
    assert not with_password(context, door, b"anything")
    door.close()


def test_keys_do_not_replace_the_password_nor_the_other_way(context: curve.Context) -> None:
    server, friend = new_pair(), new_pair()
    door = Door(context, keys=[friend.public], password=b"password")
    listener, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    guard_with_password(listener)
    curve.connect_with(sender, friend, server.public)
    assert not arrives(door, listener, sender)
    listener, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    curve.serve_with(listener, server)
    enter_with_password(sender, b"password")
    assert not arrives(door, listener, sender)
    door.close()


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"1.0"],
        [b"1.0", b"1", b"", b"127.0.0.1", b""],
        [b"0.9", b"1", b"", b"127.0.0.1", b"", b"PLAIN", USER, b"password"],
        [b"1.0", b"1", b"", b"127.0.0.1", b"", b"PLAIN", USER],
        [b"1.0", b"1", b"", b"\xff", b"", b"CURVE", bytes(31)],
        [b"1.0", b"1", b"", b"127.0.0.1", b"", b"NULL"],
        [b"1.0", b"1", b"", b"127.0.0.1", b"", b"PLAIN", USER, b"password", b"more"],
    ],
)
def test_questions_that_are_none_are_refused(context: curve.Context, parts: list[bytes]) -> None:
    door = Door(context, password=b"password")
    asker = context.socket(zmq.REQ)
    asker.connect("inproc://zeromq.zap.01")
    asker.send_multipart(parts or [b""])
    assert door.socket.poll(BOUND_MS)
    door.answer()
    assert door.refused == 1
    assert asker.recv_multipart()[2] == b"400"
    asker.close(linger=0)
    door.close()


# -- a message without an end
ENDLESS = f"""
import socket, struct, sys, time
host, port, mechanism, password = sys.argv[1:]
peer = socket.create_connection((host, int(port)))
peer.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + mechanism.encode().ljust(20, b"\\0") + bytes(32))
def take(count):
    data = peer.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise OSError("turned away")
    return data
def command(name, body):
    data = bytes([len(name)]) + name + body
    peer.sendall(b"\\x04" + bytes([len(data)]) + data)
    take(take(2)[1])  # the answer: what is said before it has come breaks the handshake
def name_and_value(name, value):
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
try:
    take(64)
    if mechanism == "PLAIN":
        command(b"HELLO", bytes([7]) + b"asyncpf" + bytes([len(password)]) + password.encode())
    about = name_and_value(b"Socket-Type", b"DEALER") + name_and_value(b"Identity", b"me")
    command(b"INITIATE" if mechanism == "PLAIN" else b"READY", about)
    part = b"\\x03" + struct.pack(">Q", {PART_BYTES}) + bytes({PART_BYTES})
    for _ in range({PARTS}):
        peer.sendall(part)
except OSError:
    pass
print("said", flush=True)
sys.stdin.read()
"""
"""What no socket of ZeroMQ does: say the parts of a message before the last one is known."""


def own_memory() -> int:
    """Bytes of this process that are its own."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def grown_by(
    listener: zmq.Socket[bytes], door: Door | None, mechanism: str = "NULL", password: str = ""
) -> int:
    """How much this process grows while a stranger sends a message that never ends."""
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    # What tests before have freed would be used first, and nothing would grow.
    ctypes.CDLL(None).malloc_trim(0)
    before, most = own_memory(), 0
    stranger = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "127.0.0.1", str(port), mechanism, password],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert stranger.stdout is not None
    try:
        until_s = time.monotonic() + BOUND_MS / 1000
        while time.monotonic() < until_s and not select.select([stranger.stdout], [], [], 0)[0]:
            if door is not None:
                door.answer()
            assert not listener.poll(5), "no part of it may arrive"
            most = max(most, own_memory() - before)
        assert stranger.stdout.readline() == b"said\n"
        return most
    finally:
        listener.close(linger=0)
        stranger.kill()
        stranger.communicate()


def test_a_stranger_cannot_fill_the_memory_with_one_message(context: curve.Context) -> None:
    door = Door(context, password=link.tcp_password(b"secret"))
    for mechanism in ("NULL", "PLAIN", "CURVE"):
        listener = context.socket(zmq.ROUTER)
        guard_with_password(listener)
        assert grown_by(listener, door, mechanism, "guessed") < 16 * MIB
    assert door.admitted == 0
    door.close()


def test_without_a_door_he_could(context: curve.Context) -> None:
    assert grown_by(context.socket(zmq.ROUTER), None) > 100 * MIB


def test_who_knows_the_password_could(context: curve.Context) -> None:
    """The stranger above does speak PLAIN: it is the password that it lacks."""
    password = link.tcp_password(b"secret")
    door = Door(context, password=password)
    listener = context.socket(zmq.ROUTER)
    guard_with_password(listener)
    assert grown_by(listener, door, "PLAIN", password.decode()) > 100 * MIB
    door.close()
