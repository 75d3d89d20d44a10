"""Daemons elsewhere, as the host sees them: it connects, attaches, and hears what any daemon says.

The machines know nothing of it: an incarnation of a daemon elsewhere is an epoch like any other, counted from 0 in this run (the
daemon's own epochs go on from run to run and are translated here).

* The link is down, or the process over there is dead: nothing happens here. Requests stay out and are sent again under the same id; the
  daemon does each once per epoch. Tasks that need no page from there go on.
* OFFER with a greater epoch: over there the old incarnation was killed, reaped and fenced before this one was numbered. So the old one is
  lost and fenced for the machines, and its unanswered requests go to the new one.
* OFFER with a smaller epoch is refused, and so are replies of one: they are counted and answered with NACK.
* OFFER of other contents (`file`), or for another host: what was acknowledged is gone, and so is the daemon for this run.
* Nothing is heard for `give_up_seconds`: the same. Whether the run can do without it is the machines' business.
* One that could not be used at all, at the start (`CONNECT_NS`): the run ends with the reason.

Not handled here: keys and sockets (proto/remote.py), what incarnations and replies mean to the run (host/daemon_links.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import zmq

from host import events as ev
from host.daemon_links import DaemonLinks
from host.peers import Peer
from host.run_clock import RunClock
from host.setup import ShellObserver
from host.swap import SwapMachine
from proto import curve, link, remote, wire
from proto.curve import Context, Endpoint
from proto.stats import HostCounter
from proto.topology import Swapd, Topology
from proto.wire import Message, Nack, WireError

CONNECT_NS: Final = 20_000_000_000
"""To the first OFFER, unless `give_up_seconds` is less: twice as long as another host's session may be in the way."""
RENEW_NS: Final = 5_000_000_000
"""Of silence: more than the kernel needs to notice, and ZeroMQ to connect anew."""
SILENCE_NS: Final = 1_000_000_000
"""Twice the time between two heartbeats: a daemon that was not heard for less was not away."""
DRAIN_MAX: Final = 64
_TRANSLATED: Final = (wire.Io, wire.Ping, wire.Welcome)
_HANDSHAKE: Final[dict[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refuses this host's key (its --allow list)",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: one side has keys, the other has none or expects others",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: the keys do not fit, or nobody answers it",
}


class Shell(Protocol):
    """What is needed of the host's shell."""

    topology: Topology
    obs: ShellObserver
    swap: SwapMachine
    links: DaemonLinks
    clock: RunClock

    def feed(self, machine: Any, event: Any) -> None:
        """Give a machine an event."""

    def dispatch(self, peer: Peer, identity: bytes, message: Message, extra: Sequence[bytes]) -> None:
        """Handle a message of a daemon. WireError when it is not what may be said."""


class RemoteDaemon:
    """One of them. Routing id in this process: `name`."""

    def __init__(
        self,
        context: Context,
        number: int,
        spec: Swapd,
        slots: int,
        resolve: Callable[[str], Path],
        poller: zmq.Poller,
    ) -> None:
        """Connects. Raises UserError for a key file that cannot be used."""
        endpoint = curve.parse_endpoint(spec.connect)
        assert endpoint is not None, "the topology was checked"
        self.number = number
        self.spec = spec
        self.slots = slots
        self.name = b"R%d" % number
        self.peer: Peer = ("S", number, 0)
        """Without its epoch: for those who only want to know who it is."""
        self.endpoint: Endpoint = endpoint
        # Not the run's: another process, with another swap map, must never pass for this one.
        self.session = int.from_bytes(os.urandom(8), "big") or 1
        keys = None
        if spec.key:
            where = f"swapd[{number}]"
            keys = (
                curve.read_pair(resolve(spec.key), f"{where}.key"),
                curve.read_public(resolve(spec.server_key), f"{where}.server_key"),
            )
        self._connect = partial(remote.connect, context, endpoint, remote.host_identity(self.session), keys)
        self._poller = poller
        self.last_event = 0
        """zmq.EVENT_* of the connection; 0 before the first."""
        self.was_stuck = False
        self.closed_until_ns = 0
        """While the connection is closed on purpose; 0: it is not."""
        self._is_open = False
        self._open()
        self.base: int | None = None
        """The daemon's epoch at the first OFFER."""
        self.file = 0
        self.heard_ns = time.monotonic_ns()
        self.trouble = "nobody listens there, or packets are lost"

    def send(self, message: Message, pages: Sequence[Any]) -> bool:
        """False when there is no connection, or its queue is full."""
        if self.closed_until_ns:
            return False
        if isinstance(message, _TRANSLATED):
            message = message._replace(epoch=message.epoch + (self.base or 0))
        try:
            self.socket.send_multipart([wire.encode(message), *pages], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def attach(self) -> None:
        """Ask for the daemon's incarnation."""
        self.send(wire.Attach(self.session), ())

    def _open(self) -> None:
        self.opened_ns = time.monotonic_ns()
        self.socket, self.monitor = self._connect()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)
        self._is_open = True

    def disconnect(self, until_ns: int) -> None:
        """Close the connection; `revive` makes it again from then on."""
        if not self.closed_until_ns:
            self._shut(linger_ms=0)
        self.closed_until_ns = until_ns

    def revive(self, now_ns: int) -> None:
        """Every half second: a new socket for one that has stopped trying, or whose connection leads nowhere."""
        if self.closed_until_ns:
            if now_ns >= self.closed_until_ns:
                self.closed_until_ns = 0
                self._open()
                self.last_event, self.was_stuck = 0, False
            return
        stuck = self.last_event != 0 and not self.last_event & remote.UNDER_WAY
        silent = now_ns - max(self.heard_ns, self.opened_ns) > RENEW_NS
        if silent or (stuck and self.was_stuck):
            self._shut(linger_ms=0)
            self._open()
            self.last_event, stuck = 0, False
        self.was_stuck = stuck

    def _shut(self, linger_ms: int) -> None:
        if not self._is_open:
            return  # there was no new socket when the old one was given up
        self._is_open = False
        self._poller.unregister(self.socket)
        self._poller.unregister(self.monitor)
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)

    def close(self) -> None:
        """What was said last still leaves, within the linger time."""
        if not self.closed_until_ns:
            self._shut(link.LINGER_MS)


