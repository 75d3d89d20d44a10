"""Boot of a guest kernel: which tasks a VM has, and a fresh kernel segment filled with them.

`plan_tasks` turns a ``[[vm]]`` table into task specs: what runs where, on which memory. `init_kernel` writes them as task records, gives
every address space a root table and every verifying task its part of the shadow.

Invariants: tasks with the same ``space`` share a CR3; parts of the shadow do not overlap; a VM's plan depends on its topology only, so
that all roles agree on task numbers without talking.

Not handled here: whether the memory suffices (proto/topology.py refuses before), reading traces, running anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from guest.mmu import U64
from guest.program_core import PAGES_MAX, PC_BARRIER, PC_SETUP
from proto.layout import (
    ALLOC_FIRST_GFN,
    K_ALLOC_NEXT,
    K_BARRIER_TASKS,
    K_MEMORY_PAGES,
    K_OWNERS,
    K_SEED,
    K_TASKS,
    K_VCPUS,
    P_BM_FAULT,
    P_BM_MAIN,
    P_BM_WORK,
    P_CHASE,
    P_REPLAY,
    P_SEQUENTIAL,
    P_STAMP,
    P_SYSCALLS,
    P_UNIFORM,
    P_ZIPF,
    T_AUX0,
    T_BASE,
    T_CPL,
    T_CPU,
    T_CR3,
    T_GROUP,
    T_HOME,
    T_IF,
    T_INDEX,
    T_LOOPS,
    T_OPS_LIMIT,
    T_PAGES,
    T_PC,
    T_PROGRAM,
    T_RNG,
    T_SHADOW,
    T_STATE,
    T_TRACE,
    T_TRACE_LEN,
    T_VPN_LEN,
    T_WRITE_Q32,
    TASK_WORDS,
    kernel_words,
    owners_base,
    task_base,
)
from proto.lives import TASK, TaskState
from proto.topology_keys import Task, Vm
from proto.units import PAGE_SIZE, WORDS_PER_PAGE

BUFFER_BASE: Final = 0x7F00_0000_0000
"""Where a task's working set starts in its address space."""
COUNTERS_BASE: Final = 0x5500_0000_0000
"""Where the counters of the benchmark's work threads start: far from the buffer, adjacent to each other (spec §6.1)."""
GVA_END: Final = 1 << 47
MASK64: Final = (1 << 64) - 1
PROGRAMS: Final = {
    "sequential": P_SEQUENTIAL,
    "uniform": P_UNIFORM,
    "zipf": P_ZIPF,
    "chase": P_CHASE,
    "replay": P_REPLAY,
    "syscalls": P_SYSCALLS,
    "stamp": P_STAMP,
}
WITH_SETUP: Final = (P_BM_MAIN, P_CHASE)
SHADOW_PER_PAGE: Final = (P_SEQUENTIAL, P_UNIFORM, P_ZIPF, P_SYSCALLS)
SHADOW_PER_WORD: Final = (P_STAMP, P_REPLAY)


@dataclass(frozen=True, slots=True)
class TraceShape:
    """Size of a recorded trace (fields of the same names in proto/tracefile.py)."""

    pages: int
    accesses: int


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task of a VM. ``space`` numbers address spaces from 0; ``trace`` indexes the VM's traces, -1 for none."""

    program: int
    cpu: int = 0
    space: int = 0
    base: int = BUFFER_BASE
    pages: int = 1
    write_percent: float = 50.0
    ops: int = 0
    loops: int = 0
    index: int = 0
    zipf_exponent: float = 1.0
    trace: int = -1
    group: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks of a VM and the traces they replay (paths as in the topology, in the order of ``TaskSpec.trace``)."""

    tasks: list[TaskSpec] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- plan


def plan_tasks(vm: Vm) -> Plan:
    """The tasks of a VM, in the order of its tables.

    Placement is round robin within each table: task i goes to vCPU i mod n, counted from the table's ``vcpu`` where it has one. Of the
    2010 benchmark, fault thread i and work thread i share vCPU i mod n, as in its published runs, and the main thread is on the first.
    """
    plan = Plan()
    space = 0
    for group, table in enumerate(vm.task):
        first = max(table.vcpu, 0)
        for copy in range(table.count):
            if table.workload == "bm":
                plan.tasks.extend(_bm_threads(table, vm.vcpus, first, space, group))
            else:
                cpu = first if table.vcpu >= 0 else copy % vm.vcpus
                plan.tasks.append(_single(table, plan.traces, cpu, space, group, copy))
            space += 1
    return plan


def _bm_threads(table: Task, vcpus: int, first: int, space: int, group: int) -> list[TaskSpec]:
    pages = _pages(table)
    threads = [TaskSpec(P_BM_MAIN, first, space, BUFFER_BASE, pages, group=group)]
    for program, count, base in (
        (P_BM_FAULT, table.fault_threads, BUFFER_BASE),
        (P_BM_WORK, table.work_threads, COUNTERS_BASE),
    ):
        threads += [
            TaskSpec(program, (first + i) % vcpus, space, base, pages, index=i, group=group)
            for i in range(count)
        ]
    return threads


def _single(table: Task, traces: list[str], cpu: int, space: int, group: int, index: int) -> TaskSpec:
    trace = -1
    if table.workload == "replay":
        if table.trace not in traces:
            traces.append(table.trace)
        trace = traces.index(table.trace)
    return TaskSpec(
        PROGRAMS[table.workload],
        cpu,
        space,
        pages=_pages(table) if trace < 0 else 0,
        write_percent=table.write_percent,
        ops=table.ops,
        loops=table.loops,
        index=index,
        zipf_exponent=table.zipf_exponent,
        trace=trace,
        group=group,
    )


def _pages(table: Task) -> int:
    return -(-table.memory_kib * 1024 // PAGE_SIZE)


# ---------------------------------------------------------------- shadow


def shadow_words_of(spec: TaskSpec, traces: Sequence[TraceShape] = ()) -> int:
    """u32 entries that one task needs in the shadow."""
    if spec.program in SHADOW_PER_WORD:
        return (traces[spec.trace].pages if spec.trace >= 0 else spec.pages) * WORDS_PER_PAGE
    return spec.pages if spec.program in SHADOW_PER_PAGE else 0


def shadow_words(tasks: Sequence[TaskSpec], traces: Sequence[TraceShape] = ()) -> int:
    """u32 entries of the VM's shadow array (0 if no task verifies)."""
    return sum(shadow_words_of(spec, traces) for spec in tasks)


