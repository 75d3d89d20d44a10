"""The arguments that several commands share, and how their values are read.

Invariants: standard library only, since `--help` works before the dependencies are installed; a value that
cannot be read is a usage error (exit code 2), with what is allowed.

Not handled here: whether a topology exists or a mode fits a profile; the command checks that when it runs.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

MODES = ("sync", "halt", "exception", "interrupt")
PROFILES = ("v3", "v7", "mainline")
SIM_FAULTS = (
    "kill", "stop", "read_error", "write_error", "short_read", "bit_flip", "bad_block", "drop", "duplicate", "delay",
    "restart", "gone",
)  # fmt: skip
"""As sim/plan.py has them; a test compares."""
_UNIT_NS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60 * 1_000_000_000}
_PROCESS = re.compile(r"swapd(-\d{1,4})?|vcpu-\d{1,4}|host|zygote")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m)")


def duration_ns(text: str) -> int:
    """Nanoseconds of a duration with its unit: 500ms, 20s, 1.5m."""
    match = _DURATION.fullmatch(text)
    duration = round(float(match[1]) * _UNIT_NS[match[2]]) if match is not None else 0
    if duration == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration of a nanosecond or more (allowed: as in 500ms, 20s, 2m)"
        )
    return duration


def positive_seconds(text: str) -> float:
    """Seconds, finite and above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (allowed: above 0)")
    return value


def ratio(text: str) -> float:
    """A finite number, 1 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio (allowed: a number, 1 or more)")
    return value


def positive_count(text: str) -> int:
    """A whole number above zero."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count (allowed: 1 or more)")
    return int(text)


def seed_number(text: str) -> int:
    """A seed: 0 to 2**63 - 1."""
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed (allowed: 0 to 2**63 - 1)")
    return int(text)


def mode_list(text: str) -> tuple[str, ...]:
    """Delivery modes separated by commas, each at most once."""
    modes = tuple(text.split(","))
    if not set(modes) <= set(MODES) or len(set(modes)) != len(modes):
        raise argparse.ArgumentTypeError(f"{text!r} (allowed: different ones of {', '.join(MODES)})")
    return modes


def fault_list(text: str) -> tuple[str, ...]:
    """Kinds of faults separated by commas, each at most once; none for no faults."""
    if text == "none":
        return ()
    kinds = tuple(text.split(","))
    if not set(kinds) <= set(SIM_FAULTS) or len(set(kinds)) != len(kinds):
        raise argparse.ArgumentTypeError(
            f"{text!r} (allowed: none, or different ones of {', '.join(SIM_FAULTS)})"
        )
    return kinds


def process_name(text: str) -> str:
    """A process of a run that may be killed; whether there is such a one the topology tells."""
    if _PROCESS.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is nobody (allowed: swapd, swapd-N, vcpu-N, host, zygote)"
        )
    return text


def add_topology(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """The TOML file of the run; with a default it may be left out."""
    parser.add_argument(
        "topology",
        metavar="TOPOLOGY",
        nargs=None if default is None else "?",
        default=default,
        help="a TOML file, or the name of a ready-made topology"
        + (f" (default: {default})" if default else ""),
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What changes a topology or says where results go; for every command that runs one."""
    parser.add_argument(
        "--profile", choices=PROFILES, help="the rule set of KVM and guest (default: by mode)"
    )
    add_changes(parser, "change a key of the topology, as in vm.vcpus=8")
    parser.add_argument("--seconds", type=positive_seconds, metavar="S", help="how long the workload runs")
    parser.add_argument("--seed", type=seed_number, metavar="N", help="seed of every random choice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (default: a new one)")
    add_json(parser)


def add_changes(parser: argparse.ArgumentParser, what: str) -> None:
    """`--set KEY=VALUE`; what: what it does, for the help."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help=f"{what}; may be repeated",
    )


def add_log_inputs(parser: argparse.ArgumentParser) -> None:
    """For commands whose runs can be executed again."""
    parser.add_argument(
        "--log-inputs",
        action="store_true",
        help="record what the host is told and reads, for the replay command (needs --out)",
    )


def add_outages(parser: argparse.ArgumentParser) -> None:
    """How outages are made longer, compared and drawn."""
    parser.add_argument(
        "--down",
        type=duration_ns,
        default=0,
        metavar="TIME",
        dest="away_ns",
        help="start the successor of a daemon no sooner than this after its end (default: at once)",
    )
    parser.add_argument(
        "--modes",
        type=mode_list,
        default=(),
        metavar="MODE,...",
        help="the same under each of these modes, and a table of the guests' work around the outages",
    )
    parser.add_argument(
        "--repeat",
        type=positive_count,
        metavar="R",
        help="with --modes or --plot: runs of each mode (default: 1)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.svg",
        help="draw that table, too (installs matplotlib on first use)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
