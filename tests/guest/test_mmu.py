"""The page walk against a naive twin, the TLB's rights, hostile table contents, and races with a host that clears entries."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest import mmu
from guest.mmu import BAD_ADDRESS, DIRTY, NESTED, NOT_PRESENT, OK, PROTECTED, READ, USER, WRITE, Vcpu
from proto import layout as L  # noqa: N812
from proto.atomics import load, py_load, py_store, store
from proto.jit import lean_kernel as kernel
from proto.pagetable import npt_clear, npt_get, npt_make_readonly, npt_set, u64
from tests.guest.harness import shared

FRAMES = 48
GFNS = 40
LEAVES_AT = (L.npt_tables(GFNS) - 1) * 512
ROOT = 3
HUGE = 1 << 39


def vcpu(frames: int = FRAMES, gfns: int = GFNS) -> Vcpu:
    return mmu.make_vcpu(
        shared(frames * 512),
        shared(L.npt_tables(gfns) * 512),
        shared(64),
        shared(512),
        shared(512),
        shared(512),
        shared(1, np.uint32),
        shared(1, np.uint32),
        shared(1),
    )


class Twin:
    """The walk in plain Python, on lists, as the x86 and EPT rules in guest/mmu.py's docstring say."""

    def __init__(self, m: Vcpu) -> None:
        self.frames = m.frames.tolist()
        self.npt = m.npt.tolist()

    def nested(self, gfn: int, write: bool) -> int | None:
        """Host frame of ``gfn``; None for a nested fault."""
        if gfn >= GFNS + 512 or LEAVES_AT + gfn >= len(self.npt):
            return None
        entry = self.npt[LEAVES_AT + gfn]
        frame = (entry & L.NPT_ADDR) >> 12
        if not entry & L.NPT_P or frame >= FRAMES or (write and not entry & L.NPT_W):
            return None
        self.npt[LEAVES_AT + gfn] |= L.NPT_A | (L.NPT_D if write else 0)
        return int(frame)

    def guest_entry(self, table: int, index: int, level: int, access: int) -> tuple[int, int, int, int]:
        """(OK, entry, 0, 0) with its bits set, or the fault."""
        gpa = table << 12 | index << 3
        frame = self.nested(table, False)
        if frame is None:
            return NESTED, gpa, READ, level
        entry = self.frames[frame * 512 + index]
        if not entry & L.PTE_P:
            return NOT_PRESENT, gpa, READ, level
        bits = L.PTE_A
        if level == 1:
            if (access & DIRTY and not entry & L.PTE_W) or (access & USER and not entry & L.PTE_U):
                return PROTECTED, 0, 0, 0
            bits |= L.PTE_D if access & DIRTY else 0
        if entry & bits != bits:
            if self.nested(table, True) is None:
                return NESTED, gpa, WRITE, level
            self.frames[frame * 512 + index] = entry | bits
        return OK, entry | bits, 0, 0

    def walk(self, gva: int, access: int) -> tuple[int, int, int, int]:
        vpn = gva >> 12
        if vpn >> 36 or (vpn >> 35 and access & USER):
            return BAD_ADDRESS, 0, 0, 0
        if vpn >> 35:
            gpa = gva - (1 << 47)
        else:
            table = ROOT
            for level in (4, 3, 2, 1):
                status, x, y, z = self.guest_entry(table, vpn >> 9 * (level - 1) & 511, level, access)
                if status != OK:
                    return status, x, y, z
                table = (x & L.PTE_ADDR) >> 12
            gpa = table << 12 | gva & 4095
        frame = self.nested(gpa >> 12, bool(access & DIRTY))
        return (NESTED, gpa, access & WRITE, 0) if frame is None else (OK, frame, 0, 0)


def random_gfn(rng: random.Random) -> int:
    """Mostly a page of the guest; sometimes one it does not have, up to all ones."""
    return rng.choice([rng.randrange(GFNS)] * 12 + [GFNS + 7, 600, 1 << 27, (1 << 40) - 1])


