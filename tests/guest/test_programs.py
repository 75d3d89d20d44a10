"""Every program to completion on a one-process host: with all memory, with too little, and with memory that loses data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guest import boot
from guest.boot import BUFFER_BASE, COUNTERS_BASE, TaskSpec
from guest.program_core import PC_SWEEP, py_stamp
from guest.programs import py_chase_next
from proto import layout as L  # noqa: N812
from tests.guest.harness import Guest, trace

PAGES = 60
OPS = 6000


def bm(pages: int = PAGES) -> list[TaskSpec]:
    return [
        TaskSpec(L.P_BM_MAIN, pages=pages),
        *(TaskSpec(L.P_BM_FAULT, pages=pages, index=i) for i in range(2)),
        *(TaskSpec(L.P_BM_WORK, base=COUNTERS_BASE, index=i) for i in range(2)),
    ]


def single(program: int, **changes: Any) -> list[TaskSpec]:
    return [replace(TaskSpec(program, space=i, pages=PAGES, ops=OPS), **changes) for i in range(2)]


def replay(loops: int = 2) -> list[TaskSpec]:
    return [TaskSpec(L.P_REPLAY, space=i, loops=loops, trace=0, pages=0) for i in range(2)]


KINDS = {
    "bm": bm(),
    "sequential": single(L.P_SEQUENTIAL),
    "uniform": single(L.P_UNIFORM),
    "zipf": single(L.P_ZIPF, zipf_exponent=0.8),
    "chase": single(L.P_CHASE),
    "syscalls": single(L.P_SYSCALLS),
    "stamp": single(L.P_STAMP),
    "replay": replay(),
}
TRACE = trace(np.random.default_rng(1), 40, 3000)


def make(kind: str, **kwargs: Any) -> Guest:
    return Guest(KINDS[kind], traces=[TRACE] if kind == "replay" else (), **kwargs)


def errors(guest: Guest) -> int:
    return sum(int(guest.task(i)[L.T_ERRORS]) for i in range(len(guest.specs)))


def check_done(guest: Guest, kind: str) -> None:
    for i, spec in enumerate(guest.specs):
        record = guest.task(i)
        assert int(record[L.T_CPL]) == 3
        assert int(record[L.T_IF]) == 1
        assert int(record[L.T_PREEMPT]) == 0
        if spec.ops:
            expected = spec.ops if kind != "syscalls" else range(spec.ops, spec.ops + 16)
            assert int(record[L.T_OPS]) in ([expected] if isinstance(expected, int) else expected)
            assert int(record[L.T_READS_CHECKED]) > 0
        if kind == "replay":
            assert int(record[L.T_WORK]) == 2 * 3000
            assert int(record[L.T_AUX0]) == 2
        if spec.program in (L.P_STAMP, L.P_REPLAY):
            assert int(record[L.T_READS_CHECKED]) >= boot.shadow_words_of(spec, [boot.TraceShape(40, 3000)])
    for name, word in ((L.VC_WORK, L.T_WORK), (L.VC_READS_CHECKED, L.T_READS_CHECKED)):
        assert guest.counter(name) == sum(int(guest.task(i)[word]) for i in range(len(guest.specs)))
    assert guest.counter(L.VC_INTEGRITY_ERRORS) == errors(guest)


@pytest.mark.parametrize("kind", KINDS)
def test_completes_with_all_memory(kind: str) -> None:
    guest = make(kind)
    guest.run(stop_after_ops=30_000 if kind == "bm" else None)
    check_done(guest, kind)
    assert errors(guest) == 0
    assert guest.counter(L.VC_GUEST_FAULTS) > 0
    if kind == "bm":
        buffer = [
            guest.page(guest.gfn_of(int(guest.task(0)[L.T_CR3]), BUFFER_BASE + p * 4096) or 0)
            for p in range(PAGES)
        ]
        first = {int(page[0]) for page in buffer if page is not None}
        assert first in ({0, 10}, {10})
        assert int(guest.task(3)[L.T_WORK]) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_survives_eviction(kind: str, seed: int) -> None:
    """A third of the memory, also for page tables: faults everywhere, also in the walk and in the handler, and nothing is lost."""
    guest = make(kind, frames=30, seed=seed)
    flags: set[int] = set()

    def watch(code: int, index: int) -> None:
        if code == L.RUN_NESTED:
            seen = int(guest.vps[0][L.VP_X_FLAGS])
            flags.add(seen)
            record = guest.task(index)
            assert bool(seen & L.XF_KERNEL) == (int(record[L.T_CPL]) == 0)
            assert bool(seen & L.XF_IF) == bool(int(record[L.T_IF]))
            if int(record[L.T_KSTAGE]):
                assert seen & L.XF_KERNEL
                assert not seen & L.XF_IF
                assert int(guest.vps[0][L.VP_X_GVA]) >> 47 == 0x1FFFF

    guest.run(budget=97, stop_after_ops=20_000 if kind == "bm" else None, on_exit=watch)
    check_done(guest, kind)
    assert errors(guest) == 0
    assert guest.evictions > 100
    assert any(f & L.XF_WALK for f in flags)
    assert any(f & L.XF_KERNEL for f in flags)
    assert any(f & L.XF_IF for f in flags)
    if kind == "syscalls":
        assert L.XF_KERNEL in {f & (L.XF_KERNEL | L.XF_IF) for f in flags}
        assert L.XF_KERNEL | L.XF_IF in {f & (L.XF_KERNEL | L.XF_IF) for f in flags}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bm"] + ["bm"])
def test_detects_lost_data(kind: str) -> None:
    """Half way, the words that were written get other contents: the programs must say so."""
    guest = make(kind)
    damaged: list[int] = []

    def damage(code: int, index: int) -> None:
        record = guest.task(index)
        if damaged or code != L.RUN_BUDGET or int(record[L.T_WORK]) < 1000 or int(record[L.T_PC]) == PC_SWEEP:
            return
        pages = range(PAGES)
        vpns = (
            [int(record[L.T_BASE] >> np.uint64(12)) + p for p in pages]
            if kind != "replay"
            else TRACE[0].tolist()
        )
        for vpn in vpns:
            gfn = guest.gfn_of(int(record[L.T_CR3]), vpn << 12)
            page = None if gfn is None else guest.page(gfn)
            if page is not None:
                damaged.append(vpn)
                page[page != 0] ^= np.uint64(1 << 40)

    guest.run(stop_after_ops=30_000 if kind == "bm" else None, on_exit=damage)
    assert damaged
    assert errors(guest) > 0
    assert guest.counter(L.VC_INTEGRITY_ERRORS) == errors(guest)
    bad = next(guest.task(i) for i in range(len(guest.specs)) if int(guest.task(i)[L.T_ERRORS]))
    assert int(bad[L.T_FIRST_ERROR_GVA]) >> 12 in damaged


def test_detects_a_lost_page_of_zeros() -> None:
    guest = make("stamp")
    lost: list[int] = []

    def lose(code: int, index: int) -> None:
        if not lost and code == L.RUN_BUDGET and int(guest.task(index)[L.T_WORK]) > 3000:
            gfn = guest.gfn_of(int(guest.task(index)[L.T_CR3]), BUFFER_BASE)
            page = None if gfn is None else guest.page(gfn)
            if page is not None:
                lost.append(int(np.count_nonzero(page)))
                page[:] = 0

    guest.run(on_exit=lose)
    assert lost[0] > 0
    assert errors(guest) > 0


def test_same_work_whatever_the_memory_and_the_budget() -> None:
    """Restartability: the random choices of a task do not depend on its faults."""
    results = []
    for frames, budget in ((4096, 100_000), (30, 64), (30, 1)):
        guest = make("stamp", frames=frames)
        guest.run(budget=budget)
        results.append(
            [(int(guest.task(i)[L.T_RNG]), int(guest.task(i)[L.T_READS_CHECKED])) for i in range(2)]
        )
        assert guest.shadow.sum() > 0
        results[-1].append((int(guest.shadow.astype(np.uint64).sum()), 0))
    assert results[0] == results[1] == results[2]


def test_chase_is_one_cycle_and_stamps_are_never_zero() -> None:
    for pages in (1, 2, 3, 60, 64, 1000):
        page, seen = 0, set()
        for _ in range(pages):
            page = int(py_chase_next(page, pages))
            seen.add(page)
        assert seen == set(range(pages))
        assert page == 0
    assert len({int(py_stamp(gva, seq)) for gva in range(0, 800, 8) for seq in range(50)} - {0}) == 5000


def test_zipf_prefers_few_pages() -> None:
    counts = {}
    for exponent in (0.0, 1.0, 2.0):
        guest = Guest([TaskSpec(L.P_ZIPF, pages=500, ops=20_000, write_percent=100, zipf_exponent=exponent)])
        guest.run(budget=100_000)
        counts[exponent] = np.sort(guest.shadow)[::-1]
        assert counts[exponent].sum() == 20_000
    top = {exponent: int(values[:5].sum()) for exponent, values in counts.items()}
    assert top[0.0] < 600 < top[1.0] < 10_000 < top[2.0]
