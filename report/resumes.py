"""When tasks that waited for a page went on after an outage of swap daemons, from the merged events of a run.

An outage is over when the host has connected the successors of all daemons that it had lost (DAEMON_UP), or goes on without those that
never come back (DAEMON_GONE), also of daemons elsewhere. Who waits at that moment:

* a task whose kernel was told "page not present" for a token and that has not gone on (G_NP to G_RESUME),
* a vCPU that the host halted for a page, and with it its task (HALT_ON to HALT_OFF; halted again for the same page, it never went on),
* a vCPU that the host holds for a page (HELD, which says afterwards how long).

The resume of the outage is the time from then, as the host saw it, until the last of them went on, as the guest saw it (for a held
vCPU: when the host let it go). It contains the re-sent reads, the mapping, the wake-up, the wait for a CPU, and what the vCPU's clock
is behind: it takes the wake-up when its own time has come. The part up to the last page (ASYNC_PF_COMPLETED, or the end of the hold or
halt) is told apart. Who waits for a page of another daemon, or for a frame that a write to the dead one was to free, counts, too. When
a daemon is lost again before all have gone on, the outage has no times.

Invariants: events come in merged order; memory grows with vCPUs, waiting tasks and outages (40 bytes each), never with events.

Not handled here: whether any of that was right (report/check/).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from proto.events import Events, Kind
from proto.jit import lean_kernel as kernel
from report.check.state import VCPUS_MAX, i64

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

K_G_NP: Final = int(Kind.G_NP)
K_COMPLETED: Final = int(Kind.ASYNC_PF_COMPLETED)
K_HALT_ON: Final = int(Kind.HALT_ON)
K_HALT_OFF: Final = int(Kind.HALT_OFF)
K_RESET: Final = int(Kind.RESET)
K_G_RESUME: Final = int(Kind.G_RESUME)
K_DAEMON_UP: Final = int(Kind.DAEMON_UP)
K_DAEMON_DOWN: Final = int(Kind.DAEMON_DOWN)
K_FENCED: Final = int(Kind.FENCED)
K_DAEMON_GONE: Final = int(Kind.DAEMON_GONE)
K_BARRIER: Final = int(Kind.BARRIER)
K_HELD: Final = int(Kind.HELD)
VCPU_BITS: Final = 0xFFF
"""Of a token: the vCPU it was made for."""
DAEMONS_MAX: Final = 1 << 12
"""Daemons with higher numbers are not looked at; no topology has them."""

G_ROWS: Final = 0
G_DOWN: Final = 1
"""Daemons that are away."""
G_OUTAGES: Final = 2
G_BARRIER: Final = 3
"""1: the measured time has begun."""
G_WORDS: Final = 4
W_TOKEN: Final = 0
W_OUTAGE: Final = 1
"""1 + number of the outage at whose end it waited; 0: none."""
W_WORDS: Final = 2
H_ON: Final = 0
H_GFN: Final = 1
H_OUTAGE: Final = 2
H_WORDS: Final = 3
O_UP: Final = 0
O_WAITED: Final = 1
O_WENT_ON: Final = 2
O_LAST: Final = 3
"""When the last one went on."""
O_THERE: Final = 4
"""When the last page was there."""
O_WORDS: Final = 5


class Resume(NamedTuple):
    """What followed an outage. waited: tasks that waited when it was over. pages_ms, resume_ms: until the last page was there, until the
    last task had gone on; 0 when nobody waited, None when not all went on before the next outage or the end of the events.
    """

    waited: int
    pages_ms: float | None
    resume_ms: float | None


class Waits(NamedTuple):
    """All arrays."""

    rows_of: I32
    """[vms, VCPUS_MAX]: row of a vCPU, -1: none yet"""
    tokens: I64
    """[rows, room, W_WORDS]"""
    used: I64
    """[rows]: tokens waiting"""
    halts: I64
    """[rows, H_WORDS]"""
    down: I64
    """[DAEMONS_MAX]: 1 while a daemon is away"""
    outages: I64
    """[room, O_WORDS]"""
    g: I64
    """[G_WORDS]"""


class ResumeWatch:
    """Feed it all events of a run in merged order, window by window, then ask for the figures."""

    def __init__(self) -> None:
        self._waits = Waits(
            np.full((1, VCPUS_MAX), -1, np.int32),
            np.zeros((4, 16, W_WORDS), np.int64),
            np.zeros(4, np.int64),
            np.zeros((4, H_WORDS), np.int64),
            np.zeros(DAEMONS_MAX, np.int64),
            np.zeros((16, O_WORDS), np.int64),
            np.zeros(G_WORDS, np.int64),
        )

    def feed(self, events: Events) -> None:
        """The next events, dtype EVENT; their vm and vcpu are such that no checker refuses them."""
        if not len(events):
            return
        missing = int(events["vm"].max()) + 1 - len(self._waits.rows_of)
        if missing > 0:
            more = np.full((missing, VCPUS_MAX), -1, np.int32)
            self._waits = self._waits._replace(rows_of=np.concatenate([self._waits.rows_of, more]))
        start = 0
        while (start := watch_waits(self._waits, events, start)) < len(events):
            self._waits = _grown(self._waits)

    def outages(self) -> list[Resume]:
        """Of each outage after the barrier, in order."""
        found = []
        for up_ns, waited, went_on, last_ns, there_ns in self._waits.outages[
            : self._waits.g[G_OUTAGES]
        ].tolist():
            if went_on < waited:
                found.append(Resume(waited, None, None))
            else:
                found.append(Resume(waited, max(0, there_ns - up_ns) / 1e6, max(0, last_ns - up_ns) / 1e6))
        return found


def _grown(waits: Waits) -> Waits:
    """Room for more of whatever is full."""
    rows, room = waits.tokens.shape[:2]
    if waits.g[G_ROWS] == rows:
        return waits._replace(
            tokens=np.concatenate([waits.tokens, np.zeros_like(waits.tokens)]),
            used=np.concatenate([waits.used, np.zeros_like(waits.used)]),
            halts=np.concatenate([waits.halts, np.zeros_like(waits.halts)]),
        )
    if waits.g[G_OUTAGES] == len(waits.outages):
        return waits._replace(outages=np.concatenate([waits.outages, np.zeros_like(waits.outages)]))
    assert int(waits.used.max()) == room
    return waits._replace(tokens=np.concatenate([waits.tokens, np.zeros_like(waits.tokens)], axis=1))


@kernel
def watch_waits(w: Waits, events: Events, start: int) -> int:
    """Handle events[start:]; returns their number, or earlier the index of an event for which the arrays have to grow first."""
    for i in range(start, len(events)):
        e = events[i]
        kind = e["kind"]
        if kind in (K_G_NP, K_G_RESUME, K_COMPLETED):
            if not _token_event(w, e, kind):
                return i
        elif kind in (K_HALT_ON, K_HALT_OFF, K_RESET):
            row = _row(w, e["vm"], e["vcpu"])
            if row < 0:
                return i
            _vcpu_event(w, row, e, kind)
        elif kind == K_HELD:
            _held(w, i64(e["t_ns"]) - i64(e["a"]), i64(e["t_ns"]))
        elif kind == K_BARRIER:
            w.g[G_BARRIER] = 1
        elif kind in (K_DAEMON_UP, K_DAEMON_DOWN, K_FENCED, K_DAEMON_GONE):
            if w.g[G_OUTAGES] == len(w.outages):
                return i
            _daemon_event(w, e, kind)
    return len(events)


@kernel
def _token_event(w: Waits, e: Any, kind: int) -> bool:
    """False when there is no room for it."""
    vm, vcpu, token, t_ns = e["vm"], e["token"] & VCPU_BITS, i64(e["token"]), i64(e["t_ns"])
    if kind == K_G_NP:
        row = _row(w, vm, vcpu)
        if row < 0 or w.used[row] == w.tokens.shape[1]:
            return False
        _waits_for(w, row, token)
        return True
    row = w.rows_of[vm, vcpu]
    if row >= 0 and kind == K_G_RESUME:
        _goes_on(w, row, token, t_ns)
    elif row >= 0 and w.g[G_OUTAGES] > 0:
        _page_is_there(w, row, token, t_ns)
    return True


@kernel
def _row(w: Waits, vm: int, vcpu: int) -> int:
    """Row of a vCPU; -1: there is no room for a new one."""
    row: int = w.rows_of[vm, vcpu]
    if row < 0:
        row = w.g[G_ROWS]
        if row == len(w.used):
            return -1
        w.g[G_ROWS] = row + 1
        w.rows_of[vm, vcpu] = row
    return row


@kernel
def _waits_for(w: Waits, row: int, token: int) -> None:
    """A task sleeps. A token that is used again has been forgotten by its vCPU."""
    at = w.used[row]
    for k in range(w.used[row]):
        if w.tokens[row, k, W_TOKEN] == token:
            at = k
    if at == w.used[row]:
        w.used[row] += 1
    w.tokens[row, at, W_TOKEN] = token
    w.tokens[row, at, W_OUTAGE] = 0


@kernel
def _goes_on(w: Waits, row: int, token: int, t_ns: int) -> None:
    for k in range(w.used[row]):
        if w.tokens[row, k, W_TOKEN] == token:
            outage = w.tokens[row, k, W_OUTAGE] - 1
            if outage >= 0:
                w.outages[outage, O_WENT_ON] += 1
                w.outages[outage, O_LAST] = max(w.outages[outage, O_LAST], t_ns)
            last = w.used[row] - 1
            for word in range(W_WORDS):
                w.tokens[row, k, word] = w.tokens[row, last, word]
            w.used[row] = last
            return


@kernel
def _page_is_there(w: Waits, row: int, token: int, t_ns: int) -> None:
    for k in range(w.used[row]):
        outage = w.tokens[row, k, W_OUTAGE] - 1
        if w.tokens[row, k, W_TOKEN] == token and outage >= 0:
            w.outages[outage, O_THERE] = max(w.outages[outage, O_THERE], t_ns)
            return


@kernel
def _let_go(w: Waits, outage: int, t_ns: int) -> None:
    """A vCPU goes on at once when its page is there."""
    w.outages[outage, O_WENT_ON] += 1
    w.outages[outage, O_LAST] = max(w.outages[outage, O_LAST], t_ns)
    w.outages[outage, O_THERE] = max(w.outages[outage, O_THERE], t_ns)


@kernel
def _vcpu_event(w: Waits, row: int, e: Any, kind: int) -> None:
    halt = w.halts[row]
    outage = halt[H_OUTAGE] - 1
    if kind == K_RESET:
        # Nobody on it waits any more: what ran there is gone.
        for k in range(w.used[row]):
            if w.tokens[row, k, W_OUTAGE] > 0:
                w.outages[w.tokens[row, k, W_OUTAGE] - 1, O_WENT_ON] += 1
        w.used[row] = 0
        if halt[H_ON] and outage >= 0:
            w.outages[outage, O_WENT_ON] += 1
        halt[H_ON] = halt[H_OUTAGE] = 0
    elif kind == K_HALT_ON:
        again = outage >= 0 and halt[H_GFN] == i64(e["b"])
        if not halt[H_ON] and again:
            w.outages[outage, O_WENT_ON] -= 1
        elif not halt[H_ON]:
            halt[H_OUTAGE] = 0
        halt[H_ON], halt[H_GFN] = 1, i64(e["b"])
    elif halt[H_ON]:
        halt[H_ON] = 0
        if outage >= 0:
            _let_go(w, outage, i64(e["t_ns"]))


@kernel
def _held(w: Waits, since_ns: int, t_ns: int) -> None:
    """A vCPU was held from since_ns to t_ns: at the end of the last outage in between, and through all that came before."""
    last = True
    for k in range(w.g[G_OUTAGES] - 1, -1, -1):
        up_ns = w.outages[k, O_UP]
        if up_ns <= since_ns:
            return
        if up_ns < t_ns:
            w.outages[k, O_WAITED] += 1
            if last:
                _let_go(w, k, t_ns)
            last = False


@kernel
def _daemon_event(w: Waits, e: Any, kind: int) -> None:
    daemon = i64(e["a"])
    if daemon < 0 or daemon >= len(w.down):
        return
    if kind in (K_DAEMON_DOWN, K_FENCED):
        # FENCED, too: of one that died before it said HELLO there is no DAEMON_DOWN.
        w.g[G_DOWN] += 1 - w.down[daemon]
        w.down[daemon] = 1
        return
    # One that is gone is missed no more than one that is up: what was asked of it is asked elsewhere, or has failed.
    if not w.down[daemon]:
        return
    w.down[daemon] = 0
    w.g[G_DOWN] -= 1
    if w.g[G_DOWN] == 0 and w.g[G_BARRIER]:
        _outage_over(w, i64(e["t_ns"]))


@kernel
def _outage_over(w: Waits, up_ns: int) -> None:
    """No daemon is awaited: whoever waits now is waited for. Who has waited through the outage before, too, is that one's no more."""
    number = w.g[G_OUTAGES]
    w.g[G_OUTAGES] = number + 1
    waiting = 0
    for row in range(w.g[G_ROWS]):
        for k in range(w.used[row]):
            w.tokens[row, k, W_OUTAGE] = number + 1
        waiting += w.used[row]
        if w.halts[row, H_ON]:
            w.halts[row, H_OUTAGE] = number + 1
            waiting += 1
        else:
            w.halts[row, H_OUTAGE] = 0
    w.outages[number, O_UP] = up_ns
    w.outages[number, O_WAITED] = waiting
    w.outages[number, O_WENT_ON] = 0
    w.outages[number, O_LAST] = up_ns
    w.outages[number, O_THERE] = up_ns
