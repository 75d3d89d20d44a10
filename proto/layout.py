"""Word offsets of everything that lies in shared memory. All words are 64-bit little-endian unless said otherwise.

Five kinds of segments (sizes in proto/segments.py, the map for readers in docs/memory-map.md):

* ``frames``      host physical memory, 4 KiB frames
* ``control``     run-wide words, then one 4 KiB page per VM (`VMC_*`), then one word per daemon (`DW_*`)
* ``vcpus``       one 4 KiB page per vCPU (`VP_*`): state word, doorbell, registers, counters
* ``npt-V``       nested page table of VM V: 512-entry tables, table 0 is the root
* ``kernel-V``    the guest kernel of VM V (`K_*`, task records `T_*`, sleeper nodes `N_*`): unswappable kernel memory, shared by its vCPUs

One writer per cache line (8 words), except words that are only touched by atomic read-modify-write.
"""

from __future__ import annotations

from typing import Final

from proto.units import WORDS_PER_PAGE

LINE: Final = 8

# ---- control segment, page 0: the run -------------------------------------------------------------------------------------------
CTL_STOP: Final = 0
"""1: the measured time is over, tasks without a fixed amount of work finish. Written by the host."""
CTL_BARRIER: Final = 8
"""1: the start barrier is open. Written by the host."""
CTL_START_NS: Final = 9
"""Monotonic ns at which the barrier opened; 0 before."""
CTL_ABORT: Final = 16
"""1: the run is being torn down (Ctrl-C, failure): everybody leaves at the next look. Written by the launcher."""

# ---- control segment, page 1 + v: VM v (VMC_*), written by the host ---------------------------------------------------------------
VMC_FLUSH_GEN: Final = 0
"""Flush generation: bumped (seq_cst) after nested entries were cleared."""
VMC_OFFLINE: Final = 8
"""16 words: bitmap of the CPUs that the run wants offline (1024 bits)."""
VMC_REBOOTS: Final = 24
"""How many reboots the run has asked for."""

# ---- control segment, behind the pages of the VMs: word d is that of daemon d, written by the host ----------------------------------
DW_NEVER: Final = 0
"""No incarnation of the daemon was connected yet."""
DW_EPOCH: Final = 1
"""1 + epoch of the incarnation that the host connected last; it stays when that one ends."""
DW_GONE: Final = 1 << 63
"""The daemon never comes back, and the host goes on without it. More than the word of any epoch."""

# ---- vCPU page ----------------------------------------------------------------------------------------------------------------------
VP_STATE: Final = 0
"""(acknowledged flush generation << 2) | mode. Writer: the vCPU. Entering guest mode is a seq_cst store, then VMC_FLUSH_GEN is
read again."""
MODE_OUTSIDE: Final = 0
MODE_IN_GUEST: Final = 1
VP_DOORBELL: Final = 8
"""Messages sent to this vCPU and not yet taken, signed: the host adds 1 AFTER sending, the vCPU subtracts what it received."""

# registers and exit information (writer: the vCPU process)
VP_TASK: Final = 16
"""Current task index + 1, 0 = idle."""
VP_CR0_PG: Final = 17
VP_CR3: Final = 18
VP_APF_GPA: Final = 19
"""Guest-physical address of this CPU's async-PF area (64 bytes, 64-aligned)."""
VP_APF_ENABLED: Final = 20
"""The guest-private `enabled` word (spec §2.8)."""
VP_IRQ_PENDING: Final = 21
"""Non-zero while an interrupt waits for IF=1: `sti` then leaves vcpu_run with RUN_IRQ_WINDOW."""
VP_NEED_RESCHED: Final = 22
"""Non-zero: leaving a preempt-disabled section leaves vcpu_run with RUN_RESCHED."""
VP_X_GPA: Final = 24
VP_X_GVA: Final = 25
VP_X_FLAGS: Final = 26
"""Exit information of RUN_NESTED: XF_* bits."""
VP_X_OPS: Final = 27
"""Operations executed by the last vcpu_run call."""
XF_WRITE: Final = 1
XF_KERNEL: Final = 2
"""CPL 0 at the access."""
XF_WALK: Final = 4
"""The missing page holds a guest page table."""
XF_IF: Final = 8
"""Interrupts were enabled."""
XF_RESTART: Final = 16
"""EXIT.flags only: a save point. The guest goes on from its records and executes the instruction again, so a fresh vCPU can, too."""

