"""The commands: one table of names, arguments and handlers.

Purpose: a command is a row of COMMANDS, a function that adds its arguments, and a function `cmd_x(args) ->
int` that imports its implementation when it runs. To add one, write the two functions and the row.

Invariants: standard library and `proto.errors` only at import, since usage errors and `--help` need no
dependencies; exit codes are 0 (finished, every check held), 1 (it ran and something failed), 2 (bad usage or
configuration); a `UserError` becomes its message on stderr and 2.

Not handled here: signals during a run, which the launcher's own loop turns into an orderly end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launcher import bootstrap, options
from proto.errors import UserError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
DEFAULT_COMMAND = "compare"
DEFAULT_TOPOLOGY = "topologies/quickstart.toml"
WHOLE_SUITE = ("-q", "-n", "2", "--dist", "worksteal")
"""Two at a time, since most tests wait for processes that they start; neighbours stay together, and with them what they share."""


class Rest(Enum):
    """Which arguments a command takes as they are, in `args.rest`, unseen by argparse."""

    NONE = "none"
    AFTER_DASHES = "those after the first --"
    ALL = "all"


@dataclass(frozen=True)
class Command:
    """A row of the table. needs: the requirement set that the bootstrap provides before the handler runs."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[argparse.Namespace], int]
    needs: bootstrap.Needs = "run"
    rest: Rest = Rest.NONE


@dataclass(frozen=True)
class Request:
    """A command line that was understood."""

    command: Command
    args: argparse.Namespace

    @property
    def needs(self) -> bootstrap.Needs:
        """The requirement set for these arguments: a figure needs more than its command does."""
        return "plot" if getattr(self.args, "plot", None) is not None else self.command.needs


def main(argv: Sequence[str]) -> int:
    """Parse and run, in an interpreter that has the dependencies; returns the exit code."""
    return run(parse(argv))


def parse(argv: Sequence[str]) -> Request:
    """Understand a command line; nothing is run. SystemExit after `--help` (0) and on bad usage (2)."""
    words = list(argv) or [DEFAULT_COMMAND]
    command = next((row for row in COMMANDS if row.name == words[0]), None)
    rest: list[str] = []
    if command is not None and command.rest is Rest.ALL:
        words, rest = words[:1], words[1:]
    elif command is not None and command.rest is Rest.AFTER_DASHES and "--" in words:
        dashes = words.index("--")
        words, rest = words[:dashes], words[dashes + 1 :]
    args = _parser().parse_args(words)
    args.rest = rest
    return Request(args.command, args)


def run(request: Request) -> int:
    """Run the command; a UserError is shown without a traceback."""
    try:
        return request.command.handler(request.args)
    except UserError as error:
        sys.stderr.write(f"asyncpf: error: {error}\n")
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: a later option must not change what a script's shortened one means.
    parser = argparse.ArgumentParser(
        prog="asyncpf",
        description="Emulate KVM guests with asynchronous page faults.",
        epilog=f"Without a command: {DEFAULT_COMMAND} {DEFAULT_TOPOLOGY}.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
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


def cmd_run(args: argparse.Namespace) -> int:
    """`run TOPOLOGY`: one run."""
    from launcher import commands

    return commands.cmd_run(args)


def _add_compare(parser: argparse.ArgumentParser) -> None:
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


def cmd_compare(args: argparse.Namespace) -> int:
    """`compare [TOPOLOGY]`: the same work under several modes, as a table."""
    from launcher import commands

    return commands.cmd_compare(args)


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.usage = "asyncpf record [-h] [-o FILE] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the trace file to write")


def cmd_record(args: argparse.Namespace) -> int:
    """`record [-o FILE] -- COMMAND...`: the data accesses of a real program, under valgrind."""
    from launcher import commands

    return commands.cmd_record(args)


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a recorded trace")
    options.add_json(parser)


def cmd_trace(args: argparse.Namespace) -> int:
    """`trace FILE`: counts, footprint, reads and writes, reuse."""
    from launcher import commands

    return commands.cmd_trace(args)


def _add_stress(parser: argparse.ArgumentParser) -> None:
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
        default=options.duration_ns("1s"),
        metavar="TIME",
        dest="every_ns",
        help="with --chaos: time between two kills (default: 1s)",
    )
    options.add_log_inputs(parser)
    options.add_run_options(parser)


def cmd_stress(args: argparse.Namespace) -> int:
    """`stress`: many vCPUs of one or more VMs under overcommit, every page checked."""
    from launcher import commands

    return commands.cmd_stress(args)


def _add_chaos(parser: argparse.ArgumentParser) -> None:
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