def fill(m: Vcpu, rng: random.Random, holes: int) -> list[int]:
    """Random tables; returns addresses worth an access. One entry in ``holes`` lacks something."""
    for gfn in range(GFNS):
        npt_set(m.npt, gfn, gfn, True)
        if rng.randrange(holes) == 0:
            bits = rng.choice(
                [0, L.NPT_P, L.NPT_P | L.NPT_W | L.NPT_A, L.NPT_P | L.NPT_W | L.NPT_A | L.NPT_D]
            )
            frame = rng.choice([rng.randrange(FRAMES), FRAMES, (1 << 40) - 1])
            m.npt[LEAVES_AT + gfn] = frame << 12 | bits
    gvas = []
    for _ in range(8):
        vpn = rng.choice([0, 5, 511, 512, 1 << 18, (1 << 35) - 1]) ^ rng.randrange(4)
        table = ROOT
        for level in (4, 3, 2, 1):
            frame = int(m.npt[LEAVES_AT + table]) >> 12 if table < GFNS else FRAMES
            if frame >= FRAMES:
                break
            word = frame * 512 + (vpn >> 9 * (level - 1) & 511)
            if not int(m.frames[word]) & L.PTE_P:
                target = (
                    random_gfn(rng) if level == 1 or rng.randrange(holes) == 0 else rng.randrange(4, GFNS)
                )
                flags = L.PTE_P | L.PTE_W | L.PTE_U
                if rng.randrange(holes) == 0:
                    flags ^= rng.choice([L.PTE_P, L.PTE_W, L.PTE_U])
                m.frames[word] = target << 12 | flags | rng.choice([0, L.PTE_A, L.PTE_A | L.PTE_D])
            table = (int(m.frames[word]) & L.PTE_ADDR) >> 12
        gvas.append(vpn << 12 | rng.randrange(512) << 3)
    kernel_half = [(1 << 47) | random_gfn(rng) << 12 | 8 for _ in range(3)]
    return [*gvas, *kernel_half, 1 << 48, 1 << 62, (1 << 64) - 8]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([4, 12, 1000]))
def test_walk_equals_its_twin(seed: int, holes: int) -> None:
    rng = random.Random(seed)
    m = vcpu()
    gvas = fill(m, rng, holes)
    mmu.set_cr3(m, ROOT << 12)
    twin = Twin(m)
    for _ in range(25):
        gva, access = rng.choice(gvas), rng.choice([READ, WRITE]) | rng.choice([0, USER])
        found = tuple(int(x) for x in mmu.translate(m, u64(gva), access))
        assert found == twin.walk(gva, access), (hex(gva), access)
        assert m.npt.tolist() == twin.npt
        if rng.randrange(5) == 0:
            _host_changes_an_entry(m, twin, rng)
    assert m.frames.tolist() == twin.frames


def _host_changes_an_entry(m: Vcpu, twin: Twin, rng: random.Random) -> None:
    gfn = rng.randrange(GFNS)
    change = rng.randrange(3)
    if change == 0:
        npt_clear(m.npt, gfn)
    elif change == 1:
        npt_make_readonly(m.npt, gfn)
    else:
        npt_set(m.npt, gfn, rng.randrange(FRAMES), True)
    twin.npt[LEAVES_AT + gfn] = int(m.npt[LEAVES_AT + gfn])
    mmu.flush(m)


@kernel
def lookup(m: Vcpu, gva: int, access: int) -> int:
    return mmu.tlb_lookup(m.tlb, u64(gva), u64(access))


def mapped(gva: int = 0x5000, flags: int = L.PTE_P | L.PTE_W | L.PTE_U) -> Vcpu:
    """Four tables in gfns 3..6, the page in gfn 7, frame = gfn + 1."""
    m = vcpu()
    for gfn in range(GFNS):
        npt_set(m.npt, gfn, gfn + 1, True)
    for level, table in zip((4, 3, 2, 1), range(ROOT, ROOT + 4), strict=True):
        m.frames[(table + 1) * 512 + (gva >> 12 + 9 * (level - 1) & 511)] = (table + 1) << 12 | flags
    mmu.set_cr3(m, ROOT << 12)
    return m


def test_a_read_does_not_give_the_right_to_write() -> None:
    m = mapped()
    assert lookup(m, 0x5000, READ) == -1
    assert int(mmu.translate(m, 0x5000, READ | USER)[0]) == OK
    assert lookup(m, 0x5000, READ | USER) == 8
    assert lookup(m, 0x5000, WRITE | USER) == -1
    assert not int(npt_get(m.npt, 7)) & L.NPT_D
    assert int(mmu.translate(m, 0x5000, WRITE | USER)[0]) == OK
    assert lookup(m, 0x5000, WRITE | USER) == 8
    assert int(npt_get(m.npt, 7)) & L.NPT_D
    assert int(m.frames[7 * 512 + 5]) & L.PTE_D
    # The guest entry was written to, so the page of the leaf table is dirty too.
    assert int(npt_get(m.npt, 6)) & L.NPT_D


def test_a_read_of_a_page_that_is_dirty_already_gives_it() -> None:
    m = mapped()
    mmu.translate(m, 0x5000, WRITE | USER)
    mmu.flush(m)
    assert lookup(m, 0x5000, READ) == -1
    mmu.translate(m, 0x5000, READ | USER)
    assert lookup(m, 0x5000, WRITE | USER) == 8
    npt_make_readonly(m.npt, 7)
    mmu.flush(m)
    mmu.translate(m, 0x5000, READ | USER)
    assert lookup(m, 0x5000, WRITE | USER) == -1
    assert tuple(mmu.translate(m, 0x5123, WRITE | USER)) == (NESTED, 7 << 12 | 0x123, WRITE, 0)


