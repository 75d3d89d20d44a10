"""Two machines on one: a network namespace with a link of its own to this one, made and removed by whoever uses it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

COMMAND_BOUND_S: Final = 20.0


def why_not() -> str:
    """Why there can be no namespace here; "" if there can."""
    if shutil.which("ip") is None:
        return "no `ip` command (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"apf-{secrets.token_hex(3)}"
    made = subprocess.run(
        ["ip", "netns", "add", name], check=False, capture_output=True, text=True, timeout=COMMAND_BOUND_S
    )
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    ip("netns", "del", name)
    return ""


def ip(*words: str) -> None:
    """Run `ip`; what goes wrong is shown."""
    done = subprocess.run(
        ["ip", *words], check=False, capture_output=True, text=True, timeout=COMMAND_BOUND_S
    )
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Network:
    """A namespace behind a link. here, there: the addresses of its ends."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.name = f"apf-{self.tag}"
        self.link = f"apf{self.tag}a"
        # One of 16384 networks of 4 addresses in 198.18.0.0/16, which is for tests of networks.
        net = secrets.randbelow(1 << 14) * 4
        base = f"198.18.{net >> 8}"
        self.here, self.there = f"{base}.{(net & 255) + 1}", f"{base}.{(net & 255) + 2}"

    def up(self) -> None:
        """The link carries packets."""
        ip("link", "set", self.link, "up")

    def down(self) -> None:
        """Nothing gets through; neither side is told."""
        ip("link", "set", self.link, "down")

    @property
    def inside(self) -> list[str]:
        """Words before a command that shall run over there."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def network() -> Iterator[Network]:
    """Two ends and a link that is up. Processes over there must have ended before this ends."""
    made = Network()
    peer = f"apf{made.tag}b"
    ip("netns", "add", made.name)
    try:
        ip("link", "add", made.link, "type", "veth", "peer", "name", peer, "netns", made.name)
        ip("addr", "add", f"{made.here}/30", "dev", made.link)
        made.up()
        ip("-n", made.name, "addr", "add", f"{made.there}/30", "dev", peer)
        ip("-n", made.name, "link", "set", peer, "up")
        ip("-n", made.name, "link", "set", "lo", "up")
        yield made
    finally:
        # The link goes with the namespace.
        ip("netns", "del", made.name)
