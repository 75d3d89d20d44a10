"""io_uring itself: detection of a kernel or sandbox that refuses it, and refused submissions."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swapd import uring
from swapd.syscall import BLOCK_BYTES, NR_IO_URING_ENTER, NR_IO_URING_REGISTER, NR_IO_URING_SETUP
from swapd.uring import STALL_LIMIT, Uring, UringUnavailable

Region = Callable[[int], np.ndarray]


def forbid(number: int, code: int) -> None:
    """Make system call ``number`` fail with ``code`` in this process from now on, as a sandbox does."""
    steps = [
        (0x20, 0, 0, 0),  # load the system call's number
        (0x15, 0, 1, number),  # equal? else skip one
        (0x06, 0, 0, 0x0005_0000 | code),  # return an errno
        (0x06, 0, 0, 0x7FFF_0000),  # allow
    ]
    program = b"".join(struct.pack("<HBBI", *step) for step in steps)
    text = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(steps), ctypes.addressof(text)), 16)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, head, 0, 0) == 0, os.strerror(ctypes.get_errno())  # seccomp, filter mode


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (NR_IO_URING_SETUP, errno.EPERM, "io_uring_setup: EPERM"),
        (NR_IO_URING_SETUP, errno.ENOSYS, "io_uring_setup: ENOSYS"),
        (NR_IO_URING_REGISTER, errno.EACCES, "io_uring_register(EVENTFD): EACCES"),
        (NR_IO_URING_ENTER, errno.EPERM, "io_uring_enter: EPERM"),
    ],
)
@pytest.mark.usefixtures("uring_here")
def test_sandbox_that_refuses_any_part_is_noticed(region: Region, number: int, code: int, said: str) -> None:
    uring.warm()
    memory = region(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            forbid(number, code)
            before = len(list(Path("/proc/self/fd").iterdir()))
            try:
                Uring(0, memory, 4)
                verdict = "no refusal"
            except UringUnavailable as refused:
                verdict = str(refused)
            leaked = len(list(Path("/proc/self/fd").iterdir())) - before
            os.write(writer, f"{verdict} leaked={leaked}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 4096).decode()
    os.close(reader)
    os.waitpid(child, 0)
    assert answer.startswith(said)
    assert answer.endswith("leaked=0")


@pytest.mark.usefixtures("uring_here")
def test_refused_submission_is_tried_again_within_a_budget(region: Region) -> None:
    fd = os.memfd_create("file")
    os.ftruncate(fd, BLOCK_BYTES)
    ring = Uring(fd, region(1), 2)
    try:
        ring._entered(-errno.EAGAIN)
        assert os.eventfd_read(ring.eventfd) == 1  # the poller is told to come back
        assert len(ring.reap()) == 0  # which submits what is left: nothing here
        assert ring._stalls == 0
        with pytest.raises(OSError, match="EBADF"):
            ring._entered(-errno.EBADF)
        ring._stalls = STALL_LIMIT
        with pytest.raises(OSError, match=f"refused {STALL_LIMIT + 1} times in a row: EBUSY"):
            ring._entered(-errno.EBUSY)
    finally:
        ring.close(0, 0)
        os.close(fd)


@pytest.mark.usefixtures("uring_here")
def test_close_reports_what_never_completes(region: Region) -> None:
    """A read of an empty pipe stays in flight."""
    reader, writer = os.pipe()
    ring = Uring(reader, region(1), 1)
    ring.submit(np.zeros((1, 4), dtype=np.uint64), 1)
    assert ring.close(1, 1_000_000) == 1
    os.close(reader)
    os.close(writer)
