"""A vCPU that is saved while it waits for its entry, and the process that goes on for it, over ipc."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from guest import host_link, shell
from guest.registers import Registers
from proto import layout as L  # noqa: N812 - a table of constants
from proto import wire
from proto.run import RunContext
from proto.topology import Task
from proto.wire import ExitReason
from tests.guest.fake_host import FakeHost, context

STAMP = Task(workload="stamp", memory_kib=600, ops=600)
SAVED_AT = 40
"""An exit in the middle of the workload."""


def saved(ctx: RunContext) -> wire.Registers:
    """Run the first process up to its save."""
    with FakeHost(ctx) as host:
        host.save_at = SAVED_AT
        shell.main(ctx, 0)
    assert host.exits[-1].seq == SAVED_AT
    assert host.exits[-1].flags & L.XF_RESTART
    assert host.saved is not None
    return host.saved


def after(ctx: RunContext) -> RunContext:
    """The context of the second set of processes."""
    return dataclasses.replace(ctx, image="an image", events="events-1")


def test_a_saved_vcpu_goes_on_in_a_fresh_process() -> None:
    with context("sync", (STAMP, STAMP)) as ctx:
        registers = saved(ctx)
        words = Registers.from_words(registers.words["word"].tolist())
        assert (words.seq, words.off, words.vclock_ns > 0) == (SAVED_AT, 0, True)
        with FakeHost(ctx) as host:
            host.registers = registers
            shell.main(after(ctx), 0)
        first, last = host.exits[0], host.exits[-1]
        assert (first.reason, first.seq) == (ExitReason.RESUME, SAVED_AT + 1)
        assert first.lamport > registers.lamport
        assert last.reason == ExitReason.DONE
        assert ExitReason.BOOT not in {e.reason for e in host.exits}
        counters = ctx.segments["vcpus"].u64[L.VP_COUNTERS :]
        assert counters[L.VC_TASKS_DONE] == host.tasks
        assert counters[L.VC_INTEGRITY_ERRORS] == 0


def test_a_vcpu_that_was_powered_down_stays_so() -> None:
    with context("sync", (STAMP,)) as ctx, FakeHost(ctx) as host:
        host.registers = wire.Registers(0, np.array([(wire.POWERED_DOWN,)], wire.REGISTER_DTYPE))
        shell.main(after(ctx), 0)
        assert [e.reason for e in host.exits] == [ExitReason.DONE]


def test_registers_of_another_version_end_the_process() -> None:
    with context("sync", (STAMP,)) as ctx, FakeHost(ctx) as host:
        host.registers = wire.Registers(0, np.array([(77,), (0,)], wire.REGISTER_DTYPE))
        with pytest.raises(ValueError, match="registers of version 77"):
            shell.main(after(ctx), 0)
        assert host.exits == []


def test_welcome_in_place_of_registers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "LOOK_MS", 20)
    monkeypatch.setattr(host_link, "RESTORE_LIMIT_NS", 100_000_000)
    with context("sync", (STAMP,)) as ctx:
        with FakeHost(ctx) as host, pytest.raises(TimeoutError, match="no REGISTERS"):
            shell.main(after(ctx), 0)
        assert [nack.code for nack in host.nacks] == [wire.Nack.NOT_EXPECTED]


def test_registers_in_place_of_welcome_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "LOOK_MS", 20)
    monkeypatch.setattr(host_link, "HELLO_LIMIT_NS", 100_000_000)
    with context("sync", (STAMP,)) as ctx:
        host = FakeHost(ctx)
        host.registers = wire.Registers(0, np.array([(wire.POWERED_DOWN,)], wire.REGISTER_DTYPE))
        with host, pytest.raises(TimeoutError, match="no WELCOME"):
            shell.main(ctx, 0)
        assert [nack.code for nack in host.nacks] == [wire.Nack.NOT_EXPECTED]