# ---------------------------------------------------------------- kernel segment


def init_kernel(
    kern: U64,
    tasks: Sequence[TaskSpec],
    vcpus: int,
    memory_pages: int,
    seed: int,
    traces: Sequence[TraceShape] = (),
) -> None:
    """Fill a guest kernel segment: header, root tables, task records; every task runnable, none started.

    Args:
        kern: u64, at least ``kernel_words(len(tasks), vcpus, memory_pages)``; overwritten.
        tasks: specs, see `plan_tasks`.
        vcpus: CPUs of the guest.
        memory_pages: guest memory in pages.
        seed: of the tasks' random choices, together with the task's number.
        traces: shape of each trace, by ``TaskSpec.trace``. Traces lie in arrays of their own (``T_TRACE`` says which), offset 0.

    Raises:
        ValueError: the segment is too small, or a spec does not fit the guest.
    """
    words = kernel_words(len(tasks), vcpus, memory_pages)
    if len(kern) < words:
        raise ValueError(f"kernel segment: {len(kern)} words, allowed: at least {words}")
    kern[:] = 0
    kern[K_TASKS] = kern[K_BARRIER_TASKS] = len(tasks)
    kern[K_VCPUS] = vcpus
    kern[K_MEMORY_PAGES] = memory_pages
    kern[K_SEED] = seed & MASK64
    kern[K_OWNERS] = owners = owners_base(len(tasks), vcpus)
    roots = {space: ALLOC_FIRST_GFN + i for i, space in enumerate(sorted({spec.space for spec in tasks}))}
    kern[K_ALLOC_NEXT] = ALLOC_FIRST_GFN + len(roots)
    if ALLOC_FIRST_GFN + len(roots) > memory_pages:
        allowed = f"at least {ALLOC_FIRST_GFN + len(roots)} for {len(roots)} address spaces"
        raise ValueError(f"memory_pages: {memory_pages}, allowed: {allowed}")
    for root in roots.values():
        kern[owners + root] = root
    shadow = 0
    for number, spec in enumerate(tasks):
        _check(number, spec, vcpus, traces)
        base = task_base(len(tasks), vcpus) + number * TASK_WORDS
        _fill(kern[base : base + TASK_WORDS], spec, seed, number, roots[spec.space], shadow, traces)
        shadow += shadow_words_of(spec, traces)


def _check(number: int, spec: TaskSpec, vcpus: int, traces: Sequence[TraceShape]) -> None:
    if not 0 <= spec.cpu < vcpus:
        raise ValueError(f"task {number}: cpu {spec.cpu}, allowed: 0 to {vcpus - 1}")
    if spec.program == P_REPLAY:
        if not 0 <= spec.trace < len(traces):
            raise ValueError(f"task {number}: trace {spec.trace}, allowed: 0 to {len(traces) - 1}")
        return
    last = (GVA_END - spec.base) // PAGE_SIZE
    if spec.base % PAGE_SIZE or not 1 <= spec.pages <= min(PAGES_MAX, last):
        allowed = f"an aligned base and 1 to {min(PAGES_MAX, last)} pages"
        raise ValueError(f"task {number}: {spec.pages} pages at {spec.base:#x}, allowed: {allowed}")


def _fill(
    record: U64, spec: TaskSpec, seed: int, number: int, root: int, shadow: int, traces: Sequence[TraceShape]
) -> None:
    record[T_STATE] = TASK.go(TaskState.UNUSED, "create")
    record[T_CPU] = record[T_HOME] = spec.cpu
    record[T_PROGRAM] = spec.program
    record[T_CR3] = root * PAGE_SIZE
    record[T_CPL] = 3
    record[T_IF] = 1
    record[T_PC] = PC_SETUP if spec.program in WITH_SETUP else PC_BARRIER
    record[T_OPS_LIMIT] = spec.ops
    record[T_RNG] = _scramble(_scramble(seed & MASK64) + number)
    record[T_BASE] = spec.base
    record[T_PAGES] = spec.pages
    record[T_WRITE_Q32] = round(spec.write_percent / 100 * (1 << 32))
    record[T_SHADOW] = shadow
    record[T_LOOPS] = spec.loops
    record[T_INDEX] = spec.index
    record[T_GROUP] = spec.group
    if spec.program == P_ZIPF:
        record[T_AUX0] = round(spec.zipf_exponent * 1e6)
    if spec.program == P_REPLAY:
        shape = traces[spec.trace]
        record[T_TRACE] = spec.trace
        record[T_TRACE_LEN] = shape.accesses
        record[T_VPN_LEN] = record[T_PAGES] = shape.pages


def _scramble(value: int) -> int:
    """One round of splitmix64, so that neighbouring seeds and task numbers start far apart."""
    z = (value + 0x9E37_79B9_7F4A_7C15) & MASK64
    z = (z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB & MASK64
    return z ^ (z >> 31)
