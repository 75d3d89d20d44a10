"""A peer that breaks the contract, on the host's socket during a run: everything is dropped, counted and answered, and nothing dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgpack
import numpy as np
import zmq

from proto import link, wire
from proto.events import Kind
from proto.trace_tail import last_events
from proto.wire import Nack
from tests.e2e import known_key
from tests.e2e.known_key import KEY
from tests.e2e.runs import BM, Launched, Runner, of_kind

ANSWER_BOUND_S: Final = 20.0
POLL_S: Final = 0.02
LOOK_BACK: Final = 50_000
"""Events: far more than a host of two vCPUs records between two looks, also when this process does not get a core."""
FLOOD: Final = 2000
STRANGER: Final = b"stranger"
KNOWN_KEY: Final = Path(known_key.__file__)
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
    run = runner.start("run", str(path), "--json", "--seconds", "8", out=out, program=KNOWN_KEY)
    run.wait_for(": running")
    assert (out / "h").is_socket()
    # Routing ids that parse, of a vCPU and a daemon that this run does not have, and of a past or future daemon.
    no_vcpu, no_daemon = link.vcpu_identity(7, KEY), link.swapd_identity(9, 0, KEY)
    later = link.swapd_identity(0, 5, KEY)
    identities = [
        STRANGER,
        no_vcpu,
        no_daemon,
        later,
        link.vcpu_identity(0, KEY),
        link.launcher_identity(KEY),
    ]
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


# -- who does not know the secret -------------------------------------------------------------------------------------------------
def _pretenders() -> list[bytes]:
    """Routing ids of peers that the run has, or will have, as somebody makes them who has read the source."""
    names = [b"L", b"V\0\0", b"S\0\0\0\0\0", b"S\0\0\0\0\1", b"S\0\0\0\0\2"]
    guessed = [
        link.launcher_identity(), link.vcpu_identity(0), link.swapd_identity(0, 0), link.swapd_identity(0, 1),
        link.swapd_identity(0, 1, bytes(32)), link.swapd_identity(0, 1, KEY)[:-1], link.swapd_identity(0, 1, KEY) + b"\0",
    ]  # fmt: skip
    return names + guessed


def _claims(epoch: int) -> list[wire.Message]:
    """What would give a stranger pages to read and to write, and the guests' tokens."""
    return [
        wire.Hello(wire.Role.SWAPD, 0, epoch, 1),
        wire.IoDone(epoch, 1, DONE_RECORDS),
        wire.Pong(epoch, 1),
        wire.Hello(wire.Role.VCPU, 0, 0, 1),
        wire.decode(EXIT),
        wire.Hello(wire.Role.LAUNCHER, 0, 0, 1),
        wire.DaemonDown(0, 0),
        wire.DaemonFenced(0, 0),
    ]


def test_neither_strangers_nor_former_daemons_get_a_page_or_a_token(runner: Runner) -> None:
    path, out = runner.file(BM), runner.folder / "out"
    run = runner.start("run", str(path), "--json", "--seconds", "8", out=out, program=KNOWN_KEY)
    run.wait_for(": running")
    endpoint = f"ipc://{out / 'h'}"
    refused = former = 0
    with _peers(endpoint, _pretenders()) as pretenders:
        # They are there before the successor is, and while the daemon is stopped: nobody takes its place.
        for round_ in range(2):
            former = run.pid_of("swapd-0")
            os.kill(former, signal.SIGSTOP)
            # Half of them each time: a daemon that stood still for too long would be replaced.
            for pretender in pretenders[round_::2]:
                for message in _claims(1):
                    pretender.say(wire.encode(message))
                assert set(pretender.codes(len(_claims(1)))) == {Nack.STRANGER}
                refused += len(_claims(1))
            if round_ == 0:
                os.kill(former, signal.SIGKILL)
                _wait_for_successor(run, former)
                _wait_until_up(out / "events" / "host.bin", 1)
        # The former daemon's own routing id, with its secret: what it says is of the old epoch.
        with _peers(endpoint, [link.swapd_identity(0, 0, KEY)]) as (old,):
            for message in (
                wire.Hello(wire.Role.SWAPD, 0, 0, 1),
                wire.IoDone(0, 1, DONE_RECORDS),
                wire.Pong(0, 1),
            ):
                old.say(wire.encode(message))
            assert old.codes(3) == [Nack.STALE_EPOCH] * 3
            refused += 3
            # A record of the new epoch does not help under the old id.
            old.say(wire.encode(wire.IoDone(1, 1, DONE_RECORDS)))
            assert old.codes(1) == [Nack.STALE_EPOCH]
            refused += 1
        os.kill(former, signal.SIGCONT)
    ended = run.end()
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert summary["integrity"]["errors"] == 0
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["tasks"]["killed"] == 0
    assert len(list((out / "events").glob("swapd-0-*.bin"))) == 2
    assert summary["totals"]["bad_messages"] == refused


