"""The door of a listening tcp socket: who may come in before anything that he says is taken (ZeroMQ's authentication protocol, RFC 27).

Two kinds of guests: those who prove a CURVE key on a list (daemons and hosts on other machines), and those who know the password of the
run (its own daemons behind loopback tcp, PLAIN). Who is refused has no connection: nothing of him is kept, not even a part of a message.
That matters because ZeroMQ keeps the parts of a message until the last one is there and counts none of them.

Invariants: without the proof nobody comes in; what is refused is counted and can be told in words; a password is compared in constant
time and never shown.

Not handled here: keys and their files (proto/curve.py), routing ids (proto/link.py): who is in is still only who his id says he is.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from typing import Any, Final

import zmq
from zmq.utils import z85

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_VERSION: Final = b"1.0"
ZAP_PER_TURN: Final = 64
DOMAIN: Final = b"asyncpf"
USER: Final = b"asyncpf"
"""The only name that PLAIN guests have: it is the password that counts."""

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]


def guard_with_password(socket: Socket) -> None:
    """Before bind: clients need the password that a `Door` of the same context knows. Addresses bound before stay as they are."""
    socket.setsockopt(zmq.PLAIN_SERVER, 1)
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)


def enter_with_password(socket: Socket, password: bytes) -> None:
    """Before connect: say the password."""
    socket.setsockopt(zmq.PLAIN_USERNAME, USER)
    socket.setsockopt(zmq.PLAIN_PASSWORD, password)


class Door:
    """The door of all listening sockets of a context. To be made before they are bound; `answer` when `socket` is readable."""

    def __init__(self, context: Context, keys: Collection[bytes] = (), password: bytes = b"") -> None:
        """keys: public keys in Z85 that may come in; password: what lets others in, empty: nobody."""
        self.admitted = 0
        self.refused = 0
        self._keys = frozenset(keys)
        self._password = password
        self.socket: Socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    def answer(self) -> list[str]:
        """Answer what was asked; who was refused, in words."""
        refused = []
        for _ in range(ZAP_PER_TURN):
            try:
                parts: list[Any] = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            request_id = parts[1] if len(parts) > 1 else b""
            why = self._why_not(parts)
            if not why:
                self.admitted += 1
                answer = [ZAP_VERSION, request_id, b"200", b"OK", b"", b""]
            else:
                self.refused += 1
                address = parts[3].decode(errors="replace") if len(parts) > 3 else "?"
                refused.append(f"{address} {why}")
                answer = [ZAP_VERSION, request_id, b"400", b"not on the list", b"", b""]
            self.socket.send_multipart(answer)
        return refused

    def _why_not(self, parts: Sequence[bytes]) -> str:
        """Empty for who may come in. parts: version, request id, domain, address, identity, mechanism, credentials."""
        if len(parts) < 6 or parts[0] != ZAP_VERSION:
            return "with a question that is none"
        mechanism, credentials = parts[5], parts[6:]
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            key = z85.encode(credentials[0])
            return "" if key in self._keys else f"with key {key.decode()}"
        if mechanism == b"PLAIN" and len(credentials) == 2:
            user, said = credentials
            right = hmac.compare_digest(said, self._password) and user == USER
            return "" if right and self._password else "with a wrong password"
        return "without a key"

    def close(self) -> None:
        """Nobody new comes in."""
        self.socket.close()
