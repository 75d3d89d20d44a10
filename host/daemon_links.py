"""The host's links to its swap daemons: which incarnation of each is up, what is asked of it, what it answers, and when it is given up.

A daemon's incarnations are numbered (epochs). The launcher reports that one is dead (DAEMON_DOWN), that nothing of it can land any more
(DAEMON_FENCED), and perhaps that none will follow (DAEMON_GONE); its successor says HELLO over a connection of its own, and may be early.

Invariants: an epoch is admitted only when the one before it is fenced, and never again; answers of an epoch that is over reach no
machine; pages in messages are written only into landing frames of requests in flight; a round sends each daemon one message for each
`BATCH_MAX` requests; which incarnation of each daemon was connected last is in shared memory (`DW_*`) for those who look at outages.

Not handled here: which requests there are and when they are sent again (host/swap.py), connections to daemons elsewhere
(host/remote.py, which admits and gives up by this class), who a peer is (host/peers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np

from host import events as ev
from host.memory import HostMemory, U64Array
from host.outbox import Outbox
from host.peers import Handler, Peer, Peers, observe, only_launcher
from host.run_clock import RunClock
from host.setup import ShellObserver
from host.swap import SwapMachine, op_of
from proto import wire
from proto.layout import DW_EPOCH, DW_GONE, control_words, daemons_base
from proto.stats import HostCounter
from proto.topology import Topology
from proto.trace import TraceWriter
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE, Message, Nack, WireError

BEATS_MAX: Final = 10
"""A daemon that leaves so many heartbeats unanswered is reported for a restart: 5 s, far above any scheduling delay seen. Counted and not
measured, since a host that stood still itself has asked for nothing meanwhile.
"""
GONE_TEXT_MAX: Final = 300
"""Of the reason why a daemon is gone, where more is said in the same message."""


class Shell(Protocol):
    """What is needed of the host's shell."""

    topology: Topology
    control: U64Array
    swap: SwapMachine
    memory: HostMemory
    obs: ShellObserver
    writer: TraceWriter
    peers: Peers
    outbox: Outbox
    clock: RunClock

    def feed(self, machine: Any, event: Any) -> None:
        """Give a machine an event."""

    def send(self, identity: bytes, message: Message, pages: Sequence[memoryview] = ()) -> bool:
        """Now or not at all; False when it did not leave."""

    def to_launcher(self, message: Message) -> None:
        """As soon as it can take it."""


class Daemon:
    """What is known of a daemon's link."""

    __slots__ = (
        "early",
        "epoch",
        "fenced",
        "gone",
        "identity",
        "next_epoch",
        "pages_in_messages",
        "ping_nonce",
        "reported",
        "unanswered",
        "up",
    )

    def __init__(self, pages_in_messages: bool) -> None:
        self.pages_in_messages = pages_in_messages
        self.identity = b""
        self.epoch = -1
        self.up = False
        self.fenced = True
        self.next_epoch = 0
        """The only epoch that may say HELLO next: the launcher counts them, one by one."""
        self.early: tuple[bytes, int] | None = None
        """(identity, epoch) of a successor that said HELLO before the fence of this one was reported."""
        self.ping_nonce = 0
        self.reported = False
        self.unanswered = 0
        """Heartbeats since it was heard last."""
        self.gone = ""
        """Why it never comes back."""


