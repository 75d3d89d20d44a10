"""What the emulated MMU costs, as ratios: ``python bench/mmu.py`` from the checkout (about 20 s, one core).

Every round runs all variants one after the other, and the figures are medians over the rounds, so that a slow moment of the machine meets
all of them. Ratios compare within a round; nanoseconds are for orientation.

    raw gather      random reads of frames by a jitted loop without any translation, the limit
    TLB hits        the same reads through the TLB, with the look at doorbell and generation every 64
    2-D walk        all 24 references, page-walk cache empty, tables in cache
    leaf walk       with the page-walk cache: 5 references
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from guest import mmu
from guest.boot import BUFFER_BASE, COUNTERS_BASE, TaskSpec, init_kernel, shadow_words
from guest.mmu import PWC_ENTRIES, READ, U64, USER, Vcpu, tlb_flush, tlb_lookup, walk
from guest.program_core import mix, next_state
from guest.run import check_flush, vcpu_run
from proto import layout as L  # noqa: N812
from proto.atomics import load
from proto.jit import lean_kernel as kernel
from proto.pagetable import npt_init, npt_set, u64
from proto.units import KICK_CHECK_OPS

MEMORY_PAGES = 4096
TLB_PAGES = 512
"""2 MiB: within the TLB and about the second-level cache."""
ROUNDS = 7
LOOPS = 2_000_000
WALKS = 300_000
FLUSHES = 20_000
PROGRAM_OPS = 2_000_000


@kernel
def raw_gather(m: Vcpu, frame_of: U64, n: int) -> int:
    """Read a random word of a random page; which frame it is in comes from an array, as from a perfect TLB without tags."""
    state = u64(1)
    total = u64(0)
    for i in range(n):
        if i % KICK_CHECK_OPS == 0:
            total += load(m.vmc, L.VMC_FLUSH_GEN)
        state = next_state(state)
        random = mix(state)
        frame = frame_of[random & u64(TLB_PAGES - 1)]
        total += m.frames[frame * u64(512) + (random >> u64(32) & u64(511))]
    return total


@kernel
def _hits(m: Vcpu, base: int, state: int, n: int) -> tuple[int, int, int, int]:
    """Reads until one misses or ``n`` are done, as the programs of guest mode do: (done, state, sum, gva that missed)."""
    total = u64(0)
    generation = load(m.vmc, L.VMC_FLUSH_GEN)
    for i in range(n):
        if i % KICK_CHECK_OPS == 0:
            generation = check_flush(m, generation)
        after = next_state(state)
        random = mix(after)
        gva = u64(base) + ((random & u64(TLB_PAGES - 1)) << u64(12)) + (random >> u64(32) & u64(511)) * u64(8)
        frame = tlb_lookup(m.tlb, gva, u64(READ | USER))
        if frame < 0:
            return i, state, total, gva
        total += m.frames[u64(frame) * u64(512) + (random >> u64(32) & u64(511))]
        state = after
    return n, state, total, u64(0)


@kernel
def tlb_gather(m: Vcpu, base: int, n: int) -> int:
    """The same through the TLB."""
    state = u64(1)
    total = u64(0)
    left = n
    while left > 0:
        done, state, part, gva = _hits(m, base, state, left)
        total += part
        left -= done
        if left > 0:
            walk(m.frames, m.npt, m.tlb, m.pwc, gva, u64(READ | USER))
    return total


@kernel
def walks(m: Vcpu, base: int, n: int, full: bool) -> int:
    """Translate random pages without the TLB; ``full`` also empties the page-walk cache's only slot in use."""
    state = u64(1)
    total = u64(0)
    for _ in range(n):
        state = next_state(state)
        gva = u64(base) + ((mix(state) & u64(TLB_PAGES - 1)) << u64(12))
        if full:
            m.pwc[(gva >> u64(21)) & u64(PWC_ENTRIES - 1)] = u64(0)
        _, frame, _, _ = walk(m.frames, m.npt, m.tlb, m.pwc, gva, u64(READ | USER))
        total += frame
    return total


@kernel
def flushes(m: Vcpu, n: int) -> None:
    """Full flushes of TLB and page-walk cache."""
    for _ in range(n):
        tlb_flush(m.tlb, m.pwc)
        load(m.vmc, L.VMC_FLUSH_GEN)