def cmd_chaos(args: argparse.Namespace) -> int:
    """`chaos TOPOLOGY`: a run in which things go wrong on purpose."""
    from launcher import commands

    return commands.cmd_chaos(args)


def _add_scenario(parser: argparse.ArgumentParser) -> None:
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


def cmd_scenario(args: argparse.Namespace) -> int:
    """`scenario FILE...`: scripted protocol cases, expected against observed."""
    from launcher import scenario

    return scenario.cmd_scenario(args)


def _add_sim(parser: argparse.ArgumentParser) -> None:
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


def cmd_sim(args: argparse.Namespace) -> int:
    """`sim`: random runs in virtual time."""
    from launcher import sim

    return sim.cmd_sim(args)


def _add_check(parser: argparse.ArgumentParser) -> None:
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


def cmd_check(args: argparse.Namespace) -> int:
    """`check RUN_DIR|EVENTS...`: the invariants of KVM against recorded events."""
    from launcher import check

    return check.cmd_check(args)


def _add_replay(parser: argparse.ArgumentParser) -> None:
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


def cmd_replay(args: argparse.Namespace) -> int:
    """`replay RUN_DIR`: run recorded machines again and compare."""
    from launcher import replay

    return replay.cmd_replay(args)


def _add_zoo(parser: argparse.ArgumentParser) -> None:
    options.add_json(parser)


def cmd_zoo(args: argparse.Namespace) -> int:
    """`zoo`: known bugs put back in, each must be noticed."""
    from launcher import zoo

    return zoo.cmd_zoo(args)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make CURVE key pairs for links that leave this machine: NAME.key, which is secret, and NAME.pub for the other side."
        " A swap daemon elsewhere needs one pair, each host that uses it another."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="whose keys: as in daemon host")
    parser.add_argument(
        "--out", type=Path, default=Path("keys"), metavar="DIR", help="the folder, mode 0700 (default: keys)"
    )


def cmd_keys(args: argparse.Namespace) -> int:
    """`keys NAME...`: key pairs for links that leave this machine."""
    from launcher import keys

    return keys.cmd_keys(args)


def _add_swapd(parser: argparse.ArgumentParser) -> None:
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


def cmd_swapd(args: argparse.Namespace) -> int:
    """`swapd --listen ADDR --file F`: a swap daemon for hosts elsewhere."""
    from launcher import swapd_alone

    return swapd_alone.cmd_swapd(args)


def cmd_topologies(args: argparse.Namespace) -> int:
    """`topologies`: the ready-made ones, one line each."""
    from launcher import commands

    return commands.cmd_topologies(args)


def cmd_test(args: argparse.Namespace) -> int:
    """`test [PYTEST ARGUMENT...]`: replaces this process by pytest in the checkout; without arguments the whole suite on two cores."""
    if not (bootstrap.APP_DIR / "tests").is_dir():
        raise UserError("the tests are not installed", where="test", allowed="launch.py test, in a checkout")
    os.chdir(bootstrap.APP_DIR)
    bootstrap.restart([sys.executable, "-m", "pytest", *(args.rest or WHOLE_SUITE)])


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that have none, and for those that take all as they are."""


COMMANDS = (
    Command("run", "run one topology", _add_run, cmd_run),
    Command(
        "compare", "run the same work under several modes and show the ratios", _add_compare, cmd_compare
    ),
    Command(
        "record", "record the memory accesses of a program", _add_record, cmd_record, rest=Rest.AFTER_DASHES
    ),
    Command("trace", "show what a recorded trace holds", _add_trace, cmd_trace),
    Command("stress", "many vCPUs under overcommit, with every page checked", _add_stress, cmd_stress),
    Command(
        "chaos", "let things go wrong during a run and check that nothing is lost", _add_chaos, cmd_chaos
    ),
    Command(
        "scenario",
        "run scripted protocol cases and compare with what is expected",
        _add_scenario,
        cmd_scenario,
    ),
    Command("sim", "random runs in virtual time, one per seed", _add_sim, cmd_sim),
    Command("zoo", "put known bugs back in and see which rule notices", _add_zoo, cmd_zoo),
    Command("check", "check the events of a run against KVM's invariants", _add_check, cmd_check),
    Command("replay", "run a recorded host again and compare what it does", _add_replay, cmd_replay),
    Command("swapd", "run a swap daemon for hosts elsewhere", _add_swapd, cmd_swapd),
    Command("keys", "make key pairs for links that leave this machine", _add_keys, cmd_keys),
    Command("topologies", "list the ready-made topologies", _no_arguments, cmd_topologies),
    Command(
        "test",
        "run the tests; the arguments go to pytest",
        _no_arguments,
        cmd_test,
        needs="test",
        rest=Rest.ALL,
    ),
)
