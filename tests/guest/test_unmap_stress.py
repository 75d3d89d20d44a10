"""Unmapping under running vCPUs: two processes access memory while the host clears entries, waits, and reuses the frames.

Every access verifies and rewrites a word with a sequence number that is also kept outside guest memory; the host poisons the frames it
takes and looks at the poison before it gives them out again. The rules of guest entry, flush and grace period must show no error, and
each of them left out must show one: a stress that cannot catch the broken variants proves nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from guest.boot import TaskSpec
from guest.mmu import OK, WRITE, Vcpu, kernel_gva, tlb_flush, tlb_lookup, walk
from guest.program_core import mix, next_state, stamp
from guest.run import check_flush, enter_guest, leave_guest, vcpu_run
from proto import layout as L  # noqa: N812
from proto.atomics import add, load, pause, py_load, py_store, store
from proto.jit import lean_kernel as kernel
from proto.pagetable import i64, u64
from tests.guest.harness import U64, Guest, shared

PAGES = 64
CPUS = 2
SECONDS_CORRECT = 1.2
EVICTIONS_CORRECT = 50 * 8
"""The broken variants are caught in less."""
SECONDS_LONGEST = 60.0
SECONDS_WAIT = 60.0
VICTIMS = 8
EVICT_EVERY_S = 0.0003
ACCESSES_BETWEEN = 200
"""At least so many between two evictions, so that vCPUs which get little of the cores have translations to lose."""
SLOPPY_PAUSES = 1000

CORRECT, ACKNOWLEDGE_ONLY, SLOPPY_ENTRY, NO_WAIT = range(4)

# Words of the test's own control page: one line per vCPU for its request, then the stop flag and the counters.
REQUEST, STOP, BAD, ACCESSES = 0, 64, 72, 80

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to race"),
    pytest.mark.timeout(300),
]


@kernel
def sloppy_enter(m: Vcpu) -> int:
    """Guest entry that looks at the generation only before it announces itself. The pause takes many times as long as a stay in guest
    mode, so that the window is where a vCPU most often is when the host evicts, also where it does not get a core of its own.
    """
    generation: int = load(m.vmc, L.VMC_FLUSH_GEN)
    if load(m.vp, L.VP_STATE) >> u64(2) != generation:
        tlb_flush(m.tlb, m.pwc)
    for _ in range(SLOPPY_PAUSES):
        pause()
    store(m.vp, L.VP_STATE, (generation << u64(2)) | u64(L.MODE_IN_GUEST))
    return generation


@kernel
def acknowledge_only(m: Vcpu, acknowledged: int) -> int:
    """Answer to a new generation without the flush."""
    generation: int = load(m.vmc, L.VMC_FLUSH_GEN)
    if generation != acknowledged:
        store(m.vp, L.VP_STATE, (generation << u64(2)) | u64(L.MODE_IN_GUEST))
    return generation


@kernel
def access_memory(m: Vcpu, words: U64, sequences: U64, cpu: int, variant: int, batches: int) -> int:
    """Short batches in guest mode; returns gfn + 1 of a nested fault, or 0 after all batches."""
    state = sequences[PAGES]
    for _ in range(batches):
        generation = sloppy_enter(m) if variant == SLOPPY_ENTRY else enter_guest(m)
        length = 8 + i64(mix(state) & u64(63))
        for i in range(length):
            if i % 16 == 15:
                flawed = variant == ACKNOWLEDGE_ONLY
                generation = acknowledge_only(m, generation) if flawed else check_flush(m, generation)
            following = next_state(state)
            gfn = mix(following) % u64(PAGES)
            gva = kernel_gva((gfn << u64(12)) | u64(cpu * 8))
            frame = tlb_lookup(m.tlb, gva, u64(WRITE))
            if frame < 0:
                status, found, _, _ = walk(m.frames, m.npt, m.tlb, m.pwc, gva, u64(WRITE))
                if status != OK:
                    leave_guest(m, generation)
                    sequences[PAGES] = state
                    return i64(gfn) + 1
                frame = i64(found)
            at = frame * 512 + cpu
            expected = stamp(gva, sequences[gfn]) if sequences[gfn] else u64(0)
            if m.frames[at] != expected:
                add(words, BAD, 1)
            sequences[gfn] += u64(1)
            m.frames[at] = stamp(gva, sequences[gfn])
            state = following
        leave_guest(m, generation)
        add(words, ACCESSES, length)
    sequences[PAGES] = state
    return 0


class Stress(Guest):
    """A VM whose vCPUs run in processes of their own while this one is the host."""

    def __init__(
        self, specs: list[TaskSpec], frames: int, *, wait: bool = True, memory_pages: int = 4096
    ) -> None:
        super().__init__(specs, frames=frames, memory_pages=memory_pages, vcpus=CPUS)
        self.words = shared(512)
        self.wait = wait
        self.pids: list[int] = []

    def grace(self) -> None:
        """Wait until every vCPU is outside guest mode or has acknowledged the generation."""
        generation = int(py_load(self.vmc, L.VMC_FLUSH_GEN))
        end = time.monotonic() + SECONDS_WAIT
        for vp in self.vps if self.wait else ():
            while True:
                state = int(py_load(vp, L.VP_STATE))
                if state & 3 == L.MODE_OUTSIDE or state >> 2 >= generation:
                    break
                assert time.monotonic() < end, "a vCPU does not acknowledge"
                os.sched_yield()

    def start(self, body: Callable[[int], None]) -> None:
        """Fork one process per vCPU; ``body(cpu)`` is what it does."""
        for cpu in range(CPUS):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    body(cpu)
                    code = 0
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def ask(self, cpu: int, gfn: int) -> None:
        """In a vCPU: have the host bring a page in; returns when it has, or when the run ends."""
        py_store(self.words, REQUEST + cpu * 8, gfn + 1)
        end = time.monotonic() + SECONDS_WAIT
        while py_load(self.words, REQUEST + cpu * 8) and not py_load(self.words, STOP):
            assert time.monotonic() < end, "the host does not answer"
            os.sched_yield()

    def answer(self) -> None:
        """In the host: serve the requests there are."""
        for cpu in range(CPUS):
            asked = int(py_load(self.words, REQUEST + cpu * 8))
            if asked:
                if asked - 1 not in self.resident:
                    self.serve((asked - 1) << 12)
                py_store(self.words, REQUEST + cpu * 8, 0)

    def alive(self) -> bool:
        """Whether a vCPU process is still running; one that failed fails the test."""
        for pid in list(self.pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.pids.remove(pid)
                assert os.waitstatus_to_exitcode(status) == 0
        return bool(self.pids)

    def finish(self) -> None:
        """End all processes, by force if need be."""
        py_store(self.words, STOP, 1)
        end = time.monotonic() + SECONDS_WAIT
        try:
            while self.alive() and time.monotonic() < end:
                self.answer()
                os.sched_yield()
        finally:
            for pid in self.pids:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            self.pids.clear()


def hammer(stress: Stress, sequences: list[U64], variant: int) -> Callable[[int], None]:
    def body(cpu: int) -> None:
        while not py_load(stress.words, STOP):
            missing = access_memory(stress.cpus[cpu], stress.words, sequences[cpu], cpu, variant, 500)
            if missing:
                stress.ask(cpu, int(missing) - 1)

    return body


def run_variant(variant: int) -> tuple[int, int]:
    """(errors, evictions) of a run of at least so many seconds and evictions; broken variants stop at the first error. Bounded by time."""
    stress = Stress([], PAGES, wait=variant != NO_WAIT)
    sequences = [shared(PAGES + 1) for _ in range(CPUS)]
    for cpu, words in enumerate(sequences):
        words[PAGES] = cpu
        access_memory(stress.cpus[cpu], stress.words, words, cpu, variant, 0)
    stress.start(hammer(stress, sequences, variant))
    begun = time.monotonic()
    next_eviction, next_accesses = 0.0, 0
    try:
        while stress.alive() and time.monotonic() < begun + SECONDS_LONGEST:
            stress.answer()
            accesses = int(py_load(stress.words, ACCESSES))
            if time.monotonic() >= next_eviction and accesses >= next_accesses:
                resident = list(stress.resident)
                stress.evict(stress.random.sample(resident, min(VICTIMS, len(resident))))
                next_eviction, next_accesses = time.monotonic() + EVICT_EVERY_S, accesses + ACCESSES_BETWEEN
            enough = stress.evictions >= EVICTIONS_CORRECT and time.monotonic() > begun + SECONDS_CORRECT
            if enough if variant == CORRECT else int(stress.words[BAD]) or stress.damaged:
                break
    finally:
        stress.finish()
    lost = 0
    for gfn in range(PAGES):
        page = stress.page(gfn)
        for cpu in range(CPUS):
            count = int(sequences[cpu][gfn])
            gva = u64(1 << 47 | gfn << 12 | cpu * 8)
            lost += count > 0 and (page is None or page[cpu] != stamp(gva, u64(count)))
    return int(stress.words[BAD]) + stress.damaged + lost, stress.evictions


def test_correct_protocol_loses_nothing() -> None:
    errors, evictions = run_variant(CORRECT)
    assert errors == 0
    assert evictions > 10 * VICTIMS


@pytest.mark.parametrize("variant", [NO_WAIT, ACKNOWLEDGE_ONLY, SLOPPY_ENTRY])
def test_each_broken_variant_is_caught(variant: int) -> None:
    errors, evictions = run_variant(variant)
    assert errors > 0, f"not caught in {evictions} evictions"


def test_the_run_loop_itself_under_eviction() -> None:
    """Two vCPUs with stamping tasks on two thirds of the memory they need; page tables are evicted like the rest."""
    specs = [TaskSpec(L.P_STAMP, cpu=cpu, space=cpu, pages=40, index=cpu) for cpu in range(CPUS)]
    stress = Stress(specs, 60)
    stress.control[L.CTL_BARRIER] = 1

    def body(cpu: int) -> None:
        for _ in range(1_000_000):
            code = vcpu_run(stress.cpus[cpu], cpu, 20_000)
            if code == L.RUN_DONE:
                return
            if code == L.RUN_NESTED:
                stress.ask(cpu, int(stress.vps[cpu][L.VP_X_GPA]) >> 12)
            assert code in (L.RUN_NESTED, L.RUN_BUDGET)

    stress.start(body)
    begin = time.monotonic()
    try:
        while stress.alive():
            stress.answer()
            if stress.evictions > 1500 or time.monotonic() > begin + SECONDS_WAIT:
                py_store(stress.control, L.CTL_STOP, 1)
            assert time.monotonic() < begin + 2 * SECONDS_WAIT
    finally:
        stress.finish()
    assert stress.damaged == 0
    assert [int(stress.task(i)[L.T_ERRORS]) for i in range(CPUS)] == [0] * CPUS
    assert all(int(stress.task(i)[L.T_READS_CHECKED]) >= 40 * 512 for i in range(CPUS))
    assert stress.evictions > 300
