"""The directory of a run: where it lies, what belongs to it, how it goes away.

Purpose: `create` makes the run directory (mode 0700) with its folders for logs and events, and the folder of the sockets.

Invariants: a directory that existed before is used only when it is empty and the user's own; only a directory without a name given by
the user is removed at the end, and sockets always are; the path of a socket fits into what the kernel takes. What a run that was
killed as a whole has left is removed by the next one (`sweep`).

Not handled here: what the files in it mean (report/, docs/).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launcher import tempdirs
from launcher.tempdirs import TemporaryFolder
from proto.errors import UserError
from swapd import swapfile

SOCKET_NAME: Final = "h"
IMAGE_NAME: Final = "image"
"""Where the host writes an image; it does not outlive the run (host/image.py FILE_NAME)."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path holds 108 bytes, one of them the terminator."""
DISK_TEMP: Final = Path("/var/tmp")  # noqa: S108 - only as the parent of a fresh 0700 directory
"""Where the file hierarchy standard puts temporary files that shall not lie in memory."""
_FOLDERS: Final = ("logs", "events")
PREFIX: Final = "asyncpf-"
SOCKETS_PREFIX: Final = "apfs-"
SHORT_TEMP: Final = Path("/tmp")  # noqa: S108 - only as the parent of fresh 0700 directories
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run directory that exists.

    temporary: removed at the end. created: it did not exist before. socket_dir: 0700 as well, mostly the same one. folders: those that
    go away with the run.
    """

    path: Path
    temporary: bool
    created: bool
    socket_dir: Path
    folders: tuple[TemporaryFolder, ...] = ()

    @property
    def socket(self) -> Path:
        """Path of the host's socket."""
        return self.socket_dir / SOCKET_NAME

    @property
    def endpoint(self) -> str:
        """The host's ZeroMQ endpoint."""
        return f"ipc://{self.socket}"

    @property
    def image(self) -> Path:
        """Where the host writes an image of the guests."""
        return self.path / IMAGE_NAME

    @property
    def cleanup(self) -> list[Path]:
        """What goes away at the end of the run, or with the launcher."""
        paths = [self.socket] if self.socket_dir == self.path else [self.socket_dir]
        return [*paths, self.path if self.temporary else self.image]

    def log(self, name: str) -> Path:
        """Log file of a process, by its name: vcpu-3."""
        return self.path / "logs" / f"{name}.log"

    def log_tail(self, name: str, lines: int = 12, bytes_max: int = 4096) -> list[str]:
        """The last lines of a process's log; none if it wrote nothing."""
        try:
            data = self.log(name).read_bytes()[-bytes_max:]
        except OSError:
            return []
        return data.decode(errors="replace").splitlines()[-lines:]

    def remove(self) -> None:
        """Remove what does not outlive the run. OSError when that fails."""
        for path in (self.socket, self.image):
            path.unlink(missing_ok=True)
        for folder in self.folders:
            folder.remove()

    def discard(self) -> None:
        """Undo `create`: the run was refused before it began."""
        self.remove()
        if not self.temporary:
            for folder in _FOLDERS:
                shutil.rmtree(self.path / folder)
            if self.created:
                # A user's file that has come meanwhile stays, and the directory with it.
                with contextlib.suppress(OSError):
                    self.path.rmdir()


def create(out: Path | None, *, on_disk: bool) -> RunDir:
    """Make the run directory: ``out``, or a temporary one without it.

    on_disk: the swap file will lie in it, so a temporary one should not lie in memory. Raises UserError.
    """
    folders: list[TemporaryFolder] = []
    if out is None:
        folders.append(tempdirs.make(PREFIX, _temporary_parent(on_disk=on_disk)))
        path, created = folders[0].path, True
    else:
        path, created = named(out)
    try:
        for name in _FOLDERS:
            (path / name).mkdir(mode=0o700)
        if not _fits(path):
            folders.append(_socket_folder(path))
        return RunDir(path, out is None, created, folders[-1].path if folders else path, tuple(folders))
    except BaseException:
        for folder in folders:
            folder.remove()
        if created and out is not None:
            shutil.rmtree(path)
        raise


def sweep() -> list[Path]:
    """Remove the temporary folders of this user's runs that were killed with all their processes; which those were."""
    parents = (Path(tempfile.gettempdir()), DISK_TEMP, SHORT_TEMP)
    return [path for prefix in (PREFIX, SOCKETS_PREFIX) for path in tempdirs.sweep(prefix, parents)]


def filesystem_of(folder: Path) -> str:
    """Name of the file system that holds a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return swapfile.fs_type_of(fd)
    finally:
        os.close(fd)


def _temporary_parent(*, on_disk: bool) -> Path:
    parent = Path(tempfile.gettempdir())
    if on_disk and filesystem_of(parent) in IN_MEMORY and _is_writable_disk(DISK_TEMP):
        return DISK_TEMP
    return parent


def _is_writable_disk(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and filesystem_of(folder) not in IN_MEMORY


def named(out: Path) -> tuple[Path, bool]:
    """Make the directory that the user named, or take it if it is empty; (absolute path, it was made). Raises UserError."""
    allowed = "a new or an empty directory of yours that can be written"
    created = not out.exists()
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError("the run directory is not empty", where="--out", found=str(out), allowed=allowed)
        if out.stat().st_uid != os.geteuid():
            # Its owner could have the sockets, or put others in their place.
            raise UserError(
                "the run directory belongs to somebody else", where="--out", found=str(out), allowed=allowed
            )
        out.chmod(0o700)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the run directory cannot be written: {error.strerror}",
            where="--out",
            found=str(out),
            allowed=allowed,
        ) from error
    return out.resolve(), created


def _socket_folder(path: Path) -> TemporaryFolder:
    """A folder with a short path for the sockets of a run directory with a long one."""
    for parent in (Path(tempfile.gettempdir()), SHORT_TEMP):
        if _fits(parent / f"{SOCKETS_PREFIX}12345678"):
            return tempdirs.make(SOCKETS_PREFIX, parent)
    raise UserError(
        "the paths of the run directory and of the temporary folder are too long for a socket",
        where="--out",
        found=str(path),
        allowed=f"at most {SOCKET_PATH_BYTES_MAX - 1 - len(SOCKET_NAME)} bytes, or a shorter TMPDIR",
    )


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX
