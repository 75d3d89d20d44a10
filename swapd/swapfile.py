"""The swap file: a nameless file of slots, and the fence that makes a killed daemon's reads harmless.

Purpose: `create` makes the file; `fence` is called after a daemon was killed and reaped, and returns when no
direct I/O on the file is in flight any more; `probe_fence` finds out at the start of a run whether that can
be relied upon on this file system.

Why a fence: reaping a killed process does not wait for its direct I/O. A read that the device still works on
lands in the shared frames afterwards, when the frame may already hold another page (measured on ext4: in most
of the trials with 64 reads in flight). Changing the file's size makes ext4, xfs and btrfs wait for
direct I/O on the inode; flushing the file does not.

Invariants: the file has no name from the moment it is used, so nothing is left behind whoever is killed; all
slots are allocated before the run begins, so writing never fails for want of space; `fence` leaves the size
as it was.

Deliberately not handled: which slot holds what (the host's swap map), files given by name, block devices.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from swapd import uring
from swapd.syscall import BLOCK_BYTES

Direct = Literal["auto", "on", "off"]

_FS_NAMES = {  # f_type of statfs(2)
    0xEF53: "ext4",  # ext2 and ext3 have the same number and, today, the same driver
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x794C7630: "overlay",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x6969: "nfs",
    0x65735546: "fuse",
    0x01021997: "9p",
}
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# Their set-attribute operation waits for the inode's direct I/O before it shrinks a file.
_WAITS_FOR_DIRECT_IO = frozenset({"ext4", "xfs", "btrfs"})

PROBE_READS = 256  # in flight when the child dies: with 64 a fast device is done before the child is reaped
PROBE_SLOTS = 1024  # the reads are scattered over these, so that the device cannot merge them into a few
PROBE_ROUNDS = 6
PROBE_BUDGET_NS = 60_000_000  # no further round begins after this
PROBE_SETTLE_S = (0.004, 0.25)  # bounds of the time in which a late read would show
CHILD_TIMEOUT_MS = 5_000


class SwapFileError(RuntimeError):
    """The swap file cannot be made or fenced as asked; the text says where, what was found and what is
    allowed.
    """


@dataclass(frozen=True)
class SwapFile:
    """An open swap file of ``slots`` blocks of 4096 bytes; ``direct`` says whether I/O bypasses the page
    cache.
    """

    fd: int
    size_bytes: int
    slots: int
    fs_type: str
    direct: bool

    def close(self) -> None:
        """Close the descriptor; the last one to close frees the space."""
        os.close(self.fd)


class FenceProbe(NamedTuple):
    """What `probe_fence` found: whether `fence` may be relied upon, why, in how many rounds it was tried."""

    reliable: bool
    reason: str
    rounds: int


def create(
    directory: str | os.PathLike[str], slots: int, *, direct: Direct = "auto", allow_tmpfs: bool = False
) -> SwapFile:
    """Make a nameless swap file of ``slots`` blocks in ``directory``.

    ``direct``: ``on`` insists on O_DIRECT, ``auto`` takes it where the file system has it, ``off`` never
    does. A file system in memory is refused unless ``allow_tmpfs``: swapping to it would measure nothing.
    Raises `SwapFileError`, ValueError for bad arguments.
    """
    if slots < 1:
        raise ValueError(f"swap file: {slots} slots (allowed: 1 or more)")
    if direct not in ("auto", "on", "off"):
        raise ValueError(f"swap file: direct is {direct!r} (allowed: auto, on, off)")
    where = Path(directory)
    fd = _open_nameless(where)
    try:
        fs_type = fs_type_of(fd)
        is_direct = prepare(fd, where, fs_type, slots * BLOCK_BYTES, direct, allow_tmpfs=allow_tmpfs)
    except BaseException:
        os.close(fd)
        raise
    return SwapFile(fd, slots * BLOCK_BYTES, slots, fs_type, is_direct)


def prepare(
    fd: int, where: Path, fs_type: str, size_bytes: int, direct: Direct, *, allow_tmpfs: bool
) -> bool:
    """Refuse what was not asked for, allocate what the file lacks, switch O_DIRECT on; returns whether it is on.

    ``where``: the file or its directory, for messages. Raises `SwapFileError`.
    """
    if fs_type in _IN_MEMORY and not allow_tmpfs:
        raise SwapFileError(
            f"swap file: {where} is a {fs_type}, which is memory (allowed: a disk, or allow_tmpfs)"
        )
    if os.fstat(fd).st_size < size_bytes:
        _allocate(fd, where, size_bytes)
    # O_DIRECT only now: some C libraries allocate by writing single bytes where the file system cannot,
    # and such a write must not be direct.
    is_direct = direct != "off" and _set_direct(fd)
    if direct == "on" and not is_direct:
        raise SwapFileError(
            f"swap file: {where} ({fs_type}) refuses O_DIRECT (needed by direct='on'; allowed: auto, off)"
        )
    return is_direct


def _open_nameless(where: Path) -> int:
    try:
        return os.open(where, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as refused:
        # EISDIR comes from kernels that do not know the flag. Anything else is the directory's own fault.
        if refused.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise _cannot_create(where, refused) from refused
    try:
        fd, name = tempfile.mkstemp(prefix="asyncpf-swap-", dir=where)
    except OSError as refused:
        raise _cannot_create(where, refused) from refused
    Path(name).unlink()
    return fd


def _cannot_create(where: Path, refused: OSError) -> SwapFileError:
    return SwapFileError(f"swap file: cannot create a file in {where}: {refused.strerror}")


def fs_type_of(fd: int) -> str:
    """Name of the file system that holds ``fd`` (``ext4``, ``xfs``, ``tmpfs``, ...); its number in hex if
    unknown.
    """
    buffer = ctypes.create_string_buffer(
        512
    )  # struct statfs is smaller everywhere; the type is its first word
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs")
    number = int.from_bytes(buffer.raw[:8], "little") & 0xFFFF_FFFF
    return _FS_NAMES.get(number, f"{number:#x}")


def _allocate(fd: int, where: Path, size_bytes: int) -> None:
    """Reserve every block now. Free space is compared first: a large request must not fill the disk before it
    fails.
    """
    status = os.fstatvfs(fd)
    free_bytes = status.f_bavail * status.f_frsize
    shortage = SwapFileError(
        f"swap file: not enough space in {where}: needed {size_bytes} bytes, free {free_bytes} bytes"
    )
    if size_bytes > free_bytes:
        raise shortage
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as refused:
        if refused.errno in (errno.ENOSPC, errno.EDQUOT):
            raise shortage from refused
        raise SwapFileError(
            f"swap file: cannot allocate {size_bytes} bytes in {where}: {refused.strerror}"
        ) from refused


def _set_direct(fd: int) -> bool:
    """Switch O_DIRECT on and try one block; False, and off again, where either is refused."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # page aligned, as the frames are
            os.preadv(fd, [block], 0)
    except OSError as refused:
        if refused.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def fence(fd: int, size_bytes: int) -> None:
    """Return when no direct I/O on the file is in flight any more: grow it by a block and shrink it back.

    Call after the daemon was killed *and* reaped (before that it may start more), and before anything that
    its unanswered requests name is used again. ``size_bytes`` is the size the file has (`SwapFileError` if it
    has another: shrinking to a wrong size would destroy slots).
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
        raise SwapFileError(
            f"swap file: fence on {status.st_size} bytes (needed: a regular file of {size_bytes} bytes)"
        )
    os.ftruncate(fd, size_bytes + BLOCK_BYTES)
    os.ftruncate(fd, size_bytes)


def verify_fence(directory: str | os.PathLike[str]) -> bool:
    """True if `fence` may be relied upon for files in ``directory``; if not, use the thread pool, which needs
    no fence.
    """
    return probe_fence(directory).reliable


def probe_fence(directory: str | os.PathLike[str]) -> FenceProbe:
    """Decide whether `fence` works for files in ``directory``, in about 0.1 s.

    Two conditions: the file system is one whose driver waits for direct I/O when a file shrinks, and a
    bounded trial confirms it: a forked child is killed with many direct reads into a shared mapping in
    flight, reaped and fenced, after which the mapping must not change. The trial alone could pass by luck on
    a fast device. Where direct I/O is refused there is nothing to fence: buffered reads are copied by threads
    of the process itself, which are gone when it is reaped. Forks: call it before starting threads.
    """
    try:
        file = create(directory, PROBE_SLOTS, allow_tmpfs=True)
    except SwapFileError as refused:
        return FenceProbe(False, str(refused), 0)
    try:
        if not file.direct or file.fs_type in _IN_MEMORY:
            return FenceProbe(True, f"{file.fs_type}: no direct I/O, nothing to wait for", 0)
        if file.fs_type not in _WAITS_FOR_DIRECT_IO:
            known = ", ".join(sorted(_WAITS_FOR_DIRECT_IO))
            return FenceProbe(
                False, f"{file.fs_type} is not known to wait for direct I/O (known: {known})", 0
            )
        return _probe_by_trial(file)
    except uring.UringUnavailable as refused:
        return FenceProbe(False, f"no trial without io_uring: {refused}", 0)
    finally:
        file.close()


def _probe_by_trial(file: SwapFile) -> FenceProbe:
    filler = np.frombuffer(mmap.mmap(-1, file.size_bytes), dtype=np.uint8)
    filler[:] = 0xA5
    os.pwritev(file.fd, [filler.data], 0)
    memory = np.frombuffer(mmap.mmap(-1, PROBE_READS * BLOCK_BYTES), dtype=np.uint8)
    batch = scattered_reads(file.slots, PROBE_READS)
    settle_s = min(max(_time_of(file.fd, memory, batch), PROBE_SETTLE_S[0]), PROBE_SETTLE_S[1])
    begin_ns = time.monotonic_ns()
    rounds = 0
    while rounds < PROBE_ROUNDS and (rounds == 0 or time.monotonic_ns() - begin_ns < PROBE_BUDGET_NS):
        memory[:] = 0
        refusal = killed_reader(file.fd, memory, batch)
        if refusal:
            return FenceProbe(False, f"{file.fs_type}: {refusal}", rounds)
        fence(file.fd, file.size_bytes)
        landed = memory.copy()
        time.sleep(settle_s)
        rounds += 1
        if not np.array_equal(landed, memory):
            return FenceProbe(False, f"{file.fs_type}: a read landed after the fence", rounds)
    return FenceProbe(True, f"{file.fs_type}: no read landed after the fence in {rounds} rounds", rounds)


def scattered_reads(slots: int, reads: int) -> np.ndarray:
    """A batch of ``reads`` reads of different slots out of ``slots`` into frames 0, 1, ..., u64[reads, 4]."""
    batch = np.zeros((reads, 4), dtype=np.uint64)
    batch[:, 0] = batch[:, 3] = np.arange(reads)
    batch[:, 2] = np.random.default_rng(0).permutation(slots)[:reads]
    return batch


def _time_of(fd: int, memory: np.ndarray, batch: np.ndarray) -> float:
    """Seconds that the batch takes when nobody is killed. Also loads the kernels: the children must not
    compile.
    """
    uring.warm()
    ring = uring.Uring(fd, memory, len(batch))
    begin_ns = time.monotonic_ns()
    ring.submit(batch, len(batch))
    left = ring.close(len(batch), CHILD_TIMEOUT_MS * 1_000_000)
    if left:
        raise SwapFileError(f"swap file: {left} of {len(batch)} reads not done in {CHILD_TIMEOUT_MS} ms")
    return (time.monotonic_ns() - begin_ns) / 1e9


def killed_reader(fd: int, memory: np.ndarray, batch: np.ndarray) -> str:
    """Fork a child that starts the reads of ``batch`` by io_uring and dies of SIGKILL at once; reap it.

    ``memory`` must be a shared mapping. Returns an empty string, or why the child could not start the reads.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _reader_child(fd, memory, batch, writer)
    os.close(writer)
    try:
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        in_time = poller.poll(CHILD_TIMEOUT_MS)  # its last word, or the end of the pipe when it is dead
        said = os.read(reader, 512).decode(errors="replace") if in_time else "the reading child hangs"
    finally:
        os.kill(child, signal.SIGKILL)  # a no-op if it has ended: it is not reaped yet
        _, status = os.waitpid(child, 0)
        os.close(reader)
    if not said and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        return f"the reading child ended with status {status}"
    return said


def _reader_child(fd: int, memory: np.ndarray, batch: np.ndarray, report: int) -> None:
    """Never returns. Kills itself: a signal from outside would come when the device is half done."""
    try:
        uring.Uring(fd, memory, len(batch)).submit(batch, len(batch))
        os.kill(os.getpid(), signal.SIGKILL)
    except (OSError, uring.UringUnavailable) as refused:
        os.write(report, str(refused).encode()[:512])
    finally:
        os._exit(1)
