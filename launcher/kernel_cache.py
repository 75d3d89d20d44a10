"""Where Numba keeps compiled kernels: one folder per state of the sources.

Purpose: Numba compares only the file that a kernel stands in with what it compiled. When a callee or a
constant in another file changes, it goes on using the old machine code. So the cache folder is named after
the contents of every file that holds kernels and every file of ours that those import, directly or not.

Invariants: `prepare` comes before the first import of numba, which reads NUMBA_CACHE_DIR only then; standard
library only; a setting that is there already is kept, so child processes use the launcher's folder.

Not handled here: versions of Python, Numba and the processor, which are part of Numba's own key; kernels that
tests define, which Numba's own check covers as long as they call only their own file and the sources below.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"
SOURCE_FOLDERS = ("proto", "host", "guest", "swapd", "sim", "report")
# Settings that change the machine code but not Numba's key.
COMPILER_SETTINGS = ("NUMBA_BOUNDSCHECK", "NUMBA_OPT", "NUMBA_DEBUGINFO", "NUMBA_DEVELOPER_MODE")
KEEP_NEWEST = 2
KEEP_S = 3600.0  # a folder that was used this recently may belong to a running process
HASH_CHARS = 16

# Numba itself, and our modules of that name, which wrap its decorators.
_COMPILERS = re.compile(r"(?:numba|llvmlite)(?:\..*)?|\w+\.jit")
_IMPORT = re.compile(rb"import[ \t]+(\([^)]*\)|[^\n#]*)")
_WORD = re.compile(rb"[\w.]+")
_FOLDER_NAME = re.compile(rf"[0-9a-f]{{{HASH_CHARS}}}")


class KernelCacheError(Exception):
    """No folder for compiled kernels can be written."""


def prepare(app_dir: Path, *, installed: bool, now_s: float | None = None) -> Path:
    """Set NUMBA_CACHE_DIR for this process and its children, and remove folders of former sources.

    app_dir: the folder that holds proto/, host/ and so on.
    installed: False keeps the cache in the checkout, True in the user's cache directory.
    Raises KernelCacheError if the folder cannot be made.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    parent = _parent(app_dir, installed=installed)
    folder = parent / source_hash(app_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        raise KernelCacheError(
            f"{folder}: the folder for compiled kernels cannot be written ({error.strerror}); "
            f"set {VARIABLE} to a folder that can"
        ) from error
    _remove_stale(parent, keep=folder, now_s=time.time() if now_s is None else now_s)
    os.environ[VARIABLE] = str(folder)
    return folder


def source_hash(app_dir: Path) -> str:
    """The name of the cache folder for the sources as they are now: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=HASH_CHARS // 2)
    for name in COMPILER_SETTINGS:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    sources = _read_sources(app_dir)
    for module in _kernel_modules(sources):
        digest.update(f"{module} {len(sources[module])}\n".encode())
        digest.update(sources[module])
    return digest.hexdigest()


def _parent(app_dir: Path, *, installed: bool) -> Path:
    if not installed:
        return app_dir / ".cache" / "numba"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path is to be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "asyncpf" / "numba"


def _read_sources(app_dir: Path) -> dict[str, bytes]:
    """The text of each module, by dotted name; a package's name stands for its __init__."""
    sources = {}
    for folder in SOURCE_FOLDERS:
        for path in (app_dir / folder).rglob("*.py"):
            parts = path.relative_to(app_dir).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_bytes()
    return sources


def _kernel_modules(sources: dict[str, bytes]) -> list[str]:
    """The modules that hold kernels and all that they import of ours, sorted."""
    found: set[str] = set()
    imports = {name: set(_imported(text)) for name, text in sources.items()}
    waiting = [name for name, targets in imports.items() if any(map(_COMPILERS.fullmatch, targets))]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(imports[name] & sources.keys())
    return sorted(found)


def _imported(text: bytes) -> Iterable[str]:
    """The dotted names that a source may import; names that are no modules are harmless."""
    # A regular expression that begins with a word is several times faster than one for whole lines.
    for match in _IMPORT.finditer(text):
        head = text[text.rfind(b"\n", 0, match.start()) + 1 : match.start()].split()
        names = [word.decode() for word in _WORD.findall(match[1])]
        if not head:
            yield from names
        elif len(head) == 2 and head[0] == b"from":
            origin = head[1].decode()
            yield origin
            yield from (f"{origin}.{name}" for name in names)


def _remove_stale(parent: Path, *, keep: Path, now_s: float) -> None:
    """Remove all but the newest folders; those used within KEEP_S stay, whatever their number."""
    folders = []
    for path in parent.iterdir():
        if path != keep and _FOLDER_NAME.fullmatch(path.name):
            try:
                folders.append((path.stat().st_mtime, path))
            except FileNotFoundError:
                continue  # another start has just removed it
    folders.sort(reverse=True)
    for used_s, path in folders[KEEP_NEWEST - 1 :]:
        if now_s - used_s > KEEP_S:
            # Whatever cannot be removed (another start is doing the same) only takes space.
            shutil.rmtree(path, ignore_errors=True)


def is_filled() -> bool:
    """Whether compiled kernels of these sources are there; a guess for progress messages."""
    return _has("vcpu_run")


def has_checker() -> bool:
    """Whether the rules of the checker are there: the one that is compiled last (report/check/warm.py) is."""
    return _has("check_end")


def _has(kernel: str) -> bool:
    folder = os.environ.get(VARIABLE)
    return folder is not None and any(Path(folder).rglob(f"*.{kernel}-*.nbi"))
