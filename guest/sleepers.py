"""The sleeper hash: wait(token), wake(token), wake-all. Lies in the guest kernel segment, shared by all CPUs of the guest.

256 buckets of {lock, head}; a node is {token, cpu, linked, next, dummy, used, halted}. Node t belongs to task t and stands for a node
on that task's kernel stack; the nodes behind them are the heap for dummies (wake before wait) and for contexts that are no task.

Rules: spec §2.3 to §2.5, in the form that Linux has since 5.19: a dummy is allocated outside the bucket lock, then the bucket is
looked at again. Every operation runs with interrupts off and is a path: a simulated world may run another CPU at each named step.

Invariants
* At most one node per token; a dummy exists only after wake-before-wait (I39).
* A waker unlinks a node before it wakes its task, and the sleeper sets its state before it tests "linked": neither can miss the other.
* Nodes of a CPU are inserted by that CPU only.

Wake-all frees the dummies of its CPU. Linux unlinks them and forgets them; that is a leak, not a rule, so no profile has it.

Not handled here: task states, interrupts to other CPUs, who may sleep (guest/apf.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from guest.accounting import Accounting
from guest.events import GuestPanicError
from proto.kvm import SLEEPER_HASH_BITS, hash_32
from proto.layout import (
    B_HEAD,
    B_LOCK,
    BUCKET_WORDS,
    BUCKETS,
    DUMMIES_PER_VCPU,
    K_BUCKETS,
    K_NODES,
    N_CPU,
    N_DUMMY,
    N_HALTED,
    N_LINKED,
    N_NEXT,
    N_TOKEN,
    N_USED,
    NODE_WORDS,
)
from proto.machine import Ask, MachineError, Path
from proto.port import MemoryPort
from proto.trace import Kind

B_LAMPORT: Final = 2
"""Word of a bucket: Lamport counter of the last holder of its lock, handed over with the lock."""
SPINS_PER_RELAX: Final = 64
"""Tries for a lock before the world is asked to let others run: the holder is another process, perhaps not even on a core."""
RELAX_MAX: Final = 50_000
"""Relaxations before a lock or an empty pool is taken for a dead holder (at 0.1 ms each: 5 s)."""

WAIT_SLEEPS: Final = 0
WAIT_HALTS: Final = 1
WAIT_DUMMY: Final = 2
"""`variant` of G_WAIT events."""
WAKE_NODE: Final = 0
WAKE_ADDED_DUMMY: Final = 1
WAKE_ALL: Final = 2
WAKE_DUPLICATE: Final = 3
"""`variant` of G_WAKE events."""


TABLE_WAIT: Final = 0
TABLE_WAKE: Final = 1
TABLE_WAKE_ALL: Final = 2
"""`operation` of G_TABLE events."""


class Woken(NamedTuple):
    """A sleeper that was unlinked, copied before its node could be used again."""

    node: int
    token: int
    cpu: int
    halted: bool


class Sleepers:
    """One CPU's view of the table. ``relax`` emits a request to let other CPUs run and returns its `Ask`."""

    __slots__ = ("_acc", "_cpu", "_heap", "_heap_nodes", "_port", "_relax")

    def __init__(
        self, port: MemoryPort, tasks: int, vcpus: int, cpu: int, acc: Accounting, relax: Callable[[], Ask]
    ) -> None:
        self._port = port
        self._cpu = cpu
        self._heap = tasks
        self._heap_nodes = vcpus * DUMMIES_PER_VCPU
        self._acc = acc
        self._relax = relax

    # ---- the three operations -----------------------------------------------------------------------------------------------
    def wait(self, token: int, node: int, *, halted: bool) -> Path:
        """Insert ``node``; True when it is linked now and its owner has to wait, False when the wake came first (spec §2.3)."""
        port = self._port
        bucket = _bucket(token)
        yield "wait-lock"
        self._acc.event(Kind.G_TABLE, token, TABLE_WAIT, self._acc.interrupts)
        yield from self._lock(bucket)
        link, found = self._find(bucket, token)
        yield "wait-looked"
        if found >= 0:
            if not port.load(_word(found, N_DUMMY)):
                raise MachineError(f"token {token:#x} has two waiters: nodes {found} and {node}")
            self._acc.event(Kind.G_WAIT, token, self._task_of(node), found, WAIT_DUMMY)
            self._unlink(link, found)
            self._free(found)
            self._unlock(bucket)
            return False
        self._acc.event(Kind.G_WAIT, token, self._task_of(node), node, WAIT_HALTS if halted else WAIT_SLEEPS)
        port.store(_word(node, N_DUMMY), 0)
        port.store(_word(node, N_HALTED), halted)
        self._insert(bucket, node, token)
        self._unlock(bucket)
        yield "wait-linked"
        return True

    def linked(self, node: int) -> bool:
        """Whether ``node`` still waits. Lock-free: a waker unlinks first and wakes second."""
        return self._port.load(_word(node, N_LINKED)) != 0

    def token(self, node: int) -> int:
        """The token that ``node`` waits for, or waited for last."""
        return self._port.load(_word(node, N_TOKEN))

    def wake(self, token: int) -> Path:
        """Unlink the node of ``token`` and return it as `Woken`; None when a dummy was left for a wait to come (spec §2.4)."""
        bucket = _bucket(token)
        self._acc.event(Kind.G_TABLE, token, TABLE_WAKE, self._acc.interrupts)
        spare = -1
        for _ in range(RELAX_MAX):
            yield "wake-lock"
            yield from self._lock(bucket)
            link, found = self._find(bucket, token)
            yield "wake-looked"
            if found >= 0 or spare >= 0:
                woken = self._wake_locked(bucket, link, found, token, spare)
                self._unlock(bucket)
                if found >= 0 and spare >= 0:
                    self._free(spare)
                return woken
            self._unlock(bucket)
            # Outside the lock: an allocator may sleep. So the waiter may come in between, and the bucket is looked at again.
            yield "wake-allocate"
            spare = self.allocate()
            if spare < 0:
                # Some CPU will handle its not-present event sooner or later and free a dummy.
                yield self._relax()
        raise GuestPanicError(f"wake of token {token:#x}: no free dummy node")

    def wake_all(self) -> Path:
        """Unlink all nodes of this CPU, free its dummies, return the list of `Woken` (spec §2.5)."""
        out: list[Woken] = []
        self._acc.event(Kind.G_TABLE, 0, TABLE_WAKE_ALL, self._acc.interrupts)
        for index in range(BUCKETS):
            bucket = K_BUCKETS + index * BUCKET_WORDS
            # Nodes of this CPU were inserted by this CPU: it cannot miss one by looking before it locks.
            if not self._port.load(bucket + B_HEAD):
                continue
            yield "wake-all-lock"
            yield from self._lock(bucket)
            yield "wake-all-locked"
            self._wake_bucket(bucket, out)
            self._unlock(bucket)
        return out

    # ---- the heap -----------------------------------------------------------------------------------------------------------
    def allocate(self) -> int:
        """Claim a heap node; -1 when there is none. Own share first, so that CPUs do not meet."""
        port = self._port
        start = self._cpu * DUMMIES_PER_VCPU
        for i in range(self._heap_nodes):
            node = self._heap + (start + i) % self._heap_nodes
            used = _word(node, N_USED)
            if port.load(used) == 0 and port.cmpxchg(used, 0, 1) == 0:
                return node
        return -1

    def release(self, node: int) -> None:
        """Give a heap node back that `allocate` returned and that is not linked."""
        self._free(node)

    def count(self) -> tuple[int, int]:
        """(nodes linked, heap nodes in use), without locks: for tests and for a look at quiescence (I45)."""
        load = self._port.load
        nodes = range(self._heap + self._heap_nodes)
        linked = sum(load(_word(n, N_LINKED)) for n in nodes)
        return linked, sum(load(_word(n, N_USED)) for n in nodes[self._heap :])

    # ---- under the bucket lock ----------------------------------------------------------------------------------------------
    def _wake_locked(self, bucket: int, link: int, found: int, token: int, spare: int) -> Woken | None:
        if found < 0:
            self._acc.event(Kind.G_WAKE, token, 0, spare, WAKE_ADDED_DUMMY)
            self._port.store(_word(spare, N_DUMMY), 1)
            self._port.store(_word(spare, N_HALTED), 0)
            self._insert(bucket, spare, token)
            return None
        if self._port.load(_word(found, N_DUMMY)):
            # Ready twice before the wait: one dummy says it all.
            self._acc.event(Kind.G_WAKE, token, 0, found, WAKE_DUPLICATE)
            return None
        self._acc.event(Kind.G_WAKE, token, self._task_of(found), found, WAKE_NODE)
        woken = self._woken(found)
        self._unlink(link, found)
        return woken

    def _wake_bucket(self, bucket: int, out: list[Woken]) -> None:
        port = self._port
        link = bucket + B_HEAD
        while node_plus := port.load(link):
            node = node_plus - 1
            if port.load(_word(node, N_CPU)) != self._cpu:
                link = _word(node, N_NEXT)
                continue
            woken = self._woken(node)
            self._acc.event(Kind.G_WAKE, woken.token, self._task_of(node), node, WAKE_ALL)
            dummy = port.load(_word(node, N_DUMMY))
            self._unlink(link, node)
            if dummy:
                self._free(node)
            else:
                out.append(woken)

    def _find(self, bucket: int, token: int) -> tuple[int, int]:
        """(word that points to the node, node) of ``token``; node -1 when there is none."""
        load = self._port.load
        link = bucket + B_HEAD
        while node_plus := load(link):
            node = node_plus - 1
            if load(_word(node, N_TOKEN)) == token:
                return link, node
            link = _word(node, N_NEXT)
        return link, -1

    def _insert(self, bucket: int, node: int, token: int) -> None:
        port = self._port
        port.store(_word(node, N_TOKEN), token)
        port.store(_word(node, N_CPU), self._cpu)
        port.store(_word(node, N_LINKED), 1)
        port.store(_word(node, N_NEXT), port.load(bucket + B_HEAD))
        port.store(bucket + B_HEAD, node + 1)

    def _unlink(self, link: int, node: int) -> None:
        port = self._port
        port.store(link, port.load(_word(node, N_NEXT)))
        port.store(_word(node, N_NEXT), 0)
        port.store(_word(node, N_LINKED), 0)

    def _free(self, node: int) -> None:
        self._port.store(_word(node, N_USED), 0)

    def _woken(self, node: int) -> Woken:
        load = self._port.load
        return Woken(
            node, load(_word(node, N_TOKEN)), load(_word(node, N_CPU)), load(_word(node, N_HALTED)) != 0
        )

    def _task_of(self, node: int) -> int:
        """Task + 1 of a node, 0 for a heap node: as VP_TASK counts."""
        return node + 1 if node < self._heap else 0

    def _lock(self, bucket: int) -> Path:
        port = self._port
        word = bucket + B_LOCK
        for attempt in range(1, SPINS_PER_RELAX * RELAX_MAX):
            if port.load(word) == 0 and port.cmpxchg(word, 0, self._cpu + 1) == 0:
                self._acc.trace.observe(port.load(bucket + B_LAMPORT))
                return
            yield "bucket-spin"
            if attempt % SPINS_PER_RELAX == 0:
                yield self._relax()
        raise GuestPanicError(
            f"sleeper bucket {bucket}: lock held by CPU {port.load(word) - 1} and never released"
        )

    def _unlock(self, bucket: int) -> None:
        self._port.store(bucket + B_LAMPORT, self._acc.trace.lamport)
        self._port.store(bucket + B_LOCK, 0)


def _bucket(token: int) -> int:
    return K_BUCKETS + hash_32(token, SLEEPER_HASH_BITS) * BUCKET_WORDS


def _word(node: int, field: int) -> int:
    return K_NODES + node * NODE_WORDS + field
