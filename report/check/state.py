"""What the checker remembers: one row per vCPU, one record per live token, in arrays that compiled code reads and writes.

Memory is bounded by what is live: a record goes away when neither host nor guest can still do anything legal with its token; of
closed tokens each vCPU keeps the last `RING`.

Invariants: `rows_of[vm, vcpu]` is the row or -1; records 0..V_RECORDS-1 of a row are in use, in no order; a row always has room for
one more record and the table for one more row when an event is handled (`Tables` are grown between two events, never inside).

Not handled here: what the fields mean for a rule (host_side.py, ready_side.py, guest_side.py).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from report.check.profiles import CONFIG_WORDS

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

INVARIANTS: Final = 50
# Typed numbers: a plain literal in a call would have the callee compiled again for each.
i64: Final[Any] = np.int64
NR: Final[Any] = np.arange(INVARIANTS + 1, dtype=np.int64)
"""Numbers of the invariants: NR[33] is I33."""
NONE: Final[Any] = np.int64(0)
"""No earlier event, no token."""
AT_END: Final[Any] = np.int64(-1)
KEEP: Final = 5
"""Broken events kept for each invariant."""
RING: Final = 64
"""Closed tokens remembered per vCPU: as many as can be outstanding."""
HASH_SLOTS: Final = 64
"""Of the gfn hash (spec §0.6)."""
VCPUS_MAX: Final = 4096
"""A token has 12 bits for the vCPU's id (spec §0.5)."""
UNKNOWN: Final = -1
UNSEEN: Final = -2
"""Of V_RD_TOKEN: events that begin in the middle of a run do not show it."""

# -- a vCPU: host's side -------------------------------------------------------------------------------------------------
V_VM: Final = 0
V_VCPU: Final = 1
V_RECORDS: Final = 2
"""Records in use."""
V_LIVE: Final = 3
"""Tokens announced and neither ready nor cancelled."""
V_EN: Final = 4
"""PV async PF is enabled: 1, 0, UNKNOWN."""
V_EPOCH: Final = 5
"""Changes when async PF is enabled from disabled."""
V_SEND_ALWAYS: Final = 6
"""1, 0, UNKNOWN."""
V_LAPIC: Final = 7
"""Software-enabled: 1, 0, UNKNOWN."""
V_VECTOR: Final = 8
"""Of the ready interrupt; UNKNOWN before INT was written."""
V_LAST_ID: Final = 9
V_TRY_GFN: Final = 10
"""gfn of a TRY that has not been decided; UNKNOWN otherwise."""
V_REPEATED: Final = 11
"""A repeated fault has not requested its halt yet."""
V_HALT_REQ: Final = 12
V_HALTED: Final = 13
V_INJ_KIND: Final = 14
"""Injected and not dispatched: 0 nothing, 1 not present, 2 ready, UNKNOWN."""
V_INJ_TOKEN: Final = 15
V_INJ_QUEUED: Final = 16
"""No guest event since the injection."""
V_WORD: Final = 17
"""Announcing word of the shared area as host and guest have written it."""
V_WRITTEN: Final = 18
"""Value of the last SLOT_WRITE of that word, 0 once it was used by an injection."""
V_TOKEN_WORD: Final = 19
"""1: the token word was written and not cleared."""
V_ACCEPT: Final = 20
"""A token was written and its interrupt has not been accepted yet."""
V_WAKEALL: Final = 21
"""A wake-all may be on the done list."""
V_PREFAULT: Final = 22
"""A prefault has been done and its ready event has not come."""
V_DONE_SEQ: Final = 23
V_DESTROYED: Final = 24
V_SPIN: Final = 25
"""Halts and wake-ups since something happened."""
V_RING_AT: Final = 26
V_NP_GFN: Final = 27
V_NP_TIMES: Final = 28
"""The same page announced this many times in a row."""
V_NP_TOKEN: Final = 29
"""Recorded kernels: the last token announced, UNKNOWN once injected."""
# The ready event that was dequeued last; what is delivered must be it.
V_RD_TOKEN: Final = 30
V_RD_INJECTED: Final = 31
V_RD_EPOCH: Final = 32
V_RD_SINCE: Final = 33
# -- a vCPU: guest's side ------------------------------------------------------------------------------------------------
V_HALTING: Final = 34
"""Nested waits that halt."""
V_WAKING_ALL: Final = 35
"""Mode E: the broadcast is being handled."""
V_BROADCAST: Final = 36
"""Mode I: the token that was written is the broadcast."""
V_AREA: Final = 37
V_DONE_HALTED_NS: Final = 38
"""When a fetch ended while the vCPU was halted, 0: none since it was."""
V_INTERRUPT: Final = 39
"""`event_id` of the guest's last page-ready interrupt."""
V_HLT: Final = 40
"""The guest has executed HLT and nothing has happened since."""
V_MMU: Final = 41
V_CACHE: Final = 42
"""What was noted for the next prefault, and for the next write of the shared area (state_side.py); 0: never anything."""
V_RESTORED: Final = 43
"""The state that is being restored had async PF enabled, and EN has not been written yet."""
V_WORDS: Final = 44

