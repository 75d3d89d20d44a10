"""A peer that breaks the contract, on the host's socket during a run: everything is dropped, counted and answered, and nothing dies."""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgpack
import numpy as np
import zmq

from proto import link, wire
from proto.wire import Nack
from tests.e2e.runs import BM, Runner

ANSWER_BOUND_S: Final = 20.0
FLOOD: Final = 2000
STRANGER: Final = b"stranger"
EXIT: Final = wire.encode(wire.Exit(1, 1, wire.ExitReason.HLT, 0, 3, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
DONE_RECORDS: Final = np.array([(1, 4096, 10), (2, 4096, 10)], wire.DONE_DTYPE)


class Peer:
    """A DEALER with any routing id."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, int(ANSWER_BOUND_S * 1000))
        self.socket.connect(endpoint)

    def say(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    def codes(self, count: int) -> list[int]:
        """Codes of the next ``count`` answers, which must all be NACKs."""
        found: list[int] = []
        deadline_s = time.monotonic() + ANSWER_BOUND_S
        while len(found) < count:
            left_ms = int(1000 * (deadline_s - time.monotonic()))
            assert left_ms > 0, f"{len(found)} of {count} answers came"
            assert self.socket.poll(left_ms), f"{len(found)} of {count} answers came"
            answer = wire.decode(self.socket.recv())
            assert isinstance(answer, wire.NackMsg)
            found.append(answer.code)
        return found


@contextmanager
def _peers(endpoint: str, identities: Sequence[bytes]) -> Iterator[list[Peer]]:
    context = zmq.Context()
    peers = [Peer(context, endpoint, identity) for identity in identities]
    try:
        yield peers
    finally:
        context.destroy(linger=0)


def _malformed() -> list[tuple[bytes, Nack]]:
    """Messages that no peer may send, and the code of the answer."""
    exit_fields = msgpack.unpackb(EXIT)
    hello = wire.encode(wire.Hello(wire.Role.VCPU, 0, 0, 1))
    return [
        (b"", Nack.MALFORMED),
        (b"\xff" * 40, Nack.MALFORMED),
        (msgpack.packb("text"), Nack.MALFORMED),
        (msgpack.packb({1: 2}), Nack.MALFORMED),
        (hello[:-1], Nack.MALFORMED),
        (hello + b"\x00", Nack.MALFORMED),
        (b"\x91" * 3000 + b"\x00", Nack.MALFORMED),
        (b"\xdd\xff\xff\xff\xff" + bytes(64), Nack.MALFORMED),
        (b"\xc6\xff\xff\xff\xff" + bytes(64), Nack.MALFORMED),
        (msgpack.packb([wire.VERSION, wire.Kind.EXIT, *range(1000)]), Nack.MALFORMED),
        (bytes(wire.MESSAGE_BYTES_MAX + 1), Nack.OVERSIZED),
        (msgpack.packb([wire.VERSION + 1, wire.Kind.BYE, 0]), Nack.VERSION),
        (msgpack.packb([wire.VERSION, 99]), Nack.UNKNOWN_KIND),
        (msgpack.packb([wire.VERSION, -1]), Nack.UNKNOWN_KIND),
        (msgpack.packb([wire.VERSION, wire.Kind.BYE]), Nack.FIELD),
        (msgpack.packb([wire.VERSION, wire.Kind.BYE, -1]), Nack.FIELD),
        (msgpack.packb([wire.VERSION, wire.Kind.BYE, 0.5]), Nack.FIELD),
        (msgpack.packb([*exit_fields[:-1], 1 << 63, 0]), Nack.FIELD),
        (msgpack.packb([*exit_fields[:-1], "cause"]), Nack.FIELD),
        (msgpack.packb([wire.VERSION, wire.Kind.STOP, "x" * (wire.TEXT_MAX + 1)]), Nack.FIELD),
        (msgpack.packb([wire.VERSION, wire.Kind.IO_DONE, 0, 0, b"x" * 23]), Nack.FIELD),
        (msgpack.packb([wire.VERSION, wire.Kind.IO_DONE, 0, 0, b""]), Nack.FIELD),
        (
            msgpack.packb([wire.VERSION, wire.Kind.IO_DONE, 0, 0, bytes(24 * (wire.BATCH_MAX + 1))]),
            Nack.FIELD,
        ),
    ]


def _well_formed(records: np.ndarray) -> list[wire.Message]:
    """Messages that somebody may send, but not this peer."""
    return [
        wire.Hello(wire.Role.LAUNCHER, 0, 0, 1),
        wire.IoDone(0, 1, records),
        wire.Bye(0),
        wire.Stop("because"),
        wire.DaemonDown(0, 0),
        wire.DaemonFenced(0, 0),
        wire.DaemonGone(0, "because"),
        wire.Entry(1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        wire.Welcome(0, 0),
    ]


def test_hostile_peers_are_refused_and_the_run_goes_on(runner: Runner) -> None:
    path = runner.file(BM)
    out = runner.folder / "out"
    run = runner.start("run", str(path), "--json", "--seconds", "5", out=out)
    run.wait_for(": running")
    assert (out / "h").is_socket()
    # Routing ids that parse, of a vCPU and a daemon that this run does not have, and of a past or future daemon.
    no_vcpu, no_daemon = link.vcpu_identity(7), link.swapd_identity(9, 0)
    later = link.swapd_identity(0, 5)
    identities = [STRANGER, no_vcpu, no_daemon, later, link.vcpu_identity(0), link.LAUNCHER_ID]
    refused = 0
    with _peers(f"ipc://{out / 'h'}", identities) as (stranger, vcpu, daemon, stale, *doubles):
        malformed = _malformed()
        # A peer that could be one is told what was wrong; a stranger hears only that it is one.
        for peer, expected in ((daemon, [code for _, code in malformed]), (stranger, [Nack.STRANGER] * 99)):
            for raw, _ in malformed:
                peer.say(raw)
            assert peer.codes(len(malformed)) == expected[: len(malformed)]
            refused += len(malformed)

        for peer, hello in ((vcpu, wire.Hello(wire.Role.VCPU, 7, 0, 1)), (daemon, wire.Hello(3, 9, 0, 1))):
            peer.say(wire.encode(hello))
            peer.say(EXIT)
            assert peer.codes(2) == [Nack.STRANGER] * 2
            refused += 2
            for message in _well_formed(DONE_RECORDS):
                peer.say(wire.encode(message))
            codes = peer.codes(len(_well_formed(DONE_RECORDS)))
            assert set(codes) <= {Nack.STRANGER, Nack.NOT_EXPECTED}
            refused += len(codes)

        stale.say(wire.encode(wire.Hello(wire.Role.SWAPD, 0, 5, 1)))
        stale.say(wire.encode(wire.IoDone(5, 1, DONE_RECORDS)))
        stale.say(wire.encode(wire.IoDone(0, 1, DONE_RECORDS)))
        assert stale.codes(3) == [Nack.STALE_EPOCH] * 3
        refused += 3

        # Whoever takes the routing id of a peer that is there is not heard at all.
        for double in doubles:
            double.say(EXIT)
            double.say(wire.encode(wire.Stop("because")))
            double.say(b"\xff")

        for number in range(FLOOD):
            stranger.say(EXIT if number % 2 else struct.pack("<Q", number))
        assert Counter(stranger.codes(FLOOD)) == {Nack.STRANGER: FLOOD}
        refused += FLOOD
        assert not any(double.socket.poll(0) for double in doubles)

    # A frame beyond the socket's own limit ends that connection and nothing else.
    with _peers(f"ipc://{out / 'h'}", [b"huge", b"later"]) as (huge, after):
        huge.say(bytes(link.FRAME_BYTES_MAX + 1))
        after.say(EXIT)
        assert after.codes(1) == [Nack.STRANGER]
        refused += 1

    ended = run.end()
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert summary["ended"] == "finished"
    assert summary["tasks"]["killed"] == 0
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["integrity"]["errors"] == 0
    assert summary["totals"]["bad_messages"] == refused
    assert summary["totals"]["stale_replies"] >= 2 * len(DONE_RECORDS)
    assert any("break the contract" in text for text in summary["warnings"])