def _wait_for_successor(run: Launched, former: int) -> None:
    deadline_s = time.monotonic() + ANSWER_BOUND_S
    while run.pid_of("swapd-0") == former:
        assert time.monotonic() < deadline_s


def _wait_until_up(host_events: Path, epoch: int) -> None:
    """Until the host has admitted that incarnation."""
    deadline_s = time.monotonic() + ANSWER_BOUND_S
    while True:
        events, _ = last_events(host_events, LOOK_BACK)
        if (of_kind(events, Kind.DAEMON_UP)["b"] == epoch).any():
            return
        assert time.monotonic() < deadline_s
        time.sleep(POLL_S)


# -- who sends without end, who never reads -----------------------------------------------------------------------------------------
FLOOD_S: Final = 1.5
FLOODERS: Final = 3
PER_PEER_MIB: Final = link.HWM * link.FRAME_BYTES_MAX >> 20
SPARE_MIB: Final = 64


def _anonymous_mib(pid: int) -> int:
    """Memory of a process that is its own."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


def test_floods_and_deaf_peers_neither_stop_a_run_nor_make_it_grow(runner: Runner) -> None:
    path, out = runner.file(BM), runner.folder / "out"
    # What belongs to the run directory is the user's alone, whatever the user's habits.
    before = os.umask(0)
    try:
        run = runner.start("run", str(path), "--json", "--seconds", "6", out=out, program=KNOWN_KEY)
    finally:
        os.umask(before)
    run.wait_for(": running")
    assert {"h", "run.json", "logs/zygote-0.log", "events/host.bin", "events/vcpu-0.bin"} <= _open_to_others(
        out
    ).keys()
    assert not any(_open_to_others(out).values())
    host = run.pid_of("host-0")
    before_mib = most_mib = _anonymous_mib(host)
    endpoint = f"ipc://{out / 'h'}"
    no_daemon = link.swapd_identity(9, 0, KEY)
    sent = 0
    with _peers(endpoint, [*(b"flood %d" % n for n in range(FLOODERS)), no_daemon]) as (*flooders, member):
        # None of them reads an answer. The largest frames, a peer that could be one among them: it is decoded, too.
        blocks = [bytes(link.FRAME_BYTES_MAX), EXIT, b"\xdd\xff\xff\xff\xff" + bytes(30_000)]
        for peer in (*flooders, member):
            peer.socket.setsockopt(zmq.SNDTIMEO, 0)
        until_s = time.monotonic() + FLOOD_S
        while time.monotonic() < until_s:
            for peer in (*flooders, member):
                for block in blocks:
                    with contextlib.suppress(zmq.Again):
                        peer.say(block)
                        sent += 1
            if sent % 64 == 0:
                most_mib = max(most_mib, _anonymous_mib(host))
        most_mib = max(most_mib, _anonymous_mib(host))
        # Others are heard meanwhile.
        with _peers(endpoint, [b"later"]) as (later,):
            later.say(EXIT)
            assert later.codes(1) == [Nack.STRANGER]
    ended = run.end()
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert sent > 10 * FLOODERS
    assert most_mib - before_mib < (FLOODERS + 1) * PER_PEER_MIB + SPARE_MIB
    assert summary["integrity"]["errors"] == 0
    assert summary["totals"]["bad_messages"] >= FLOODERS
    assert summary["integrity"]["reads_checked"] > 0
    assert {"summary.json", "run.json"} <= _open_to_others(out).keys()
    assert not any(_open_to_others(out).values())


def _open_to_others(folder: Path) -> dict[str, int]:
    """By name, the permissions that group and others have."""
    return {
        str(path.relative_to(folder)): path.lstat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))
    }
