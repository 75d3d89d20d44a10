"""Damage to a daemon's swap file while a run is under way."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.e2e.runs import Launched, open_files

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


def wait_for_block(path: str, block: int) -> None:
    """Until the block holds something. Blocks are given out in order, so those before it do, too, or did."""
    fd = os.open(path, os.O_RDONLY)
    try:
        deadline_s = time.monotonic() + WRITTEN_BOUND_S
        while os.pread(fd, PAGE, block * PAGE) == bytes(PAGE):
            assert time.monotonic() < deadline_s, "hardly anything was swapped out"
            time.sleep(POLL_S)
    finally:
        os.close(fd)


def flip(path: str, blocks: list[int]) -> None:
    """Invert one byte of each block."""
    fd = os.open(path, os.O_RDWR)
    try:
        for at in blocks:
            os.pwrite(fd, bytes([os.pread(fd, 1, at + FLIP_AT)[0] ^ 0xFF]), at + FLIP_AT)
        os.fsync(fd)
    finally:
        os.close(fd)
