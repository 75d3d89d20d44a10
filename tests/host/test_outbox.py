"""What nobody asks for again leaves sooner or later, in its order, and once."""

from __future__ import annotations

from host.outbox import Outbox
from proto import wire
from proto.wire import Message


class Link:
    """Sends that fail for the peers in ``deaf``."""

    def __init__(self) -> None:
        self.deaf: set[bytes] = set()
        self.sent: list[tuple[bytes, Message]] = []

    def send(self, identity: bytes, message: Message) -> bool:
        if identity in self.deaf:
            return False
        self.sent.append((identity, message))
        return True


A, B = b"a", b"b"


def kick(number: int) -> wire.Kick:
    return wire.Kick(number, 0)


def test_what_can_be_sent_is_sent_at_once() -> None:
    link = Link()
    outbox = Outbox(link.send)
    done: list[int] = []
    outbox.put(A, kick(1), lambda: done.append(1))
    assert link.sent == [(A, kick(1))]
    assert done == [1]
    assert not outbox


def test_what_cannot_is_kept_in_order_and_before_what_is_newer() -> None:
    link = Link()
    outbox = Outbox(link.send)
    done: list[int] = []
    link.deaf = {A}
    for number in (1, 2):
        outbox.put(A, kick(number), lambda number=number: done.append(number))  # type: ignore[misc]
    outbox.put(B, kick(9))
    assert link.sent == [(B, kick(9))]
    assert done == []
    outbox.retry()
    assert outbox
    link.deaf = set()
    outbox.put(A, kick(3))
    assert len(link.sent) == 1, "nothing overtakes what is kept"
    outbox.retry()
    assert link.sent[1:] == [(A, kick(1)), (A, kick(2)), (A, kick(3))]
    assert done == [1, 2]
    assert not outbox
    outbox.retry()
    assert len(link.sent) == 4, "once"


def test_a_peer_that_is_gone_is_owed_nothing() -> None:
    link = Link()
    link.deaf = {A, B}
    outbox = Outbox(link.send)
    outbox.put(A, kick(1))
    outbox.put(B, kick(2))
    outbox.forget(A)
    outbox.forget(b"never heard of")
    link.deaf = set()
    outbox.retry()
    assert link.sent == [(B, kick(2))]
