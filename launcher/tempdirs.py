"""Temporary folders that the next start removes when their owner was killed.

Purpose: `make` a folder that is its owner's as long as the process lives, `remove` it, and `sweep` away those whose owner is gone.

A folder holds a lock file, and its owner holds the lock (flock), which the kernel releases whatever happens to the process. The file
gets its name when it is locked already: whoever finds it unlocked knows that the owner has ended.

Invariants: removed is only a folder of this user that nobody else can write to, with the name that `make` gives, and either a lock file
that nobody holds or nothing in it (but a lock file without its name) for `EMPTY_S`: then its owner was killed before it had locked it,
or after it had emptied it.
The lock file goes last, so that a removal that was cut short is taken up by the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

LOCK_NAME: Final = ".lock"
UNLOCKED_NAME: Final = ".lock.new"
EMPTY_S: Final = 3600.0
"""Age of an empty folder that nobody is about to lock any more: between making and locking it there are three system calls."""
_RANDOM: Final = "[a-z0-9_]{8}"
"""As tempfile.mkdtemp makes them."""


class TemporaryFolder:
    """A folder of this process, mode 0700, until `remove`."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        """Use `make`."""
        self.path = path
        self._lock_fd = lock_fd

    def __enter__(self) -> Path:
        """Its path; leaving the block removes it."""
        return self.path

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()

    def remove(self) -> None:
        """Remove the folder, if it is still there, and let the lock go. OSError when that fails."""
        if self._lock_fd < 0:
            return
        try:
            if self.path.exists():
                _remove(self.path)
        finally:
            os.close(self._lock_fd)
            self._lock_fd = -1


def make(prefix: str, parent: Path) -> TemporaryFolder:
    """A new folder in ``parent``: the prefix and eight random characters. OSError when it cannot be made."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    unlocked = path / UNLOCKED_NAME
    fd = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(path / LOCK_NAME)
    except OSError:
        os.close(fd)
        shutil.rmtree(path)
        raise
    return TemporaryFolder(path, fd)


def sweep(prefix: str, parents: Collection[Path]) -> list[Path]:
    """Remove the folders with that prefix whose owner is gone; which those were. What cannot be removed stays."""
    name = re.compile(re.escape(prefix) + _RANDOM)
    removed: list[Path] = []
    for parent in dict.fromkeys(parents):
        with contextlib.suppress(OSError):
            found = [path for path in parent.iterdir() if name.fullmatch(path.name)]
            removed += filter(_remove_if_left, found)
    return removed


def _remove_if_left(path: Path) -> bool:
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return False
        fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # nothing that `make` has finished
        return _remove_if_empty(path)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink == 0:
            return False  # another start was faster
        _remove(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _remove_if_empty(path: Path) -> bool:
    with contextlib.suppress(OSError):  # gone already, or something is in it
        if time.time() - path.lstat().st_mtime > EMPTY_S:
            if [entry.name for entry in path.iterdir()] == [UNLOCKED_NAME]:
                (path / UNLOCKED_NAME).unlink()
            path.rmdir()
            return True
    return False


def _remove(folder: Path) -> None:
    """Remove a folder, its lock file last."""
    for entry in folder.iterdir():
        if entry.name == LOCK_NAME:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    folder.rmdir()
