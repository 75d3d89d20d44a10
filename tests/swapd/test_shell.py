"""A daemon's own shell in a run with a schedule of faults: which of its words is an occasion."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from proto import segments, wire
from proto.faults import FIRED, SEEN, FaultMachine
from proto.run import RunContext, SwapFileInfo
from proto.topology import Topology
from proto.topology_faults import schedule
from proto.units import PAGE_SIZE
from swapd import shell as shell_module
from swapd.shell import SwapdShell

SLOTS = 64


class Shell(SwapdShell):
    """What it says goes into a list; nobody answers."""

    def __init__(self, ctx: RunContext, epoch: int) -> None:
        self.said: list[Any] = []
        super().__init__(ctx, 0, epoch)

    def _send(self, message: Any, _pages: Sequence[bytes] = ()) -> None:
        if self.socket is not None:
            self.said.append(message)

    def hellos(self, count: int) -> None:
        """Turn until HELLO was said so often."""
        for _ in range(2_000):
            self.once()
            if sum(isinstance(one, wire.Hello) for one in self.said) >= count:
                return
        raise AssertionError(self.said)


class Bench:
    """The segments and the swap file of a run whose schedule waits for HELLOs and closes a connection."""

    def __init__(self, folder: Path) -> None:
        faults = [
            {"do": "bit_flip", "at": "daemon.hello", "nth": 90},
            {"do": "disconnect", "every_ms": 1, "for_ms": 1},
        ]
        self.topology = Topology.from_dict(
            {
                "host": {"allowance_mib": 4},
                "vm": [{"memory_mib": 8, "task": [{"memory_kib": 4}]}],
                "fault": faults,
            }
        )
        self.parts = segments.create(segments.plan(self.topology, [1], [1], {}))
        run = self.topology.run
        specs = schedule(self.topology.fault, 1, run.seconds, run.seed)
        self.machine = FaultMachine(specs, self.parts["faults"].u64.data)
        self.fd = os.memfd_create("swap")
        os.ftruncate(self.fd, SLOTS * PAGE_SIZE)
        file = SwapFileInfo(self.fd, SLOTS, False, "tmpfs", "pread")
        self.ctx = RunContext(
            "test",
            folder,
            f"ipc://{folder}/h",
            "",
            self.topology,
            self.parts,
            [-1],
            [file],
            trace_bytes=1 << 20,
        )

    def word(self, fault: int, name: int) -> int:
        return self.machine.word(self.machine.specs[fault], name)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(shell_module, "HELLO_EVERY_NS", 1_000_000)
    monkeypatch.setattr(shell_module, "FAULTS_POLL_MS", 1)
    made = Bench(tmp_path)
    yield made
    del made.machine
    for segment in made.parts.values():
        segment.close()
    os.close(made.fd)


def test_the_first_hello_of_each_process_is_a_step_and_no_other(bench: Bench) -> None:
    bench.machine.start(time.monotonic_ns())
    for epoch in (0, 1):
        shell = Shell(bench.ctx, epoch)
        try:
            shell.hellos(3)
            assert bench.word(0, SEEN) == epoch + 1, "the same, said again"
            shell.take([wire.encode(wire.Welcome(epoch, 0))])
            before = bench.word(1, FIRED)
            while bench.word(1, FIRED) == before:
                shell.once()
            shell.hellos(4)
            assert bench.word(0, SEEN) == epoch + 1, "a new connection of the same process"
        finally:
            shell.close()


def test_a_process_that_started_before_the_barrier_has_no_such_step(bench: Bench) -> None:
    shell = Shell(bench.ctx, 0)
    try:
        shell.hellos(1)
        bench.machine.start(time.monotonic_ns())
        shell.hellos(3)
        assert bench.word(0, SEEN) == 0
    finally:
        shell.close()
