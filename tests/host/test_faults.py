"""The host's hand in a schedule of faults: messages that are lost, doubled or late, and processes that are signalled at its steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from host.faults import HostFaults
from proto.events import Kind
from proto.faults import FIRED, KINDS, FaultMachine, Spec, target_code, words_needed
from proto.trace import TraceWriter, read_file

START = 1_000
MS = 1_000_000
WAIT_S = 10.0


class Bench:
    """HostFaults with a real event file; who is asked to close a connection is noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = TraceWriter(path, 0, 1 << 16)
        self.closed: list[tuple[int, int]] = []
        self.got: list[str] = []

    def of(self, *specs: Spec, elsewhere: frozenset[int] = frozenset()) -> HostFaults:
        machine = FaultMachine(specs, memoryview(array("Q", [0] * words_needed(len(specs), 2))))
        machine.start(START)
        self.faults = HostFaults(machine, self.writer, elsewhere, lambda *a: self.closed.append(a))
        return self.faults

    def send(self, *names: str, at_ns: int = START + 1, daemon: int = 0) -> list[str]:
        """What has arrived when these were sent."""
        for name in names:
            self.faults.message(daemon, at_ns, partial(self.got.append, name))
        got = list(self.got)
        self.got.clear()
        return got

    def events(self) -> list[tuple[int, str, int, int]]:
        self.writer.close()
        found = read_file(self.path).events
        return [
            (int(e["a"]), KINDS[int(e["b"])], int(e["c"]), int(e["token"]))
            for e in found
            if e["kind"] == Kind.FAULT
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "host.bin")
    yield made
    made.faults.close()
    made.writer.close()


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that this one's zygote forked, as far as the module can tell."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(WAIT_S)


def fault(number: int, kind: str, step: str = "link.message", **more: Any) -> Spec:
    return Spec(number, kind, more.pop("role", "swapd"), more.pop("targets", (0,)), step=step, **more)


def test_messages_are_lost_and_doubled(bench: Bench) -> None:
    bench.of(fault(0, "drop", nth=2), fault(1, "duplicate", nth=3))
    assert bench.send("a", "b", "c", "d") == ["a", "c", "c", "d"]
    assert bench.events() == [(0, "drop", 0, 1), (1, "duplicate", 0, 1)]


def test_each_fault_of_a_link_makes_a_difference(bench: Bench) -> None:
    kinds = ("drop", "drop", "duplicate", "delay")
    faults = bench.of(*(fault(n, kind, for_ns=5 * MS * (kind == "delay")) for n, kind in enumerate(kinds)))
    assert bench.send("a", "b", "c", "d") == ["d"], "two are lost, the third is doubled and late"
    faults.turn(START + 1 + 5 * MS)
    assert bench.got == ["c", "c"]
    assert bench.events() == [
        (0, "drop", 0, 1),
        (1, "drop", 0, 1),
        (2, "duplicate", 0, 1),
        (3, "delay", 0, 1),
    ]


def test_a_late_message_is_overtaken_and_arrives(bench: Bench) -> None:
    faults = bench.of(fault(0, "delay", nth=1, for_ns=5 * MS), fault(1, "duplicate", nth=1))
    assert bench.send("a", "b") == ["b"]
    assert faults.next_ns(START + 1) == START + 1 + 5 * MS
    faults.turn(START + 5 * MS)
    assert bench.got == []
    faults.turn(START + 1 + 5 * MS)
    assert bench.got == ["a", "a"], "both copies of it are late"
    assert faults.next_ns(START + 6 * MS) is None


def test_links_of_others_are_left_alone(bench: Bench) -> None:
    bench.of(fault(0, "drop", targets=(1,)))
    assert bench.send("a") == ["a"]
    assert bench.send("b", daemon=1) == []


def test_only_connections_to_daemons_elsewhere_are_the_hosts_to_close(bench: Bench) -> None:
    specs = [Spec(i, "disconnect", "swapd", (i,), times_ns=(10,), for_ns=5 * MS) for i in (0, 1)]
    faults = bench.of(*specs, elsewhere=frozenset({1}))
    faults.turn(START + 9)
    assert bench.closed == []
    faults.turn(START + 10)
    faults.turn(START + 11)
    assert bench.closed == [(1, START + 10 + 5 * MS)]
    assert faults.machine.pending(specs[0], START + 11), "the daemon's own"


