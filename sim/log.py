"""The event log of a simulated run: records of proto/events.py in the order in which things happened.

All processes are one here, so the order of events is known: the number of an event is its Lamport counter. The log is bytes from the start;
two runs are the same if these bytes are.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from proto.events import EVENT, Events, Kind
from proto.stats import HostCounter, HostHist
from proto.trace_writer import RECORD
from sim.agenda import Agenda


class EventLog:
    """Events of all processes; times are those of ``agenda``."""

    __slots__ = ("_agenda", "_bytes", "_count", "_sequences", "counts")

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._bytes = bytearray()
        self._count = 0
        self._sequences: list[int] = []
        self.counts: Counter[HostCounter] = Counter()
        """Of the host."""

    def append(
        self, proc: int, kind: int, vcpu: int, vm: int, token: int, a: int, b: int, c: int, cause: int
    ) -> int:
        """An event of process ``proc``; returns its number, from 1."""
        self._count += 1
        sequences = self._sequences
        while proc >= len(sequences):
            sequences.append(0)
        sequence = sequences[proc]
        sequences[proc] = sequence + 1
        self._bytes += RECORD.pack(
            self._count, self._agenda.now_ns, sequence, kind, proc, vcpu, vm, token, a, b, cause, c
        )
        return self._count

    def __len__(self) -> int:
        """Events so far."""
        return self._count

    @property
    def raw(self) -> bytes:
        """The log as bytes."""
        return bytes(self._bytes)

    def events(self) -> Events:
        """The log as an array of dtype EVENT (a copy)."""
        return np.frombuffer(bytes(self._bytes), EVENT)


class HostSink:
    """What the host's machines tell (host.observe.Observer)."""

    __slots__ = ("_log", "_proc")

    def __init__(self, log: EventLog, proc: int) -> None:
        self._log = log
        self._proc = proc

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        self._log.counts[counter] += n

    def gauge(self, counter: HostCounter, value: int) -> None:
        """Gauges of an instant mean nothing here."""

    def record(self, hist: HostHist, value_ns: int) -> None:
        """Latencies follow from the events."""

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        self._log.append(self._proc, kind, vcpu, vm, token, a, b, c, 0)


class GuestSink:
    """What a guest CPU tells (guest.accounting.TraceSink). One order for all, so Lamport counters need not be passed on."""

    __slots__ = ("_log", "_proc", "lamport")

    def __init__(self, log: EventLog, proc: int) -> None:
        self._log = log
        self._proc = proc
        self.lamport = 0

    def event(
        self,
        kind: int,
        vcpu: int = 0,
        vm: int = 0,
        token: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        cause: int = 0,
    ) -> int:
        """See guest.accounting.TraceSink."""
        return self._log.append(self._proc, kind, vcpu, vm, token, a, b, c, cause)

    def observe(self, lamport: int) -> None:
        """See guest.accounting.TraceSink."""
