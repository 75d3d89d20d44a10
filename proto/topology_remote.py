"""Rules for daemons elsewhere (``connect`` of ``[[swapd]]``): which keys go together, and what beyond loopback needs.

Raises UserError through `proto.schema.refuse`; nothing is looked up or connected to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from proto import curve
from proto.schema import Rule, Source, members, refuse
from proto.topology_keys import Swapd

APPLY: Final = frozenset({"connect", "size_mib", "key", "server_key", "give_up_seconds"})
"""Keys that mean something with ``connect``."""
ONLY_WITH_CONNECT: Final = ("key", "server_key")
ADDRESS: Final = "tcp://HOST:PORT"


def check_remote(daemons: Sequence[Swapd], source: Source) -> None:
    """Every rule that needs no file."""
    seen: set[str] = set()
    for i, daemon in enumerate(daemons):
        at = f"swapd[{i}]"
        if not daemon.connect:
            for name in ONLY_WITH_CONNECT:
                if getattr(daemon, name):
                    refuse(
                        "means nothing without connect",
                        source,
                        f"{at}.{name}",
                        getattr(daemon, name),
                        "connect beside it",
                    )
            continue
        endpoint = curve.parse_endpoint(daemon.connect)
        if endpoint is None or endpoint.port == 0 or endpoint.host == "0.0.0.0":  # noqa: S104 - refused
            refuse("no address to connect to", source, f"{at}.connect", daemon.connect, ADDRESS)
        if daemon.connect in seen:
            refuse("one daemon cannot be two", source, f"{at}.connect", daemon.connect, "each address once")
        seen.add(daemon.connect)
        for name, member in members(Swapd).items():
            if (
                name not in APPLY
                and isinstance(member.rule, Rule)
                and getattr(daemon, name) != member.default
            ):
                refuse(
                    "with connect this is said where the daemon is started",
                    source,
                    f"{at}.{name}",
                    getattr(daemon, name),
                    "the options of `launch.py swapd`",
                )
        if bool(daemon.key) != bool(daemon.server_key):
            missing = "server_key" if daemon.key else "key"
            refuse(
                "key and server_key go together",
                source,
                f"{at}.{missing}",
                "",
                "both of them, or on loopback none",
            )
        if not endpoint.is_loopback and not daemon.key:
            refuse(
                "an address beyond loopback needs keys",
                source,
                f"{at}.connect",
                daemon.connect,
                "key and server_key beside it (see `launch.py keys`), or an address of this machine",
            )


def check_key_files(daemons: Sequence[Swapd], resolve: Callable[[str], Path]) -> None:
    """That the key files can be used. resolve: path of a name in the topology."""
    for i, daemon in enumerate(daemons):
        if daemon.key:
            curve.read_pair(resolve(daemon.key), f"swapd[{i}].key")
            curve.read_public(resolve(daemon.server_key), f"swapd[{i}].server_key")
