"""Thousands of messages that are well-formed and wild, from a peer that belongs: what host and daemon remember stays bounded."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from host.timers import TIMERS_PER_VCPU
from proto import kvm, wire
from proto.lives import Where
from tests.fuzz.messages import IDENTITIES, S0, S1, V0, V1, WIDTHS, exit_of, ordinary
from tests.fuzz.mutate import EXTREMES
from tests.fuzz.shells import DaemonUnderTest, HostUnderTest

STORM: Final = 1500
GROWTH_BYTES_MAX: Final = 4 << 20
REASONS: Final = [int(reason) for reason in wire.ExitReason if reason is not wire.ExitReason.DONE]
VECTORS: Final = 256


def wild_exit(rng: random.Random) -> wire.Exit:
    """Some fields ordinary, some at an extreme or anything; now and then a counter far ahead."""
    fields = {
        name: rng.choice((rng.choice(EXTREMES), rng.getrandbits(WIDTHS[width]), 0, 1))
        & ((1 << WIDTHS[width]) - 1)
        for name, width in zip(wire.Exit._fields, wire.SPECS[wire.Kind.EXIT].ints, strict=True)
        if rng.random() < 0.4
    }
    fields["lamport"] = rng.choice((1, 2, 1 << 35, wire.LAMPORT_MAX))
    record = exit_of(rng.choice(REASONS))._replace(**fields)
    if rng.random() < 0.3:
        index = rng.choice((kvm.MSR_X2APIC_SPIV, kvm.MSR_ASYNC_PF_INT, kvm.MSR_ASYNC_PF_ACK, 0x4B564D02))
        record = record._replace(reason=wire.ExitReason.WRMSR, arg0=index)
    return record if record.reason in REASONS else record._replace(reason=rng.choice(REASONS))


def wild_done(rng: random.Random, epoch: int) -> wire.IoDone:
    """Answers to what was asked, and to what was not."""
    ids = (rng.randrange(2, 400), rng.randrange(2, 400), rng.getrandbits(64))
    results = (4096, -5, rng.getrandbits(63), -(1 << 63))
    records = [(ids[k % 3], rng.choice(results), rng.getrandbits(64)) for k in range(rng.randrange(1, 5))]
    return wire.IoDone(epoch, rng.choice((1, 1 << 35, wire.LAMPORT_MAX)), np.array(records, wire.DONE_DTYPE))


def wild_request(rng: random.Random) -> tuple[int, int, int, int]:
    """(id, operation, frame, slot); one in twenty of a device or a memory that is not there."""
    ident = rng.choice((rng.randrange(1000), rng.getrandbits(64)))
    return ident, rng.choice((0, 1, 1, 2)), rng.randrange(4), rng.randrange(80)


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_exits_and_replies(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    with HostUnderTest(tmp_path) as host:
        shell = host.shell
        for who, said, _ in ordinary()[:-1]:
            host.turn(IDENTITIES[who], [wire.encode(said)])
        settled = 0
        tracemalloc.start()
        try:
            for number in range(STORM):
                if number == STORM // 3:
                    settled, _ = tracemalloc.get_traced_memory()
                daemon, who = rng.choice((S0, S1)), rng.choice((V0, V1))
                message: Any = wild_done(rng, 0) if rng.random() < 0.2 else wild_exit(rng)
                sender = daemon if isinstance(message, wire.IoDone) else who
                host.turn(IDENTITIES[sender], [wire.encode(message), *([bytes(4096)] * rng.randrange(3))])
                shell.sent.clear()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left - settled < GROWTH_BYTES_MAX
        assert len(shell.timers) <= TIMERS_PER_VCPU * len(shell.vcpus)
        for machine in shell.vcpus:
            assert len(machine.lapic.irr) <= VECTORS
            assert len(machine.lapic.isr) <= VECTORS
            assert max(machine.lapic.irr, default=0) < VECTORS
            assert machine.where in Where
        assert shell.writer.lamport < wire.LAMPORT_MAX


@pytest.mark.parametrize("number", [0, 1])
def test_a_storm_of_requests(number: int, tmp_path: Path) -> None:
    """Ids, slots, frames and operations of all kinds; the daemon answers or refuses each message, and goes on."""
    rng = random.Random(number)
    with DaemonUnderTest(tmp_path, number) as daemon:
        shell = daemon.shell
        settled = 0
        tracemalloc.start()
        try:
            for turn in range(STORM):
                if turn == STORM // 3:
                    settled, _ = tracemalloc.get_traced_memory()
                records = np.array([wild_request(rng) for _ in range(rng.randrange(1, 40))], wire.IO_DTYPE)
                message = wire.Io(
                    rng.choice((0, 0, 0, 1)), rng.choice((1, wire.LAMPORT_MAX >> 1)), 0, records
                )
                writes = int((records["op"] == 1).sum()) if number else 0
                daemon.turn(
                    [wire.encode(message), *([bytes(4096)] * rng.choice((writes, writes, writes, 3)))]
                )
                shell.sent.clear()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left - settled < 8 * GROWTH_BYTES_MAX
        shell.sent.clear()
        daemon.turn([wire.encode(wire.Ping(0, 7))])
        # An answer of the storm may come behind it.
        assert any(isinstance(one, wire.Pong) and one == wire.Pong(0, 7) for one in shell.sent)