# counters (writer: the vCPU process); VC_* are offsets from VP_COUNTERS
VP_COUNTERS: Final = 64
VP_COUNTERS_LEN: Final = 64
VC_VCLOCK_NS: Final = 0
"""Guest time of this vCPU: running + blocked + halted + idle."""
VC_RUNNING_NS: Final = 1
VC_BLOCKED_NS: Final = 2
"""Held in the host for a synchronous fault."""
VC_HALTED_NS: Final = 3
"""Synthetic halt (host side, the guest does not know)."""
VC_IDLE_NS: Final = 4
"""HLT executed by the guest."""
VC_STEAL_NS: Final = 5
"""Wanted to run, waited for a run token."""
VC_EMULATION_NS: Final = 6
"""Time the emulator itself needed for exits: message round trips, Python. Charged to nobody."""
VC_OPS: Final = 7
VC_WORK: Final = 8
"""Work units: bm work-thread increments, otherwise operations completed."""
VC_READS_CHECKED: Final = 9
VC_INTEGRITY_ERRORS: Final = 10
VC_TLB_MISSES: Final = 11
VC_TLB_FLUSHES: Final = 12
VC_GUEST_FAULTS: Final = 13
"""Ordinary guest page faults (demand zero)."""
VC_EXITS: Final = 14
VC_NESTED: Final = 15
VC_KERNEL_NESTED: Final = 16
"""Nested faults taken at CPL 0."""
VC_NOT_PRESENT: Final = 17
"""Async 'page not present' events dispatched by the guest."""
VC_READY: Final = 18
"""Wake-ups dispatched by the guest (one per token, broadcasts not counted)."""
VC_BROADCASTS: Final = 19
VC_SWITCHES: Final = 20
VC_IPIS: Final = 21
VC_KICKS: Final = 22
VC_PACE_LAG_MAX_NS: Final = 23
VC_TASKS_DONE: Final = 24
VC_TASKS_KILLED: Final = 25
VC_BAD_MESSAGES: Final = 26
VC_BARRIER_VCLOCK_NS: Final = 27
"""VC_VCLOCK_NS when this vCPU saw the barrier open."""
VC_END_VCLOCK_NS: Final = 28
"""VC_VCLOCK_NS when this vCPU saw the stop flag."""
VC_BARRIER_WALL_NS: Final = 29
VC_END_WALL_NS: Final = 30
VC_PAUSED_NS: Final = 31
"""Paced vCPU ahead of or level with the wall clock: nothing to do until it advances."""
VC_HALT_TASKS: Final = 32
"""Async faults taken where the guest may not sleep (it halted instead, spec §2.6)."""

VP_HISTOGRAMS: Final = 0
"""Latency histograms do not lie in the vCPU page but in the `stats` segment (proto/stats.py)."""

# ---- guest kernel segment -----------------------------------------------------------------------------------------------------------
K_TASKS: Final = 0
"""Number of task records."""
K_VCPUS: Final = 1
K_MEMORY_PAGES: Final = 2
K_SEED: Final = 3
K_BARRIER_TASKS: Final = 4
"""Tasks that stop at the start barrier (all of them, see guest/programs.py); the host opens it when K_AT_BARRIER gets there."""
K_BOOTS: Final = 5
"""Reboots so far. After one the allocator starts again, so a new page may hold anything and is cleared in full."""
K_OWNERS: Final = 6
"""Word index of the owner column: one word for each guest page, behind the task records (see `owners_base`). It is what struct page is to
Linux: whose page this is can be told without a look at guest memory, which may be on swap. 0: nobody's, or the kernel's; else the gfn of
the root table of the address space, or `OWNER_FREE`, `OWNER_TAKEN`."""
OWNER_FREE: Final = 1 << 63
"""On the stack of pages given back; the low half is the next one."""
OWNER_TAKEN: Final = 1 << 62
"""Of a root table: a CPU is giving this address space back."""
K_ALLOC_NEXT: Final = 8
"""Next gfn that the guest's page allocator never handed out (atomic add)."""
K_ALLOC_FAILED: Final = 9
K_POWER: Final = 10
"""What becomes of the machine, where CPUs may go and come (cmpxchg): POWER_*."""
POWER_ON: Final = 0
POWER_REBOOT: Final = 1
POWER_OFF: Final = 2
"""All tasks are finished: every CPU powers down."""
K_HOTPLUG: Final = 11
"""Lock: one CPU goes offline at a time (cpu + 1)."""
K_FREE: Final = 12
"""Top of the stack of pages given back (cmpxchg): gfn in the low half, 0 = empty; the high half counts changes."""
K_OOM: Final = 13
"""Number of the host's notice that memory is short, while it has no answer; 0: none."""
K_AT_BARRIER: Final = 16
"""Tasks waiting at the start barrier (atomic add)."""
K_DONE: Final = 24
"""Tasks finished or killed (atomic add)."""
K_ONLINE: Final = 32
"""16 words: bitmap of online CPUs (1024 bits)."""
K_DEAD: Final = 48
"""16 words: bitmap of CPUs that are offline and wait, halted, to be started again."""
K_LOCKS: Final = 64
"""64 spin-lock words for the guest's own locks, one per cache line (used by the syscalls workload)."""
K_LOCK_COUNT: Final = 16
K_QUIET: Final = 192
"""16 words: bitmap of CPUs that have disabled async PF for the reboot under way."""
K_BUCKETS: Final = 256
"""Sleeper hash: 256 buckets of BUCKET_WORDS (lock word, head = node index + 1)."""
BUCKETS: Final = 256
BUCKET_WORDS: Final = 8
B_LOCK: Final = 0
B_HEAD: Final = 1
K_NODES: Final = K_BUCKETS + BUCKETS * BUCKET_WORDS
"""Sleeper nodes: node t (t < tasks) belongs to task t (its 'kernel stack'), nodes tasks.. are the heap for dummies."""
NODE_WORDS: Final = 8
N_TOKEN: Final = 0
N_CPU: Final = 1
N_LINKED: Final = 2
"""1 while the node is in a bucket list."""
N_NEXT: Final = 3
"""Next node index + 1 in the bucket list."""
N_DUMMY: Final = 4
N_USED: Final = 5
"""Dummies: 1 while allocated (claimed by cmpxchg)."""
N_HALTED: Final = 6
"""The waiter halts instead of sleeping (spec §2.6)."""
DUMMIES_PER_VCPU: Final = 64

