"""From a bare Python to one that can import the dependencies: `.venv` in the checkout, and a restart in it.

Purpose: `python3 launch.py` works on a machine with Python, the venv module and a package index, nothing
else. An interpreter that can import what is needed goes on at once; versions are not compared, only the
virtual environment that this file makes is held to the locked versions.

Invariants
* Standard library only; nothing is written outside the checkout.
* `.venv` belongs to us only if it holds the file MARKER, written before anything else in it. One that does
  not is used if it serves, and never changed.
* The file STAMP is written last and names the locked requirement sets that are completely installed, by the
  hash of their lock files. An interrupted bootstrap leaves none, and the next start begins afresh.
* Two bootstraps at a time exclude each other by a file lock, which the kernel releases whatever happens to
  its holder.

Not handled here: upgrading in place (a changed lock file rebuilds the environment), systems other than Linux,
and packages without a wheel for this machine (pip says so; nothing is compiled).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from launcher import kernel_cache

Needs = Literal["run", "test", "plot"]

APP_DIR = Path(__file__).resolve().parent.parent
_RUN_MODULES = ("zmq", "msgpack", "numba", "numpy", "xxhash", "setproctitle")
MODULES: Mapping[Needs, tuple[str, ...]] = {
    "run": _RUN_MODULES,
    "test": (*_RUN_MODULES, "pytest", "pytest_timeout", "xdist", "hypothesis"),
    "plot": (*_RUN_MODULES, "matplotlib"),
}
# The larger lock files contain the run lock file, and all have equal versions of what they share.
CONTAINS: Mapping[Needs, tuple[Needs, ...]] = {
    "run": ("run",),
    "test": ("run", "test"),
    "plot": ("run", "plot"),
}
WITH_EXTRA: Mapping[Needs, str] = {"plot": "asyncpf[plot]"}
"""What an installer is asked for, where that is not everything."""
MARKER = "made-by-asyncpf"
STAMP = "asyncpf-complete.json"
LOCK_WAIT_S = 1800.0
LOCK_POLL_S = 0.2
VENV_ADVICE = (
    "on Debian and Ubuntu these are in the package python3-venv "
    f"(python{sys.version_info.major}.{sys.version_info.minor}-venv): apt install python3-venv"
)


class BootstrapError(Exception):
    """The dependencies cannot be provided; the message says what is missing and what to do."""


Runner = Callable[[Sequence[str], Mapping[str, str]], int]
"""Runs a command with an environment, its output on our stderr, and returns its exit code."""


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; its output goes to stderr, since stdout belongs to the command asked for."""
    done = subprocess.run(
        command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
    )
    return done.returncode


def say(text: str) -> None:
    """One plain line about what is being done."""
    sys.stderr.write(f"asyncpf: {text}\n")
    sys.stderr.flush()


def prepare(needs: Needs, arguments: Sequence[str], *, installed: bool) -> None:
    """Return in an interpreter that can import what `needs` names, with NUMBA_CACHE_DIR set.

    Replaces this process by one in `.venv` if this interpreter lacks something. Raises BootstrapError.
    """
    if not sys.platform.startswith("linux"):
        raise BootstrapError(f"asyncpf needs Linux (memfd, eventfd, process signals); this is {sys.platform}")
    missing = missing_modules(needs)
    if missing and installed:
        raise BootstrapError(
            f"not installed: {', '.join(missing)}; install {WITH_EXTRA.get(needs, 'asyncpf')} again, with its dependencies"
        )
    if missing:
        python = Environment(APP_DIR).ensure(needs, missing)
        restart([str(python), str(APP_DIR / "launch.py"), *arguments])
    try:
        kernel_cache.prepare(APP_DIR, installed=installed)
    except kernel_cache.KernelCacheError as error:
        raise BootstrapError(str(error)) from error


def missing_modules(needs: Needs) -> list[str]:
    """The modules of a requirement set that this interpreter cannot find; nothing is imported."""
    return [name for name in MODULES[needs] if importlib.util.find_spec(name) is None]


