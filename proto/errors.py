"""Errors a user can act on.

`UserError` is the one exception for bad input: a wrong key, an impossible mode, a missing file. The
command line prints it without a traceback and exits with code 2. Faults of ours are assertions, faults of
a peer are counted where the message is received; neither belongs here.
"""

from __future__ import annotations

FOUND_CHARS_MAX = 120


class UserError(Exception):
    """Input that is refused: what is wrong, where, what was found and what is allowed.

    `where` names the file or option, `key` the path inside it (`vm[0].task[2].memory_kib`); `found` is the
    offending value (None: nothing to show), `allowed` says in words or values what would have been
    accepted.
    """

    def __init__(
        self, message: str, *, where: str = "", key: str = "", found: object = None, allowed: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.key = key
        self.found = found
        self.allowed = allowed

    def __str__(self) -> str:
        """One line, `where: key: message, found ...`, and a second one with what is allowed."""
        text = ": ".join(part for part in (self.where, self.key, self.message) if part)
        if self.found is not None:
            shown = repr(self.found)
            text += f", found {shown if len(shown) <= FOUND_CHARS_MAX else shown[:FOUND_CHARS_MAX] + '...'}"
        if self.allowed:
            text += f"\n  allowed: {self.allowed}"
        return text
