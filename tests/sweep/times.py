"""Times of the protocol as they are in a conversation: short, the rules are the same."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import host.remote
import host.shell
import host.swap
import proto.remote
import swapd.kept_file
import swapd.remote
import swapd.shell

TIMES: Final = (
    (host.swap, "RESEND_NS", 20_000_000),
    (host.shell, "PING_EVERY_NS", 10_000_000),
    (host.shell, "GAUGES_EVERY_NS", 1_000_000),
    (host.remote, "RENEW_NS", 400_000_000),
    (swapd.shell, "HELLO_EVERY_NS", 10_000_000),
    (swapd.kept_file, "LOCK_WAIT_S", 0.05),
    (swapd.kept_file, "LOCK_POLL_S", 0.01),
    (proto.remote, "RECONNECT_MS", 5),
    (swapd.remote, "say", len),  # what the daemon elsewhere tells its user
)


@contextmanager
def short_times() -> Generator[None]:
    """The protocol's times as `TIMES` has them."""
    before = [getattr(module, name) for module, name, _ in TIMES]
    for module, name, value in TIMES:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(TIMES, before, strict=True):
            setattr(module, name, value)


def warm() -> None:
    """Compile everything before the clock of a conversation runs."""
    host.shell.warm()
    swapd.shell.warm()
