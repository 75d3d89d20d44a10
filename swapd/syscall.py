"""System calls from nopython code, and the few kernel numbers the I/O engines need.

Purpose: one intrinsic, `syscall`, for compiled code that runs without the GIL. It returns what the kernel
returned: a value >= 0 or a negative errno. The libc symbol is bound by name when the machine code is loaded,
so the compiled code can be cached on disk (a function pointer taken from ctypes could not: it is another
address in each process).

Invariants: arguments are integers and are passed as they are; an address given to a call must stay mapped
until the call, and any I/O that it started, is over. Little-endian 64-bit Linux only, on the two machine
types listed below.

Deliberately not handled: retries. EINTR and EAGAIN are results like any other; who retries, and how often, is
the caller's decision.
"""

from __future__ import annotations

import errno
import os
import platform
from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK_BYTES = 4096  # a guest page, a swap slot and a host frame are all of this size

_NUMBERS = {  # machine: read, write, pread64, pwrite64, futex
    "x86_64": (0, 1, 17, 18, 202),
    "aarch64": (63, 64, 67, 68, 98),
}
if platform.machine() not in _NUMBERS:
    raise ImportError(
        f"swapd: machine type {platform.machine()!r} is not supported (allowed: {', '.join(_NUMBERS)})"
    )
NR_READ, NR_WRITE, NR_PREAD, NR_PWRITE, NR_FUTEX = _NUMBERS[platform.machine()]
NR_IO_URING_SETUP, NR_IO_URING_ENTER, NR_IO_URING_REGISTER = 425, 426, 427  # the same on both

FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE = 128, 129
EAGAIN, EINTR, EBUSY = errno.EAGAIN, errno.EINTR, errno.EBUSY


def errno_text(code: int) -> str:
    """``-11`` or ``11`` -> ``'EAGAIN (Resource temporarily unavailable)'``."""
    number = abs(code)
    return f"{errno.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


if TYPE_CHECKING:

    def syscall(nr: int, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> int:
        """System call ``nr`` with six integer arguments; returns the result, or ``-errno``."""

else:

    @intrinsic
    def syscall(typingctx, nr, a, b, c, d, e, f):
        def codegen(context, builder, sig, args):
            i64, i32 = ir.IntType(64), ir.IntType(32)
            module = builder.module
            entry = cgutils.get_or_insert_function(
                module, ir.FunctionType(i64, [i64], var_arg=True), "syscall"
            )
            errno_of_thread = cgutils.get_or_insert_function(
                module, ir.FunctionType(i32.as_pointer(), []), "__errno_location"
            )
            words = [
                context.cast(builder, value, kind, types.int64)
                for value, kind in zip(args, sig.args, strict=True)
            ]
            result = builder.call(entry, words)
            slot = cgutils.alloca_once_value(builder, result)
            with builder.if_then(builder.icmp_signed("==", result, i64(-1)), likely=False):
                code = builder.load(builder.call(errno_of_thread, []), typ=i32)
                builder.store(builder.neg(builder.sext(code, i64)), slot)
            return builder.load(slot, typ=i64)

        return types.int64(nr, a, b, c, d, e, f), codegen
