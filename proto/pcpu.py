"""Physical CPUs of the emulated machine: run tokens, of which a vCPU needs one to be in guest mode.

Purpose: far more vCPU processes than cores must not be time-sliced by the operating system, or every flush
waits for all of them. At most `pcpus` vCPUs hold a token; a holder gives it up before it waits and at the end
of its slice, straight to the next vCPU that waits for one.

Segment ``pcpu`` (u64 words): `PC_*`, then one line per token {owner, since}, then one state word per vCPU.

Invariants
* The owner word of a token is the only truth about who holds it: free (0) or cpu + 1. It changes hands in one
  cmpxchg, so that a process killed at any point neither takes a token with it unseen nor doubles one.
* A vCPU that wants a token is WAITING. Whoever wants to give it one claims it first (cmpxchg WAITING ->
  claimed by me), so two givers never serve the same vCPU; a vCPU that takes a free token claims itself.
* No lost wake-up: a waiter publishes WAITING, then looks for free tokens; a giver that found nobody frees its
  token, then looks for waiters again. Both are sequentially consistent, so at least one sees the other. The
  eventfd only says "look again".
* Nobody starves: waiters are served in ring order, starting after the last one that was. vCPUs that were just
  woken may jump the queue, each once per slice, at most `HEAD_RUN_MAX` of them in a row while others wait.

Not handled here: which vCPU is runnable (it says so by waiting), preemption of a holder (it looks at
`waiting_others` itself), telling a dead process from a slow one (`release_for` is for processes that were
reaped).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from proto.atomics import add, cmpxchg, load, py_load, py_store, store, store_sc
from proto.jit import kernel
from proto.layout import LINE

PC_CURSOR: Final = 0
"""vCPU after the one that was served last in ring order."""
PC_HEAD_RUN: Final = LINE
"""Grants to queue jumpers since the last grant in ring order."""
PC_HANDOVERS: Final = 2 * LINE
"""Tokens handed from one vCPU straight to another."""
PC_TOKENS: Final = 8 * LINE
"""Token k: words PC_TOKENS + k * LINE + PT_*. There is room for one token per vCPU."""
PT_OWNER: Final = 0
PT_SINCE_NS: Final = 1
"""When the token was granted or its holder last looked at `waiting_others`, monotonic; 0 while free. Written
by the owner.
"""

IDLE: Final = 0
"""Running or blocked: does not want a token."""
WAITING: Final = 1
WAITING_HEAD: Final = 2
"""Waiting, and may jump the queue."""
DEAD: Final = 3
CLAIM: Final = 16
"""CLAIM + c: about to get a token from vCPU c."""

SLICE_NS: Final = 1_500_000
HEAD_RUN_MAX: Final = 8
"""Queue jumpers served in a row while others wait: bounds everybody's wait to 9 grants per vCPU."""
LOOK_AGAIN_MS: Final = 1000
"""A sleeping waiter looks again this often: the giver may have been killed between the hand-over and the
wake-up.
"""
CLAIM_WAIT_NS: Final = 1_000_000_000
"""How long a claimed vCPU waits for its token past its own time-out: the giver is between two instructions,
or dead.
"""
CLAIM_NAP_S: Final = 0.001
NOBODY: Final = -1

U64Array = npt.NDArray[np.uint64]


def pcpu_words(vcpus: int) -> int:
    """Size of the pcpu segment in words."""
    return PC_TOKENS + vcpus * LINE + vcpus


def make_eventfds(vcpus: int) -> list[int]:
    """One eventfd per vCPU, for the process that forks them all; the caller closes them.

    Not EFD_SEMAPHORE: what counts is the owner word, so wake-ups may merge, and one read gets rid of all
    stale ones.
    """
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vcpus)]


@kernel
def _owner_word(token: int) -> int:
    return PC_TOKENS + token * LINE + PT_OWNER


@kernel
def _since_word(token: int) -> int:
    return PC_TOKENS + token * LINE + PT_SINCE_NS


@kernel
def _state_word(cpu: int, vcpus: int) -> int:
    return PC_TOKENS + vcpus * LINE + cpu


@kernel
def owned_token(seg: U64Array, cpu: int, pcpus: int) -> int:
    """Number of the token that ``cpu`` holds (cpu -1: of a free token), -1 if none."""
    for k in range(pcpus):
        if np.int64(load(seg, _owner_word(k))) == cpu + 1:
            return k
    return NOBODY


