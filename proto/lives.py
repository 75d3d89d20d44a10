"""The protocol as tables: the lives of a token, a vCPU, a host page, a guest task, a swap daemon.

The machines go along these arrows and along no others (proto/transitions.py). To add a state: a member with the next number, its meaning in
the table, its arrows; then ``python -m proto.protocol_page docs/protocol.md``, and a script in tests/test_tables.py that goes along each
new arrow (the test names those that nothing goes along).

Invariants: numbers of page and task states are those in shared memory and kernels (host/kernels.py HPT_*, proto/layout.py TS_*).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

from proto import layout
from proto.transitions import Arrow, State, Transitions


# ---- a token --------------------------------------------------------------------------------------------------------------
class TokenState(IntEnum):
    """One asynchronous fault, from its token to its end (spec §4.3)."""

    ALLOCATED = 0
    ANNOUNCED = 1
    STARTED = 2
    FETCHING = 3
    EARLY = 4
    DONE = 5
    READY = 6
    ENDED = 7
    CANCELLED = 8


TOKEN: Final = Transitions(
    "token",
    "A token",
    "One asynchronous fault as the host keeps it (spec §4.3). The guest has its own half: a sleeper's node, or the dummy of a wake"
    " that came first. A broadcast (wake-all) is a completion without a fault, so it begins as DONE.",
    "host/async_pf.py, host/x86.py",
    (
        State(TokenState.ALLOCATED, "it has its number"),
        State(TokenState.ANNOUNCED, "the guest was told, or the vCPU is about to be halted for it"),
        State(TokenState.STARTED, "the worker runs, the guest is not told yet"),
        State(TokenState.FETCHING, "the worker brings the page"),
        State(TokenState.EARLY, "the page came before the guest was told"),
        State(TokenState.DONE, "on the done list, in order"),
        State(TokenState.READY, "handed to the guest, if it wants to know"),
        State(TokenState.ENDED, "forgotten: the number may be used again after 2^20 others"),
        State(TokenState.CANCELLED, "forgotten without a word to the guest"),
    ),
    (TokenState.ALLOCATED, TokenState.DONE),
    (
        Arrow("setup_fail", TokenState.ALLOCATED, TokenState.ENDED, "too many outstanding: synchronous, the number is burnt", "limit"),
        Arrow("no_memory", TokenState.ALLOCATED, TokenState.ENDED, "no memory for the item: synchronous, the number is burnt"),
        Arrow("announce", TokenState.ALLOCATED, TokenState.ANNOUNCED, "word and #PF, or synthetic halt", "announce_before_fetch"),
        Arrow("fetch", TokenState.ANNOUNCED, TokenState.FETCHING, "the worker starts", "announce_before_fetch"),
        Arrow("fetch", TokenState.ALLOCATED, TokenState.STARTED, "the worker starts first", "not announce_before_fetch"),
        Arrow("announce", TokenState.STARTED, TokenState.FETCHING, "decided; injected at the next entry", "not announce_before_fetch"),
        Arrow("complete", TokenState.STARTED, TokenState.EARLY, "the worker was faster than the fault path", "not announce_before_fetch"),
        Arrow("announce", TokenState.EARLY, TokenState.DONE, "decided all the same", "not announce_before_fetch"),
        Arrow("complete", TokenState.FETCHING, TokenState.DONE, "the worker is done (done does not mean present)"),
        Arrow("ready", TokenState.DONE, TokenState.READY, "head of the done list, and the guest can take it"),
        Arrow("retire", TokenState.READY, TokenState.ENDED, "off the queue"),
        Arrow("elide", TokenState.DONE, TokenState.CANCELLED, "the page came before the event was injected: neither is sent", "elide"),
        Arrow("cancel", TokenState.FETCHING, TokenState.CANCELLED, "disable, reset, power-down; the read goes on"),
        Arrow("cancel", TokenState.DONE, TokenState.CANCELLED, "disable, reset, power-down"),
    ),
)  # fmt: skip


# ---- a vCPU ---------------------------------------------------------------------------------------------------------------
class Where(IntEnum):
    """Where the vCPU is, as the host knows it."""

    OUT = 0
    IN_GUEST = 1
    BLOCKED = 2
    OFF = 3
    PAUSED = 4


VCPU: Final = Transitions(
    "vcpu",
    "A vCPU, as the host sees it",
    "The host decides on a vCPU only while it is OUT: it acts on nothing but the exit record. Whether a vCPU that is OUT may be entered"
    " says the next table.",
    "host/vcpu.py",
    (
        State(Where.OUT, "outside guest mode, a path of the host is at work for it"),
        State(Where.IN_GUEST, "the entry record was sent; it executes until the exit record comes"),
        State(Where.BLOCKED, "halted, one way or the other, and nothing makes it runnable"),
        State(Where.OFF, "powered down"),
        State(Where.PAUSED, "at a save point, for good: its state may be read"),
    ),
    (Where.OUT,),
    (
        Arrow("boot", Where.OUT, Where.OUT, "its first exit record"),
        Arrow("exit", Where.IN_GUEST, Where.OUT, "an exit record: fault, kick, HLT, MSR, IPI, hypercall, end"),
        Arrow("enter", Where.OUT, Where.IN_GUEST, "no request left, not halted: exception and interrupts go with it"),
        Arrow("block", Where.OUT, Where.BLOCKED, "halted and not runnable (spec §1.15 rule 3)"),
        Arrow("wake", Where.BLOCKED, Where.OUT, "a completion, an interrupt, a poke (rule 4)"),
        Arrow("power_down", Where.OUT, Where.OFF, "its last exit record"),
        Arrow("pause", Where.OUT, Where.PAUSED, "a save is wanted, and the guest goes on by executing its instruction again"),
        Arrow("pause", Where.BLOCKED, Where.PAUSED, "the same, while nothing makes it runnable"),
    ),
)  # fmt: skip


class Halt(IntEnum):
    """Why a vCPU is not entered."""

    RUNS = 0
    HALTED = 1
    HLT = 2
    INIT = 3


HALT: Final = Transitions(
    "halt",
    "Why a vCPU is not entered",
    "The synthetic halt and the guest's own HLT are two states on purpose: only the second is part of mp_state, so a saved vCPU never shows"
    " the first (spec §1.15, I37). The fault path decides on the first, the HLT exit on the second; a vCPU is never in both, since every"
    " entry ends either.",
    "host/vcpu.py, host/exits.py",
    (
        State(Halt.RUNS, "it may be entered"),
        State(Halt.HALTED, "synthetic halt: the guest does not know"),
        State(Halt.HLT, "the guest executed HLT (mp_state HALTED)"),
        State(Halt.INIT, "it was reset and waits for its start-up (mp_state INIT_RECEIVED)"),
    ),
    (Halt.RUNS,),
    (
        Arrow("apf_halt", Halt.RUNS, Halt.HALTED, "the halt request of a fault is consumed (rule 2)"),
        Arrow("hlt", Halt.RUNS, Halt.HLT, "HLT exit; or restored like that"),
        Arrow("go_on", Halt.HALTED, Halt.RUNS, "it leaves the block (rule 5), or a completion was handed over (rule 7)"),
        Arrow("go_on", Halt.HLT, Halt.RUNS, "the same: a spurious wake-up is legal"),
        Arrow("reset", Halt.RUNS, Halt.INIT, "INIT, or a reset of the machine, taken outside guest mode (spec §1.16)"),
        Arrow("reset", Halt.HLT, Halt.INIT, "the same; one that is blocked goes on first"),
        Arrow("reset", Halt.INIT, Halt.INIT, "once more before it was started"),
        Arrow("startup", Halt.INIT, Halt.RUNS, "a start-up interrupt, or the first vCPU of a machine that was reset"),
    ),
)  # fmt: skip


# ---- a host page ----------------------------------------------------------------------------------------------------------
class PageState(IntEnum):
    """A host virtual page: the truth behind every nested entry."""

    NONE = 0
    ZERO = 1
    RESIDENT = 2
    SLOT = 3
    READING = 4
    EVICT = 5
    WRITING = 6
    BAD = 7


PAGE: Final = Transitions(
    "page",
    "A host page",
    "The host page table; nested tables only cache it. A page leaves memory in this order: the nested entry is cleared, every vCPU"
    " acknowledges the flush or is outside guest mode, the contents are summed, the write is acknowledged; only then is the frame free."
    " Until then a fault takes the page back.",
    "host/vm.py, host/page_in.py, host/reclaim.py, host/page_out.py, host/kernels.py",
    (
        State(PageState.NONE, "never touched, or its zero-filled page was dropped untouched"),
        State(PageState.ZERO, "known to be all zeros; no slot, no frame"),
        State(PageState.RESIDENT, "in a frame"),
        State(PageState.SLOT, "on a swap slot only"),
        State(PageState.READING, "swap-in under way, or waiting for a landing frame"),
        State(PageState.EVICT, "unmapped, waiting for the flush acknowledgements; still in its frame"),
        State(PageState.WRITING, "write-back under way; still in its frame"),
        State(PageState.BAD, "unreadable: whoever touches it gets a machine check"),
    ),
    (PageState.NONE,),
    (
        Arrow("zero_fill", PageState.NONE, PageState.RESIDENT, "first touch, of the page or of its block"),
        Arrow("zero_fill", PageState.ZERO, PageState.RESIDENT, "touched again"),
        Arrow("load", PageState.NONE, PageState.RESIDENT, "from an image, into a fresh host; dirty"),
        Arrow("load_zero", PageState.NONE, PageState.ZERO, "the same, a page of zeros"),
        Arrow("load_bad", PageState.NONE, PageState.BAD, "the same, a page that was lost before the save"),
        Arrow("want", PageState.SLOT, PageState.READING, "somebody waits for it: one read for all"),
        Arrow("arrive", PageState.READING, PageState.RESIDENT, "the bytes came and their sum is right"),
        Arrow("poison", PageState.READING, PageState.BAD, "three reads failed"),
        Arrow("unmap", PageState.RESIDENT, PageState.EVICT, "the clock's hand: not accessed since it last passed"),
        Arrow("take_back", PageState.EVICT, PageState.RESIDENT, "touched before the grace ended"),
        Arrow("take_back", PageState.WRITING, PageState.RESIDENT, "touched before the write was acknowledged; read-only until then"),
        Arrow("drop_clean", PageState.EVICT, PageState.SLOT, "its slot still holds the same bytes"),
        Arrow("drop_untouched", PageState.EVICT, PageState.NONE, "zero-filled and never written"),
        Arrow("drop_zero", PageState.EVICT, PageState.ZERO, "all zeros by now"),
        Arrow("write", PageState.EVICT, PageState.WRITING, "nobody translates to it any more: summed, then written"),
        Arrow("keep", PageState.EVICT, PageState.RESIDENT, "it would have to be written, and no daemon takes writes: it stays, dirty"),
        Arrow("written", PageState.WRITING, PageState.SLOT, "the write was acknowledged"),
        Arrow("keep", PageState.WRITING, PageState.RESIDENT, "the write failed or swap is full: it stays, dirty"),
        Arrow("give_back", PageState.ZERO, PageState.NONE, "the guest does not need it any more"),
        Arrow("give_back", PageState.RESIDENT, PageState.NONE, "the same; its frame is free after the flush acknowledgements"),
        Arrow("give_back", PageState.SLOT, PageState.NONE, "the same"),
        Arrow("give_back", PageState.READING, PageState.NONE, "the same; frame and slot are free when the read is answered"),
        Arrow("give_back", PageState.EVICT, PageState.NONE, "the same; frame as for RESIDENT"),
        Arrow("give_back", PageState.WRITING, PageState.NONE, "the same; frame and slot are free when the write is answered"),
        Arrow("give_back", PageState.BAD, PageState.NONE, "the same; its slot is not used again"),
    ),
)  # fmt: skip


# ---- a guest task ---------------------------------------------------------------------------------------------------------
class TaskState(IntEnum):
    """A task of the guest kernel: word T_STATE of its record."""

    UNUSED = layout.TS_UNUSED
    RUNNABLE = layout.TS_RUNNABLE
    RUNNING = layout.TS_RUNNING
    SLEEPING = layout.TS_SLEEPING
    HALTING = layout.TS_HALTING
    BARRIER = layout.TS_BARRIER
    DONE = layout.TS_DONE
    KILLED = layout.TS_KILLED


TASK: Final = Transitions(
    "task",
    "A guest task",
    "The word is in memory that all CPUs of the guest share. Its own CPU changes it, except that a waker on any CPU makes a sleeper"
    " runnable; so falling asleep, staying awake and waking are compare-and-exchange.",
    "guest/task_records.py, guest/execution.py, guest/switching.py, guest/phases.py, guest/apf.py, guest/sched.py, guest/boot.py",
    (
        State(TaskState.UNUSED, "a record without a task"),
        State(TaskState.RUNNABLE, "in its CPU's queue"),
        State(TaskState.RUNNING, "the current task of its CPU"),
        State(TaskState.SLEEPING, "waits for its token; another task runs"),
        State(TaskState.HALTING, "waits for its token where it may not schedule: its CPU halts with it"),
        State(TaskState.BARRIER, "at the start barrier"),
        State(TaskState.DONE, "finished"),
        State(TaskState.KILLED, "killed: bad access, out of memory, machine check, swap full"),
    ),
    (TaskState.UNUSED,),
    (
        Arrow("create", TaskState.UNUSED, TaskState.RUNNABLE, "before the run"),
        Arrow("pick", TaskState.RUNNABLE, TaskState.RUNNING, "least virtual runtime of its CPU"),
        Arrow("preempt", TaskState.RUNNING, TaskState.RUNNABLE, "tick or wake-up, where it may be preempted"),
        Arrow("sleep", TaskState.RUNNING, TaskState.SLEEPING, "page not present; set before its node is looked at again"),
        Arrow("stay", TaskState.SLEEPING, TaskState.RUNNING, "the wake came in between: it goes on at once"),
        Arrow("wake", TaskState.SLEEPING, TaskState.RUNNABLE, "page ready, or wake-all"),
        Arrow("halt", TaskState.RUNNING, TaskState.HALTING, "page not present where it may not sleep (spec §2.6)"),
        Arrow("halt", TaskState.HALTING, TaskState.HALTING, "a restored CPU takes its halt loop up again"),
        Arrow("go_on", TaskState.HALTING, TaskState.RUNNING, "its node was unlinked"),
        Arrow("arrive", TaskState.RUNNING, TaskState.BARRIER, "the barrier is closed"),
        Arrow("release", TaskState.BARRIER, TaskState.RUNNABLE, "the barrier opens"),
        Arrow("finish", TaskState.RUNNING, TaskState.DONE, "its program is over"),
        Arrow("kill", TaskState.RUNNING, TaskState.KILLED, "see KILL_*"),
    ),
)  # fmt: skip


# ---- a swap daemon --------------------------------------------------------------------------------------------------------
class DaemonState(IntEnum):
    """A swap daemon as the host sees it."""

    FENCED = 0
    UP = 1
    LOST = 2
    GONE = 3


DAEMON: Final = Transitions(
    "daemon",
    "A swap daemon, as the host sees it",
    "Killing a daemon is not a fence: what it asked of the disk may still land in a frame. So from LOST to FENCED its unanswered"
    " requests keep their frames and slots, and nothing is sent in their place. Each incarnation has an epoch, one more than the last;"
    " replies of another epoch are dropped. One that is GONE has no further incarnation: its pages go on from their other copies,"
    " and a page that has none ends the run.",
    "host/swap.py",
    (
        State(DaemonState.FENCED, "no incarnation, and no I/O of an earlier one can land any more"),
        State(DaemonState.UP, "this epoch said HELLO: requests are sent"),
        State(DaemonState.LOST, "its process has ended; its I/O may still land"),
        State(DaemonState.GONE, "it never comes back: its restarts are used up, or it was silent for too long"),
    ),
    (DaemonState.FENCED,),
    (
        Arrow("hello", DaemonState.FENCED, DaemonState.UP, "the next epoch said HELLO; unanswered requests go to it"),
        Arrow("lose", DaemonState.UP, DaemonState.LOST, "its process ended"),
        Arrow("lose", DaemonState.FENCED, DaemonState.LOST, "it ended before it said HELLO"),
        Arrow("lose", DaemonState.LOST, DaemonState.LOST, "its successor ended as well, before the fence"),
        Arrow("fence", DaemonState.LOST, DaemonState.FENCED, "the launcher fenced it"),
        Arrow("give_up", DaemonState.FENCED, DaemonState.GONE, "nobody starts it again"),
    ),
)  # fmt: skip

TABLES: Final[tuple[Transitions[Any], ...]] = (TOKEN, VCPU, HALT, PAGE, TASK, DAEMON)
