"""Events: the 64-byte record, the kinds, and what each kind's fields hold.

Kinds carry the names of KVM's tracepoints where KVM has one, with KVM's fields; the others are ours.

Invariants: numbers of kinds are never reused, a kind's fields never change their meaning; FIELDS names every
kind. Values are what the event's process saw; nothing here checks them.

Not handled here: files and order (proto/trace.py), rules (report/).
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Final

import numpy as np
import numpy.typing as npt

EVENT: Final = np.dtype(
    [
        ("lamport", "<u8"),
        ("t_ns", "<u8"),
        ("seq", "<u4"),
        ("kind", "<u2"),
        ("proc", "<u2"),
        ("vcpu", "<u2"),
        ("vm", "<u2"),
        ("token", "<u4"),
        ("a", "<u8"),
        ("b", "<u8"),
        ("cause", "<u8"),
        ("c", "<u8"),
    ]
)
"""One event. t_ns: CLOCK_MONOTONIC; seq: number within the file; vcpu: vcpu_id within vm; cause: `event_id`
of the causing event or a request id, 0 unknown; a, b, c: see FIELDS.
"""

Events = npt.NDArray[np.void]
"""1-D array of dtype EVENT."""


@unique
class Kind(IntEnum):
    """What happened. Numbers are part of the file format: add, never reuse.

    1..31 KVM's tracepoints (fields as in KVM), 32..63 other host events, 64..95 guest, 96..127 memory and
    swap, 128.. the run.
    """

    TRY_ASYNC_GET_PAGE = 1
    ASYNC_PF_NOT_PRESENT = 2
    ASYNC_PF_READY = 3
    ASYNC_PF_COMPLETED = 4
    ASYNC_PF_REPEATED_FAULT = 5
    INJ_EXCEPTION = 6
    MSR_WR = 7
    APIC_ACCEPT_IRQ = 8
    MSR_RD = 9
    SEND_ASYNC_PF = 10
    """v3's one tracepoint for both kinds."""
    EXIT = 11
    ENTRY = 12

    CANCEL = 32
    SETUP_FAIL = 33
    INJ = 34
    SLOT_WRITE = 35
    SLOT_READ0 = 36
    ACK = 37
    KICK = 38
    REQ = 39
    HALT_ON = 40
    HALT_OFF = 41
    PREFAULT = 42
    SYNC_FAULT = 43
    """The vCPU waits in the host for the page."""
    SYNC_DONE = 44
    ALLOC_TOKEN = 45
    MEMSLOTS = 46
    """A layout of the memslots was published (twice per change, spec §1.7)."""
    RESET = 47
    """The vCPU was reset (spec §1.16)."""
    CR0_PG = 48
    """The guest wrote CR0."""
    AREA_CACHE = 49
    """Before a write of the shared area: what its translation is worth. dirty: the page is marked so."""
    OOM_NOTICE = 50
    """The next entry tells the guest that memory is short; number 0: its vCPUs have to look who was chosen."""
    OOM_ANSWER = 51
    """The guest's answer. flags: OOM_* of proto/wire.py."""
    STATE_SAVE = 56
    """A vCPU's state is saved: what is read of it. mp_state as KVM_GET_MP_STATE gives it; halted: in the synthetic halt."""
    STATE_RESTORE = 57
    HASH_SET = 60
    """An entry of the gfn hash stands here now, new or moved."""
    HASH_DROP = 61
    """An entry of the gfn hash was taken out; gfn all ones: the hash was emptied."""
    MMU = 62
    """Before a prefault: the MMU context in which it happens."""

    G_NP = 64
    G_WAIT = 65
    G_SLEEP = 66
    G_WAKE = 67
    G_RESUME = 68
    G_IRQ = 69
    G_CLEAR = 70
    """The guest clears a word of its shared area."""
    TASK_DONE = 71
    TASK_KILLED = 72
    GUEST_FAULT = 73
    SWITCH = 74
    IPI = 75
    G_HLT = 76
    G_MACHINE_CHECK = 77
    CPU_OFFLINE = 78
    """Async PF is disabled on this CPU, its sleepers are awake, its tasks are elsewhere."""
    CPU_ONLINE = 79
    """A CPU that came back, or that another one started, has booted."""
    G_REBOOT = 80
    """Async PF is disabled on every CPU; the machine is reset next. Nobody is woken."""
    TASK_MOVED = 81
    G_TABLE = 90
    """The sleeper table is worked on: 0 wait, 1 wake, 2 wake-all; interrupts: the interrupt flag."""
    G_OOM_VICTIM = 92
    """The guest chose a task, and with it all that share its address space. pages: what that has."""
    G_OOM_RELEASE = 93
    """The pages of an address space that nobody executes in are given back. root: gfn of its root table."""

    SWAP_IN = 96
    SWAP_IN_DONE = 97
    SWAP_OUT = 98
    SWAP_OUT_DONE = 99
    UNMAP = 100
    FREE_FRAME = 101
    MAP = 102
    FLUSH = 103
    FLUSH_DONE = 104
    ZERO_FILL = 105
    CLEAN_DROP = 106
    WRITEBACK_CANCEL = 107
    IO_ERROR = 108
    COPY_BAD = 112
    """A copy of a page on swap proved bad; its block is not used again."""
    DAEMON_GONE = 113
    """A daemon never comes back; slots_lost had their only copy there."""

    DAEMON_UP = 128
    DAEMON_DOWN = 129
    FENCED = 130
    BARRIER = 131
    STOP = 132
    PROCESS_START = 133
    PROCESS_END = 134
    BAD_MESSAGE = 135
    """The host dropped a message. role: `proto.wire.Role` of the peer, 0 a stranger; code: `proto.wire.Nack`; token: `proto.wire.Kind`
    of the message, 0 unknown."""
    NACKED = 136
    """A peer dropped a message of the host's, or had to wait: as BAD_MESSAGE, with what the peer said of it."""
    FAULT = 150
    """A fault of the schedule happens. fault: its number; kind, target: `proto.faults.KINDS`, `target_code`; token: for which time;
    cause: the request that it happens to, 0 none."""
    HELD = 156
    """A vCPU that the host held for a page goes on; for how long it was held."""


