"""Directories, memory and stamped pages for the tests of the swap daemon's I/O."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from swapd import swapfile
from swapd.swapfile import SwapFile
from swapd.syscall import BLOCK_BYTES
from swapd.uring import Uring, UringUnavailable

Region = Callable[[int], np.ndarray]


def region_of(frames: int) -> np.ndarray:
    """A shared mapping of a memfd, as the frames of a run are."""
    fd = os.memfd_create("frames")
    try:
        os.ftruncate(fd, frames * BLOCK_BYTES)
        return np.frombuffer(mmap.mmap(fd, frames * BLOCK_BYTES), dtype=np.uint8)
    finally:
        os.close(fd)


def stamped(pages: np.ndarray, version: int) -> np.ndarray:
    """Page contents u64[n, 512] that differ in every word, between pages and between versions."""
    words = np.arange(BLOCK_BYTES // 8, dtype=np.uint64)
    head = (pages.astype(np.uint64) << np.uint64(20)) + np.uint64(version << 50)
    return head[:, None] + words[None, :] + np.uint64(1)


@pytest.fixture
def region() -> Region:
    return region_of


@pytest.fixture
def stamp() -> Callable[[np.ndarray, int], np.ndarray]:
    return stamped


@pytest.fixture
def disk_dir(tmp_path: Path) -> Path:
    """A directory that is not in memory."""
    for candidate in (tmp_path, Path("/var/tmp"), Path.cwd()):
        probe = os.open(candidate, os.O_RDONLY)
        try:
            if swapfile.fs_type_of(probe) not in ("tmpfs", "ramfs"):
                return candidate
        finally:
            os.close(probe)
    pytest.skip("every directory at hand is in memory")


@pytest.fixture
def swap(disk_dir: Path) -> Iterator[SwapFile]:
    """256 slots, slot i filled with stamp (i, 0)."""
    file = swapfile.create(disk_dir, 256)
    pages = region_of(file.slots)
    pages.view(np.uint64).reshape(file.slots, -1)[:] = stamped(np.arange(file.slots), 0)
    os.pwritev(file.fd, [pages.data], 0)
    yield file
    file.close()


@pytest.fixture(params=["uring", "pread"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "uring":
        needs_uring()
    return name


@pytest.fixture
def uring_here() -> None:
    needs_uring()


def needs_uring() -> None:
    fd = os.memfd_create("probe")
    try:
        Uring(fd, region_of(1), 1).close(0, 0)
    except UringUnavailable as refused:
        pytest.skip(f"io_uring: {refused}")
    finally:
        os.close(fd)