def test_supervisor_pages_and_the_direct_map_are_closed_to_user_mode() -> None:
    m = mapped(flags=L.PTE_P | L.PTE_W)
    assert int(mmu.translate(m, 0x5000, READ | USER)[0]) == PROTECTED
    assert int(mmu.translate(m, 0x5000, READ)[0]) == OK
    assert lookup(m, 0x5000, READ) == 8
    assert lookup(m, 0x5000, READ | USER) == -1
    direct = (1 << 47) | 9 << 12
    assert int(mmu.translate(m, direct, READ | USER)[0]) == BAD_ADDRESS
    assert tuple(mmu.translate(m, direct, WRITE)) == (OK, 10, 0, 0)
    assert lookup(m, direct, WRITE) == 10
    assert lookup(m, direct, READ | USER) == -1


def test_addresses_beyond_48_bits_never_hit() -> None:
    m = mapped()
    mmu.translate(m, 0x5000, WRITE | USER)
    for high in range(48, 64):
        assert lookup(m, u64(0x5000 | 1 << high), READ) == -1
    # An empty entry is not a translation of page 0.
    mmu.flush(m)
    assert lookup(m, 0, READ) == -1


def test_changing_cr3_flushes_and_keeping_it_does_not() -> None:
    m = mapped()
    mmu.translate(m, 0x5000, READ | USER)
    assert not mmu.set_cr3(m, ROOT << 12)
    assert lookup(m, 0x5000, READ) == 8
    assert mmu.set_cr3(m, 9 << 12)
    assert lookup(m, 0x5000, READ) == -1
    assert int(mmu.translate(m, 0x5000, READ | USER)[0]) == NOT_PRESENT


@pytest.mark.parametrize("entry", [(1 << 64) - 1, L.NPT_P | L.NPT_W | FRAMES << 12, L.NPT_P | L.NPT_ADDR])
def test_frame_and_table_numbers_out_of_range_are_faults(entry: int) -> None:
    m = mapped()
    m.npt[LEAVES_AT + 7] = entry
    assert int(mmu.translate(m, 0x5000, WRITE | USER)[0]) == NESTED
    for upper in range(3):
        m = mapped()
        m.npt[upper * 512] = entry if entry >> 12 >= len(m.npt) // 512 else L.NPT_P | 1 << 50
        assert tuple(mmu.translate(m, 0x5000, READ | USER)) == (NESTED, ROOT << 12, READ, 4)


@pytest.mark.parametrize(
    "changes", [{"frames": 511}, {"npt": 512}, {"shadow": np.uint64}, {"frames": np.int64}]
)
def test_wrong_arrays_are_refused(changes: dict[str, Any]) -> None:
    m = vcpu()
    arrays = {name: getattr(m, name) for name in ("frames", "npt", "kern", "control", "vmc", "vp", "shadow")}
    for name, change in changes.items():
        arrays[name] = arrays[name][:change] if isinstance(change, int) else np.zeros(512, change)
    with pytest.raises(ValueError, match="allowed"):
        mmu.make_vcpu(**arrays, trace_accesses=m.trace_accesses, trace_vpns=m.trace_vpns)


# ---------------------------------------------------------------- races with the host


@kernel
def walker(m: Vcpu, flag: int, careful: bool, rounds: int) -> None:
    """Set A and D of gfn 7 again and again, in the walker's way or (the control) by a plain store."""
    at = u64(LEAVES_AT + 7)
    for _ in range(rounds):
        if load(m.kern, flag):
            return
        if careful:
            mmu.nested_walk(m.npt, u64(len(m.frames) // 512), u64(7), True)
        else:
            entry = load(m.npt, at)
            if entry & u64(L.NPT_P):
                store(m.npt, at, entry | u64(L.NPT_A | L.NPT_D))


@kernel
def clear_and_watch(m: Vcpu, rounds: int, looks: int) -> int:
    """Clear gfn 7 and look whether it comes back by itself; returns how often it did."""
    at = u64(LEAVES_AT + 7)
    revived = 0
    for _ in range(rounds):
        store(m.npt, at, (8 << 12) | L.NPT_P | L.NPT_W)
        for _ in range(looks):
            if load(m.npt, at) & u64(L.NPT_D):
                break
        store_zero(m, at)
        for _ in range(looks):
            if load(m.npt, at):
                revived += 1
                break
    return revived


@kernel
def store_zero(m: Vcpu, at: int) -> None:
    store(m.npt, at, 0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to race")
@pytest.mark.parametrize("careful", [True, False])
def test_a_cleared_entry_stays_cleared(careful: bool) -> None:
    """A and D bits set by compare-exchange never bring an entry back; set by a plain store they do (control)."""
    m = mapped()
    walker(m, 0, careful, 1)
    clear_and_watch(m, 1, 10)
    pid = os.fork()
    if not pid:
        for _ in range(10_000):
            walker(m, 0, careful, 100_000)
            if py_load(m.kern, 0):
                break
        os._exit(0)
    revived = 0
    end = time.monotonic() + (0.3 if careful else 20)
    try:
        while time.monotonic() < end and (careful or not revived):
            revived += clear_and_watch(m, 20_000, 60)
    finally:
        py_store(m.kern, 0, 1)
        os.waitpid(pid, 0)
    assert (revived == 0) is careful