def test_a_connection_that_is_closed_is_not_closed_again(bench: Bench) -> None:
    specs = [Spec(i, "disconnect", "swapd", (1,), times_ns=(10,), for_ns=5 * MS) for i in (0, 1)]
    faults = bench.of(*specs, elsewhere=frozenset({1}))
    for at_ns in (10, 11, 10 + 5 * MS):
        faults.turn(START + at_ns)
    assert bench.closed == [(1, START + 10 + 5 * MS), (1, START + 10 + 10 * MS)]


def test_a_process_is_killed_at_the_step_and_at_no_other(
    bench: Bench, child: subprocess.Popen[bytes]
) -> None:
    faults = bench.of(fault(0, "kill", "fault.announced", nth=2, role="vcpu", targets=(3,)))
    faults.hello("vcpu", 3, child.pid)
    faults.step("fault.announced", "vcpu", 3, START + 1)
    faults.step("ready.sent", "vcpu", 3, START + 1)
    faults.step("fault.announced", "vcpu", 2, START + 1)
    assert child.poll() is None
    faults.step("fault.announced", "vcpu", 3, START + 1)
    assert child.wait(WAIT_S) == -signal.SIGKILL
    assert bench.events() == [(0, "kill", target_code("vcpu", 3), 1)]


def test_a_stopped_process_stands_still(bench: Bench, child: subprocess.Popen[bytes]) -> None:
    faults = bench.of(fault(0, "stop", "swap_in.sent", for_ns=MS))
    faults.hello("swapd", 0, child.pid)
    faults.step("swap_in.sent", "swapd", 0, START + 1)
    found, status = os.waitpid(child.pid, os.WUNTRACED)
    assert found == child.pid
    assert os.WIFSTOPPED(status)


def test_a_daemon_that_is_gone_is_waited_for(bench: Bench, child: subprocess.Popen[bytes]) -> None:
    faults = bench.of(fault(0, "kill", "swap_in.sent"))
    (spec,) = faults.machine.specs
    faults.step("swap_in.sent", "swapd", 0, START + 1)
    assert faults.machine.word(spec, FIRED) == 0, "nobody has said HELLO"
    first = subprocess.Popen([sys.executable, "-c", ""])
    faults.hello("swapd", 0, first.pid)
    first.wait(WAIT_S)
    faults.step("swap_in.sent", "swapd", 0, START + 2)
    assert faults.machine.word(spec, FIRED) == 0, "it has ended"
    faults.hello("swapd", 0, child.pid)
    faults.step("swap_in.sent", "swapd", 0, START + 3)
    assert child.wait(WAIT_S) == -signal.SIGKILL
    assert faults.machine.word(spec, FIRED) == 1


def test_nobody_dies_twice(bench: Bench, child: subprocess.Popen[bytes]) -> None:
    faults = bench.of(*(fault(n, "kill", "swap_in.sent") for n in (0, 1)))
    faults.hello("swapd", 0, child.pid)
    faults.step("swap_in.sent", "swapd", 0, START + 1)
    faults.step("swap_in.sent", "swapd", 0, START + 2)
    fired = [faults.machine.word(spec, FIRED) for spec in faults.machine.specs]
    assert fired == [1, 0], "the second waits for a successor"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    faults.hello("swapd", 0, child.pid)
    faults.step("swap_in.sent", "swapd", 0, START + 3)
    assert faults.machine.word(faults.machine.specs[1], FIRED) == 0, "dead, and not reaped yet"
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    faults.hello("swapd", 0, second.pid)
    faults.step("swap_in.sent", "swapd", 0, START + 4)
    assert second.wait(WAIT_S) == -signal.SIGKILL
    assert [token for _, _, _, token in bench.events()] == [1, 1]


def test_a_process_of_somebody_else_is_never_signalled(bench: Bench) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        faults = bench.of(fault(0, "kill", "swap_in.sent"))
        for pid in (stranger.pid, 0, 1 << 40):
            faults.hello("swapd", 0, pid)
        faults.step("swap_in.sent", "swapd", 0, START + 1)
        assert stranger.poll() is None
        assert faults.machine.word(faults.machine.specs[0], FIRED) == 0
    finally:
        stranger.kill()
        stranger.wait(WAIT_S)


def test_steps_of_daemons_are_theirs_to_act_at(bench: Bench, child: subprocess.Popen[bytes]) -> None:
    faults = bench.of(fault(0, "kill", "read.done"), fault(1, "kill", "swap_in.sent", nth=5))
    faults.hello("swapd", 0, child.pid)
    faults.machine.step("read.done", "swapd", 0, START + 1)
    faults.step("swap_in.sent", "swapd", 0, START + 1)
    assert child.poll() is None
