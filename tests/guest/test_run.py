"""The run loop: each exit by itself, and two processes in one guest kernel."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from guest.boot import BUFFER_BASE, TaskSpec
from guest.run import kernel_access32, vcpu_run
from guest.syscalls import PC_LOCKED, release_locks
from proto import layout as L  # noqa: N812
from proto.pagetable import npt_set
from tests.guest.harness import Guest


def one(program: int = L.P_UNIFORM, **kwargs: Any) -> Guest:
    guest = Guest([TaskSpec(program, pages=8, **kwargs)])
    guest.map_all()
    guest.control[L.CTL_BARRIER] = 1
    return guest


def go(guest: Guest, budget: int = 1000) -> int:
    return vcpu_run(guest.cpus[0], 0, budget)


def test_exits_and_counts_operations() -> None:
    guest = one()
    assert go(guest) == L.RUN_BUDGET
    assert 0 < int(guest.vps[0][L.VP_X_OPS]) <= 1000
    assert guest.counter(L.VC_OPS) == int(guest.vps[0][L.VP_X_OPS])
    assert int(guest.vps[0][L.VP_CR3]) == int(guest.task(0)[L.T_CR3])
    assert go(guest, 0) == L.RUN_BUDGET
    assert int(guest.vps[0][L.VP_X_OPS]) == 0


def test_doorbell_is_a_signed_count() -> None:
    guest = one()
    guest.vps[0][L.VP_DOORBELL] = 1
    assert go(guest) == L.RUN_KICK
    guest.vps[0][L.VP_DOORBELL] = (1 << 64) - 1
    assert go(guest) == L.RUN_BUDGET


def test_abort_and_barrier_and_stop() -> None:
    guest = one()
    guest.control[L.CTL_BARRIER] = 0
    assert [go(guest), go(guest)] == [L.RUN_BARRIER] * 2
    guest.control[L.CTL_ABORT] = 1
    assert go(guest) == L.RUN_ABORT
    guest.control[L.CTL_ABORT] = 0
    guest.control[L.CTL_STOP] = 1
    assert go(guest) == L.RUN_DONE


@pytest.mark.parametrize(
    "base", [1 << 47, (1 << 47) | (1 << 20), 0xFFFF_8000_0000_0000, 1 << 52, (1 << 63) + 4096]
)
def test_kernel_half_and_uncanonical_addresses_end_the_task(base: int) -> None:
    guest = one()
    assert go(guest) == L.RUN_BUDGET
    guest.task(0)[L.T_BASE] = base
    assert go(guest) == L.RUN_SEGV
    assert int(guest.vps[0][L.VP_X_GVA]) >> 12 in range(base >> 12, (base >> 12) + 8)


def test_guest_out_of_memory() -> None:
    guest = one()
    guest.kern[L.K_ALLOC_NEXT] = guest.memory_pages - 2
    assert go(guest) == L.RUN_OOM
    assert go(guest) == L.RUN_OOM
    assert int(guest.kern[L.K_ALLOC_FAILED]) == 2
    assert int(guest.kern[L.K_ALLOC_NEXT]) == guest.memory_pages


def test_generation_is_acknowledged_after_a_flush() -> None:
    guest = one()
    go(guest)
    flushes = guest.counter(L.VC_TLB_FLUSHES)
    guest.vmc[L.VMC_FLUSH_GEN] = 5
    go(guest)
    assert int(guest.vps[0][L.VP_STATE]) == 5 << 2 | L.MODE_OUTSIDE
    assert guest.counter(L.VC_TLB_FLUSHES) == flushes + 1


def test_set_async_pf_word_stops_the_fault_handler() -> None:
    """Spec §2.2: every #PF first asks whether it is an asynchronous one."""
    guest = one()
    guest.vps[0][L.VP_APF_GPA] = L.APF_AREA_GPA + 64
    guest.vps[0][L.VP_APF_ENABLED] = 1
    assert kernel_access32(guest.cpus[0], L.APF_AREA_GPA + 64, True, 1) == (0, 1)
    assert go(guest) == L.RUN_APF_WORD
    assert int(guest.task(0)[L.T_CPL]) == 0
    assert int(guest.task(0)[L.T_IF]) == 0
    assert kernel_access32(guest.cpus[0], L.APF_AREA_GPA + 64, False, 0) == (0, 1)
    kernel_access32(guest.cpus[0], L.APF_AREA_GPA + 64, True, 0)
    assert go(guest) == L.RUN_BUDGET
    assert int(guest.task(0)[L.T_CPL]) == 3


def test_kernel_access_reports_a_missing_page() -> None:
    guest = Guest([TaskSpec(L.P_UNIFORM)])
    gpa = L.APF_AREA_GPA + 4
    assert kernel_access32(guest.cpus[0], gpa, True, 7) == (L.RUN_NESTED, 0)
    assert int(guest.vps[0][L.VP_X_GPA]) == gpa
    assert int(guest.vps[0][L.VP_X_FLAGS]) == L.XF_WRITE | L.XF_KERNEL
    assert int(guest.vps[0][L.VP_STATE]) & 3 == L.MODE_OUTSIDE
    npt_set(guest.npt, gpa >> 12, 9, False)
    assert kernel_access32(guest.cpus[0], gpa, False, 0) == (0, 0)
    assert kernel_access32(guest.cpus[0], gpa, True, 7)[0] == L.RUN_NESTED
    npt_set(guest.npt, gpa >> 12, 9, True)
    assert kernel_access32(guest.cpus[0], gpa, True, 0xFFFF_FFFF) == (0, 0xFFFF_FFFF)
    assert int(guest.frames[9 * 512]) == 0xFFFF_FFFF << 32
    with pytest.raises(ValueError, match="bad address"):
        kernel_access32(guest.cpus[0], 0x1002, False, 0)
    with pytest.raises(IndexError, match="no such task"):
        vcpu_run(guest.cpus[0], 1, 10)


