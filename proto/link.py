"""ZeroMQ links: socket options, identities and the few calls that shells need.

ROUTER on the host, DEALER elsewhere. Sends never block: the protocol bounds what is in flight (64 faults per vCPU, a window per
daemon), so a full queue means a peer that stopped reading, and the message counts as lost to that peer. Contexts are made after
fork; nothing here may be called in the zygote.

A routing id names its peer and carries a seal made with the secret of the run. ROUTER gives an id to one connection at a time, so what
comes under an id comes from somebody who knows the secret, and nobody else can take the place of a daemon that is about to be
restarted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Final

import zmq

from proto.door import enter_with_password
from proto.units import MAX_VCPUS

LINGER_MS: Final = 200
"""Long enough to hand a last message to the kernel, short enough for a teardown within a second."""
HWM: Final = 1024
"""Messages queued per peer and direction before a send fails, or a peer's sends wait: four times the window of a daemon
(host/swap.py), 16 times that of a vCPU. With FRAME_BYTES_MAX it bounds what a flooding peer has this process hold for it: 64 MiB.
"""
FRAME_BYTES_MAX: Final = 64 * 1024
"""ZeroMQ drops the connection of a peer that sends a longer frame: twice the longest message, so that one that is somewhat too long is
still answered.
"""

KEY_BYTES: Final = 32
SEAL_BYTES: Final = 16


def new_key() -> bytes:
    """The secret of a run. Whoever has it can be any peer of the run, so it never leaves the memory of its processes."""
    return os.urandom(KEY_BYTES)


def _sealed(name: bytes, key: bytes) -> bytes:
    return name + hashlib.blake2b(name, digest_size=SEAL_BYTES, key=key).digest()


def tcp_password(key: bytes) -> bytes:
    """What the run's own daemons behind loopback tcp say at the door. The secret itself cannot be found out from it."""
    return hashlib.blake2b(b"tcp", digest_size=SEAL_BYTES, key=key).hexdigest().encode()


def launcher_identity(key: bytes = b"") -> bytes:
    """Routing id of the launcher."""
    return _sealed(b"L", key)


def vcpu_identity(cpu: int, key: bytes = b"") -> bytes:
    """Routing id of global vCPU ``cpu``."""
    return _sealed(b"V" + struct.pack(">H", cpu), key)


def swapd_identity(daemon: int, epoch: int, key: bytes = b"") -> bytes:
    """Routing id of one incarnation of a daemon: a stale incarnation can never be taken for its successor."""
    return _sealed(b"S" + struct.pack(">BI", daemon, epoch), key)


def parse_identity(identity: bytes, key: bytes = b"") -> tuple[str, int, int] | None:
    """(kind letter, index, epoch) of a routing id; None for a stranger, which is everybody who does not know the key."""
    name = identity[:-SEAL_BYTES]
    if not hmac.compare_digest(identity, _sealed(name, key)):
        return None
    if name == b"L":
        return "L", 0, 0
    if len(name) == 3 and name[:1] == b"V":
        cpu = struct.unpack(">H", name[1:])[0]
        return ("V", cpu, 0) if cpu < MAX_VCPUS else None
    if len(name) == 6 and name[:1] == b"S":
        daemon, epoch = struct.unpack(">BI", name[1:])
        return "S", daemon, epoch
    return None


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context of this process with one I/O thread. Raises RuntimeError in a process that was forked with a live context."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    context.set(zmq.MAX_SOCKETS, 4096)
    return context


def _options(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, HWM)
    socket.setsockopt(zmq.RCVHWM, HWM)
    socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)


def bind_router(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """The host's socket. ROUTER_MANDATORY: a send to nobody is an error, not silence."""
    socket = context.socket(zmq.ROUTER)
    _options(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(endpoint)
    return socket


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes, password: bytes = b""
) -> zmq.Socket[bytes]:
    """A peer's socket. password: for the host's door on tcp."""
    socket = context.socket(zmq.DEALER)
    _options(socket)
    if password:
        enter_with_password(socket, password)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(endpoint)
    return socket


def raise_descriptor_limit(wanted: int) -> None:
    """1024 ipc connections need more than the usual 1024 descriptors. Raises OSError when the hard limit is lower."""
    import resource  # noqa: PLC0415 - only the host needs it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(
            f"{wanted} file descriptors needed, hard limit is {hard} (see ulimit -Hn), pid {os.getpid()}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
