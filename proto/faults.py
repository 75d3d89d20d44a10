"""Which fault of a schedule happens now: occasions are counted, times are looked at, what has fired is remembered.

A `Spec` is one fault. Its trigger is a step (every ``nth`` occasion of it, ``scheduled`` times in all) or a list of times. What a trigger
made due is pending until the one who does such things takes it: the process that sees the step, or the next read, write or message that
the fault can happen to. So whoever counts and whoever acts may be two processes: both work on the same words.

State lies in words (u64) that outlive every process of a run: `HEADER_WORDS`, then `FAULT_WORDS` for each fault, then for each daemon what
faults have come to there. A list of integers does as well (the simulation).

Invariants: pure, callers pass the time; nothing happens before `START_NS` or after `STOP_NS`, also if it was due before; a process that is
killed by its own fault has counted it before. A word has one writer at a time: targets in turn hand their fault on by the word `TURN`.
It is written last and read first, so that who finds its own number there finds all else as the one before left it (x86-64 keeps the order
of stores, and that of loads). A daemon that is gone for good has no turn: `GONE` is set after its end, when it writes nothing any more.

Not handled here: what a fault does (swapd/faulty.py, host/faults.py, launcher/chaos.py), what a topology may ask for
(proto/topology_faults.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

PROCESS_KINDS: Final = ("kill", "stop")
READ_KINDS: Final = ("read_error", "short_read", "bit_flip", "bad_block")
WRITE_KINDS: Final = ("write_error", "no_space")
DEVICE_KINDS: Final = ("slow", *READ_KINDS, *WRITE_KINDS, "device_gone")
MESSAGE_KINDS: Final = ("drop", "duplicate", "delay")
LINK_KINDS: Final = (*MESSAGE_KINDS, "disconnect")
KINDS: Final = (*PROCESS_KINDS, *DEVICE_KINDS, *LINK_KINDS)
"""What can go wrong; an event names a kind by its place here."""
ROLES: Final = ("swapd", "vcpu", "host", "zygote")
"""Whom it can happen to; an event names a target as place here * 65536 + number."""


class Step(NamedTuple):
    """An occasion of the protocol. seen_by: host or swapd. of: the role that has it (swapd or vcpu)."""

    seen_by: str
    of: str
    meaning: str


STEPS: Final = {
    "swap_in.sent": Step("host", "swapd", "The host has sent a daemon the request to read a page."),
    "swap_in.done": Step("host", "swapd", "A page was read without an error; its checksum comes next."),
    "swap_out.sent": Step("host", "swapd", "The host has sent a daemon the request to write a page."),
    "swap_out.done": Step("host", "swapd", "A page was written without an error."),
    "link.message": Step("host", "swapd", "Requests go to a daemon, or answers come from it: one message."),
    "fault.announced": Step("host", "vcpu", 'A vCPU was entered with "page not present".'),
    "ready.sent": Step("host", "vcpu", 'The host has handed over a "page ready".'),
    "read.started": Step("swapd", "swapd", "The daemon has given a read to the device."),
    "write.started": Step("swapd", "swapd", "The daemon has given a write to the device."),
    "read.done": Step("swapd", "swapd", "A read is over; its answer has not left yet."),
    "write.done": Step("swapd", "swapd", "A write is over; its answer has not left yet."),
    "io.done": Step("swapd", "swapd", "A read or a write is over; its answer has not left yet."),
    "daemon.hello": Step("swapd", "swapd", "A daemon has said its first HELLO (a restarted one: faults begin at the start barrier)."),
}  # fmt: skip
"""Every step that a fault may wait for (``at``)."""

_DAEMON: Final = "swapd"
"""The only role that has several targets of one fault, and one of which may be gone while the run goes on."""

NATURAL: Final = {
    **dict.fromkeys(READ_KINDS, "read.done"),
    **dict.fromkeys(WRITE_KINDS, "write.done"),
    **dict.fromkeys(("slow", "device_gone"), "io.done"),
    **dict.fromkeys(LINK_KINDS, "link.message"),
}
"""What ``nth`` counts when no step is given: the occasions that the fault itself can happen to."""

START_NS: Final = 0
"""When the start barrier opened, monotonic; 0 before. Written by the host."""
STOP_NS: Final = 1
"""When the measured time was over; 0 before. Written by the host."""
HEADER_WORDS: Final = 8

SEEN: Final = 0
"""Occasions of its step. Writer: the process that sees them."""
TAKEN: Final = 1
"""How many of those that became due were taken, or passed over. From here on: written by the process that acts."""
TURN: Final = 2
"""Targets had: the next one is number ``TURN`` modulo their count, or the first one after it that is not gone."""
FIRED: Final = 3
LAST_NS: Final = 4
"""When it fired last."""
FAULT_WORDS: Final = 8

GONE: Final = 0
"""Of each daemon, behind the faults: 1 when it is gone for good. Written by the host."""
UNTIL_NS: Final = 0
"""Of each fault at each daemon: when what it began there last is over (`for_ms`). Written by the process that acts, as what follows."""
FIRED_HERE: Final = 1
TARGET_WORDS: Final = 2
BAD_WORDS: Final = 512
"""Of each daemon, behind its faults: how many blocks went bad, then their numbers. Written by the daemon."""
FOREVER_NS: Final = (1 << 63) - 1
READ_TRIES: Final = 3
"""Failed reads that a page survives at least: fewer never lose one (host/reads.py STRIKES_MAX)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One fault. Times are ns since the start barrier.

    targets: numbers of the role, in turn. step: "" for a fault by time, whose times are ``times_ns``, rising. scheduled: how often it is to
    happen. merges: times that pass while an earlier one is pending are passed over. from_ns, until_ns: when occasions count.
    for_ns: how long it lasts, 0: one operation. slower_ns: time added to each operation.
    """

    number: int
    kind: str
    role: str
    targets: tuple[int, ...]
    step: str = ""
    nth: int = 1
    scheduled: int = 1
    times_ns: tuple[int, ...] = ()
    merges: bool = False
    from_ns: int = 0
    until_ns: int = FOREVER_NS
    for_ns: int = 0
    slower_ns: int = 0

    @property
    def lasts(self) -> bool:
        """Whether it goes on after it fired."""
        return self.for_ns > 0


class Firing(NamedTuple):
    """A fault that happens now, for the ``nth`` time."""

    spec: Spec
    number: int
    """Of the target."""
    nth: int


class Delivery(NamedTuple):
    """What becomes of a message: it arrives ``copies`` times, and ``later_ns`` later than it would have."""

    copies: int
    later_ns: int
    firings: tuple[Firing, ...]


def words_needed(faults: int, daemons: int) -> int:
    """Size of the segment `faults`, in words."""
    return _daemon_at(faults, daemons)


def _daemon_at(faults: int, daemon: int) -> int:
    """Where the words of a daemon begin."""
    return HEADER_WORDS + faults * FAULT_WORDS + daemon * (1 + faults * TARGET_WORDS + BAD_WORDS)


def target_code(role: str, number: int) -> int:
    """A target in an event."""
    return ROLES.index(role) << 16 | number


class FaultMachine:
    """See the module. ``words``: u64 memoryview or list, at least `words_needed`."""

    def __init__(self, specs: Iterable[Spec], words: Any) -> None:
        self.specs = tuple(specs)
        self.words = words
        self._by_step: dict[str, list[Spec]] = {}
        self._by_kind: dict[str, list[Spec]] = {}
        for spec in self.specs:
            if spec.step:
                self._by_step.setdefault(spec.step, []).append(spec)
            self._by_kind.setdefault(spec.kind, []).append(spec)

    def word(self, spec: Spec, name: int) -> int:
        """One of the words of a fault: SEEN, TAKEN, ..."""
        return int(self.words[HEADER_WORDS + spec.number * FAULT_WORDS + name])

    def _put(self, spec: Spec, name: int, value: int) -> None:
        self.words[HEADER_WORDS + spec.number * FAULT_WORDS + name] = value

    def _here(self, spec: Spec, daemon: int) -> int:
        """Where the words of a fault at a daemon begin."""
        return _daemon_at(len(self.specs), daemon) + 1 + spec.number * TARGET_WORDS

    def fired_at(self, spec: Spec, number: int) -> int:
        """How often it has happened to this target."""
        if spec.role != _DAEMON:
            return self.word(spec, FIRED)
        return int(self.words[self._here(spec, number) + FIRED_HERE])

    # -- the time in which faults happen -------------------------------------------------------------------
    def start(self, now_ns: int) -> None:
        """The start barrier has opened."""
        self.words[START_NS] = now_ns

    def stop(self, now_ns: int) -> None:
        """Nothing happens any more; what has begun goes on to its end."""
        self.words[STOP_NS] = now_ns

    def since_start(self, now_ns: int) -> int:
        """Time since the barrier; negative before it."""
        start = int(self.words[START_NS])
        return now_ns - start if start else -1

    def gone(self, daemon: int) -> None:
        """A daemon has ended and never comes back: its turns are those of the others."""
        self.words[_daemon_at(len(self.specs), daemon) + GONE] = 1

    def _is_gone(self, spec: Spec, number: int) -> bool:
        return spec.role == _DAEMON and bool(self.words[_daemon_at(len(self.specs), number) + GONE])

    # -- triggers ------------------------------------------------------------------------------------------
    def step(self, name: str, role: str, number: int, now_ns: int) -> bool:
        """Count an occasion of a step, which ``role``-``number`` has. Whether a fault that waits for it is pending now."""
        specs = self._by_step.get(name)
        if not specs or not self.words[START_NS] or self.words[STOP_NS]:
            return False
        since_ns = now_ns - int(self.words[START_NS])
        due = False
        for spec in specs:
            if not spec.from_ns <= since_ns < spec.until_ns:
                continue
            # Occasions of others do not count for a fault that waits for those of its target. Asked before anything else is read.
            if spec.role == role and self.target(spec) != number:
                continue
            seen = self.word(spec, SEEN) + 1
            self._put(spec, SEEN, seen)
            due = due or self.pending(spec, now_ns)
        return due

    def target(self, spec: Spec) -> int:
        """Number of the target whose turn it is."""
        return spec.targets[self._turn(spec) % len(spec.targets)]

    def _turn(self, spec: Spec) -> int:
        """The turn it is: `TURN`, or the first one after it whose target is not gone, if there is one."""
        turn, count = self.word(spec, TURN), len(spec.targets)
        if count > 1:
            for ahead in range(turn, turn + count):
                if not self._is_gone(spec, spec.targets[ahead % count]):
                    return ahead
        return turn

    def _due(self, spec: Spec, now_ns: int) -> int:
        """How often it should have happened by now."""
        if spec.step:
            return min(spec.scheduled, self.word(spec, SEEN) // spec.nth)
        return bisect_right(spec.times_ns, self.since_start(now_ns))

    def pending(self, spec: Spec, now_ns: int) -> bool:
        """It is to happen now, to its target (who asks whether that is itself asks before)."""
        if self.words[STOP_NS] or self._is_gone(spec, self.target(spec)):
            return False
        return self._due(spec, now_ns) > self.word(spec, TAKEN)

    def left_over(self, spec: Spec) -> bool:
        """Whether it was due when the measured time was over, and had found nothing to happen to."""
        stop_ns = int(self.words[STOP_NS])
        return bool(stop_ns) and self._due(spec, stop_ns) > self.word(spec, TAKEN)

    def next_ns(self, specs: Iterable[Spec], now_ns: int) -> int | None:
        """When one of these faults becomes due by time; None: never again."""
        since_ns, start_ns = self.since_start(now_ns), int(self.words[START_NS])
        if since_ns < 0 or self.words[STOP_NS]:
            return None
        found = []
        for spec in specs:
            at = bisect_right(spec.times_ns, since_ns)
            if at < len(spec.times_ns):
                found.append(start_ns + spec.times_ns[at])
        return min(found, default=None)

    # -- acting --------------------------------------------------------------------------------------------
    def take(self, kind: str, role: str, number: int, now_ns: int) -> Firing | None:
        """A fault of this kind that happens to this target now. It counts as fired: the caller does it.

        One at most, since two at one operation are one: the others stay pending for the next.
        """
        for spec in self._by_kind.get(kind, ()):
            if spec.role == role and self.target(spec) == number and self.pending(spec, now_ns):
                return self.fire(spec, now_ns)
        return None

    def deliver(self, daemon: int, now_ns: int) -> Delivery:
        """What happens to a message to or from a daemon now; the caller does it.

        One that is lost is neither doubled nor late: what else is due stays pending for the next.
        """
        if (lost := self.take("drop", _DAEMON, daemon, now_ns)) is not None:
            return Delivery(0, 0, (lost,))
        doubled = self.take("duplicate", _DAEMON, daemon, now_ns)
        late = self.take("delay", _DAEMON, daemon, now_ns)
        firings = tuple(firing for firing in (doubled, late) if firing is not None)
        return Delivery(1 if doubled is None else 2, 0 if late is None else late.spec.for_ns, firings)

    def fire(self, spec: Spec, now_ns: int) -> Firing:
        """It happens."""
        turn, nth = self._turn(spec), self.word(spec, FIRED) + 1
        number = spec.targets[turn % len(spec.targets)]
        self._put(spec, LAST_NS, now_ns)
        if spec.role == _DAEMON:
            here = self._here(spec, number)
            self.words[here + UNTIL_NS] = min(FOREVER_NS, now_ns + spec.for_ns)
            self.words[here + FIRED_HERE] = int(self.words[here + FIRED_HERE]) + 1
        self._put(spec, FIRED, nth)
        self._move_on(spec, turn, now_ns)
        return Firing(spec, number, nth)

    def skip(self, spec: Spec, now_ns: int) -> None:
        """Its target is not there: passed over, and the next target's turn."""
        self._move_on(spec, self._turn(spec), now_ns)

    def _move_on(self, spec: Spec, turn: int, now_ns: int) -> None:
        self._put(spec, TAKEN, self._due(spec, now_ns) if spec.merges else self.word(spec, TAKEN) + 1)
        # Last: the next target may act from here on, and what is due to it is what is not taken.
        self._put(spec, TURN, turn + 1)

    def open(self, kind: str, daemon: int, now_ns: int) -> Spec | None:
        """A fault of this kind that goes on at this daemon, if there is one."""
        for spec in self._by_kind.get(kind, ()):
            if spec.lasts and self._is_open(spec, daemon, now_ns):
                return spec
        return None

    def _is_open(self, spec: Spec, daemon: int, now_ns: int) -> bool:
        return now_ns < int(self.words[self._here(spec, daemon) + UNTIL_NS])


