"""The architecture-independent core of asynchronous page faults (KVM: virt/kvm/async_pf.c; spec §3.2, §3.3, §1.8).

One `AsyncPf` per vCPU: work items from set-up to dequeue. What an architecture adds (how a vCPU is told, when it may be told) is
behind `ArchHooks`; host/x86.py implements them.

Ownership (spec §0.7): ``queue`` and ``queued`` belong to the vCPU's thread; ``done`` is appended to by workers and popped by the
vCPU's thread. Here both are paths of one machine, and a simulated world may switch between them at every named step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Final, Protocol

from host.events import CancelFetch, Fetch
from host.observe import Observer
from proto.lives import TOKEN, TokenState
from proto.machine import Path
from proto.profile import Profile
from proto.stats import HostCounter
from proto.trace import Kind
from proto.transitions import Transitions
from proto.units import TOKEN_WAKE_ALL

CANCEL_ELIDED: Final = 4
"""Why a work item was forgotten (trace field of CANCEL); the other reasons are the architecture's."""

SETUP_LIMIT: Final = 1
SETUP_NO_MEMORY: Final = 2
"""Why a set-up failed (trace field of SETUP_FAIL)."""


_BEGINS: Final = (TokenState.ALLOCATED, TokenState.DONE)
"""Of a fault; of a broadcast."""


@cache
def life_of_a_token(profile: Profile) -> Transitions[TokenState]:
    """The arrows that a profile has."""
    return TOKEN.under(profile)


class Work:
    """One asynchronous fault (or the wake-all pseudo completion)."""

    __slots__ = (
        "announced",
        "arrived",
        "cr3",
        "gfn",
        "gpa",
        "gva",
        "hvp",
        "id",
        "life",
        "started_ns",
        "token",
        "wakeup_all",
        "write",
    )

    def __init__(
        self,
        ident: int,
        token: int,
        *,
        gpa: int = 0,
        gva: int = 0,
        hvp: int = -1,
        cr3: int = 0,
        write: bool = False,
    ) -> None:
        self.id = ident
        self.token = token
        self.gpa = gpa
        self.gva = gva
        self.gfn = gpa >> 12
        self.hvp = hvp
        """Host virtual page at set-up: the worker fetches this one, whatever the slots are by then (spec §1.16)."""
        self.cr3 = cr3
        self.write = write
        self.wakeup_all = token == TOKEN_WAKE_ALL
        self.life = _BEGINS[self.wakeup_all]
        """Changed by `AsyncPf.move` only."""
        self.announced = False
        """The not-present event was really injected (notpresent_injected)."""
        self.arrived = False
        self.started_ns = 0
        """When the vCPU left for this fault, monotonic; for latencies only."""

    @property
    def cancelled(self) -> bool:
        """Forgotten: whoever still works on it stops at the next step (KVM waits for the worker instead)."""
        return self.life is TokenState.CANCELLED


class ArchHooks(Protocol):
    """What the core needs from the architecture."""

    def not_present(self, work: Work) -> Path:
        """Tell the guest, or arrange the synthetic halt. Sets work.announced."""
        ...

    def present_queued(self) -> None:
        """The done list became non-empty."""
        ...

    def can_dequeue(self) -> Path:
        """Whether a completion may be handed over now; returns bool."""
        ...

    def page_ready(self, work: Work) -> Path:
        """Retry the fault before entry (prefault)."""
        ...

    def page_present(self, work: Work) -> Path:
        """Tell the guest that the page is there."""
        ...


