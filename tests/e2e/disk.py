"""Damage to a daemon's swap file while a run is under way."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.e2e.runs import HOST, Launched, open_files

STAMPS = (
    HOST
    + """
[[swapd]]
size_mib = 48

[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 20_000

[[vm.task]]
workload = "stamp"
count = 4
memory_kib = 4096
"""
)
"""Half of the pages are on swap when the time begins, and nearly each holds something."""
PAGE = 4096
WRITTEN_BOUND_S = 30.0
POLL_S = 0.01
FLIP_AT = 100
"""Byte of each block that is flipped."""


def swap_file(run: Launched, daemon: str) -> str:
    """The daemon's swap file, which has no name, through its descriptor."""
    pid = run.pid_of(daemon)
    found = [
        fd
        for fd, target in open_files(pid).items()
        if target.endswith("(deleted)") and "memfd" not in target and Path(f"/proc/{pid}/fd/{fd}").is_file()
    ]
    assert len(found) == 1, open_files(pid)
    return f"/proc/{pid}/fd/{found[0]}"


def damage(path: str, blocks: int) -> None:
    """Invert one byte of each block that holds something, once so many do. Some never do: a page of zeros is written, too."""
    fd = os.open(path, os.O_RDWR)
    try:
        deadline_s = time.monotonic() + WRITTEN_BOUND_S
        while len(held := _held(fd)) < blocks:
            assert time.monotonic() < deadline_s, f"{len(held)} pages were swapped out"
            time.sleep(POLL_S)
        for at in held:
            os.pwrite(fd, bytes([os.pread(fd, 1, at + FLIP_AT)[0] ^ 0xFF]), at + FLIP_AT)
        os.fsync(fd)
    finally:
        os.close(fd)


def _held(fd: int) -> list[int]:
    """Where blocks with something in them begin."""
    # The daemon writes past the page cache, which would go on showing what was read here once.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.fstat(fd).st_size
    return [at for at in range(0, size, PAGE) if os.pread(fd, PAGE, at) != bytes(PAGE)]
