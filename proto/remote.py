"""The link between a host and a daemon elsewhere: sockets, identities, how long what may take.

The daemon listens (ROUTER), the host connects (DEALER, one for each daemon elsewhere). On both sides the kernel looks after the
connection (keepalive, bounded retransmission), so that one whose packets go nowhere is given up after seconds instead of minutes; whether
the process at the other end is at work is what PING and PONG find out. The messages and what they mean are those of any daemon's link
(proto/wire.py).

ZeroMQ's own heartbeats are off: their timer may fire on a connection that has failed and is not cleaned up yet, and then libzmq 4.3.5 ends
the whole process by an assertion (`!_io_error`; its issues 4364 and 4841). Seen here, too.
"""

from __future__ import annotations

import struct
from typing import Final

import zmq

from proto import curve, link
from proto.curve import Context, Endpoint, KeyPair, Socket

KEEPALIVE_S: Final = 1
"""Of silence, before the kernel asks the other one, and between two questions."""
KEEPALIVE_PROBES: Final = 3
"""Questions without an answer that end a connection."""
UNACKNOWLEDGED_MS: Final = 3000
"""A connection whose bytes are not acknowledged for this long is closed."""
HANDSHAKE_MS: Final = 3000
CONNECT_MS: Final = 2000
"""A connection that does not come about is tried anew: a link that returns must not wait for the kernel's own retries."""
RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 500
FRAME_BYTES_MAX: Final = 64 * 1024
"""As the longest first part; a page is smaller."""
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
UNDER_WAY: Final = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
)
"""After one of these the socket goes on by itself. After any other it may have stopped for good: it does so when whoever answers at the
address does not speak the protocol, as a gateway that answers for a machine that is away."""


def host_identity(session: int) -> bytes:
    """Routing id of one host process."""
    return b"H" + struct.pack(">Q", session)


def session_of(identity: bytes) -> int | None:
    """The session of a host's routing id; None for a stranger."""
    if len(identity) != 9 or identity[:1] != b"H":
        return None
    session: int = struct.unpack(">Q", identity[1:])[0]
    return session or None


def _options(socket: Socket) -> None:
    socket.setsockopt(zmq.LINGER, link.LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, link.HWM)
    socket.setsockopt(zmq.RCVHWM, link.HWM)
    socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def listen(context: Context, fd: int, endpoint: Endpoint, pair: KeyPair | None) -> tuple[Socket, Socket]:
    """(ROUTER, monitor of failed handshakes) on a listening socket that is there already; it belongs to the ROUTER from now on.

    With a key, a `proto.door.Door` of the same context must exist before.
    """
    socket = context.socket(zmq.ROUTER)
    _options(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A host whose connection broke comes again before its old one is given up here.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if pair is not None:
        curve.serve_with(socket, pair)
    socket.setsockopt(zmq.USE_FD, fd)
    monitor: Socket = socket.get_monitor_socket(HANDSHAKE_FAILED)
    socket.bind(str(endpoint))
    return socket, monitor


def connect(
    context: Context, endpoint: Endpoint, identity: bytes, keys: tuple[KeyPair, bytes] | None
) -> tuple[Socket, Socket]:
    """(DEALER, monitor of handshakes and ends of connections). keys: our pair and the daemon's public key."""
    socket = context.socket(zmq.DEALER)
    _options(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    # Nothing is kept for a daemon that cannot be reached: its requests are sent again when it can.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    if ":" in endpoint.host:
        socket.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        curve.connect_with(socket, *keys)
    wanted = HANDSHAKE_FAILED | UNDER_WAY | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
    monitor: Socket = socket.get_monitor_socket(wanted)
    socket.connect(str(endpoint))
    return socket, monitor


def events_of(monitor: Socket, at_most: int = 64) -> list[int]:
    """zmq.EVENT_* that a monitor has seen since."""
    events = []
    for _ in range(at_most):
        try:
            parts: list[bytes] = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            break
        events.append(int.from_bytes(parts[0][:2], "little"))
    return events
