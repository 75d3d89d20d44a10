"""Reads the memory trace that valgrind's lackey tool prints, as arrays.

A line is ``I  addr,size`` (instruction, skipped), `` L addr,size`` (load), `` S addr,size`` (store) or `` M
addr,size`` (modify: a load and a store); the address is hexadecimal without prefix, the size decimal. Lines
of other kinds are valgrind's own messages.

Each access is cut into the aligned 8-byte words that it touches, in ascending order; a modify reads all of
its words, then writes them. Whole blocks of text are handled by NumPy at once: lackey prints several
million lines per second.

Not handled here: where the text comes from, and which process it belongs to (one parser per stream).
"""

from __future__ import annotations

import collections

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

# The largest data access of VEX is 512 bytes (its MAX_DSIZE, for the state-saving instructions); larger
# ones are misread text.
ACCESS_BYTES_MAX = 512
LINE_BYTES_MAX = 1 << 16
MESSAGES_KEPT = 20

_NEWLINE, _SPACE, _COMMA = b"\n ,"
_INSTRUCTION, _LOAD, _STORE, _MODIFY = b"ILSM"
_ADDRESS_AT = 3
_HEX_DIGITS_MAX = 16
_SIZE_DIGITS_MAX = 3
_NOT_HEX = 255
_NOT_DECIMAL = 10


def _hex_values() -> U8:
    table = np.full(256, _NOT_HEX, np.uint8)
    for value, digit in enumerate(b"0123456789abcdef"):
        table[digit] = value
    return table


_HEX = _hex_values()


class LackeyParser:
    """Turns blocks of lackey's output, cut anywhere, into accesses.

    Attributes:
        unreadable: lines that look like accesses but are not well formed.
        messages: the last lines that valgrind printed about other things.
    """

    def __init__(self) -> None:
        self.unreadable = 0
        self.messages: collections.deque[str] = collections.deque(maxlen=MESSAGES_KEPT)
        self._rest = b""

    def feed(self, data: bytes) -> tuple[U64, Bools]:
        """Parse the lines completed by ``data``.

        Returns:
            (words u64[n]: numbers of the 8-byte words, address >> 3; is_write bool[n]), in program order.
        """
        text = self._rest + data
        end = text.rfind(b"\n") + 1
        self._rest = text[end:]
        if len(self._rest) > LINE_BYTES_MAX:
            self.unreadable += 1
            self._rest = b""
        if not end:
            return np.empty(0, np.uint64), np.empty(0, np.bool_)
        block = np.frombuffer(text, np.uint8, end)
        ends = np.flatnonzero(block == _NEWLINE)
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
        first = block[starts]
        self._keep_messages(text, starts, ends, (first != _INSTRUCTION) & (first != _SPACE))
        data_lines = first == _SPACE
        return self._accesses(block, starts[data_lines], ends[data_lines])

    def _keep_messages(self, text: bytes, starts: I64, ends: I64, other: Bools) -> None:
        for at in np.flatnonzero(other)[-MESSAGES_KEPT:].tolist():
            self.messages.append(text[starts[at] : ends[at]].decode(errors="replace"))

    def _accesses(self, block: U8, starts: I64, ends: I64) -> tuple[U64, Bools]:
        # A line starts with a space, so position start + 1 exists; reads before the block's begin wrap to
        # its end and are refused by the number of digits they imply.
        kinds = block[starts + 1]
        good = (kinds == _LOAD) | (kinds == _STORE) | (kinds == _MODIFY)
        good &= block[np.minimum(starts + 2, ends)] == _SPACE
        sizes, commas, sizes_good = _sizes(block, ends)
        addresses, addresses_good = _addresses(block, starts + _ADDRESS_AT, commas)
        good &= sizes_good & addresses_good
        self.unreadable += int(np.count_nonzero(~good))
        return _words(kinds[good], addresses[good], sizes[good])


def _sizes(block: U8, ends: I64) -> tuple[I64, I64, Bools]:
    """Decimal sizes in front of ``ends``: (sizes, positions of their commas, which lines are good)."""
    sizes = np.zeros(len(ends), np.int64)
    commas = np.full(len(ends), -1, np.int64)
    open_ = np.ones(len(ends), np.bool_)
    for place in range(_SIZE_DIGITS_MAX + 1):
        # Before the block there is nothing; its first byte, a blank of a data line, ends the number.
        at = np.maximum(ends - 1 - place, 0)
        byte = block[at]
        here = open_ & (byte == _COMMA)
        commas[here] = at[here]
        open_ &= ~here
        value = _HEX[byte]
        open_ &= value < _NOT_DECIMAL
        sizes[open_] += value[open_].astype(np.int64) * 10**place
    return sizes, commas, (commas >= 0) & (sizes >= 1) & (sizes <= ACCESS_BYTES_MAX)


def _addresses(block: U8, begins: I64, commas: I64) -> tuple[U64, Bools]:
    """Hexadecimal numbers in ``block[begins:commas]``: (numbers, which lines are good)."""
    digits = commas - begins
    good = (digits >= 1) & (digits <= _HEX_DIGITS_MAX)
    addresses = np.zeros(len(begins), np.uint64)
    for place in range(int(digits[good].max(initial=0))):
        live = good & (place < digits)
        value = _HEX[block[commas - 1 - place]]
        good &= ~live | (value != _NOT_HEX)
        addresses |= np.where(live, value, 0).astype(np.uint64) << np.uint64(4 * place)
    return addresses, good & (addresses <= np.uint64(2**64 - ACCESS_BYTES_MAX))


def _words(kinds: U8, addresses: U64, sizes: I64) -> tuple[U64, Bools]:
    first = addresses >> np.uint64(3)
    per_pass = (((addresses + sizes.astype(np.uint64) - np.uint64(1)) >> np.uint64(3)) - first).astype(
        np.int64
    ) + 1
    modify = kinds == _MODIFY
    entries = per_pass * (1 + modify)
    line = np.repeat(np.arange(len(entries)), entries)
    offset = np.arange(len(line)) - np.repeat(np.cumsum(entries) - entries, entries)
    second_pass = offset >= per_pass[line]
    offset -= np.where(second_pass, per_pass[line], 0)
    is_write = second_pass | (kinds[line] == _STORE)
    return first[line] + offset.astype(np.uint64), is_write