class RemoteDaemons:
    """All of a run's. ``slots``: blocks of each daemon's swap file. The launcher is told, once, why the run cannot begin."""

    def __init__(self, shell: Shell, context: Context, poller: zmq.Poller, slots: Sequence[int]) -> None:
        """Connects. Raises UserError for a key file that cannot be used."""
        topology = shell.topology
        self._shell = shell
        self._handlers: dict[type[Any], Callable[[RemoteDaemon, Any, Sequence[bytes]], None]] = {
            wire.Offer: self._offered,
            wire.IoDone: self._heard,
            wire.Pong: self._heard,
            wire.NackMsg: self._refused,
        }
        self.daemons = {
            number: RemoteDaemon(context, number, spec, slots[number], topology.resolve_path, poller)
            for number, spec in enumerate(topology.swapd)
            if spec.connect
        }
        self.by_name = {daemon.name: daemon for daemon in self.daemons.values()}

    def drain(self) -> None:
        """Handle what has come."""
        for daemon in self.daemons.values():
            if daemon.closed_until_ns:
                continue
            for event in remote.events_of(daemon.monitor):
                self._connection(daemon, event)
            for _ in range(DRAIN_MAX):
                try:
                    parts = daemon.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._receive(daemon, parts)

    def disconnect(self, number: int, until_ns: int) -> None:
        """Close the connection to a daemon on purpose, for a while."""
        self.daemons[number].disconnect(until_ns)

    def _connection(self, daemon: RemoteDaemon, event: int) -> None:
        daemon.last_event = event
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            daemon.trouble = "it does not answer"
            if not self._shell.links.daemons[daemon.number].gone:
                daemon.attach()
        elif event in _HANDSHAKE:
            daemon.trouble = _HANDSHAKE[event]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and daemon.base is None:
                self._give_up(daemon, f"cannot be used: {daemon.trouble}")

    # -- receiving -----------------------------------------------------------------------------------------
    def _receive(self, daemon: RemoteDaemon, parts: Sequence[bytes]) -> None:
        try:
            message = wire.decode(parts[0])
            self._handlers.get(type(message), self._not_expected)(daemon, message, parts[1:])
        except WireError as error:
            self._shell.obs.bad_message(daemon.peer, error.code, error.kind)
            daemon.send(wire.NackMsg(error.code, error.kind, error.text), ())

    @staticmethod
    def _not_expected(_daemon: RemoteDaemon, message: Message, _: Sequence[bytes]) -> None:
        raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for the host")

    def _heard(self, daemon: RemoteDaemon, message: wire.IoDone | wire.Pong, extra: Sequence[bytes]) -> None:
        base = daemon.base
        if base is None or message.epoch < base:
            raise WireError(Nack.STALE_EPOCH, f"epoch {message.epoch} was not offered")
        epoch = message.epoch - base
        peer = ("S", daemon.number, epoch)
        self._shell.dispatch(peer, daemon.name, message._replace(epoch=epoch), extra)
        # Not before: what is refused is no sign of life of the daemon that is meant.
        self._sign_of_life(daemon)

    def _refused(self, daemon: RemoteDaemon, message: wire.NackMsg, _: Sequence[bytes]) -> None:
        if message.code == Nack.BUSY:
            daemon.trouble = "it works for another host"
            if daemon.base is not None:
                self._give_up(daemon, "works for another host now; its pages of this run are lost")
        elif message.code == Nack.STALE_EPOCH:
            daemon.attach()  # an incarnation that has not seen this host yet
        else:
            self._shell.obs.bad_message(daemon.peer, message.code, message.kind, ours=True)

    def _offered(self, daemon: RemoteDaemon, offer: wire.Offer, _: Sequence[bytes]) -> None:
        if daemon.base is None:
            if offer.slots < daemon.slots:
                self._give_up(
                    daemon,
                    f"has {offer.slots} slots, {daemon.slots} are needed (a larger --size there, or a smaller swapd.size_mib here)",
                )
                return
            daemon.base, daemon.file = offer.epoch, offer.file
        known = self._shell.links.daemons[daemon.number]
        epoch = offer.epoch - daemon.base
        if known.gone or epoch < known.epoch or epoch < 0:
            self._shell.obs.count(HostCounter.STALE_REPLIES)
            raise WireError(Nack.STALE_EPOCH, f"epoch {offer.epoch} is over", wire.Kind.OFFER)
        if offer.file != daemon.file:
            self._give_up(
                daemon,
                "came back without the pages it had acknowledged (another file, another host's, or its machine was started anew)",
            )
            return
        self._sign_of_life(daemon, successor=known.up and epoch != known.epoch)
        daemon.trouble = "it does not answer"
        if epoch == known.epoch and known.up:
            # The link was gone for a while: what was sent meanwhile may be lost.
            daemon.send(wire.Welcome(epoch, 1), ())
            self._shell.feed(self._shell.swap, ev.LookAtRequests())
            return
        if known.up:
            self._shell.feed(self._shell.swap, ev.DaemonLost(daemon.number, known.epoch))
            self._shell.feed(self._shell.swap, ev.DaemonFenced(daemon.number, known.epoch))
        self._shell.links.admit(daemon.number, daemon.name, epoch)

    def _sign_of_life(self, daemon: RemoteDaemon, *, successor: bool = False) -> None:
        """Of a daemon that is there, or of its successor. That it was away is told to those who look at outages."""
        silent_ns, daemon.heard_ns = daemon.heard_ns, time.monotonic_ns()
        known = self._shell.links.daemons[daemon.number]
        if known.up and (successor or daemon.heard_ns - silent_ns >= SILENCE_NS):
            self._was_away(silent_ns, daemon.heard_ns)

    def _was_away(self, silent_ns: int, over_ns: int) -> None:
        """A daemon, from its last sign of life to the next one, or until it was given up."""
        obs = self._shell.obs
        obs.gauge(HostCounter.SILENT_NS, silent_ns)
        obs.gauge(HostCounter.HEARD_NS, over_ns)
        obs.count(HostCounter.SILENCES)

    # -- time ----------------------------------------------------------------------------------------------
    def heartbeat(self, number: int, now_ns: int) -> None:
        """Every half second."""
        daemon, known = self.daemons[number], self._shell.links.daemons[number]
        if known.gone:
            return
        if known.up:
            known.ping_nonce += 1
            daemon.send(wire.Ping(known.epoch, known.ping_nonce), ())
        else:
            daemon.attach()
        daemon.revive(now_ns)
        silent_ns = now_ns - daemon.heard_ns
        connect_ns = min(CONNECT_NS, int(daemon.spec.give_up_seconds * 1e9))
        if daemon.base is None and silent_ns > connect_ns:
            self._give_up(daemon, f"cannot be reached within {connect_ns / 1e9:g} s: {daemon.trouble}")
        elif daemon.base is not None and silent_ns > daemon.spec.give_up_seconds * 1e9:
            self._give_up(
                daemon,
                f"was silent for {daemon.spec.give_up_seconds:g} s (give_up_seconds): {daemon.trouble}",
            )

    def _give_up(self, daemon: RemoteDaemon, why: str) -> None:
        text = f"swapd-{daemon.number} at {daemon.endpoint} {why}"
        if daemon.base is not None:
            if self._shell.links.daemons[daemon.number].up:
                self._was_away(daemon.heard_ns, time.monotonic_ns())
            self._shell.links.give_up(daemon.number, text)
        else:
            self._shell.clock.fail(text)

    def close(self) -> None:
        """Sockets."""
        for daemon in self.daemons.values():
            daemon.close()
