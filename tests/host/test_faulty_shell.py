"""The host's shell with a schedule of faults: what it sends and receives passes through it, and nothing else does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.faulty_shell import FaultyShell
from proto import link, segments, wire
from proto.faults import FIRED, SEEN
from proto.run import RunContext, SwapFileInfo
from proto.stats import HostCounter
from proto.topology import Topology
from proto.wire import DONE_DTYPE, OP_WRITE, Nack

DAEMON = link.swapd_identity(0, 0)


class Shell(FaultyShell):
    """Sends go into a list instead of a socket."""

    def __init__(self, ctx: RunContext) -> None:
        self.sent: list[tuple[bytes, Any, int]] = []
        super().__init__(ctx)

    def send(self, identity: bytes, message: Any, pages: Any = ()) -> bool:
        self.sent.append((identity, message, len(pages)))
        return True

    def say(self, message: Any, identity: bytes = DAEMON) -> None:
        self._receive([identity, wire.encode(message)])
        self._route()

    def heard(self, kind: type[Any]) -> list[Any]:
        return [message for _, message, _pages in self.sent if isinstance(message, kind)]

    def word(self, fault: int, name: int) -> int:
        machine = self.faults.machine
        return machine.word(machine.specs[fault], name)

    def ask(self, count: int) -> list[int]:
        """Have so many pages written, in one message; the ids of the requests."""
        for serial in range(count):
            self._to_swap(ev.SwapOut(serial, serial, serial, -1, 5))
        self._route()
        self.links.flush()
        found = self.heard(wire.Io)
        return [int(ident) for ident in found[-1].records["id"]] if found else []

    def answer(self, *requests: int) -> None:
        self.say(wire.IoDone(0, 1, np.array([(ident, 4096, 10) for ident in requests], DONE_DTYPE)))


Make = Callable[..., Shell]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[tuple[Shell, dict[str, Any]]] = []

    def shell_with(
        *faults: dict[str, Any], started: bool = True, daemons: int = 1, replicas: int = 1
    ) -> Shell:
        topology = Topology.from_dict(
            {
                "host": {"allowance_mib": 4, "replicas": replicas},
                "vm": [{"memory_mib": 8, "task": [{"memory_kib": 4}]}],
                "swapd": [{}] * daemons,
                "fault": list(faults),
            }
        )
        parts = segments.create(segments.plan(topology, [1], [1], {}))
        ctx = RunContext(
            "test", tmp_path, f"ipc://{tmp_path}/h", "", topology, parts, [-1] * daemons,
            [SwapFileInfo(-1, 2560, True, "x", "uring")] * daemons, trace_bytes=1 << 20,
        )  # fmt: skip
        shell = Shell(ctx)
        made.append((shell, parts))
        shell.say(wire.Hello(wire.Role.SWAPD, 0, 0, 1))
        if started:
            shell.clock.start(time.monotonic_ns() - 1)
        return shell

    yield shell_with
    for shell, parts in made:
        shell.close()
        for segment in parts.values():
            segment.close()


def test_a_lost_request_stays_out(make: Make) -> None:
    shell = make({"do": "drop", "nth": 1})
    assert shell.ask(3) == []
    assert shell.swap.outstanding == 3
    assert shell.ask(1) != [], "the next message arrives"


def test_a_lost_answer_changes_nothing_and_a_doubled_one_counts_once(make: Make) -> None:
    shell = make({"do": "drop", "nth": 2}, {"do": "duplicate", "nth": 3})
    requests = shell.ask(2)
    shell.answer(*requests)
    assert shell.swap.outstanding == 2
    shell.answer(*requests)
    assert shell.swap.outstanding == 0
    assert shell.obs.stats.get(HostCounter.STALE_REPLIES) == 2
    assert [shell.word(fault, FIRED) for fault in (0, 1)] == [1, 1]


def test_a_late_answer_of_an_epoch_that_is_over_is_refused(make: Make) -> None:
    shell = make({"do": "delay", "nth": 2, "for_ms": 1})
    shell.answer(*shell.ask(1))
    assert shell.swap.outstanding == 1
    for report in (wire.DaemonDown(0, 0), wire.DaemonFenced(0, 0)):
        shell.say(report, link.launcher_identity())
    shell.say(wire.Hello(wire.Role.SWAPD, 0, 1, 1), link.swapd_identity(0, 1))
    time.sleep(0.002)
    shell._due(time.monotonic_ns())
    shell._route()
    assert shell.heard(wire.NackMsg)[-1].code == Nack.STALE_EPOCH
    assert shell.obs.stats.get(HostCounter.STALE_REPLIES) == 1


def test_each_request_of_a_message_is_an_occasion(make: Make) -> None:
    shell = make({"do": "kill", "at": "swap_out.sent", "nth": 90}, {"do": "kill", "at": "swap_in.sent"})
    requests = shell.ask(3)
    assert [shell.word(fault, SEEN) for fault in (0, 1)] == [3, 0]
    assert all(ident & 1 == OP_WRITE for ident in requests)


def test_only_what_was_written_is_done(make: Make) -> None:
    shell = make({"do": "kill", "at": "swap_out.done", "nth": 90})
    for ok in (True, False):
        effect = ev.SwapOutDone(1, 1, 1 if ok else -1, 1, ok=ok, full=False)
        shell._swapped("swap_out.done", effect)
    assert shell.word(0, SEEN) == 1


def test_a_read_counts_for_the_daemon_that_answered(make: Make) -> None:
    shell = make({"do": "kill", "on": "swapd-0", "at": "swap_in.done", "nth": 90}, daemons=2)
    for copy in (5, SLOTS_PER_DAEMON + 5):
        shell._swapped("swap_in.done", ev.SwapInDone(1, 5, 1, ok=True, xxh3=0, copy=copy, rewrite=False))
    assert shell.word(0, SEEN) == 1


def test_nothing_is_counted_before_the_barrier_and_after_the_stop(make: Make) -> None:
    shell = make({"do": "drop", "nth": 1, "times": 9}, started=False)
    assert len(shell.ask(1)) == 1
    shell.clock.start(time.monotonic_ns() - 1)
    assert shell.ask(1) == shell.ask(1)
    shell.clock.stop("time")
    before = len(shell.heard(wire.Io))
    shell.ask(1)
    assert len(shell.heard(wire.Io)) == before + 1
    assert shell.word(0, SEEN) == 2


def test_the_turns_of_a_daemon_that_is_gone_for_good_are_those_of_the_others(make: Make) -> None:
    shell = make({"do": "drop", "nth": 1}, {"do": "bit_flip", "every_ms": 100}, daemons=2, replicas=2)
    shell.say(wire.Hello(wire.Role.SWAPD, 1, 0, 1), link.swapd_identity(1, 0))
    machine = shell.faults.machine
    assert [machine.target(spec) for spec in machine.specs] == [0, 0]
    for report in (wire.DaemonDown(0, 0), wire.DaemonFenced(0, 0), wire.DaemonGone(0, "tired")):
        shell.say(report, link.launcher_identity())
    assert [machine.target(spec) for spec in machine.specs] == [1, 1]
    assert shell.ask(1) == [], "the message to the other one is lost"
    assert shell.word(0, FIRED) == 1
