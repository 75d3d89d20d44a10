"""The swap file: nameless, allocated, direct or not as asked; and the fence's own behaviour."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swapd import swapfile
from swapd.swapfile import SwapFile, SwapFileError
from swapd.syscall import BLOCK_BYTES

Region = Callable[[int], np.ndarray]


def assert_nameless(file: SwapFile, directory: Path) -> None:
    assert os.fstat(file.fd).st_nlink == 0
    assert not list(directory.glob("asyncpf-swap-*"))


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_file_is_nameless_and_allocated(disk_dir: Path, direct: swapfile.Direct) -> None:
    file = swapfile.create(disk_dir, 64, direct=direct)
    status = os.fstat(file.fd)
    assert_nameless(file, disk_dir)
    assert (file.slots, file.size_bytes, status.st_size) == (64, 64 * BLOCK_BYTES, 64 * BLOCK_BYTES)
    assert status.st_blocks * 512 >= file.size_bytes
    assert status.st_mode & 0o777 == 0o600
    assert file.direct == bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT)
    assert not (direct == "off" and file.direct)
    assert not os.get_inheritable(file.fd)
    file.close()


def test_file_system_without_nameless_files(disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    refused = []

    def no_tmpfile(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            refused.append(path)
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", no_tmpfile)
    file = swapfile.create(disk_dir, 2)
    assert refused
    assert_nameless(file, disk_dir)
    file.close()


def test_direct_on_fails_where_refused(disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument"))
    )
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SwapFileError, match="refuses O_DIRECT"):
        swapfile.create(disk_dir, 2, direct="on")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    file = swapfile.create(disk_dir, 2, direct="auto")
    assert not file.direct
    assert not fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT
    file.close()


def test_memory_file_system_is_refused_unless_allowed() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    with pytest.raises(SwapFileError, match="/dev/shm is a tmpfs"):
        swapfile.create(shm, 2)
    file = swapfile.create(shm, 2, allow_tmpfs=True)
    assert file.fs_type == "tmpfs"
    file.close()


def test_too_little_space_is_refused_before_it_is_filled(disk_dir: Path) -> None:
    status = os.statvfs(disk_dir)
    slots = status.f_bavail * status.f_frsize // BLOCK_BYTES + 1_000_000
    where = re.escape(str(disk_dir))
    text = f"not enough space in {where}: needed {slots * BLOCK_BYTES} bytes, free [0-9]+ bytes"
    with pytest.raises(SwapFileError, match=text):
        swapfile.create(disk_dir, slots)


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "not enough space"), (errno.EFBIG, "cannot allocate 8192 bytes")]
)
def test_allocation_that_fails_half_way(
    disk_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SwapFileError, match=text):
        swapfile.create(disk_dir, 2)


def test_bad_arguments(disk_dir: Path) -> None:
    with pytest.raises(ValueError, match="0 slots"):
        swapfile.create(disk_dir, 0)
    with pytest.raises(ValueError, match="allowed: auto, on, off"):
        swapfile.create(disk_dir, 1, direct="yes")  # type: ignore[arg-type]
    with pytest.raises(SwapFileError, match="nowhere: No such file"):
        swapfile.create(disk_dir / "nowhere", 1)


def test_fence_keeps_size_and_contents(swap: SwapFile, region: Region) -> None:
    before, after = region(swap.slots), region(swap.slots)
    os.preadv(swap.fd, [before.data], 0)
    swapfile.fence(swap.fd, swap.size_bytes)
    assert os.fstat(swap.fd).st_size == swap.size_bytes
    os.preadv(swap.fd, [after.data], 0)
    assert np.array_equal(before, after)


def test_fence_on_something_else_is_refused(swap: SwapFile) -> None:
    for wrong in (swap.size_bytes - BLOCK_BYTES, swap.size_bytes + BLOCK_BYTES):
        with pytest.raises(SwapFileError, match=f"fence on {swap.size_bytes} bytes"):
            swapfile.fence(swap.fd, wrong)
    assert os.fstat(swap.fd).st_size == swap.size_bytes
    reader, writer = os.pipe()
    with pytest.raises(SwapFileError, match="fence on"):
        swapfile.fence(reader, 0)
    os.close(reader)
    os.close(writer)
