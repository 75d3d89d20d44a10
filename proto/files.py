"""Reading small files that a user names: never more than a limit, never a pipe or a device, every failure a `UserError`; and writing
what must not be written in part.

Not handled here: what is in them; files that are read piece by piece (event files, traces, images).
"""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any, Final

from proto.errors import UserError

TOML_BYTES_MAX: Final = 1 << 20
"""Of a topology, a scenario, a plan: a thousand tasks take a tenth of it."""


def read_regular(path: Path, what: str, most: int, allowed: str) -> bytes:
    """The whole of a regular file of at most so many bytes. what: "scenario", for the message; allowed: what is wanted instead.

    Raises UserError. Does not wait for the writer of a pipe, nor read a device that has no end.
    """
    where = str(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            regular = stat.S_ISREG(status.st_mode)
            # Room is made for as much as is asked for: no more than there is, or one byte too many.
            data = file.read(min(status.st_size, most) + 1) if regular else b""
    except OSError as error:
        raise UserError(
            f"the {what} cannot be read", where=where, found=error.strerror, allowed=allowed
        ) from error
    if not regular:
        raise UserError(f"the {what} is no regular file", where=where, allowed=allowed)
    if len(data) > most:
        raise UserError(f"the {what} is too large", where=where, allowed=f"{allowed}, at most {most} bytes")
    return data


def parse_toml(data: bytes, where: str, allowed: str) -> tuple[dict[str, Any], str]:
    """(tables, text) of a TOML file. Raises UserError, also for numbers and nesting that no parser takes."""
    try:
        text = data.decode()
        return tomllib.loads(text), text
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a TOML file: {error}", where=where, allowed=allowed) from error


def is_there(path: Path, *, folder: bool = False) -> bool:
    """Whether there is a file, or a folder, of that name; a name that cannot be one (too long) is not there."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:
        return False


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, in several calls where the system takes less at a time. OSError when it takes no more."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
