"""The host's shell in a run with a schedule of faults: it tells `HostFaults` what the host sees, and lets it have the links.

Invariants: without the segment `faults` nobody makes one, so that a run without a schedule pays nothing for it.

Not handled here: what happens then (host/faults.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from host import daemon_links
from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.daemon_links import DaemonLinks
from host.faults import HostFaults
from host.peers import Peer
from host.shell import HostShell
from proto import wire
from proto.faults import FaultMachine
from proto.run import RunContext
from proto.topology_faults import schedule
from proto.wire import OP_READ, Inject, WireError


class Shell(daemon_links.Shell, Protocol):
    """What links with faults need of it."""

    faults: HostFaults

    def refuse(self, peer: Peer | None, identity: bytes, error: WireError) -> None:
        """Count what a peer must not say, and tell it."""


class FaultyLinks(DaemonLinks):
    """Links on which messages are lost, doubled and late."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(shell)
        self._faulty = shell

    def give_up(self, number: int, reason: str) -> None:
        """A daemon never comes back, and takes no part in the schedule any more."""
        super().give_up(number, reason)
        self._faulty.faults.gone(number)

    def _ask(
        self, number: int, batch: Sequence[ev.SendIo], message: wire.Io, pages: Sequence[memoryview]
    ) -> None:
        # Copies: a message that is held back holds what it would have held.
        kept = [memoryview(bytes(page)) for page in pages]
        ask = partial(super()._ask, number, batch, message, kept)
        faults = self._faulty.faults
        faults.message(number, time.monotonic_ns(), ask)
        for request in batch:
            step = "swap_in.sent" if request.op == OP_READ else "swap_out.sent"
            faults.step(step, "swapd", number, time.monotonic_ns(), request.request)

    def _answered(
        self, identity: bytes, number: int, epoch: int, message: wire.IoDone, extra: Sequence[bytes]
    ) -> None:
        take = partial(self._take_answers, identity, number, epoch, message, extra)
        self._faulty.faults.message(number, time.monotonic_ns(), take)

    def _take_answers(
        self, identity: bytes, number: int, epoch: int, message: wire.IoDone, extra: Sequence[bytes]
    ) -> None:
        """Perhaps late, or for the second time."""
        try:
            super()._answered(identity, number, epoch, message, extra)
        except WireError as error:
            self._faulty.refuse(("S", number, epoch), identity, error)


class FaultyShell(HostShell):
    """See the module docstring."""

    faults: HostFaults

    def __init__(self, ctx: RunContext) -> None:
        super().__init__(ctx)
        run, daemons = self.topology.run, self.topology.swapd
        specs = schedule(self.topology.fault, len(daemons), run.seconds, run.seed)
        machine = FaultMachine(specs, ctx.segments["faults"].u64.data)
        elsewhere = frozenset(self.remote.daemons)
        self.faults = HostFaults(machine, self.writer, elsewhere, self.remote.disconnect)
        self.obs.ready = []
        # Faults may happen as long as the measured time runs.
        self.clock.on_start.insert(0, machine.start)
        self.clock.on_stop.append(lambda: machine.stop(time.monotonic_ns()))
        self._effects[ev.SwapInDone] = partial(self._swapped, "swap_in.done")
        self._effects[ev.SwapOutDone] = partial(self._swapped, "swap_out.done")

    def _links(self) -> FaultyLinks:
        return FaultyLinks(self)

    # -- time ----------------------------------------------------------------------------------------------
    def _timeout_ms(self, now: int) -> int:
        due_ns = self.faults.next_ns(now)
        usual_ms = super()._timeout_ms(now)
        return usual_ms if due_ns is None else min(usual_ms, max(0, -(-(due_ns - now) // 1_000_000)))

    def _due(self, now: int) -> None:
        super()._due(now)
        self.faults.turn(now)

    # -- steps ---------------------------------------------------------------------------------------------
    def _hello(self, peer: Peer, identity: bytes, message: wire.Hello, extra: Sequence[bytes]) -> None:
        super()._hello(peer, identity, message, extra)
        role = {"V": "vcpu", "S": "swapd"}.get(peer[0])
        if role is not None:
            self.faults.hello(role, peer[1], message.pid)

    def _enter(self, effect: ev.Enter) -> None:
        super()._enter(effect)
        if effect.record.inject == Inject.PF_NOT_PRESENT:
            self.faults.step("fault.announced", "vcpu", effect.cpu, time.monotonic_ns())

    def _swapped(self, step: str, effect: ev.SwapInDone | ev.SwapOutDone) -> None:
        if effect.ok:
            # Of two copies written it counts for the daemon that has the first.
            copy = effect.copy if isinstance(effect, ev.SwapInDone) else effect.slot
            self.faults.step(step, "swapd", copy // SLOTS_PER_DAEMON, time.monotonic_ns())
        self._to_vm(effect)

    def _route(self) -> None:
        super()._route()
        if self.obs.ready:
            # What they brought about has left.
            sent, self.obs.ready = self.obs.ready, []
            for vm, vcpu in sent:
                self.faults.step("ready.sent", "vcpu", self.ctx.first_cpu(vm) + vcpu, time.monotonic_ns())

    def close(self) -> None:
        """And the descriptors of processes."""
        self.faults.close()
        super().close()