TASK_WORDS: Final = 64
"""Task records follow the nodes: see `task_base`."""
T_STATE: Final = 0
TS_UNUSED: Final = 0
TS_RUNNABLE: Final = 1
TS_RUNNING: Final = 2
TS_SLEEPING: Final = 3
"""In wait(token): uninterruptible."""
TS_HALTING: Final = 4
"""In wait(token) where the context may not schedule: its CPU halts with it."""
TS_BARRIER: Final = 5
TS_DONE: Final = 6
TS_KILLED: Final = 7
T_CPU: Final = 1
T_PROGRAM: Final = 2
T_VRUNTIME_NS: Final = 3
T_CR3: Final = 4
T_CPL: Final = 5
T_IF: Final = 6
T_PREEMPT: Final = 7
T_PC: Final = 8
T_OPS: Final = 9
T_OPS_LIMIT: Final = 10
"""0 = until the stop flag."""
T_RNG: Final = 11
T_BASE: Final = 12
"""First gva of the working set."""
T_PAGES: Final = 13
T_WRITE_Q32: Final = 14
"""Probability of a write as a 32-bit fraction."""
T_CURSOR: Final = 15
T_SHADOW: Final = 16
"""First index of this task's part of the shadow array (u32 sequence numbers)."""
T_WORK: Final = 17
T_READS_CHECKED: Final = 18
T_ERRORS: Final = 19
T_LOOPS: Final = 20
"""Replay: times to run the trace, 0 = until the stop flag."""
T_TRACE_OFF: Final = 21
T_TRACE_LEN: Final = 22
T_VPN_OFF: Final = 23
T_VPN_LEN: Final = 24
T_INDEX: Final = 25
"""Index inside its group (bm: which counter)."""
T_AUX0: Final = 26
T_AUX1: Final = 27
T_AUX2: Final = 28
T_AUX3: Final = 29
T_FIRST_ERROR_GVA: Final = 30
T_RUN_NS: Final = 31
# in-kernel page-fault handler of the task (demand zero): restartable state
T_KSTAGE: Final = 32
T_KVA: Final = 33
T_KTABLE: Final = 34
T_KLEVEL: Final = 35
T_KNEW: Final = 36
T_KWRITE: Final = 37
T_KSAVED: Final = 38
"""CPL | IF << 2 of the interrupted code, restored when the handler returns."""
# scheduling and async PF
T_FAULT_NS: Final = 40
"""Monotonic ns of the last touch that left the guest, for latencies."""
T_TOKEN: Final = 41
T_KILL_REASON: Final = 42
T_GROUP: Final = 43
T_WAKE_NS: Final = 44
T_TRACE: Final = 45
"""Replay: which of the VM's traces (their order is that of guest.boot.Plan.traces)."""
T_HOME: Final = 46
"""The CPU that the task was placed on. It goes back there when that CPU has been offline and returns."""
T_LAMPORT: Final = 47
"""Lamport counter of the CPU that gave the task away, handed over with it; 0: nobody did since it ran last."""
T_DIE: Final = 48
"""The task was chosen to give its memory back: DIE_*. Its CPU looks before each stay in guest mode."""
DIE_CHOSEN: Final = 1
DIE_STOPPED: Final = 2
"""Its CPU has seen it: the task executes nothing any more."""
T_KILL_PAGES: Final = 49
"""Guest pages of its address space when it was chosen."""

