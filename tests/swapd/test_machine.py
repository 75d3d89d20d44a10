"""The daemon's requests: each is done once, however often it comes."""

from __future__ import annotations

import errno

from proto.wire import OP_READ, OP_WRITE
from swapd.machine import Reply, Request, RequestQueue

READ = Request(2, OP_READ, 5, 7)
WRITE = Request(5, OP_WRITE, 6, 8)


def queue(**options: bool) -> RequestQueue:
    return RequestQueue(frames=10, slots=10, delayer=None, **options)


def test_a_copy_of_what_is_under_way_is_ignored() -> None:
    q = queue()
    assert q.accept([READ, READ], 0, 1) == ([READ], [])
    assert q.accept([READ], 0, 2) == ([], [])
    assert q.completed([(2, 4096)], 11) == ([Reply(2, 4096, 10, READ)], None)


def test_what_was_answered_is_answered_again_and_not_done_again() -> None:
    q = queue()
    q.accept([READ, WRITE], 0, 1)
    q.completed([(2, 4096), (5, -errno.EIO)], 4)
    start, again = q.accept([READ, WRITE], 0, 9)
    assert start == []
    assert [(reply.id, reply.result) for reply in again] == [(2, 4096), (5, -errno.EIO)]


def test_what_is_settled_is_forgotten_and_ignored() -> None:
    q = queue()
    q.accept([READ, WRITE], 0, 1)
    q.completed([(2, 4096), (5, 4096)], 4)
    assert q.accept([READ], 3, 9) == ([], []), (
        "a late copy must not touch a frame that is somebody else's by now"
    )
    assert [reply.id for reply in q.accept([WRITE], 3, 9)[1]] == [5], "5 is not settled yet"
    assert q.accept([WRITE], 6, 9) == ([], [])
    assert q.accept([WRITE], 0, 9) == ([], []), "settled is settled, whatever a late message says"


def test_with_buffers_of_its_own_a_read_is_done_again_since_its_page_is_gone() -> None:
    q = queue(own_buffers=True)
    q.accept([READ, WRITE], 0, 1)
    q.completed([(2, 4096), (5, 4096)], 4)
    start, again = q.accept([READ, WRITE], 0, 9)
    assert start == [READ]
    assert [reply.id for reply in again] == [5]


def test_what_cannot_be_done_is_refused_at_once() -> None:
    bad = [Request(2, 2, 0, 0), Request(4, OP_READ, 10, 0), Request(6, OP_READ, 0, 10)]
    start, refused = queue().accept(bad, 0, 1)
    assert start == []
    assert [(reply.id, reply.result) for reply in refused] == [
        (2, -errno.EINVAL),
        (4, -errno.EINVAL),
        (6, -errno.EINVAL),
    ]
