"""Calls every guest kernel once with the types that a vCPU process uses, so that no forked process compiles."""

from __future__ import annotations

import numpy as np

from guest.boot import TaskSpec, init_kernel
from guest.mmu import flush, make_vcpu
from guest.run import kernel_access32, kernel_clear_page, vcpu_run
from guest.sched import RunQueue
from guest.syscalls import release_locks
from proto import pcpu
from proto.layout import P_SEQUENTIAL, P_SYSCALLS, TASK_WORDS, kernel_words, npt_tables, task_base
from proto.port import ArrayPort
from proto.units import WORDS_PER_PAGE

PAGES = 64


def warm_guest() -> None:
    """On a guest of two tasks and no memory behind it."""
    kern = np.zeros(kernel_words(2, 1, PAGES), np.uint64)
    init_kernel(kern, [TaskSpec(P_SEQUENTIAL), TaskSpec(P_SYSCALLS)], 1, PAGES, 1)
    page = np.zeros(WORDS_PER_PAGE, np.uint64)
    control = np.zeros(WORDS_PER_PAGE, np.uint64)
    vcpu = make_vcpu(
        np.zeros(PAGES * WORDS_PER_PAGE, np.uint64),
        np.zeros(npt_tables(PAGES) * 512, np.uint64),
        kern,
        control,
        control.copy(),
        page,
        np.zeros(PAGES * WORDS_PER_PAGE, np.uint32),
        np.zeros(1, np.uint32),
        np.zeros(1, np.uint64),
    )
    vcpu_run(vcpu, 0, 1)
    kernel_access32(vcpu, 0, False, 0)
    kernel_clear_page(vcpu, 0)
    flush(vcpu)
    queue = RunQueue(kern, 2, 1, 0, 1, 1)
    queue.scan()
    queue.open_barrier()
    port = ArrayPort(kern)
    port.cmpxchg(0, 2, 2)
    port.add(0, 0)
    at = task_base(2, 1)
    release_locks(kern, kern[at : at + TASK_WORDS])
    pcpu.warm_up()