def machine(specs: list[TaskSpec]) -> Vcpu:
    """A VM with all its memory mapped, gfn g in frame MEMORY_PAGES - 1 - g, and the barrier open."""
    npt = np.zeros(L.npt_tables(MEMORY_PAGES) * 512, np.uint64)
    npt_init(npt)
    for gfn in range(MEMORY_PAGES):
        npt_set(npt, gfn, MEMORY_PAGES - 1 - gfn, True)
    kern = np.zeros(L.kernel_words(len(specs), 1, MEMORY_PAGES), np.uint64)
    init_kernel(kern, specs, 1, MEMORY_PAGES, 1)
    control = np.zeros(512, np.uint64)
    control[L.CTL_BARRIER] = 1
    frames = np.zeros(MEMORY_PAGES * 512, np.uint64)
    shadow = np.zeros(max(1, shadow_words(specs)), np.uint32)
    words = [np.zeros(512, np.uint64) for _ in range(2)]
    return mmu.make_vcpu(
        frames, npt, kern, control, words[0], words[1], shadow, np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    )


def ns_each(function: Callable[[], object], n: int) -> float:
    """Wall time of one call, divided by ``n``."""
    begin = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - begin) / n


def main() -> None:
    """Measure and print."""
    programs = {
        "bm_work": (L.P_BM_WORK, COUNTERS_BASE, 1),
        "bm_fault": (L.P_BM_FAULT, BUFFER_BASE, TLB_PAGES),
        "sequential": (L.P_SEQUENTIAL, BUFFER_BASE, TLB_PAGES),
        "uniform": (L.P_UNIFORM, BUFFER_BASE, TLB_PAGES),
        "zipf": (L.P_ZIPF, BUFFER_BASE, TLB_PAGES),
        "chase": (L.P_CHASE, BUFFER_BASE, TLB_PAGES),
        "syscalls": (L.P_SYSCALLS, BUFFER_BASE, TLB_PAGES),
        "stamp": (L.P_STAMP, BUFFER_BASE, 64),
    }
    specs = [
        TaskSpec(p, space=i, base=base, pages=pages) for i, (p, base, pages) in enumerate(programs.values())
    ]
    m = machine(specs)
    # A BM_MAIN is not among the tasks; touching memory first happens in these calls, which also compile.
    for number in range(len(specs)):
        vcpu_run(m, number, PROGRAM_OPS)
    uniform = list(programs).index("uniform")
    vcpu_run(m, uniform, 1)
    frame_of = np.array(
        [int(mmu.translate(m, BUFFER_BASE + page * 4096, READ | USER)[1]) for page in range(TLB_PAGES)],
        np.uint64,
    )
    raw_gather(m, frame_of, 10)
    tlb_gather(m, BUFFER_BASE, 10)
    walks(m, BUFFER_BASE, 10, True)
    flushes(m, 1)
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        vcpu_run(m, uniform, 1)
        figures = {
            "raw gather": ns_each(lambda: raw_gather(m, frame_of, LOOPS), LOOPS),
            "TLB hits": ns_each(lambda: tlb_gather(m, BUFFER_BASE, LOOPS), LOOPS),
            "2-D walk": ns_each(lambda: walks(m, BUFFER_BASE, WALKS, True), WALKS),
            "leaf walk": ns_each(lambda: walks(m, BUFFER_BASE, WALKS, False), WALKS),
            "flush": ns_each(lambda: flushes(m, FLUSHES), FLUSHES),
        }
        for number, name in enumerate(programs):
            figures[name] = ns_each(lambda number=number: vcpu_run(m, number, PROGRAM_OPS), PROGRAM_OPS)  # type: ignore[misc]
        rounds.append(figures)
    report(rounds)


def report(rounds: list[dict[str, float]]) -> None:
    """Print medians, and ratios to the raw gather of the same round."""
    print(f"{'':12} {'ns':>8} {'x raw gather':>13}   (medians of {len(rounds)} interleaved rounds)")
    for name in rounds[0]:
        ns = statistics.median(figures[name] for figures in rounds)
        ratio = statistics.median(figures[name] / figures["raw gather"] for figures in rounds)
        print(f"{name:12} {ns:8.1f} {ratio:13.2f}")


if __name__ == "__main__":
    main()