@kernel
def _claim_in_ring(seg: U64Array, cpu: int, states: int, vcpus: int, first: int, head_only: bool) -> int:
    """Claim the first waiter from ``first`` on for ``cpu``; returns it or -1."""
    for i in range(vcpus):
        w = (first + i) % vcpus
        state = np.int64(load(seg, states + w))
        if state == WAITING_HEAD or (state == WAITING and not head_only):
            if w == cpu:
                continue
            if np.int64(cmpxchg(seg, states + w, state, CLAIM + cpu)) == state:
                return w
    return NOBODY


@kernel
def _claim_next(seg: U64Array, cpu: int, vcpus: int) -> int:
    """Claim the waiter whose turn it is for ``cpu``; returns it or -1 when nobody waits."""
    states = _state_word(0, vcpus)
    cursor = int(np.int64(load(seg, PC_CURSOR)))
    if np.int64(load(seg, PC_HEAD_RUN)) < HEAD_RUN_MAX:
        w = _claim_in_ring(seg, cpu, states, vcpus, cursor % vcpus, True)
        if w >= 0:
            add(seg, PC_HEAD_RUN, 1)
            return w
    w = _claim_in_ring(seg, cpu, states, vcpus, cursor % vcpus, False)
    if w >= 0:
        # Only if nobody else moved it: a giver that slept since its load must not set the cursor back.
        cmpxchg(seg, PC_CURSOR, cursor, (w + 1) % vcpus)
        store(seg, PC_HEAD_RUN, 0)
    return w


@kernel
def _take_free(seg: U64Array, cpu: int, pcpus: int, now_ns: int) -> int:
    """Take a free token for ``cpu``; returns its number or -1."""
    for k in range(pcpus):
        if (
            np.int64(load(seg, _owner_word(k))) == 0
            and np.int64(cmpxchg(seg, _owner_word(k), 0, cpu + 1)) == 0
        ):
            store(seg, _since_word(k), now_ns)
            return k
    return NOBODY


@kernel
def want(seg: U64Array, cpu: int, vcpus: int, pcpus: int, head: bool, now_ns: int) -> int:
    """Start to wait for a token, or take a free one; returns its number, or -1: wait, then `look_again`."""
    # Sequentially consistent: the look at the tokens must not move before it (see the module's invariants).
    store_sc(seg, _state_word(cpu, vcpus), WAITING_HEAD if head else WAITING)
    return look_again(seg, cpu, vcpus, pcpus, now_ns)


@kernel
def look_again(seg: U64Array, cpu: int, vcpus: int, pcpus: int, now_ns: int) -> int:
    """For a waiting ``cpu``: the token it was given or a free one, which ends the wait; -1: none."""
    own = _state_word(cpu, vcpus)
    while True:
        k = owned_token(seg, cpu, pcpus)
        if k >= 0:
            store_sc(seg, own, IDLE)
            return k
        if owned_token(seg, NOBODY, pcpus) < 0:
            return NOBODY
        state = np.int64(load(seg, own))
        # Claimed by a giver: its token is on the way, a second one would be one too many.
        if state >= CLAIM or np.int64(cmpxchg(seg, own, state, CLAIM + cpu)) != state:
            return NOBODY
        if _take_free(seg, cpu, pcpus, now_ns) < 0:
            # Somebody was faster. While this vCPU was claimed by itself a giver may have passed it by:
            # publish, look again.
            store_sc(seg, own, state)


@kernel
def pass_on(seg: U64Array, cpu: int, vcpus: int, token: int, now_ns: int) -> int:
    """Give the token that ``cpu`` holds to the next waiter, or free it.

    Returns the vCPU to wake, -1 when nobody waited, -2 when ``cpu`` does not hold the token.
    """
    word = _owner_word(token)
    if np.int64(load(seg, word)) != cpu + 1:
        return -2
    while True:
        w = _claim_next(seg, cpu, vcpus)
        if w >= 0:
            store(seg, _since_word(token), now_ns)
            if np.int64(cmpxchg(seg, word, cpu + 1, w + 1)) == cpu + 1:
                add(seg, PC_HANDOVERS, 1)
                return w
            # The token was taken away: this process was given up for dead. Undo the claim.
            cmpxchg(seg, _state_word(w, vcpus), CLAIM + cpu, WAITING)
            return -2
        store(seg, _since_word(token), 0)
        if np.int64(cmpxchg(seg, word, cpu + 1, 0)) != cpu + 1:
            return -2
        # A waiter that published itself after the scan may have seen no free token: look again (seq_cst on
        # both sides).
        if not others_wait(seg, cpu, vcpus):
            return NOBODY
        if np.int64(cmpxchg(seg, word, 0, cpu + 1)) != 0:
            # Somebody took it and is now responsible for handing it on.
            return NOBODY


