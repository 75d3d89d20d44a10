"""A swap file with a name: it outlives the daemon that serves it, and says itself what is in it.

Purpose: a daemon elsewhere may be killed with its supervisor and started again, and the host must learn whether its pages are still
there. So the file has one block more than slots, which holds its `Header`.

Invariants: one supervisor at a time has the file (flock, which also the descriptors of a killed daemon hold, so that nobody gets the
lock before it is dead); a file that is no swap file of ours is never written to; `Header.file` changes whenever contents that a host may
count on can be gone: the file is new, another session took it, or the machine was started anew since (what the device or the page
cache had not written is lost then).

Not handled here: when a session begins and ends (swapd/remote.py, launcher/swapd_alone.py), the fence (swapd/swapfile.py).
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from swapd import swapfile
from swapd.swapfile import Direct, SwapFile, SwapFileError
from swapd.syscall import BLOCK_BYTES

MAGIC: Final = b"apfswap1"
_FIELDS: Final = struct.Struct("<8sQIQQ36s")
LOCK_WAIT_S: Final = 5.0
"""A predecessor that was just killed still has reads under way."""
LOCK_POLL_S: Final = 0.05
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Header:
    """file: which contents (random, u64). epoch: the last incarnation. session: the host that it works for, 0: none."""

    file: int
    epoch: int
    session: int
    slots: int
    boot: str

    def pack(self) -> bytes:
        """One block, with a checksum."""
        fields = _FIELDS.pack(MAGIC, self.file, self.epoch, self.session, self.slots, self.boot.encode())
        return (fields + xxhash.xxh3_64_digest(fields)).ljust(BLOCK_BYTES, b"\0")

    @classmethod
    def unpack(cls, block: bytes) -> Header | None:
        """None for anything but a whole header."""
        fields, digest = block[: _FIELDS.size], block[_FIELDS.size : _FIELDS.size + 8]
        if len(block) != BLOCK_BYTES or xxhash.xxh3_64_digest(fields) != digest:
            return None
        magic, file, epoch, session, slots, boot = _FIELDS.unpack(fields)
        return cls(file, epoch, session, slots, boot.decode("ascii", "replace")) if magic == MAGIC else None


class KeptFile:
    """An open, locked swap file with a name."""

    def __init__(self, file: SwapFile, path: Path) -> None:
        self.file = file
        """Its size includes the header; its `slots` do not."""
        self.path = path
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # page aligned: the file may be open for direct I/O

    def header(self) -> Header | None:
        """As it is in the file now; None if it is damaged."""
        got = os.preadv(self.file.fd, [self._block], self.file.slots * BLOCK_BYTES)
        return Header.unpack(self._block[:got])

    def put(self, header: Header) -> None:
        """Write the header. OSError when that fails."""
        self._block[:] = header.pack()
        done = os.pwritev(self.file.fd, [self._block], self.file.slots * BLOCK_BYTES)
        if done != BLOCK_BYTES:
            raise OSError(errno.EIO, f"{done} of {BLOCK_BYTES} bytes of the header written")

    def next_epoch(self, *, keep_session: bool) -> Header:
        """Number the next incarnation, in the file first. keep_session: the host's pages are still wanted.

        To be called after the fence of the last one. Raises OSError, `SwapFileError`.
        """
        before = self.header()
        if before is None:
            raise SwapFileError(f"swap file: the header of {self.path} is damaged")
        same = keep_session and before.session != 0 and before.boot == _boot()
        after = dataclasses.replace(
            before,
            epoch=before.epoch + 1,
            session=before.session if same else 0,
            file=before.file if same else _new_contents(),
            boot=_boot(),
        )
        self.put(after)
        return after

    def fence(self) -> None:
        """See `swapd.swapfile.fence`."""
        swapfile.fence(self.file.fd, self.file.size_bytes)

    def close(self) -> None:
        """Give descriptor and lock back."""
        self.file.close()
        self._block.close()


def open_kept(
    path: Path, slots: int, *, default_slots: int = 1, direct: Direct = "auto", allow_tmpfs: bool = False
) -> KeptFile:
    """Open or make the file. slots: 0 takes what an existing file has, and for a new one ``default_slots``.

    Raises `SwapFileError` for a file that is somebody else's, in use, of another size, or where it cannot be.
    """
    fd = _open(path)
    try:
        _lock(fd, path)
        status = os.fstat(fd)
        header = None
        if not status.st_size:
            slots = slots or default_slots
        else:
            header = _header_of(fd, path, status.st_size, slots)
            slots = header.slots
        size_bytes = (slots + 1) * BLOCK_BYTES
        is_direct = swapfile.prepare(
            fd, path, swapfile.fs_type_of(fd), size_bytes, direct, allow_tmpfs=allow_tmpfs
        )
        kept = KeptFile(SwapFile(fd, size_bytes, slots, swapfile.fs_type_of(fd), is_direct), path)
        if header is None:
            kept.put(Header(_new_contents(), 0, 0, slots, _boot()))
    except BaseException:
        os.close(fd)
        raise
    return kept


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise SwapFileError(f"swap file: cannot open {path}: {error.strerror}") from error
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        os.close(fd)
        raise
    if not regular:
        os.close(fd)
        raise SwapFileError(f"swap file: {path} is no regular file")
    return fd


def _lock(fd: int, path: Path) -> None:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise SwapFileError(f"swap file: {path} is in use by another daemon") from None
            time.sleep(LOCK_POLL_S)
        else:
            return


def _header_of(fd: int, path: Path, size_bytes: int, slots: int) -> Header:
    """The header of a file that is there. `SwapFileError` if it has none: then it is not ours to write to. slots: 0 or as wanted."""
    # A fence that was cut short leaves one block too much.
    for blocks in (size_bytes // BLOCK_BYTES, size_bytes // BLOCK_BYTES - 1):
        if size_bytes % BLOCK_BYTES or blocks < 2:
            break
        header = Header.unpack(os.pread(fd, BLOCK_BYTES, (blocks - 1) * BLOCK_BYTES))
        if header is not None and header.slots == blocks - 1:
            if slots not in (0, header.slots):
                raise SwapFileError(
                    f"swap file: {path} has {header.slots} slots, {slots} were asked for"
                    " (allowed: the size it has, or another file)"
                )
            os.ftruncate(fd, blocks * BLOCK_BYTES)
            return header
    raise SwapFileError(f"swap file: {path} exists and is no swap file of ours (allowed: a new file)")


def _new_contents() -> int:
    return secrets.randbits(64)


def _boot() -> str:
    return BOOT_ID.read_text().strip()[:36]
