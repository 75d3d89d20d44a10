"""Which calls may fail, and how: the one table that says it for the whole product.

A call is known by its text in the source (``os.pread``, ``self.router.send``). `WAYS` maps patterns of such texts to the faults that the
call can really have; `HARMLESS` are patterns of calls that look like I/O and cannot fail for reasons outside of the program.

Not here: system calls that Python or pyzmq begin anew by themselves after EINTR, and errors that only a bug of ours could cause (EBADF,
EFAULT, EINVAL, ENOTSOCK).
"""

from __future__ import annotations

import ctypes
import errno
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import zmq

Call = Callable[..., Any]


class Fault(NamedTuple):
    """One way to fail. ``apply(call, args, kwargs)`` is done in the place of the call."""

    name: str
    apply: Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
    raises: bool = False


class Injected:
    """Mixed into every exception that is raised here, so that it is known again."""


class InjectedOSError(Injected, OSError):
    pass


class InjectedBlocking(Injected, BlockingIOError):
    pass


class InjectedMemoryError(Injected, MemoryError):
    pass


class InjectedThreadError(Injected, RuntimeError):
    pass


class InjectedZMQError(Injected, zmq.ZMQError):
    pass


class InjectedAgain(Injected, zmq.Again):
    pass


def _raises(name: str, make: Callable[[], BaseException]) -> Fault:
    def apply(_call: Call, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        raise make()

    return Fault(name, apply, raises=True)


def os_error(code: int) -> Fault:
    """OSError before anything was done."""
    name = errno.errorcode[code]
    if code == errno.EAGAIN:
        return _raises(name, lambda: InjectedBlocking(code, name))
    return _raises(name, lambda: InjectedOSError(code, f"injected {name}"))


def zmq_error(code: int) -> Fault:
    """ZMQError before anything was done."""
    name = errno.errorcode[code]
    if code == errno.EAGAIN:
        return _raises(name, InjectedAgain)
    return _raises(name, lambda: InjectedZMQError(code))


def _returns(name: str, value: Any) -> Fault:
    return Fault(name, lambda _call, _args, _kwargs: value)


def _c_error(code: int, value: int = -1) -> Fault:
    """A C function by ctypes: what it returns, and errno."""

    def apply(_call: Call, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> int:
        ctypes.set_errno(code)
        return value

    return Fault(errno.errorcode[code], apply)


def _half_written(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(args[0], args[1][: len(args[1]) // 2], *args[2:], **kwargs)


def _half_read(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    got = call(*args, **kwargs)
    return got[: len(got) // 2] if isinstance(got, bytes) else got // 2


def _closed_badly(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A close that reports an earlier failure has closed all the same."""
    call(*args, **kwargs)
    raise InjectedOSError(errno.EIO, "injected EIO")


def _not_entered(code: int) -> Fault:
    """io_uring_enter refuses: the entries are in the ring, and nobody was told."""

    def apply(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        geo = args[2 if len(args) > 2 else 1]
        ring_fd, geo[0] = int(geo[0]), -1
        try:
            call(*args, **kwargs)
        finally:
            geo[0] = ring_fd
        return -code

    return Fault(errno.errorcode[code], apply)


def _reaped(name: str, result: int) -> Fault:
    """The first operation that came back was no success."""

    def apply(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        count: int = call(*args, **kwargs)
        if count:
            args[-1][0, 1] = result
        return count

    return Fault(name, apply)


MEMORY: Final = _raises("MemoryError", InjectedMemoryError)
NO_THREAD: Final = _raises("no thread", lambda: InjectedThreadError("can't start new thread"))
NOTHING: Final = _returns("nothing", [])
SHORT_WRITE: Final = Fault("short", _half_written)
SHORT_READ: Final = Fault("short", _half_read)
BAD_CLOSE: Final = Fault("EIO", _closed_badly, raises=True)
MMAP_FAILED: Final = ctypes.c_void_p(-1).value


def _os(*codes: int) -> tuple[Fault, ...]:
    return tuple(os_error(code) for code in codes)


def _zmq(*codes: int) -> tuple[Fault, ...]:
    return tuple(zmq_error(code) for code in codes)


class Way(NamedTuple):
    """``calls``: pattern of the call's text; ``within``: pattern that the call with its arguments has to contain."""

    calls: str
    faults: tuple[Fault, ...]
    within: str = ""


_E = errno
_REAP: Final = (
    _reaped("EIO", -_E.EIO), _reaped("short", 512), _reaped("EAGAIN", -_E.EAGAIN), _reaped("EINTR", -_E.EINTR),
    _reaped("ENOSPC", -_E.ENOSPC),
)  # fmt: skip
WAYS: Final = (
    # Messages.
    Way(r"(self\.)?_?router\.send", _zmq(_E.EAGAIN, _E.EHOSTUNREACH), r"SNDMORE"),
    Way(r"(self\.)?_?router\.send", (MEMORY,)),
    Way(r"self\.router\.send_multipart", (*_zmq(_E.EAGAIN, _E.EHOSTUNREACH), MEMORY)),
    Way(r"(self|daemon)\.socket\.send_multipart", (*_zmq(_E.EAGAIN, _E.EHOSTUNREACH), MEMORY), r"identity"),
    Way(r"(self|daemon)\.socket\.send_multipart", (*_zmq(_E.EAGAIN), MEMORY)),
    Way(r"(self\.)?_?router\.recv", (*_zmq(_E.EAGAIN), MEMORY), r"NOBLOCK"),
    Way(r"(self\.)?_?router\.recv", (MEMORY,)),
    Way(r"(\w+\.)*(socket|monitor)\.recv_multipart", (*_zmq(_E.EAGAIN), MEMORY)),
    Way(r"self\.poller\.poll", (NOTHING, MEMORY)),
    Way(r"zmq\.Context", _zmq(_E.EMFILE)),
    Way(r"context\.socket", _zmq(_E.EMFILE)),
    Way(r"socket\.get_monitor_socket", _zmq(_E.EMFILE)),
    Way(r"(\w+\.)*(socket|router)\.bind", _zmq(_E.EADDRINUSE, _E.ENOMEM)),
    Way(r"socket\.connect", _zmq(_E.ENOMEM)),
    Way(r"wire\.(en|de)code", (MEMORY,)),
    # Files and descriptors.
    Way(r"os\.open", _os(_E.EMFILE, _E.ENOSPC, _E.EACCES)),
    Way(r"(\w+\.)*path\.open", _os(_E.EMFILE, _E.EIO)),
    Way(r"os\.fdopen", (MEMORY,)),
    Way(r"os\.read", _os(_E.EAGAIN)),
    Way(r"os\.write", (*_os(_E.ENOSPC, _E.EIO), SHORT_WRITE)),
    Way(r"self\._file\.(write|flush)", _os(_E.ENOSPC, _E.EIO)),
    Way(r"self\._file\.read", _os(_E.EIO)),
    Way(r"self\._file\.close", (BAD_CLOSE,)),
    Way(r"os\.preadv?", (*_os(_E.EIO), SHORT_READ)),
    Way(r"os\.pwrite", _os(_E.ENOSPC, _E.EIO)),
    Way(r"os\.pwritev", (*_os(_E.ENOSPC, _E.EIO), SHORT_READ)),
    Way(r"os\.(fstat|fstatvfs)", _os(_E.EIO)),
    Way(r"os\.ftruncate", _os(_E.EIO, _E.ENOSPC)),
    Way(r"os\.posix_fallocate", _os(_E.ENOSPC, _E.EIO)),
    Way(r"os\.close", (BAD_CLOSE,)),
    Way(r"os\.(eventfd|pidfd_open)", _os(_E.EMFILE, _E.ENOMEM)),
    Way(r"os\.memfd_create", _os(_E.EMFILE, _E.ENOMEM)),
    Way(r"fcntl\.flock", _os(_E.EAGAIN, _E.ENOLCK)),
    Way(r"\w+(\.parent)?\.mkdir|folder\.mkdir", _os(_E.ENOSPC, _E.EACCES)),
    # Memory.
    Way(r"mmap\.mmap", _os(_E.ENOMEM)),
    Way(r"self\._map\.madvise", _os(_E.EAGAIN)),
    Way(
        r"np\.(zeros|empty|full|ones|arange|array|asarray|isin|ascontiguousarray|concatenate|stack|frombuffer|flatnonzero|ctypeslib\.as_array)",
        (MEMORY,),
    ),
    Way(r"bytes|bytearray|(\w+\.)*tobytes|(\S+\.)tobytes", (MEMORY,)),
    Way(r"self\._pack|msgpack\.packb", (MEMORY,)),
    # The C library.
    Way(r"_libc\.timerfd_create", (_c_error(_E.EMFILE),)),
    Way(r"_libc\.mmap", (_c_error(_E.ENOMEM, MMAP_FAILED or -1),)),
    Way(r"_libc\.madvise", (_c_error(_E.EAGAIN),)),
    Way(r"_libc_syscall", (_returns("EMFILE", -_E.EMFILE), _returns("ENOMEM", -_E.ENOMEM), _returns("EPERM", -_E.EPERM))),
    Way(r".*\.fstatfs", (_c_error(_E.EIO),)),
    # Input and output in compiled code.
    Way(r"_(push|flush)", (_not_entered(_E.EAGAIN), _not_entered(_E.EBUSY), _not_entered(_E.EINTR), _not_entered(_E.ENOMEM))),
    Way(r"_collect", _REAP),
    Way(r"select\.select", (_returns("nothing", ([], [], [])),)),
    Way(r"thread\.start", (NO_THREAD,)),
)  # fmt: skip

HARMLESS: Final[dict[str, str]] = {
    r"np\.(u?int\d+|dtype|array_equal|ctypeslib.*|random.*)": "types and comparisons of numbers",
    r"np\.(any|count_nonzero)": "one number",
    r"os\.(WIF\w+|WTERMSIG|getpid|getppid|strerror|fspath|kill|_exit|urandom|waitpid|fork|pipe)": "no resource, or only of a child process",
    r"os\.lseek": "fails only for a descriptor that is none of a file",
    r"os\.eventfd_write": "fails only after 2^64 - 2 rings that nobody cleared",
    r"os\.set_inheritable": "fails only for a bad descriptor",
    r"fcntl\.fcntl": "flags and seals of a descriptor of ours",
    r"zmq\.Poller|(self\.)?_?poller\.\w+": "lists of this process",
    r"(\w+\.)*(socket|context|router|monitor)\.(setsockopt|set|get|close|disable_monitor|destroy)": "options of ours, ends",
    r"_libc\.(munmap|timerfd_settime)": "fail only for arguments that are no such thing",
    r"self\._file\.(seek|tell|fileno)": "a regular file",
    r"zmq\.curve_\w+": "arithmetic",
    r"select\.(poll|POLLIN)": "a list of this process",
    r"mmap\.(MAP|PROT)\w*": "constants",
    r"ctypes\.\w+": "views, no memory of note",
    r"tempfile\.mkstemp": "only where O_TMPFILE is not known",
}
"""Pattern -> why a call of that text is no site."""

SUSPECT: Final = re.compile(
    r"(os|np|mmap|fcntl|zmq|select|tempfile|_libc)\..*|.*(socket|router|monitor|poller|_file|context)\.\w+|_libc_syscall|_push|_flush|_collect"
)
"""Calls that have to be either in `WAYS` or in `HARMLESS`."""


def faults_of(call: str, whole: str) -> tuple[Fault, ...]:
    """How a call may fail; ``whole``: with its arguments. Empty: it is no site."""
    for way in WAYS:
        if re.fullmatch(way.calls, call) and re.search(way.within, whole):
            return way.faults
    return ()


def is_harmless(call: str) -> bool:
    """Whether it is known why the call is no site."""
    return any(re.fullmatch(pattern, call) for pattern in HARMLESS)
