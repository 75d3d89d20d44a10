"""Atomic operations on words of shared arrays, usable inside kernels.

Every word that another process may write is read with `load`; a plain read may be hoisted out of a polling loop by the compiler
(measured: a plain ``while a[0] == 0`` never noticed the other process's store). All functions take a C-contiguous 1-D array of
uint64 (or uint32, int64) and an index that the caller has bounded; there is no bounds check.

Orderings: `load` acquire, `store` release, `store_sc` sequentially consistent (an xchg; needed where a store must be visible before
a later load of *another* word, the Dekker pattern of guest entry), read-modify-writes sequentially consistent.
"""

# The intrinsics' inner functions have the (context, builder, signature, args) shape that Numba prescribes.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from proto.jit import kernel

if TYPE_CHECKING:

    def load(arr: Any, index: Any) -> Any:
        """Acquire load of ``arr[index]``."""

    def store(arr: Any, index: Any, value: Any) -> None:
        """Release store of ``value`` into ``arr[index]``."""

    def store_sc(arr: Any, index: Any, value: Any) -> None:
        """Sequentially consistent store: later loads of other words are not moved before it."""

    def cmpxchg(arr: Any, index: Any, expected: Any, value: Any) -> Any:
        """Compare and exchange; returns the word found (equal to ``expected`` on success)."""

    def add(arr: Any, index: Any, value: Any) -> Any:
        """Fetch-and-add; returns the old word."""

    def fetch_or(arr: Any, index: Any, value: Any) -> Any:
        """Fetch-and-or; returns the old word."""

    def fetch_and(arr: Any, index: Any, value: Any) -> Any:
        """Fetch-and-and; returns the old word."""

    def xchg(arr: Any, index: Any, value: Any) -> Any:
        """Exchange; returns the old word."""

    def fence() -> None:
        """Full barrier."""

    def pause() -> None:
        """The spin-wait hint (PAUSE)."""

else:

    def _pointer(context, builder, arr_type, arr, index, index_type):
        array = context.make_array(arr_type)(context, builder, arr)
        idx = context.cast(builder, index, index_type, types.intp)
        element = context.get_data_type(arr_type.dtype)
        return builder.gep(array.data, [idx], inbounds=True, source_etype=element), element

    def _width(arr_type):
        return arr_type.dtype.bitwidth // 8

    @intrinsic
    def load(typingctx, arr, index):
        def codegen(context, builder, sig, args):
            ptr, element = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1])
            return builder.load_atomic(ptr, "acquire", _width(sig.args[0]), typ=element)

        return arr.dtype(arr, index), codegen

    def _store(ordering):
        def build(typingctx, arr, index, value):
            def codegen(context, builder, sig, args):
                ptr, _ = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1])
                word = context.cast(builder, args[2], sig.args[2], sig.args[0].dtype)
                builder.store_atomic(word, ptr, ordering, _width(sig.args[0]))
                return context.get_dummy_value()

            return types.void(arr, index, value), codegen

        return build

    @intrinsic
    def store(typingctx, arr, index, value):
        return _store("release")(typingctx, arr, index, value)

    @intrinsic
    def store_sc(typingctx, arr, index, value):
        return _store("seq_cst")(typingctx, arr, index, value)

    @intrinsic
    def cmpxchg(typingctx, arr, index, expected, value):
        def codegen(context, builder, sig, args):
            ptr, _ = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1])
            dtype = sig.args[0].dtype
            old = context.cast(builder, args[2], sig.args[2], dtype)
            new = context.cast(builder, args[3], sig.args[3], dtype)
            pair = builder.cmpxchg(ptr, old, new, "seq_cst", "seq_cst")
            return builder.extract_value(pair, 0)

        return arr.dtype(arr, index, expected, value), codegen

    def _rmw(op):
        def build(typingctx, arr, index, value):
            def codegen(context, builder, sig, args):
                ptr, _ = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1])
                word = context.cast(builder, args[2], sig.args[2], sig.args[0].dtype)
                return builder.atomic_rmw(op, ptr, word, "seq_cst")

            return arr.dtype(arr, index, value), codegen

        return build

    @intrinsic
    def add(typingctx, arr, index, value):
        return _rmw("add")(typingctx, arr, index, value)

    @intrinsic
    def fetch_or(typingctx, arr, index, value):
        return _rmw("or")(typingctx, arr, index, value)

    @intrinsic
    def fetch_and(typingctx, arr, index, value):
        return _rmw("and")(typingctx, arr, index, value)

    @intrinsic
    def xchg(typingctx, arr, index, value):
        return _rmw("xchg")(typingctx, arr, index, value)

    @intrinsic
    def fence(typingctx):
        def codegen(context, builder, sig, args):
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def pause(typingctx):
        def codegen(context, builder, sig, args):
            module = builder.module
            fn = cgutils.get_or_insert_function(
                module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(fn, [])
            return context.get_dummy_value()

        return types.void(), codegen


# Python-callable forms (an intrinsic can be called from a kernel only). About 0.25 us a call.


@kernel
def py_load(arr: np.ndarray, index: int) -> int:
    return load(arr, index)  # type: ignore[no-any-return]


@kernel
def py_store(arr: np.ndarray, index: int, value: Any) -> None:
    store(arr, index, value)


@kernel
def py_store_sc(arr: np.ndarray, index: int, value: Any) -> None:
    store_sc(arr, index, value)


@kernel
def py_add(arr: np.ndarray, index: int, value: Any) -> int:
    return add(arr, index, value)  # type: ignore[no-any-return]


@kernel
def py_xchg(arr: np.ndarray, index: int, value: Any) -> int:
    return xchg(arr, index, value)  # type: ignore[no-any-return]


@kernel
def py_cmpxchg(arr: np.ndarray, index: int, expected: Any, value: Any) -> int:
    return cmpxchg(arr, index, expected, value)  # type: ignore[no-any-return]


@kernel
def py_fetch_or(arr: np.ndarray, index: int, value: Any) -> int:
    return fetch_or(arr, index, value)  # type: ignore[no-any-return]


@kernel
def py_fetch_and(arr: np.ndarray, index: int, value: Any) -> int:
    return fetch_and(arr, index, value)  # type: ignore[no-any-return]