# programs (T_PROGRAM); T_PC 0 is always the first step, PC_BARRIER steps wait for the start barrier
P_BM_MAIN: Final = 1
P_BM_FAULT: Final = 2
P_BM_WORK: Final = 3
P_SEQUENTIAL: Final = 4
P_UNIFORM: Final = 5
P_ZIPF: Final = 6
P_CHASE: Final = 7
P_REPLAY: Final = 8
P_SYSCALLS: Final = 9
P_STAMP: Final = 10

# exit codes of vcpu_run
RUN_BUDGET: Final = 0
RUN_NESTED: Final = 1
"""Nested fault: VP_X_* say where."""
RUN_KICK: Final = 2
"""Doorbell seen."""
RUN_DONE: Final = 3
"""The task finished its program (its state is still TS_RUNNING; the scheduler retires it)."""
RUN_BARRIER: Final = 4
"""The task reached the start barrier and it is closed."""
RUN_RESCHED: Final = 5
"""Preemption was enabled again and VP_NEED_RESCHED is set."""
RUN_IRQ_WINDOW: Final = 6
"""Interrupts were enabled again and VP_IRQ_PENDING is set."""
RUN_SEGV: Final = 7
"""Access to an address the task may not use: the guest kills the task."""
RUN_OOM: Final = 8
"""The guest has no free page."""
RUN_APF_WORD: Final = 9
"""An ordinary #PF found the async-PF flags word set (spec §2.2): guest kernel decides."""
RUN_ABORT: Final = 10
"""CTL_ABORT seen."""

KILL_SEGV: Final = 1
KILL_OOM: Final = 2
KILL_MACHINE_CHECK: Final = 3
KILL_SWAP_FULL: Final = 4
"""The host had neither a frame nor a swap slot left (guest/oom.py)."""

# ---- guest memory map (gfns) and formats ----------------------------------------------------------------------------------------------
APF_AREA_GPA: Final = 0x1000
"""Async-PF areas of the CPUs: 64 bytes each from here, 64 per page, at most 16 pages (1024 vCPUs)."""
ALLOC_FIRST_GFN: Final = 32
"""First gfn handed out by the guest's page allocator."""
KERNEL_VPN: Final = 1 << 35
"""vpn bit of the kernel's direct map: kernel gva = canonical(KERNEL_VPN << 12) + gpa; translated 1:1 to gpa, nested walk only.
It stands for the kernel's large linear mapping, whose own tables are unswappable kernel memory."""

# guest page-table entries (x86 4-level format)
PTE_P: Final = 1
PTE_W: Final = 2
PTE_U: Final = 4
PTE_A: Final = 0x20
PTE_D: Final = 0x40
PTE_ADDR: Final = 0x000F_FFFF_FFFF_F000
# nested entries (EPT-like): present, writable, accessed, dirty; address = host frame << 12, or nested table index << 12 above the leaf
NPT_P: Final = 1
NPT_W: Final = 2
NPT_A: Final = 0x100
NPT_D: Final = 0x200
NPT_ADDR: Final = 0x000F_FFFF_FFFF_F000

TLB_ENTRIES: Final = 2048


def daemons_base(vms: int) -> int:
    """Word index of the word of daemon 0 in the control segment."""
    return (1 + vms) * WORDS_PER_PAGE


def control_words(vms: int, daemons: int) -> int:
    """Size of the control segment in words."""
    return daemons_base(vms) + daemons


def task_base(tasks: int, vcpus: int) -> int:
    """Word index of task record 0 in the kernel segment; records are TASK_WORDS apart."""
    nodes = tasks + vcpus * DUMMIES_PER_VCPU
    return K_NODES + nodes * NODE_WORDS


def owners_base(tasks: int, vcpus: int) -> int:
    """Word index of the owner of gfn 0."""
    return task_base(tasks, vcpus) + tasks * TASK_WORDS


def kernel_words(tasks: int, vcpus: int, memory_pages: int) -> int:
    """Size of a guest kernel segment in words."""
    return owners_base(tasks, vcpus) + memory_pages


def npt_tables(memory_pages: int) -> int:
    """Nested tables a VM of that size can ever need (root, level 3, level 2, leaves)."""
    leaves = -(-memory_pages // 512)
    level2 = -(-leaves // 512)
    level3 = -(-level2 // 512)
    return 1 + level3 + level2 + leaves