# -- a token -------------------------------------------------------------------------------------------------------------
T_TOKEN: Final = 0
T_FLAGS: Final = 1
T_GFN: Final = 2
T_GVA: Final = 3
T_EPOCH: Final = 4
T_DONE_SEQ: Final = 5
"""Order in which the fetches ended."""
T_DONE_NS: Final = 6
T_NODE_CPU: Final = 7
T_TASK: Final = 8
T_SINCE: Final = 9
"""`event_id` of the event that made the record, then of the wait."""
T_CR3: Final = 10
T_DIRECT: Final = 11
"""MMU context of the fault."""
T_WORDS: Final = 12

F_NP: Final = 1
F_INJ: Final = 2
F_DONE: Final = 4
F_READY: Final = 8
F_DELIVERED: Final = 16
F_CANCEL: Final = 32
F_DESTROY: Final = 64
F_G_NP: Final = 128
F_SLEEPS: Final = 256
F_DUMMY: Final = 512
F_WOKEN: Final = 1024
F_HALTS: Final = 2048
"""The wait was one that halts."""
F_EARLY: Final = 4096
"""Its task ran before a wake was seen: legal only if the wake came from another CPU."""
F_CONSUMED: Final = 8192
"""The guest has taken the ready event."""
F_BROADCAST: Final = 16384
"""A broadcast has ended its wait: its own wake-up finds nobody, and leaves a dummy that nobody will ever take."""

GONE_READY: Final = 1
GONE_CANCELLED: Final = 2

G_ROWS: Final = 0
G_STOPPED: Final = 1
"""A STOP was seen: what was under way then is nobody's fault. 1: the time was up, 2: something else, then vCPUs may leave without
their last exit.
"""
G_FOUND: Final = 2
"""Rows of `found` in use."""
G_HASHED: Final = 3
"""The log holds changes of the gfn hash."""
G_WORDS: Final = 4

FOUND_INV: Final = 0
FOUND_AT: Final = 1
"""Index of the event in the window, -1: found at the end."""
FOUND_SINCE: Final = 2
"""`event_id` of an earlier event that belongs to it, 0: none."""
FOUND_TOKEN: Final = 3
FOUND_VM: Final = 4
FOUND_VCPU: Final = 5
FOUND_WORDS: Final = 6

FIRST_RECORDS: Final = 80
FIRST_ROWS: Final = 8


class Tables(NamedTuple):
    """All arrays. See the fields' names above; config: report/check/profiles.py."""

    v: I64
    """[rows, V_WORDS]"""
    t: I64
    """[rows, records, T_WORDS]"""
    ring: I64
    """[rows, RING, 3]: token, GONE_*, gfn"""
    hash: I64
    """[rows, HASH_SLOTS]: gfn, UNKNOWN: empty"""
    rows_of: I32
    """[vms, VCPUS_MAX]"""
    config: I64
    """[CONFIG_WORDS]"""
    g: I64
    """[G_WORDS]"""
    broken: I64
    """[INVARIANTS + 1]: how often, by number"""
    checks: I64
    """[INVARIANTS + 1]: how often each was put to the test"""
    found: I64
    """[INVARIANTS * KEEP, FOUND_WORDS]"""


def fresh_tables(config: I64, rows: int = FIRST_ROWS, records: int = FIRST_RECORDS) -> Tables:
    """Empty tables for a rule set, i64[CONFIG_WORDS]."""
    assert config.shape == (CONFIG_WORDS,)
    return Tables(
        np.zeros((rows, V_WORDS), np.int64),
        np.zeros((rows, records, T_WORDS), np.int64),
        np.full((rows, RING, 3), UNKNOWN, np.int64),
        np.full((rows, HASH_SLOTS), UNKNOWN, np.int64),
        np.full((1, VCPUS_MAX), UNKNOWN, np.int32),
        config,
        np.zeros(G_WORDS, np.int64),
        np.zeros(INVARIANTS + 1, np.int64),
        np.zeros(INVARIANTS + 1, np.int64),
        np.zeros((INVARIANTS * KEEP, FOUND_WORDS), np.int64),
    )


def with_vms(tables: Tables, vms: int) -> Tables:
    """Tables that know at least this many VMs."""
    missing = vms - len(tables.rows_of)
    if missing <= 0:
        return tables
    more = np.full((missing, VCPUS_MAX), UNKNOWN, np.int32)
    return tables._replace(rows_of=np.concatenate([tables.rows_of, more]))


def grown(tables: Tables) -> Tables:
    """Tables with room for another row and another record in every row."""
    rows, records = tables.t.shape[:2]
    if tables.g[G_ROWS] == rows:
        ring = np.full((rows, RING, 3), UNKNOWN, np.int64)
        tables = tables._replace(
            v=np.concatenate([tables.v, np.zeros_like(tables.v)]),
            t=np.concatenate([tables.t, np.zeros_like(tables.t)]),
            ring=np.concatenate([tables.ring, ring]),
            hash=np.concatenate([tables.hash, np.full((rows, HASH_SLOTS), UNKNOWN, np.int64)]),
        )
    if tables.v[:, V_RECORDS].max() >= records:
        tables = tables._replace(t=np.concatenate([tables.t, np.zeros_like(tables.t)], axis=1))
    return tables
