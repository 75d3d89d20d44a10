"""A VM in one process: arrays, and a small host that serves nested faults by mapping, evicting and swapping in."""

from __future__ import annotations

import mmap
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guest import boot, mmu
from guest.boot import TaskSpec, TraceShape
from guest.run import vcpu_run
from proto import layout as L  # noqa: N812 - a table of constants
from proto.atomics import py_add
from proto.pagetable import npt_clear, npt_frame, npt_set

U64 = NDArray[np.uint64]
POISON = 0xDEAD_BEEF_DEAD_BEEF
STEPS_MAX = 200_000


def shared(words: int, dtype: Any = np.uint64) -> Any:
    """Zeroed memory that forked children share."""
    size = max(words, 1) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype)[:words]


class Guest:
    """One VM with ``vcpus`` vCPUs; `serve` is its host."""

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        *,
        frames: int = 4096,
        memory_pages: int = 4096,
        vcpus: int = 1,
        seed: int = 1,
        traces: Sequence[tuple[U64, NDArray[np.uint32]]] = (),
    ) -> None:
        shapes = [TraceShape(len(vpns), len(accesses)) for vpns, accesses in traces]
        self.specs = list(specs)
        self.memory_pages = memory_pages
        self.frames = shared(frames * 512)
        self.npt = shared(L.npt_tables(memory_pages) * 512)
        self.kern = shared(L.kernel_words(len(specs), vcpus, memory_pages))
        self.control = shared(512)
        self.vmc = shared(512)
        self.vps = [shared(512) for _ in range(vcpus)]
        self.shadow = shared(boot.shadow_words(specs, shapes), np.uint32)
        boot.init_kernel(self.kern, specs, vcpus, memory_pages, seed, shapes)
        vpns, accesses = traces[0] if traces else (shared(1), shared(1, np.uint32))
        self.cpus = [
            mmu.make_vcpu(
                self.frames, self.npt, self.kern, self.control, self.vmc, vp, self.shadow, accesses, vpns
            )
            for vp in self.vps
        ]
        self.free = list(range(frames))
        self.swap: dict[int, U64] = {}
        self.resident: dict[int, int] = {}
        self.random = random.Random(seed)
        self.evictions = 0
        self.poisoned: set[int] = set()
        self.damaged = 0

    def task(self, index: int) -> U64:
        """Record of a task."""
        base = L.task_base(len(self.specs), len(self.vps)) + index * L.TASK_WORDS
        record: U64 = self.kern[base : base + L.TASK_WORDS]
        return record

    def counter(self, name: int, cpu: int = 0) -> int:
        """A VC_* counter."""
        return int(self.vps[cpu][L.VP_COUNTERS + name])

    # -- the host ------------------------------------------------------------------------------------------------------

    def serve(self, gpa: int) -> None:
        """Make the page of ``gpa`` present and writable, evicting a random one if no frame is free."""
        gfn = gpa >> 12
        assert gfn < self.memory_pages, f"fault beyond the guest's memory: {gpa:#x}"
        assert gfn not in self.resident, f"fault on a present page: {gpa:#x}"
        if not self.free:
            self.evict([self.random.choice(list(self.resident))])
        frame = self.free.pop()
        page = self.frames[frame * 512 : frame * 512 + 512]
        if frame in self.poisoned:
            self.poisoned.remove(frame)
            self.damaged += bool(np.any(page != POISON))
        page[:] = self.swap.pop(gfn, 0)
        npt_set(self.npt, gfn, frame, True)
        self.resident[gfn] = frame

    def evict(self, gfns: Sequence[int]) -> None:
        """Swap pages out: clear the entries, bump the generation, wait, and only then take the data and the frames."""
        frames = [int(npt_frame(npt_clear(self.npt, gfn))) for gfn in gfns]
        py_add(self.vmc, L.VMC_FLUSH_GEN, 1)
        self.grace()
        for gfn, frame in zip(gfns, frames, strict=True):
            assert frame == self.resident.pop(gfn)
            page = self.frames[frame * 512 : frame * 512 + 512]
            self.swap[gfn] = page.copy()
            page[:] = POISON
            self.poisoned.add(frame)
            self.free.append(frame)
            self.evictions += 1

    def grace(self) -> None:
        """Wait until no vCPU uses old translations. Here they are outside guest mode whenever the host runs."""

    def map_all(self) -> None:
        """Give every guest page its frame, so that no host is needed."""
        for gfn in range(self.memory_pages):
            self.serve(gfn << 12)

    # -- the guest's memory as a checker sees it -----------------------------------------------------------------------

    def page(self, gfn: int) -> U64 | None:
        """Contents of a guest page (writable), wherever they are; None if it was never touched."""
        if gfn in self.resident:
            frame = self.resident[gfn]
            view: U64 = self.frames[frame * 512 : frame * 512 + 512]
            return view
        return self.swap.get(gfn)

    def gfn_of(self, cr3: int, gva: int) -> int | None:
        """Walk the guest's table in plain Python; None where the page is not mapped."""
        gfn = cr3 >> 12
        for shift in (39, 30, 21, 12):
            table = self.page(gfn)
            if table is None:
                return None
            entry = int(table[(gva >> shift) & 511])
            if not entry & L.PTE_P:
                return None
            gfn = (entry & L.PTE_ADDR) >> 12
        return gfn

    # -- running ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        budget: int = 500,
        stop_after_ops: int | None = None,
        on_exit: Callable[[int, int], None] | None = None,
    ) -> Counter[int]:
        """Run all tasks in turn on CPU 0 until they are done; returns how often each exit occurred.

        The barrier opens when every task stands at it. ``on_exit(code, task)`` sees every exit before it is served.
        """
        exits: Counter[int] = Counter()
        left = list(range(len(self.specs)))
        waiting: set[int] = set()
        ops = 0
        for step in range(STEPS_MAX):
            if not left:
                return exits
            index = left[step % len(left)]
            code = vcpu_run(self.cpus[0], index, budget)
            vp = self.vps[0]
            assert int(vp[L.VP_STATE]) & 3 == L.MODE_OUTSIDE
            exits[code] += 1
            ops += int(vp[L.VP_X_OPS])
            if on_exit is not None:
                on_exit(code, index)
            if code == L.RUN_NESTED:
                self.serve(int(vp[L.VP_X_GPA]))
            elif code == L.RUN_DONE:
                left.remove(index)
            elif code == L.RUN_BARRIER:
                waiting.add(index)
                if len(waiting) == int(self.kern[L.K_BARRIER_TASKS]):
                    self.control[L.CTL_BARRIER] = 1
            else:
                assert code in (L.RUN_BUDGET, L.RUN_RESCHED, L.RUN_IRQ_WINDOW), f"unexpected exit {code}"
            if stop_after_ops is not None and ops >= stop_after_ops:
                self.control[L.CTL_STOP] = 1
        raise AssertionError(f"not done after {STEPS_MAX} exits: tasks {left}, exits {exits}")


def trace(rng: np.random.Generator, pages: int, accesses: int) -> tuple[U64, NDArray[np.uint32]]:
    """A made-up trace: distinct page numbers in user space, accesses as in proto/tracefile.py."""
    vpns = shared(pages)
    vpns[:] = rng.choice(1 << 20, pages, replace=False).astype(np.uint64) + np.uint64(0x7_0000_0000)
    words = shared(accesses, np.uint32)
    order = rng.integers(0, pages, accesses)
    words[:] = (order << 10) | (rng.integers(0, 512, accesses) << 1) | rng.integers(0, 2, accesses)
    return vpns, words
