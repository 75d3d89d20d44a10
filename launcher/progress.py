"""What a user sees while a run is under way: one line that changes on a terminal, plain lines elsewhere.

A run of ten minutes shall not fill a log: elsewhere than on a terminal the lines about one phase come ever more rarely, and one that says
what the last one said does not come.

Invariants: everything goes to one stream (standard error), so that standard output carries results only; a terminal's line is
erased before anything else is written; a closed stream ends the output, never the run.

Not handled here: results (report/text.py).
"""

from __future__ import annotations

import shutil
import time
from typing import Final, TextIO

TERMINAL_EVERY_S: Final = 0.2
PLAIN_EVERY_S: Final = 5.0
PLAIN_EVERY_MAX_S: Final = 60.0
PLAIN_SLOWER: Final = 1.25
"""Each line about a phase waits that much longer than the one before it."""
ERASE: Final = "\r\x1b[K"


class Progress:
    """Lines about a run, with `prefix` in front: `quickstart interrupt`."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        """Nothing is written yet; `prefix` may be changed between runs."""
        self.prefix = prefix
        self._stream = stream
        self._terminal = stream.isatty()
        self._every_s = TERMINAL_EVERY_S if self._terminal else PLAIN_EVERY_S
        self._shown_s = time.monotonic()
        self._open_line = False
        self._closed = False
        self._said = ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        self._said = text
        self._write(f"{self._with_prefix(text)}\n")

    def phase(self, text: str) -> None:
        """What begins now; on a terminal the next line takes its place."""
        if not self._terminal:
            self._every_s = min(self._every_s, PLAIN_EVERY_S)
        self._put(text)

    def due(self) -> bool:
        """Whether `update` would be shown now, so that nobody collects figures in vain."""
        return not self._closed and time.monotonic() - self._shown_s >= self._every_s

    def update(self, text: str) -> None:
        """Where the run is."""
        if not self._terminal:
            self._every_s = min(self._every_s * PLAIN_SLOWER, PLAIN_EVERY_MAX_S)
        self._put(text)

    def done(self) -> None:
        """Leave no unfinished line."""
        self._erase()

    def _put(self, text: str) -> None:
        self._shown_s = time.monotonic()
        if self._terminal:
            self._show(text)
        elif text != self._said:
            self.say(text)

    def _show(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._write(f"{ERASE}{self._with_prefix(text)[: width - 1]}")
        self._open_line = True

    def _erase(self) -> None:
        if self._open_line:
            self._write(ERASE)
            self._open_line = False

    def _with_prefix(self, text: str) -> str:
        return f"{self.prefix}: {text}" if self.prefix else text

    def _write(self, text: str) -> None:
        if self._closed:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # nobody reads any more (a closed pipe): the run has another output
            self._closed = True