def restart(command: list[str]) -> NoReturn:
    """Replace this process by another program, which keeps the process id and the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - there is no shell, and none is wanted


@dataclass
class Environment:
    """The virtual environment of one checkout.

    root: the checkout. run: how commands are run. prefix: where this interpreter lives.
    """

    root: Path
    run: Runner = run_command
    prefix: Path = Path(sys.prefix)
    lock_wait_s: float = LOCK_WAIT_S

    @property
    def folder(self) -> Path:
        """The virtual environment, whether it exists or not."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """The interpreter inside it."""
        return self.folder / "bin" / "python"

    def lock_file(self, needs: Needs) -> Path:
        """The locked, hashed requirements of a set."""
        return self.root / "requirements" / f"{needs}.txt"

    def ensure(self, needs: Needs, missing: Sequence[str]) -> Path:
        """The interpreter of an environment that holds the requirement set; made or completed if need be.

        missing: what this interpreter lacks. Raises BootstrapError.
        """
        if self._complete(needs):
            if self._inside():
                # We run inside it and still miss something: another restart would change nothing.
                raise BootstrapError(
                    f"{self.folder} is damaged (not found: {', '.join(missing)}): remove it and start again"
                )
            return self.python
        try:
            with self._exclusive():
                if not self._complete(needs):
                    self._provide(needs, missing)
        except OSError as error:
            raise BootstrapError(f"{error.filename or self.root}: {error.strerror or error}") from error
        return self.python

    def _provide(self, needs: Needs, missing: Sequence[str]) -> None:
        """Make the environment, complete it, or find that somebody else's serves; the lock is held."""
        if self.folder.exists() and not (self.folder / MARKER).exists():
            self._use_foreign(needs)
            return
        say(f"this Python ({sys.executable}) has no {', '.join(missing)}")
        lock_text = self.lock_file(needs).read_bytes()
        if not self._complete("run"):
            self._make()
        self._install(needs, lock_text)
        say(f"{self.folder} is complete; starting in it")

    def _use_foreign(self, needs: Needs) -> None:
        """Accept an environment that we did not make if it has all modules; otherwise refuse to touch it."""
        program = "import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))"
        command = [str(self.python), "-c", program, *MODULES[needs]]
        if self._inside() or not self.python.exists() or self.run(command, os.environ) != 0:
            raise BootstrapError(
                f"{self.folder} was not made by launch.py and lacks some of {', '.join(MODULES[needs])}: "
                "remove it, or install them there: "
                f"{self.python} -m pip install --require-hashes -r {self.lock_file(needs)}"
            )

    def _make(self) -> None:
        """A new, empty virtual environment; a former one of ours is removed."""
        check_venv_modules()
        for leftover in self.root.glob(".venv.tmp-*"):
            shutil.rmtree(leftover)
        # Removed and made under another name: an interruption must not leave a .venv without the marker.
        temporary = self.root / f".venv.tmp-{os.getpid()}"
        if self.folder.exists():
            say(f"{self.folder} is incomplete or out of date: removing it")
            self.folder.rename(temporary)
            shutil.rmtree(temporary)
        say(f"making a virtual environment in {self.folder}")
        temporary.mkdir()
        (temporary / MARKER).write_text("launch.py made this folder and removes it when it is out of date.\n")
        temporary.rename(self.folder)
        # Inside a virtual environment, the interpreter that it was made from: ours may be about to go away.
        python = getattr(sys, "_base_executable", None) or sys.executable
        if self._run_with_temporary_folder([python, "-I", "-m", "venv", str(self.folder)]) != 0:
            raise BootstrapError(f"{python} -m venv failed, its message is above; {VENV_ADVICE}")

    def _install(self, needs: Needs, lock_text: bytes) -> None:
        """Install the locked requirements, then write the stamp. What was complete before stays so: versions are equal."""
        before = [name for name in CONTAINS if self._complete(name)]
        (self.folder / STAMP).unlink(missing_ok=True)
        count = sum(b"==" in line and line[:1].isalnum() for line in lock_text.splitlines())
        say(f"installing {count} packages, checked by hash ({self.lock_file(needs)}); it may take a minute")
        options = ["--require-hashes", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--quiet"]
        pip = [str(self.python), "-I", "-m", "pip", "--disable-pip-version-check", "install", *options]
        code = self._run_with_temporary_folder([*pip, "--requirement", str(self.lock_file(needs))])
        if code != 0:
            raise BootstrapError(
                f"pip could not install {self.lock_file(needs)} (exit code {code}), its message is above; "
                "is the package index reachable? The next start begins afresh"
            )
        digest = hashlib.sha256(lock_text).hexdigest()
        sets = {name: digest if name == needs else self._digest(name) for name in (*before, *CONTAINS[needs])}
        stamp = {"python": os.path.realpath(self.python), "sets": sets}
        temporary = self.folder / f"{STAMP}.new"
        temporary.write_text(json.dumps(stamp))
        temporary.replace(self.folder / STAMP)

    def _run_with_temporary_folder(self, command: Sequence[str]) -> int:
        """Run a command whose temporary files stay inside the environment's folder."""
        temporary = self.folder / ".tmp"
        temporary.mkdir(exist_ok=True)
        try:
            return self.run(command, {**os.environ, "TMPDIR": str(temporary)})
        finally:
            shutil.rmtree(temporary)

    def _complete(self, needs: Needs) -> bool:
        """Whether the stamp names the set with the lock file of now, for an interpreter that still exists."""
        try:
            stamp = json.loads((self.folder / STAMP).read_text())
            python, digest = stamp["python"], stamp["sets"][needs]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return False  # none, or not one that we write: the same as an interrupted bootstrap
        same_python = self.python.exists() and os.path.realpath(self.python) == python
        return same_python and digest == self._digest(needs)

    def _inside(self) -> bool:
        """Whether this interpreter is the one of the environment."""
        return self.folder.exists() and self.folder.samefile(self.prefix)

    def _digest(self, needs: Needs) -> str:
        return hashlib.sha256(self.lock_file(needs).read_bytes()).hexdigest()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the bootstrap lock of this checkout; waits for another holder, at most lock_wait_s."""
        path = self.root / ".cache" / "bootstrap.lock"
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            deadline_s = time.monotonic() + self.lock_wait_s
            waiting = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        raise BootstrapError(
                            f"{path} was held for {self.lock_wait_s:.0f} s by another start"
                        ) from None
                if not waiting:
                    say("another start is preparing the virtual environment: waiting for it")
                    waiting = True
                time.sleep(LOCK_POLL_S)
            yield


def check_venv_modules() -> None:
    """Raise BootstrapError, naming the package, if this Python comes without venv or ensurepip."""
    lacking = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if lacking:
        raise BootstrapError(
            f"this Python ({sys.executable}) has no module {' and '.join(lacking)}; {VENV_ADVICE}"
        )