@kernel
def others_wait(seg: U64Array, cpu: int, vcpus: int) -> bool:
    """Whether a vCPU other than ``cpu`` waits for a token."""
    states = _state_word(0, vcpus)
    for w in range(vcpus):
        if w != cpu:
            state = np.int64(load(seg, states + w))
            if state in (WAITING, WAITING_HEAD):
                return True
    return False


@kernel
def leave(seg: U64Array, cpu: int, vcpus: int) -> bool:
    """Stop waiting; False when a giver has claimed this vCPU, so that a token is on its way."""
    own = _state_word(cpu, vcpus)
    state = np.int64(load(seg, own))
    return bool(state < CLAIM and np.int64(cmpxchg(seg, own, state, IDLE)) == state)


@kernel
def mark_dead(seg: U64Array, cpu: int, vcpus: int) -> bool:
    """Let nobody claim ``cpu`` any more; False when somebody else has."""
    own = _state_word(cpu, vcpus)
    state = np.int64(load(seg, own))
    if state >= CLAIM and state != CLAIM + cpu:
        return False
    return bool(np.int64(cmpxchg(seg, own, state, DEAD)) == state)


@kernel
def drop_claims(seg: U64Array, dead: int, vcpus: int, pcpus: int) -> None:
    """Make the vCPU that the dead process had claimed but not served wait again; it is to be woken."""
    states = _state_word(0, vcpus)
    for w in range(vcpus):
        if w != dead and np.int64(load(seg, states + w)) == CLAIM + dead and owned_token(seg, w, pcpus) < 0:
            cmpxchg(seg, states + w, CLAIM + dead, WAITING)


def warm_up() -> None:
    """Compile or load every kernel of this module with the types that `Pcpu` calls them with, before forking."""
    seg = np.zeros(pcpu_words(2), np.uint64)
    eventfds = make_eventfds(2)
    try:
        first, second = Pcpu(seg, 0, eventfds, 1), Pcpu(seg, 1, eventfds, 1)
        first.acquire()
        with suppress(TimeoutError):
            second.acquire(timeout_ns=0)
        first.waiting_others()
        first.release()
        second.release_for(1)
    finally:
        for fd in eventfds:
            os.close(fd)