def test_system_calls_leave_at_the_marked_points() -> None:
    guest = one(L.P_SYSCALLS)
    guest.vps[0][L.VP_NEED_RESCHED] = 1
    guest.vps[0][L.VP_IRQ_PENDING] = 1
    seen = [go(guest, 10_000) for _ in range(6)]
    assert seen == [L.RUN_RESCHED, L.RUN_IRQ_WINDOW] * 3
    record = guest.task(0)
    assert (int(record[L.T_CPL]), int(record[L.T_IF]), int(record[L.T_PREEMPT])) == (0, 1, 0)


def test_spinning_on_a_held_lock_uses_up_the_budget() -> None:
    guest = one(L.P_SYSCALLS)
    for i in range(L.K_LOCK_COUNT):
        guest.kern[L.K_LOCKS + i * L.LINE] = 99
    assert go(guest, 20_000) == L.RUN_BUDGET
    assert int(guest.vps[0][L.VP_X_OPS]) > 15_000
    assert int(guest.task(0)[L.T_PREEMPT]) == 1
    for i in range(L.K_LOCK_COUNT):
        guest.kern[L.K_LOCKS + i * L.LINE] = 0
    for _ in range(1000):
        go(guest, 1)
        if int(guest.task(0)[L.T_PC]) == PC_LOCKED:
            break
    assert release_locks(guest.kern, guest.task(0))
    assert not any(int(guest.kern[L.K_LOCKS + i * L.LINE]) for i in range(L.K_LOCK_COUNT))


def run_forked(guest: Guest, cpu: int, task: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for _ in range(100_000):
            exit_code = vcpu_run(guest.cpus[cpu], task, 20_000)
            if exit_code == L.RUN_BARRIER:
                guest.task(task)[L.T_STATE] = L.TS_BARRIER
                os.sched_yield()
            elif exit_code != L.RUN_BUDGET:
                code = 0 if exit_code == L.RUN_DONE else 2
                break
    finally:
        os._exit(code)


def race(guest: Guest, tasks: list[int], timeout_s: float = 30.0) -> list[int]:
    """Run one task per vCPU in processes of their own, let go at the same moment; returns their exit statuses."""
    guest.control[L.CTL_BARRIER] = 0
    pids = [run_forked(guest, cpu, task) for cpu, task in enumerate(tasks)]
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(int(guest.task(t)[L.T_STATE]) != L.TS_BARRIER for t in tasks):
        os.sched_yield()
    guest.control[L.CTL_BARRIER] = 1
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    for pid in set(pids) - set(codes):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [codes.get(pid, -9) for pid in pids]


@pytest.mark.parametrize("round_", range(6))
def test_two_cpus_build_one_page_table(round_: int) -> None:
    """Two tasks walk through one address space in step, faulting on the same pages: no entry is set twice, no page is wasted."""
    pages = 3000
    specs = [
        TaskSpec(L.P_SEQUENTIAL, pages=pages, ops=pages, write_percent=0),
        TaskSpec(L.P_SEQUENTIAL, pages=pages, ops=pages, write_percent=0, cpu=1),
        TaskSpec(L.P_STAMP, base=BUFFER_BASE + pages * 4096, pages=50, ops=20_000),
        TaskSpec(L.P_STAMP, base=BUFFER_BASE + (pages + 50) * 4096, pages=50, ops=20_000, cpu=1),
    ]
    guest = Guest(specs, vcpus=2, seed=round_)
    guest.map_all()
    assert race(guest, [0, 1]) + race(guest, [2, 3]) == [0, 0, 0, 0]
    assert sum(int(guest.task(i)[L.T_ERRORS]) for i in range(4)) == 0
    cr3 = int(guest.task(0)[L.T_CR3])
    mapped = [guest.gfn_of(cr3, BUFFER_BASE + page * 4096) for page in range(pages + 100)]
    present = [gfn for gfn in mapped if gfn is not None]
    assert len(present) == len(set(present)) == pages + 100
    tables = 3 + len({(BUFFER_BASE >> 12) + page >> 9 for page in range(pages + 100)})
    handed_out = int(guest.kern[L.K_ALLOC_NEXT]) - L.ALLOC_FIRST_GFN
    # A task that loses a race keeps its page for the next fault: at most one is left over with each of the four.
    assert len(present) + tables <= handed_out <= len(present) + tables + 4


def test_two_cpus_share_locks() -> None:
    specs = [TaskSpec(L.P_SYSCALLS, space=i, cpu=i, pages=8, ops=60_000, index=i) for i in range(2)]
    guest = Guest(specs, vcpus=2)
    guest.map_all()
    assert race(guest, [0, 1]) == [0, 0]
    assert sum(int(guest.task(i)[L.T_ERRORS]) for i in range(2)) == 0
    assert not any(int(guest.kern[L.K_LOCKS + i * L.LINE]) for i in range(L.K_LOCK_COUNT))