class AsyncPf:
    """Queue, done list and their rules for one vCPU."""

    __slots__ = (
        "_arch",
        "_cpu",
        "_emit",
        "_lives",
        "_next_work",
        "_obs",
        "_profile",
        "_vcpu_id",
        "_vm",
        "can_allocate",
        "done",
        "queue",
        "queued",
    )

    def __init__(
        self, cpu: int, vm: int, vcpu_id: int, profile: Profile, arch: ArchHooks, emit: Callable[[object], None],
        observer: Observer,
    ) -> None:  # fmt: skip
        self._cpu = cpu
        self._vm = vm
        self._vcpu_id = vcpu_id
        self._profile = profile
        self._lives = life_of_a_token(profile)
        self._arch = arch
        self._emit = emit
        self._obs = observer
        self._next_work = 1
        self.can_allocate: Callable[[], bool] = lambda: True
        """Whether an item can be had without sleeping (GFP_NOWAIT, spec §3.2). A world that runs short of memory says so here."""
        self.queue: dict[int, Work] = {}
        self.done: deque[Work] = deque()
        self.queued = 0

    def move(self, work: Work, event: str) -> None:
        """Take a work item along an arrow of proto/lives.py TOKEN, as far as the profile has it. Raises MachineError."""
        work.life = self._lives.go(work.life, event)

    def setup(self, work_args: Work) -> Path:
        """Queue one fault and start its worker; returns False when it must be handled synchronously (spec §3.2)."""
        work = work_args
        if self._profile.limit and self.queued >= self._profile.limit:
            self.move(work, "setup_fail")
            self._trace(Kind.SETUP_FAIL, work, a=SETUP_LIMIT, b=work.gfn, c=self.queued)
            self._obs.count(HostCounter.SETUP_FAILED)
            return False
        if not self.can_allocate():
            self.move(work, "no_memory")
            self._trace(Kind.SETUP_FAIL, work, a=SETUP_NO_MEMORY, b=work.gfn, c=self.queued)
            self._obs.count(HostCounter.SETUP_FAILED)
            return False
        work.id = self._next_work
        self._next_work += 1
        self.queue[work.id] = work
        self.queued += 1
        yield "setup.queued"
        if self._profile.announce_before_fetch:
            yield from self._arch.not_present(work)
            yield "setup.announced"
            self.move(work, "fetch")
            self._emit(Fetch(self._cpu, work.id, work.hvp))
        else:
            self.move(work, "fetch")
            self._emit(Fetch(self._cpu, work.id, work.hvp))
            yield "setup.fetching"
            yield from self._arch.not_present(work)
        return True

    def completed(self, work_id: int) -> Path:
        """The worker's tail: append to the done list, then say so (spec §3.3). Unknown ids were cancelled.

        KVM hits the tracepoint of the completion when the list was let go already, so there it may stand behind the ready event (spec
        §4.2); here it comes with the append, and the log has the order of the list.
        """
        work = self.queue.get(work_id)
        if work is None:
            return
        self.move(work, "complete")
        work.arrived = True
        first = not self.done
        self.done.append(work)
        self._trace(Kind.ASYNC_PF_COMPLETED, work, a=work.hvp << 12, b=work.gpa)
        yield "worker.appended"
        if first and not work.cancelled:
            self._arch.present_queued()
        yield "worker.queued"

    def check_completion(self, at_most: int = 1 << 30) -> Path:
        """Hand over completions, in done-list order (I23), while the guest can take them; returns how many."""
        handed = 0
        while self.done and handed < at_most:
            free = yield from self._arch.can_dequeue()
            if not free:
                break
            work = self.done.popleft()
            yield "dequeue.popped"
            yield from self._arch.page_ready(work)
            yield "dequeue.prefaulted"
            yield from self._arch.page_present(work)
            self.move(work, "retire")
            self.queue.pop(work.id, None)
            self.queued -= 1
            handed += 1
        return handed

    def wakeup_all(self) -> None:
        """Queue the broadcast pseudo completion, unless something is done already (spec §0.3, §1.16)."""
        if self.done:
            return
        self.done.append(Work(0, TOKEN_WAKE_ALL))
        self.queued += 1
        self._arch.present_queued()

    def clear(self, why: int) -> None:
        """Forget everything without telling the guest (disable, reset, power down)."""
        for work in self.queue.values():
            self.move(work, "cancel")
            self._trace(Kind.CANCEL, work, a=why, b=work.gfn)
            if not work.arrived:
                self._emit(CancelFetch(self._cpu, work.id, work.hvp))
        for work in self.done:
            if work.wakeup_all:
                self.move(work, "cancel")
        self.queue.clear()
        self.done.clear()
        self.queued = 0

    def drop_done(self, work: Work) -> None:
        """v3's elision: the page came before its not-present event was delivered (spec §1.8)."""
        self.move(work, "elide")
        self._trace(Kind.CANCEL, work, a=CANCEL_ELIDED, b=work.gfn)
        self.done.remove(work)
        self.queue.pop(work.id, None)
        self.queued -= 1
        self._obs.count(HostCounter.ELIDED)

    def _trace(self, kind: Kind, work: Work, a: int = 0, b: int = 0, c: int = 0) -> None:
        self._obs.trace(kind, vcpu=self._vcpu_id, vm=self._vm, token=work.token, a=a, b=b, c=c)