class Pcpu:
    """One process's end of the run tokens.

    vCPU processes pass their global number ``cpu``; an observer (host, zygote) passes -1 and uses
    `release_for` and `stalled`. All processes pass the same ``eventfds`` (one per vCPU, in order) and
    ``pcpus``.
    """

    __slots__ = (
        "_eventfds",
        "_head_since_ns",
        "_poll",
        "_seg",
        "_token",
        "cpu",
        "pcpus",
        "slice_ns",
        "vcpus",
    )

    def __init__(
        self, seg_u64: U64Array, cpu: int, eventfds: Sequence[int], pcpus: int, slice_ns: int = SLICE_NS
    ) -> None:
        """Nothing is written to the segment: zeros are a valid start, all tokens free."""
        self.vcpus = len(eventfds)
        if pcpus < 1 or not NOBODY <= cpu < self.vcpus or len(seg_u64) < pcpu_words(self.vcpus):
            raise ValueError(
                f"vCPU {cpu} of {self.vcpus}, {pcpus} run tokens, segment of {len(seg_u64)} words"
            )
        self.pcpus = min(pcpus, self.vcpus)
        self.cpu = cpu
        self.slice_ns = slice_ns
        self._seg = seg_u64
        self._eventfds = eventfds
        self._token = NOBODY
        self._head_since_ns = -slice_ns
        self._poll = select.poll()
        if cpu >= 0:
            self._poll.register(eventfds[cpu], select.POLLIN)

    @property
    def held(self) -> bool:
        """Whether this vCPU holds a token."""
        return self._token >= 0

    @property
    def holder_since_ns(self) -> int:
        """Monotonic ns of the last grant or look at `waiting_others`; 0 while no token is held."""
        return int(py_load(self._seg, _since_word(self._token))) if self.held else 0

    @property
    def handovers(self) -> int:
        """Tokens handed from one vCPU straight to another so far, all vCPUs."""
        return int(py_load(self._seg, PC_HANDOVERS))

    def acquire(self, head: bool = False, timeout_ns: int = 10_000_000_000) -> int:
        """Block until a token is held; returns the ns waited (steal).

        ``head``: just woken, go before those whose slice ended; counts once per slice. TimeoutError after
        ``timeout_ns``, no token is held then.
        """
        assert self.cpu >= 0, "an observer holds no token"
        assert not self.held, f"vCPU {self.cpu} holds a token already"
        start_ns = time.monotonic_ns()
        head = head and start_ns - self._head_since_ns >= self.slice_ns
        self._token = want(self._seg, self.cpu, self.vcpus, self.pcpus, head, start_ns)
        if self._token >= 0:
            return time.monotonic_ns() - start_ns
        if head:
            self._head_since_ns = start_ns
        self._wait_until(start_ns + timeout_ns)
        if self._token < 0 and not leave(self._seg, self.cpu, self.vcpus):
            self._wait_until(start_ns + timeout_ns + CLAIM_WAIT_NS)
        if self._token < 0:
            raise TimeoutError(
                f"vCPU {self.cpu}: no run token within {timeout_ns} ns; holders: {self.holders()}"
            )
        return time.monotonic_ns() - start_ns

    def release(self) -> int:
        """Give the token up, straight to the next vCPU that waits; returns that vCPU or -1."""
        token, self._token = self._token, NOBODY
        assert token >= 0, f"vCPU {self.cpu} holds no token"
        woken = pass_on(self._seg, self.cpu, self.vcpus, token, time.monotonic_ns())
        if woken < NOBODY:
            raise RuntimeError(
                f"vCPU {self.cpu}: its run token was taken away, it had been given up for dead"
            )
        self._wake(woken)
        return woken

    def waiting_others(self) -> bool:
        """At slice end: whether somebody waits, so that the token should be released. Counts as a sign of
        life of the holder.
        """
        if self.held:
            py_store(self._seg, _since_word(self._token), time.monotonic_ns())
        return others_wait(self._seg, self.cpu, self.vcpus)

    def holders(self) -> list[int]:
        """Those vCPUs that hold a token, in token order."""
        owners = [int(py_load(self._seg, _owner_word(k))) for k in range(self.pcpus)]
        return [owner - 1 for owner in owners if owner]

    def stalled(self, now_ns: int, bound_ns: int) -> list[int]:
        """Those vCPUs that have held a token for longer than ``bound_ns`` without a sign of life (stopped, or
        stuck).
        """
        late = []
        for k in range(self.pcpus):
            owner = int(py_load(self._seg, _owner_word(k)))
            since_ns = int(py_load(self._seg, _since_word(k)))
            # A free token has no holder; one that changed hands between the two looks has a fresh time.
            if owner and since_ns and now_ns - since_ns > bound_ns:
                late.append(owner - 1)
        return late

    def release_for(self, cpu: int) -> int:
        """Return the token of a vCPU whose process is dead (reaped) and let nobody give it another; returns
        how many it had.

        To be called by one process at a time, again for the same vCPU if `stalled` still names it: then a
        giver was stopped for a second between choosing the dead vCPU and handing over.
        """
        deadline_ns = time.monotonic_ns() + CLAIM_WAIT_NS
        while not mark_dead(self._seg, cpu, self.vcpus):
            # Claimed: the giver is about to hand over, then the token can be found, or it is dead too and
            # keeps its token.
            if owned_token(self._seg, cpu, self.pcpus) >= 0 or time.monotonic_ns() > deadline_ns:
                py_store(self._seg, _state_word(cpu, self.vcpus), DEAD)
                break
            time.sleep(CLAIM_NAP_S)
        drop_claims(self._seg, cpu, self.vcpus, self.pcpus)
        returned = 0
        while (token := owned_token(self._seg, cpu, self.pcpus)) >= 0:
            self._wake(pass_on(self._seg, cpu, self.vcpus, token, time.monotonic_ns()))
            returned += 1
        # It may have died before a wake-up, or after freeing its token and before its second look for waiters.
        for waiter in range(self.vcpus):
            if py_load(self._seg, _state_word(waiter, self.vcpus)) not in (IDLE, DEAD):
                self._wake(waiter)
        return returned

    def _wait_until(self, deadline_ns: int) -> None:
        """Sleep on the own eventfd until a token is owned or the time has come."""
        while True:
            now_ns = time.monotonic_ns()
            self._token = look_again(self._seg, self.cpu, self.vcpus, self.pcpus, now_ns)
            left_ns = deadline_ns - now_ns
            if self._token >= 0 or left_ns <= 0:
                return
            if self._poll.poll(min(LOOK_AGAIN_MS, left_ns / 1e6)):
                with suppress(BlockingIOError):  # poll and read are two steps
                    os.eventfd_read(self._eventfds[self.cpu])

    def _wake(self, cpu: int) -> None:
        if cpu >= 0:
            os.eventfd_write(self._eventfds[cpu], 1)