class BadBlocks:
    """Blocks of one daemon that can never be read again; they stay bad when it is restarted."""

    def __init__(self, words: Any, faults: int, daemon: int) -> None:
        self._words = words
        self._base = _daemon_at(faults, daemon + 1) - BAD_WORDS
        count = min(int(words[self._base]), BAD_WORDS - 1)
        self._blocks = {int(words[self._base + 1 + i]) for i in range(count)}

    def __contains__(self, block: int) -> bool:
        """Whether it is bad."""
        return block in self._blocks

    def add(self, block: int) -> None:
        """It is bad from now on."""
        if block in self._blocks:
            return
        count = len(self._blocks)
        assert count < BAD_WORDS - 1, "the topology was checked"
        self._words[self._base + 1 + count] = block
        self._words[self._base] = count + 1
        self._blocks.add(block)


def outcome(spec: Spec, machine: FaultMachine) -> str:
    """Why this fault fails the run; "" when it happened as it should.

    A fault at steps or at one time has to happen each time. Of one that comes again and again some may be passed over, those among them
    that were due when the measured time was over.
    """
    fired = machine.word(spec, FIRED)
    late = "; it was due, and the measured time was over before there was anything it could happen to"
    late = late if machine.left_over(spec) else ""
    if spec.merges:
        return "" if fired else f"never happened, {spec.scheduled} times were scheduled{late}"
    if fired >= spec.scheduled:
        return ""
    seen = f" (the step was seen {machine.word(spec, SEEN)} times)" if spec.step else ""
    return f"happened {fired} times of {spec.scheduled}{seen}{late}"


def may_lose_pages(machine: FaultMachine) -> list[Spec]:
    """Faults that have happened and may cost a page for good: each alone, or failed reads that are too many to be retried."""
    fired = [spec for spec in machine.specs if machine.word(spec, FIRED)]
    reads = [spec for spec in fired if spec.kind in ("read_error", "short_read", "bit_flip")]
    surely = [spec for spec in fired if spec.kind in ("bad_block", "device_gone")]
    if any(spec.lasts for spec in reads) or sum(machine.word(spec, FIRED) for spec in reads) >= READ_TRIES:
        surely += reads
    return sorted(surely, key=lambda spec: spec.number)