FIELDS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.TRY_ASYNC_GET_PAGE: ("gva", "gfn"),
    Kind.ASYNC_PF_NOT_PRESENT: ("gva", "cr3", "direct_map"),
    Kind.ASYNC_PF_READY: ("gva", "queued"),
    Kind.ASYNC_PF_COMPLETED: ("address", "gva"),
    Kind.ASYNC_PF_REPEATED_FAULT: ("gva", "gfn"),
    Kind.INJ_EXCEPTION: ("vector", "error_code", "cr2"),
    Kind.MSR_WR: ("index", "value", "failed"),
    Kind.APIC_ACCEPT_IRQ: ("vector",),
    Kind.MSR_RD: ("index", "value", "failed"),
    Kind.SEND_ASYNC_PF: ("gva", "not_present"),
    Kind.EXIT: ("reason", "gpa", "gva"),
    Kind.ENTRY: ("injected", "flush_gen"),
    Kind.CANCEL: ("why", "gfn"),
    Kind.SETUP_FAIL: ("why", "gfn", "queued"),
    Kind.INJ: ("kind", "vector_or_cr2", "state"),
    Kind.SLOT_WRITE: ("offset", "value", "old"),
    Kind.SLOT_READ0: ("offset",),
    Kind.ACK: ("value",),
    Kind.KICK: ("why",),
    Kind.REQ: ("bit",),
    Kind.HALT_ON: ("why", "gfn"),
    Kind.HALT_OFF: ("why", "gfn"),
    Kind.PREFAULT: ("gva", "gfn", "result"),
    Kind.SYNC_FAULT: ("why", "gfn"),
    Kind.SYNC_DONE: ("result", "gfn"),
    Kind.ALLOC_TOKEN: ("gva", "gfn"),
    Kind.MEMSLOTS: ("generation", "pages_removed", "pages_added"),
    Kind.RESET: (),
    Kind.CR0_PG: ("new", "old"),
    Kind.AREA_CACHE: ("cached_generation", "current_generation", "dirty"),
    Kind.OOM_NOTICE: ("number",),
    Kind.OOM_ANSWER: ("number", "pages", "flags"),
    Kind.STATE_SAVE: ("mp_state", "halted", "msr_en"),
    Kind.STATE_RESTORE: ("mp_state", "halted", "msr_en"),
    Kind.HASH_SET: ("gfn", "home", "slot"),
    Kind.HASH_DROP: ("gfn", "slot"),
    Kind.MMU: ("cr3", "direct_map"),
    Kind.G_NP: ("task", "cr2", "cpl"),
    Kind.G_WAIT: ("task", "node", "variant"),
    Kind.G_SLEEP: ("task", "node"),
    Kind.G_WAKE: ("task", "node", "variant"),
    Kind.G_RESUME: ("task",),
    Kind.G_IRQ: ("vector",),
    Kind.G_CLEAR: ("offset", "old"),
    Kind.TASK_DONE: ("task", "ops"),
    Kind.TASK_KILLED: ("task", "reason", "gva"),
    Kind.GUEST_FAULT: ("task", "gva", "flags"),
    Kind.SWITCH: ("task_from", "task_to", "interrupts"),
    Kind.IPI: ("to_vcpu", "vector", "value"),
    Kind.G_HLT: (),
    Kind.G_MACHINE_CHECK: ("task", "gva"),
    Kind.CPU_OFFLINE: ("tasks_moved",),
    Kind.CPU_ONLINE: (),
    Kind.G_REBOOT: ("boots",),
    Kind.TASK_MOVED: ("task", "to_vcpu"),
    Kind.G_TABLE: ("operation", "interrupts"),
    Kind.G_OOM_VICTIM: ("task", "number", "pages"),
    Kind.G_OOM_RELEASE: ("root", "pages"),
    Kind.SWAP_IN: ("hvp", "slot", "frame"),
    Kind.SWAP_IN_DONE: ("hvp", "slot", "frame"),
    Kind.SWAP_OUT: ("hvp", "slot", "frame"),
    Kind.SWAP_OUT_DONE: ("hvp", "slot", "frame"),
    Kind.UNMAP: ("gfn", "frame", "flush_gen"),
    Kind.FREE_FRAME: ("frame",),
    Kind.MAP: ("gfn", "frame", "writable"),
    Kind.FLUSH: ("flush_gen", "pages"),
    Kind.FLUSH_DONE: ("flush_gen",),
    Kind.ZERO_FILL: ("hvp", "frame"),
    Kind.CLEAN_DROP: ("hvp", "slot", "frame"),
    Kind.WRITEBACK_CANCEL: ("hvp", "slot", "frame"),
    Kind.IO_ERROR: ("slot", "status", "attempt"),
    Kind.COPY_BAD: ("hvp", "copy"),
    Kind.DAEMON_GONE: ("daemon", "epoch", "slots_lost"),
    Kind.DAEMON_UP: ("daemon", "epoch"),
    Kind.DAEMON_DOWN: ("daemon", "epoch"),
    Kind.FENCED: ("daemon", "epoch"),
    Kind.BARRIER: (),
    Kind.STOP: ("why",),
    Kind.PROCESS_START: ("pid",),
    Kind.PROCESS_END: ("code",),
    Kind.BAD_MESSAGE: ("role", "number", "code"),
    Kind.NACKED: ("role", "number", "code"),
    Kind.FAULT: ("fault", "kind", "target"),
    Kind.HELD: ("held_ns",),
}
"""What a, b, c hold, in this order; fields that are not named are 0."""


def event_id(proc: int, seq: int) -> int:
    """Identity of an event for the `cause` field, never 0."""
    return (proc + 1) << 32 | seq
