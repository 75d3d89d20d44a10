"""The schedule of faults that the options of `chaos` describe: tables as a topology's ``[[fault]]``.

Purpose: `tables_of` reads --kill and --fault, `drawn` makes a mixed schedule from a seed (--random). Each table comes with the option
that it is from, for messages.

Not handled here: whether such a fault can happen (proto/topology_faults.py), carrying it out (launcher/chaos.py).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from typing import Any, Final

from launcher.options import duration_ns
from proto.errors import UserError
from proto.faults import KINDS, LINK_KINDS
from proto.overrides import parse_value
from proto.topology import Topology

Tables = list[tuple[str, dict[str, Any]]]
"""(option, table)."""
NS: Final = 1e9
MS: Final = 1e6
DURATIONS: Final = {
    "after": ("after", NS), "until": ("until", NS), "every": ("every_ms", MS), "for": ("for_ms", MS), "slower": ("slower_ms", MS),
}  # fmt: skip
"""Words for times: the key, and its unit in ns."""
OTHERS: Final = {"rate": "rate_per_s"}
EVERY_NS: Final = 500_000_000
SECONDS: Final = 20.0
"""Of a run whose faults come from the command line."""
EXAMPLE: Final = '"stop on=vcpu-1 after=1s for=200ms", "bit_flip nth=50 times=3"'


def tables_of(kill: str | None, every_ns: int | None, faults: list[str], *, by_default: bool) -> Tables:
    """What --kill, --every and --fault ask for. by_default: there is nothing else, so daemons are killed. Raises UserError."""
    tables: Tables = []
    if kill is not None or every_ns is not None or (by_default and not faults):
        every_ns = every_ns or EVERY_NS
        target = kill or "swapd"
        table: dict[str, Any] = {"do": "kill", "on": target}
        # Only daemons come back to be killed again.
        table |= {"every_ms": every_ns / MS} if target.startswith("swapd") else {"after": every_ns / NS}
        tables.append((f"--kill {target} --every {every_ns / MS:g}ms", table))
    return tables + [(f"--fault {text!r}", parse(text)) for text in faults]


def for_a_while(raw: dict[str, Any]) -> dict[str, Any]:
    """The tables of a topology without faults of its own, with `SECONDS` of measured time."""
    return {**raw, "run": {**raw.get("run", {}), "seconds": SECONDS}}


def check_down(away_ns: int, tables: Tables) -> None:
    """UserError where a daemon would be kept away longer than until it is to be killed again."""
    every = [table["every_ms"] for _, table in tables if table["do"] == "kill" and "every_ms" in table]
    if every and away_ns >= min(every) * MS:
        raise UserError(
            "the daemon would still be away when it is to be killed again",
            where="--down",
            found=f"{away_ns / NS:g} s",
            allowed=f"less than the time between two kills (--every, now {min(every) / 1e3:g} s)",
        )


def parse(text: str) -> dict[str, Any]:
    """One --fault: a kind, then keys of ``[[fault]]``, times also as in for=200ms. Raises UserError for what cannot be read."""
    kind, *words = text.split() or [""]
    if kind not in KINDS:
        raise UserError(
            "no such fault", where="--fault", found=text, allowed=f"{', '.join(KINDS)}, as in {EXAMPLE}"
        )
    table: dict[str, Any] = {"do": kind}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UserError(
                "not KEY=VALUE", where=f"--fault {text!r}", found=word, allowed=f"as in {EXAMPLE}"
            )
        if name in DURATIONS:
            key, unit_ns = DURATIONS[name]
            table[key] = _duration(text, word, value) / unit_ns
        else:
            table[OTHERS.get(name, name)] = parse_value(value)
    return table


def _duration(text: str, word: str, value: str) -> float:
    try:
        return float(duration_ns(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error), where=f"--fault {text!r}", found=word) from error


def drawn(topology: Topology, number: int, seed: int) -> Tables:
    """``number`` faults from a seed, every kind once before one comes again. They begin in the first half of the run.

    Nothing in it ends the run: host and vCPUs are stopped for a while and never killed. Of a daemon elsewhere only the link is touched.
    """
    rng = random.Random(f"chaos {seed}")
    possible = KINDS if any(not daemon.connect for daemon in topology.swapd) else (*LINK_KINDS, "stop")
    kinds: list[str] = []
    tables: Tables = []
    for _ in range(number):
        if not kinds:
            kinds = list(possible)
            rng.shuffle(kinds)
        tables.append((f"--random {number}", dict(_draw(rng, kinds.pop(), topology))))
    return tables


def _draw(rng: random.Random, kind: str, topology: Topology) -> Mapping[str, Any]:
    daemons = [f"swapd-{d}" for d, one in enumerate(topology.swapd) if kind in LINK_KINDS or not one.connect]
    daemon = rng.choice(daemons) if daemons else ""
    half = topology.run.seconds / 2
    table: dict[str, Any] = {"do": kind, "on": daemon, "after": round(rng.uniform(0.02, 1.0) * half, 3)}
    if kind == "stop":
        vcpu = f"vcpu-{rng.randrange(topology.total_vcpus)}"
        return table | {
            "on": rng.choice([*filter(None, [daemon]), vcpu, "host"]),
            "for_ms": rng.choice([20, 100, 300]),
        }
    if kind in ("slow", "device_gone", "delay", "disconnect"):
        return table | {"for_ms": rng.choice([20, 50, 200])}
    if kind == "kill" or rng.random() < 0.3:
        return table
    return table | {
        "nth": rng.choice([1, 3, 10]),
        "times": rng.choice([1, 2, 5]),
        "after": round(table["after"] / 2, 3),
    }
