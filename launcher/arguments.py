"""What each command takes: one function for each, named as the command, that adds its arguments to a parser.

Invariants: standard library only, since `--help` works before the dependencies are installed; a value that
cannot be read is a usage error (exit code 2), with what is allowed.

Not handled here: arguments that several commands share (launcher/options.py), which commands there are and
what runs them (launcher/cli.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher import options

DEFAULT_TOPOLOGY = "topologies/quickstart.toml"


def run(parser: argparse.ArgumentParser) -> None:
    """`run TOPOLOGY`."""
    options.add_topology(parser)
    parser.add_argument(
        "--mode", choices=options.MODES, help="how page faults are delivered (default: interrupt)"
    )
    options.add_log_inputs(parser)
    options.add_run_options(parser)
    parser.add_argument(
        "--restart-at",
        action="append",
        default=[],
        type=options.duration_ns,
        metavar="TIME",
        dest="restart_at_ns",
        help="save all guests after this much measured time and go on in a fresh set of processes; may be repeated",
    )
    parser.add_argument(
        "--save-at",
        type=options.duration_ns,
        default=0,
        metavar="TIME",
        dest="save_at_ns",
        help="save all guests after this much measured time into --image, and end there",
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="where --save-at puts the image")
    parser.add_argument(
        "--restore", type=Path, metavar="FILE", help="go on with the guests of an image instead of booting"
    )


def compare(parser: argparse.ArgumentParser) -> None:
    """`compare [TOPOLOGY]`."""
    options.add_topology(parser, default=DEFAULT_TOPOLOGY)
    parser.add_argument(
        "--modes",
        type=options.mode_list,
        default=("sync", "halt", "interrupt"),
        metavar="MODE,...",
        help="the modes to compare (default: sync,halt,interrupt)",
    )
    parser.add_argument(
        "--repeat", type=options.positive_count, default=1, metavar="R", help="runs of each mode (default: 1)"
    )
    options.add_run_options(parser)


def record(parser: argparse.ArgumentParser) -> None:
    """`record [-o FILE] -- COMMAND...`."""
    parser.usage = "asyncpf record [-h] [-o FILE] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the trace file to write")


def trace(parser: argparse.ArgumentParser) -> None:
    """`trace FILE`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a recorded trace")
    options.add_json(parser)


def stress(parser: argparse.ArgumentParser) -> None:
    """`stress`."""
    parser.add_argument(
        "--vcpus", type=options.positive_count, default=64, metavar="N", help="virtual CPUs (default: 64)"
    )
    parser.add_argument(
        "--vms",
        type=options.positive_count,
        default=1,
        metavar="V",
        help="virtual machines that share them and the host's memory (default: 1)",
    )
    parser.add_argument(
        "--overcommit",
        type=options.ratio,
        default=4.0,
        metavar="R",
        help="memory of all guests over memory of the host (default: 4)",
    )
    parser.add_argument("--chaos", action="store_true", help="kill a swap daemon again and again")
    parser.add_argument(
        "--every",
        type=options.duration_ns,
        metavar="TIME",
        dest="every_ns",
        help="with --chaos: time between two kills (default: 1s)",
    )
    options.add_log_inputs(parser)
    options.add_run_options(parser)


def chaos(parser: argparse.ArgumentParser) -> None:
    """`chaos TOPOLOGY`."""
    parser.description = (
        "A run in which things go wrong: the [[fault]] tables of the topology, and those that the options add. Without any of them"
        " every daemon is killed in turn, each 500ms. The run fails if a fault did not happen, or if anything was lost that should not be."
        " All faults and keys: docs/topology.md; what each should show: docs/chaos.md."
    )
    options.add_topology(parser)
    parser.add_argument(
        "--kill",
        type=options.process_name,
        metavar="WHO",
        help="kill swapd (every daemon in turn) or swapd-N again and again; vcpu-N, host or zygote once, which ends the run",
    )
    parser.add_argument(
        "--every",
        type=options.duration_ns,
        metavar="TIME",
        dest="every_ns",
        help="time between two kills (default: 500ms)",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar='"KIND KEY=VALUE ..."',
        dest="faults",
        help='add a fault: a kind, then keys of [[fault]], as in "stop on=vcpu-1 after=1s for=200ms" or "bit_flip nth=50 times=3"'
        ' or "kill at=read.done nth=100"; times may be written with units as after, until, every, for, slower; may be repeated',
    )
    parser.add_argument(
        "--random",
        type=options.positive_count,
        default=0,
        metavar="N",
        help="add N faults of all kinds, drawn from the seed; none of them ends the run",
    )
    parser.add_argument(
        "--for",
        type=options.duration_ns,
        metavar="TIME",
        dest="for_ns",
        help="how long (default: as the topology says if it has faults of its own, else 20s); with --seconds: when faults that come"
        " again and again end",
    )
    options.add_outages(parser)
    options.add_log_inputs(parser)
    options.add_run_options(parser)