class DaemonLinks:
    """See the module docstring."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self.daemons = [Daemon(d.transport == "tcp" or bool(d.connect)) for d in shell.topology.swapd]
        vms = len(shell.topology.vm)
        self._words = shell.control[daemons_base(vms) : control_words(vms, len(self.daemons))]
        """DW_* of each daemon."""
        self._waiting: dict[int, list[ev.SendIo]] = {}
        """Requests of this round, by daemon."""
        self.on_up: list[Callable[[], None]] = []
        """Called after an incarnation was admitted."""
        self.messages: dict[type[Any], Handler] = {
            wire.IoDone: self._io_done,
            wire.Pong: self._pong,
            wire.DaemonDown: self._down,
            wire.DaemonFenced: self._fenced,
            wire.DaemonGone: self._gone,
        }
        self.effects: dict[type[Any], Callable[[Any], None]] = {
            ev.SendIo: lambda e: self._waiting.setdefault(e.daemon, []).append(e),
            ev.PagesLost: self._pages_lost,
        }

    # -- incarnations --------------------------------------------------------------------------------------
    def is_ours(self, number: int) -> bool:
        """Whether the launcher starts that daemon; one elsewhere does not come by itself."""
        return number < len(self.daemons) and not self._shell.topology.swapd[number].connect

    def all_met(self) -> bool:
        """Whether each daemon elsewhere was there once. Those of ours come for sure, or the launcher says why not."""
        return all(daemon.epoch >= 0 or self.is_ours(number) for number, daemon in enumerate(self.daemons))

    def hello(self, number: int, epoch: int, identity: bytes) -> None:
        """A daemon of ours has started. WireError for an epoch that cannot be."""
        daemon = self.daemons[number]
        again = epoch == daemon.epoch and daemon.up
        if not daemon.up and epoch == daemon.next_epoch - 1:
            # Said before it died and read after the launcher's report, perhaps for the second time: late, and nobody's fault.
            self._shell.obs.count(HostCounter.STALE_REPLIES)
            return
        if daemon.gone or (epoch != daemon.next_epoch and not again):
            raise WireError(
                Nack.STALE_EPOCH, f"daemon {number}: epoch {epoch}, {daemon.next_epoch} may come next"
            )
        if again:
            # It asked twice: the first answer was on its way.
            self._shell.send(identity, wire.Welcome(epoch, self._model_on(number)))
        elif daemon.up or not daemon.fenced:
            # It overtook the launcher's reports about its predecessor, which come over another connection.
            daemon.early = identity, epoch
        else:
            self.admit(number, identity, epoch)

    def admit(self, number: int, identity: bytes, epoch: int) -> None:
        """An incarnation of a daemon is up: whatever came before it is fenced."""
        daemon = self.daemons[number]
        daemon.identity, daemon.epoch, daemon.up = identity, epoch, True
        daemon.next_epoch = epoch + 1
        daemon.fenced = False
        daemon.early = None
        daemon.unanswered = 0
        daemon.reported = False
        self._words[number] = DW_EPOCH + epoch
        self._shell.send(identity, wire.Welcome(epoch, self._model_on(number)))
        self._shell.feed(self._shell.swap, ev.DaemonUp(number, epoch))
        for told in self.on_up:
            told()

    def _model_on(self, number: int) -> int:
        return int(self._shell.clock.started or not self._shell.topology.swapd[number].model_from_barrier)

    def start_models(self, _start_ns: int) -> None:
        """The measured time runs: modelled service times too. Those of a daemon elsewhere are not this run's business."""
        for number, daemon in enumerate(self.daemons):
            if daemon.up and self.is_ours(number):
                self._shell.outbox.put(daemon.identity, wire.Model(1))

    def say_bye(self) -> None:
        """To those that are up."""
        for daemon in self.daemons:
            if daemon.up:
                self._shell.send(daemon.identity, wire.Bye(0))

    # -- what the launcher reports -------------------------------------------------------------------------
    def _reported(self, peer: Peer, number: int) -> Daemon:
        only_launcher(peer)
        if number >= len(self.daemons):
            raise WireError(Nack.FIELD, f"daemon {number}: the topology has {len(self.daemons)}")
        return self.daemons[number]

    def _down(self, peer: Peer, identity: bytes, message: wire.DaemonDown, _: Sequence[bytes]) -> None:
        daemon = self._reported(peer, message.daemon)
        daemon.up = False
        daemon.fenced = False
        daemon.next_epoch = message.epoch + 1
        self._shell.outbox.forget(daemon.identity)
        # Or they would be as many as there were restarts.
        self._shell.peers.forget("S", message.daemon)
        if daemon.early is not None and daemon.early[1] <= message.epoch:
            daemon.early = None
        self._shell.feed(self._shell.swap, ev.DaemonLost(message.daemon, message.epoch))

    def _fenced(self, peer: Peer, identity: bytes, message: wire.DaemonFenced, _: Sequence[bytes]) -> None:
        daemon = self._reported(peer, message.daemon)
        daemon.fenced = True
        self._shell.feed(self._shell.swap, ev.DaemonFenced(message.daemon, message.epoch))
        if daemon.early is not None:
            self.admit(message.daemon, *daemon.early)

    def _gone(self, peer: Peer, identity: bytes, message: wire.DaemonGone, _: Sequence[bytes]) -> None:
        daemon = self._reported(peer, message.daemon)
        if daemon.up or not daemon.fenced:
            raise WireError(
                Nack.NOT_EXPECTED, f"daemon {message.daemon} is not fenced", wire.Kind.DAEMON_GONE
            )
        self.give_up(message.daemon, message.reason)

    def give_up(self, number: int, reason: str) -> None:
        """A daemon never comes back. The run goes on with the other copies of its pages, or ends with the reason."""
        daemon, swap = self.daemons[number], self._shell.swap
        if daemon.gone:
            return
        daemon.gone = reason
        self._words[number] = DW_GONE
        if daemon.up:
            # Elsewhere: its pages come in messages only, and none of them is taken any more.
            daemon.up = False
            self._shell.feed(swap, ev.DaemonLost(number, daemon.epoch))
            self._shell.feed(swap, ev.DaemonFenced(number, daemon.epoch))
        self._shell.outbox.forget(daemon.identity)
        self._shell.feed(swap, ev.DaemonGone(number))

    def _pages_lost(self, effect: ev.PagesLost) -> None:
        where = f"; {effect.pages} pages were only there" if effect.pages else ""
        reason = self.daemons[effect.daemon].gone[:GONE_TEXT_MAX]
        self._shell.clock.fail(f"{reason}{where}")

    # -- requests ------------------------------------------------------------------------------------------
    def flush(self) -> None:
        """Send what this round wants of daemons."""
        if not self._waiting:
            return
        shell = self._shell
        for number, wanted in self._waiting.items():
            daemon = self.daemons[number]
            # Its predecessor may have died in this round: what was asked of that one is asked again anyway, and a message has one epoch.
            requests = [request for request in wanted if request.epoch == daemon.epoch]
            for first in range(0, len(requests), wire.BATCH_MAX):
                batch = requests[first : first + wire.BATCH_MAX]
                records = np.array([(r.request, r.op, r.frame, r.slot) for r in batch], wire.IO_DTYPE)
                pages: list[memoryview] = []
                if daemon.pages_in_messages:
                    pages = [shell.memory.page(r.frame) for r in batch if r.op == OP_WRITE]
                shell.writer.lamport += 1
                settled = shell.swap.settled(number)
                message = wire.Io(batch[0].epoch, shell.writer.lamport, settled, records)
                self._ask(number, batch, message, pages)
        self._waiting.clear()

    def _ask(
        self, number: int, _batch: Sequence[ev.SendIo], message: wire.Io, pages: Sequence[memoryview]
    ) -> None:
        """Requests to a daemon."""
        self._shell.send(self.daemons[number].identity, message, pages)

    # -- answers -------------------------------------------------------------------------------------------
    def _io_done(self, peer: Peer, identity: bytes, message: wire.IoDone, extra: Sequence[bytes]) -> None:
        kind, number, epoch = peer
        if kind != "S" or number >= len(self.daemons):
            raise WireError(Nack.STRANGER, "IO_DONE from a peer that is no daemon")
        self._answered(identity, number, epoch, message, extra)

    def _answered(
        self, _identity: bytes, number: int, epoch: int, message: wire.IoDone, extra: Sequence[bytes]
    ) -> None:
        """Answers of a daemon."""
        daemon, shell = self.daemons[number], self._shell
        if epoch != daemon.epoch or message.epoch != epoch or not daemon.up:
            shell.obs.count(HostCounter.STALE_REPLIES, len(message.records))
            if _has_just_died(daemon, epoch):
                return
            raise WireError(Nack.STALE_EPOCH, f"epoch {message.epoch}", wire.Kind.IO_DONE)
        observe(shell.writer, message)
        daemon.unanswered = 0
        if daemon.pages_in_messages and not self._land_pages(number, message, extra):
            raise WireError(Nack.FIELD, "IO_DONE: pages and records do not match", wire.Kind.IO_DONE)
        for request, result, service_ns in message.records.tolist():
            shell.feed(shell.swap, ev.IoReply(number, epoch, request, result, service_ns))

    def _land_pages(self, number: int, message: wire.IoDone, extra: Sequence[bytes]) -> bool:
        """tcp: copy the pages of good reads into their landing frames; only frames of requests in flight are ever written."""
        pages = iter(extra)
        for request, result, _service in message.records.tolist():
            if op_of(request) != OP_READ or result != PAGE_SIZE:
                continue
            page = next(pages, None)
            if page is None or len(page) != PAGE_SIZE:
                return False
            frame = self._shell.swap.landing_frame(number, request)
            if frame is not None:
                self._shell.memory.write_page(frame, page)
        return next(pages, None) is None

    # -- heartbeats ----------------------------------------------------------------------------------------
    def heartbeat(self, number: int) -> None:
        """A beat for a daemon of ours; one that has answered none for too long is to be started anew."""
        daemon = self.daemons[number]
        if not daemon.up:
            return
        if daemon.unanswered >= BEATS_MAX and not daemon.reported:
            daemon.reported = True
            self._shell.to_launcher(wire.RestartWanted(number, daemon.epoch, "no heartbeat"))
        daemon.ping_nonce += 1
        daemon.unanswered += 1
        self._shell.send(daemon.identity, wire.Ping(daemon.epoch, daemon.ping_nonce))

    def _pong(self, peer: Peer, identity: bytes, message: wire.Pong, _: Sequence[bytes]) -> None:
        kind, number, epoch = peer
        if kind != "S" or number >= len(self.daemons):
            raise WireError(Nack.STRANGER, "PONG from a peer that is no daemon", wire.Kind.PONG)
        daemon = self.daemons[number]
        if epoch != daemon.epoch or not daemon.up:
            if _has_just_died(daemon, epoch):
                return
            raise WireError(Nack.STALE_EPOCH, f"epoch {epoch}", wire.Kind.PONG)
        daemon.unanswered = 0


def _has_just_died(daemon: Daemon, epoch: int) -> bool:
    """Whether this is what an incarnation had said before it died, read after the launcher's report: late, and nobody's fault."""
    return epoch == daemon.epoch and not daemon.up
