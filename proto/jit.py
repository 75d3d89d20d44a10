"""Typed wrappers around Numba, so that strict type checking sees through the decorators.

Every kernel of the project goes through `kernel` (called from Python and from other kernels) or `inline` (small helpers inlined
into their callers). `lean_kernel` and `lean_inline` are the same without reference counting of arrays: Numba counts with atomic
operations wherever an array is taken out of a tuple or sliced, which in the guest's run loop was more than half of the time (15
instead of 2.5 ns per operation of a counting task). They may only borrow the arrays they are given: the caller keeps them alive, and
the kernel allocates nothing and returns no array (Numba refuses what would not be safe).

All are compiled once per signature and cached on disk; the bootstrap points NUMBA_CACHE_DIR at a folder
named after the sources, because Numba does not notice that a callee in another file has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(fn: F) -> F:
    """Compile ``fn`` in nopython mode, without the GIL, cached. Division by zero follows Python (no surprise infinities)."""
    return cast(F, numba.njit(cache=True, nogil=True)(fn))


def inline(fn: F) -> F:
    """Compile ``fn`` as a helper that LLVM inlines into the kernels that call it."""
    return cast(F, numba.njit(cache=True, nogil=True, inline="never", forceinline=True)(fn))


def lean_kernel(fn: F) -> F:
    """As `kernel`, without reference counts."""
    return cast(F, numba.njit(cache=True, nogil=True, _nrt=False)(fn))


def lean_inline(fn: F) -> F:
    """As `inline`, without reference counts."""
    return cast(F, numba.njit(cache=True, nogil=True, forceinline=True, _nrt=False)(fn))