def scenario(parser: argparse.ArgumentParser) -> None:
    """`scenario FILE...`."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a TOML file, or the name of a shipped scenario"
    )
    parser.add_argument(
        "--world", choices=("sim", "real"), default="sim", help="virtual time or processes (default: sim)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="tell the story of the first fault, rule by rule"
    )
    parser.add_argument(
        "--events", action="store_true", help="show the events, also of several scenarios that passed"
    )
    options.add_json(parser)


def sim(parser: argparse.ArgumentParser) -> None:
    """`sim`."""
    parser.add_argument(
        "--seed", type=options.seed_number, default=1, metavar="N", help="the run of this seed (default: 1)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--seeds", type=_seed_range, metavar="A..B", help="the runs of these seeds, B included"
    )
    which.add_argument(
        "--minutes",
        type=options.positive_seconds,
        metavar="M",
        help="seeds from --seed on, for so many minutes",
    )
    which.add_argument(
        "--plan", type=Path, metavar="FILE", help="the run of a plan, as a failing seed leaves one"
    )
    parser.add_argument(
        "--topology", metavar="TOPOLOGY", help="the machine of this topology (default: drawn, a small one)"
    )
    parser.add_argument(
        "--seconds",
        type=options.positive_seconds,
        metavar="S",
        help="with --topology: virtual time of the workload",
    )
    parser.add_argument("--profile", choices=options.PROFILES, help="the rule set (default: drawn)")
    parser.add_argument(
        "--faults", type=options.fault_list, metavar="KIND,...",
        help=f"what may go wrong: none, or some of {', '.join(options.SIM_FAULTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep plan and events here")
    options.add_json(parser)


def _seed_range(text: str) -> range:
    """Seeds A..B, both included."""
    first, dots, last = text.partition("..")
    if not dots:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of seeds (allowed: as in 1..500)")
    seeds = range(options.seed_number(first), options.seed_number(last) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} holds no seed (allowed: A..B with A up to B)")
    return seeds


def check(parser: argparse.ArgumentParser) -> None:
    """`check RUN_DIR|EVENTS...`."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="RUN_DIR|EVENTS",
        help="run directories, event files (*.bin) of one run, recordings of kernels (*.jsonl)",
    )
    parser.add_argument(
        "--profile", choices=options.PROFILES, help="the rule set (default: what the run says, else mainline)"
    )
    options.add_json(parser)


def replay(parser: argparse.ArgumentParser) -> None:
    """`replay RUN_DIR`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run with --log-inputs")
    parser.add_argument(
        "--role", choices=("host",), default="host", help="whose machines to run again (default: host)"
    )
    parser.add_argument(
        "--part",
        type=options.positive_count,
        default=1,
        metavar="K",
        help="which set of processes of a run with --restart-at (default: 1)",
    )
    parser.add_argument(
        "--until", type=options.positive_count, metavar="N", help="stop after call number N (default: all)"
    )
    parser.add_argument(
        "--show", type=_call_range, metavar="N..M", help="print these calls with all they read and did"
    )
    options.add_json(parser)


def _call_range(text: str) -> range:
    """Calls N..M, both included; N alone is one call."""
    first, dots, last = text.partition("..")
    begin = options.positive_count(first)
    calls = range(begin, (options.positive_count(last) if dots else begin) + 1)
    if not calls:
        raise argparse.ArgumentTypeError(f"{text!r} holds no call (allowed: N..M with N up to M)")
    return calls


def zoo(parser: argparse.ArgumentParser) -> None:
    """`zoo`."""
    options.add_json(parser)


def keys(parser: argparse.ArgumentParser) -> None:
    """`keys NAME...`."""
    parser.description = (
        "Make CURVE key pairs for links that leave this machine: NAME.key, which is secret, and NAME.pub for the other side."
        " A swap daemon elsewhere needs one pair, each host that uses it another."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="whose keys: as in daemon host")
    parser.add_argument(
        "--out", type=Path, default=Path("keys"), metavar="DIR", help="the folder, mode 0700 (default: keys)"
    )


def swapd(parser: argparse.ArgumentParser) -> None:
    """`swapd --listen ADDR --file F`."""
    parser.description = (
        'Run a swap daemon for hosts elsewhere; their topology says [[swapd]] connect = "tcp://ADDR:PORT".'
        " It serves one host at a time, until Ctrl-C. Beyond loopback it needs --key and --allow."
    )
    parser.add_argument("--listen", required=True, metavar="tcp://ADDR:PORT", help="where hosts connect to")
    parser.add_argument(
        "--file",
        required=True,
        type=Path,
        metavar="FILE",
        help="the swap file: made if there is none, and kept",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        type=options.positive_count,
        metavar="MIB",
        dest="size_mib",
        help="size of a new file in MiB (default: 1024)",
    )
    size.add_argument(
        "--slots", type=options.positive_count, default=0, metavar="N", help="the same in pages of 4 KiB"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="this daemon's key pair, as of `launch.py keys`"
    )
    parser.add_argument(
        "--allow",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="public keys of the hosts that may connect; nobody else gets in",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="add a modelled service time, as in model of [[swapd]]"
    )
    options.add_changes(parser, "any other key of [[swapd]], as in engine=pread")
    parser.add_argument(
        "--seed",
        type=options.seed_number,
        default=1,
        metavar="N",
        help="seed of the service times (default: 1)",
    )
    parser.add_argument(
        "--restart-limit",
        type=options.positive_count,
        default=1000,
        metavar="N",
        help="how often the process may be replaced after it died (default: 1000)",
    )


def none(parser: argparse.ArgumentParser) -> None:
    """For commands that have none, and for those that take all as they are."""
