"""A vCPU process against a small host over ipc, with real guest mode, in one test process."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from guest import assembly, host_link, shell
from proto import layout as L  # noqa: N812 - a table of constants
from proto import segments, wire
from proto.atomics import py_store
from proto.events import Kind
from proto.run import ReplayTrace, RunContext
from proto.stats import vcpu_block
from proto.topology import Task
from proto.trace import read_events
from proto.wire import Exit, ExitReason, Nack
from tests.guest.fake_host import FakeHost, context

STAMP = Task(workload="stamp", memory_kib=600, ops=600)
UNIFORM = Task(workload="uniform", memory_kib=600, ops=300)


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def counter(ctx: RunContext, name: int) -> int:
    return int(ctx.segments["vcpus"].u64[L.VP_COUNTERS + name])


def run_to_the_end(ctx: RunContext, host: FakeHost) -> None:
    shell.main(ctx, 0)
    assert host.exits[-1].reason == ExitReason.DONE
    assert counter(ctx, L.VC_TASKS_DONE) == host.tasks
    assert counter(ctx, L.VC_INTEGRITY_ERRORS) == 0
    assert int(ctx.segments["pcpu"].u64.any()) in (0, 1)


@pytest.mark.parametrize("mode", ["sync", "halt", "exception", "interrupt"])
def test_run_in_every_mode(mode: str) -> None:
    with context(mode, (STAMP, UNIFORM)) as ctx:
        with FakeHost(ctx) as host:
            run_to_the_end(ctx, host)
        assert counter(ctx, L.VC_READS_CHECKED) > 150 * 512
        held = {name: counter(ctx, name) for name in (L.VC_BLOCKED_NS, L.VC_HALTED_NS)}
        assert (held[L.VC_BLOCKED_NS] > 0) == (mode == "sync")
        if mode == "halt":
            assert held[L.VC_HALTED_NS] > 0
        if mode in ("exception", "interrupt"):
            assert counter(ctx, L.VC_NOT_PRESENT) > 200
            assert counter(ctx, L.VC_READY) == counter(ctx, L.VC_NOT_PRESENT)
            block = vcpu_block(ctx.segments["stats"].u64, 0)
            assert block.count(0) == counter(ctx, L.VC_NOT_PRESENT)
            assert 0 < block.count(1) <= block.count(0)
        parts = (L.VC_RUNNING_NS, L.VC_BLOCKED_NS, L.VC_HALTED_NS, L.VC_IDLE_NS)
        assert sum(counter(ctx, p) for p in parts) == counter(ctx, L.VC_VCLOCK_NS)
        assert counter(ctx, L.VC_BARRIER_WALL_NS) < counter(ctx, L.VC_END_WALL_NS)
        assert counter(ctx, L.VC_BAD_MESSAGES) == 0
        kinds = set(read_events(ctx.run_dir)["kind"].tolist())
        assert {Kind.SWITCH, Kind.TASK_DONE, Kind.BARRIER} <= kinds
        assert ctx.segments["vcpus"].u64[L.VP_STATE] & np.uint64(3) == L.MODE_OUTSIDE
        assert not ctx.segments["vcpus"].u64[L.VP_DOORBELL]


def test_paced_vcpu_is_never_ahead_of_the_wall_clock() -> None:
    with context(
        "interrupt", (Task(workload="sequential", memory_kib=64, ops=4000),), rate_ops_per_s=40_000
    ) as ctx:
        begin_ns = time.monotonic_ns()
        with FakeHost(ctx) as host:
            run_to_the_end(ctx, host)
        wall_ns = time.monotonic_ns() - begin_ns
        # 4000 operations at 40 000 per second; the last stay may end one catch-up before the wall clock.
        assert 95_000_000 < counter(ctx, L.VC_VCLOCK_NS) <= wall_ns
        assert counter(ctx, L.VC_PAUSED_NS) > 0
        assert counter(ctx, L.VC_PACE_LAG_MAX_NS) > 0


def test_bad_messages_are_counted_and_answered() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.seq == 2:
            host.send_raw(b"\xc1 not msgpack")
            host.send(wire.HostReady(1))
            host.send(wire.Entry(77, 0, 0, 0, 0, 0, 0, 0, 0, 0))
            host.send(wire.Entry(record.seq, 0, 99, 0, 0, 0, 0, 0, 0, 0))

    with context("sync", (STAMP,)) as ctx:
        with FakeHost(ctx, tamper) as host:
            run_to_the_end(ctx, host)
        assert [n.code for n in host.nacks] == [Nack.MALFORMED, Nack.NOT_EXPECTED, Nack.FIELD, Nack.FIELD]
        assert counter(ctx, L.VC_BAD_MESSAGES) == 4


def test_doorbell_without_a_message_does_not_keep_the_vcpu_out() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.reason == ExitReason.NESTED and len(host.exits) in (20, 21, 22):
            host.ring()

    with context("sync", (STAMP,)) as ctx:
        with FakeHost(ctx, tamper) as host:
            run_to_the_end(ctx, host)
        kicks = [e for e in host.exits if e.reason == ExitReason.KICK]
        assert 1 <= len(kicks) <= 3
        assert counter(ctx, L.VC_BAD_MESSAGES) == len(kicks)
        assert not ctx.segments["vcpus"].u64[L.VP_DOORBELL]


def test_kicks_swallowed_while_waiting_are_taken_off_the_doorbell() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.reason == ExitReason.NESTED:
            host.send(wire.Kick(0, 0))
            host.ring()

    with context("sync", (STAMP,)) as ctx:
        with FakeHost(ctx, tamper) as host:
            run_to_the_end(ctx, host)
        assert not ctx.segments["vcpus"].u64[L.VP_DOORBELL]


def test_paused_vcpu_leaves_for_a_kick() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.reason == ExitReason.HYPERCALL:
            host.send(wire.Kick(0, 0))
            host.ring()

    # One operation is worth 20 ms: the kick finds the vCPU level with the wall clock, or waiting for its entry.
    with context("sync", (Task(workload="sequential", memory_kib=4, ops=2),), rate_ops_per_s=50) as ctx:
        with FakeHost(ctx, tamper) as host:
            run_to_the_end(ctx, host)
        assert not ctx.segments["vcpus"].u64[L.VP_DOORBELL]
        assert counter(ctx, L.VC_PAUSED_NS) > 0


def test_bye_in_the_middle_ends_the_process() -> None:
    with context("sync", (Task(workload="stamp", memory_kib=600),)) as ctx, FakeHost(ctx) as host:
        host.bye_at = ExitReason.NESTED
        shell.main(ctx, 0)
        assert host.exits[-1].reason == ExitReason.NESTED


def test_abort_flag_ends_a_running_vcpu() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.reason == ExitReason.HYPERCALL:
            py_store(host.control, L.CTL_ABORT, np.uint64(1))

    with context("sync", (Task(workload="stamp", memory_kib=600),)) as ctx, FakeHost(ctx, tamper):
        shell.main(ctx, 0)


def test_abort_flag_ends_a_vcpu_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "LOOK_MS", 20)
    with context("sync", (STAMP,)) as ctx, FakeHost(ctx) as host:
        host.silent = True
        py_store(host.control, L.CTL_ABORT, np.uint64(1))
        shell.main(ctx, 0)
        assert host.exits == []


def test_silent_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "LOOK_MS", 20)
    monkeypatch.setattr(host_link, "HELLO_LIMIT_NS", 50_000_000)
    with context("sync", (STAMP,)) as ctx, FakeHost(ctx) as host:
        host.silent = True
        with pytest.raises(TimeoutError, match="no WELCOME"):
            shell.main(ctx, 0)


def test_refused_exit_ends_the_process_with_the_reason() -> None:
    def tamper(host: FakeHost, record: Exit) -> None:
        if record.seq == 5:
            host.send(wire.NackMsg(Nack.FIELD, wire.Kind.EXIT, "no such reason"))

    with (
        context("sync", (STAMP,)) as ctx,
        FakeHost(ctx, tamper),
        pytest.raises(RuntimeError, match="no such reason"),
    ):
        shell.main(ctx, 0)


def test_token_is_free_whenever_the_vcpu_waits() -> None:
    held: list[int] = []

    def tamper(host: FakeHost, record: Exit) -> None:  # noqa: ARG001
        held.append(int(host.ctx.segments["pcpu"].u64[8 * 8]))

    with context("interrupt", (STAMP,)) as ctx, FakeHost(ctx, tamper) as host:
        run_to_the_end(ctx, host)
    assert len(held) > 100
    assert set(held) == {0}


def test_each_trace_of_the_vm_has_its_arrays() -> None:
    tasks = tuple(Task(workload="replay", trace=name) for name in ("b", "c", "b"))
    with context("sync", (UNIFORM,)) as ctx:
        vm = dataclasses.replace(ctx.topology.vm[0], task=tasks)
        made = segments.create({"trace-0": 4096, "trace-1": 4096, "trace-2": 4096})
        for k in range(3):
            made[f"trace-{k}"].u64[:2] = k
            made[f"trace-{k}"].u32[4:7] = 10 + k
        traced = dataclasses.replace(
            ctx,
            topology=dataclasses.replace(ctx.topology, vm=(vm,)),
            segments={**ctx.segments, **made},
            traces=[ReplayTrace(name, 2, 3) for name in "abc"],
        )
        arrays = assembly.vcpu_arrays(traced, 0)
        assert [(m.trace_vpns.tolist(), m.trace_accesses.tolist()) for m in arrays] == [
            ([1, 1], [11, 11, 11]),
            ([2, 2], [12, 12, 12]),
        ]
        assert arrays[0].tlb is arrays[1].tlb
        del arrays
        for segment in made.values():
            segment.close()


def test_process_start_and_end_are_traced() -> None:
    with context("sync", (UNIFORM,)) as ctx:
        with FakeHost(ctx) as host:
            run_to_the_end(ctx, host)
        events = read_events(ctx.run_dir)
        assert events["kind"][0] == Kind.PROCESS_START
        assert events["a"][0] == os.getpid()
        assert events["kind"][-1] == Kind.PROCESS_END
