"""The commands: one table of names, arguments and handlers.

Purpose: a command is a row of COMMANDS, a function in launcher/arguments.py that adds its arguments, and a
function `cmd_x(args) -> int` that imports its implementation when it runs. To add one, write the two
functions and the row.

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

from launcher import arguments, bootstrap
from proto.errors import UserError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
DEFAULT_COMMAND = "compare"
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
        epilog=f"Without a command: {DEFAULT_COMMAND} {arguments.DEFAULT_TOPOLOGY}.",
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


def cmd_run(args: argparse.Namespace) -> int:
    """`run TOPOLOGY`: one run."""
    from launcher import commands

    return commands.cmd_run(args)


def cmd_compare(args: argparse.Namespace) -> int:
    """`compare [TOPOLOGY]`: the same work under several modes, as a table."""
    from launcher import commands

    return commands.cmd_compare(args)


def cmd_record(args: argparse.Namespace) -> int:
    """`record [-o FILE] -- COMMAND...`: the data accesses of a real program, under valgrind."""
    from launcher import commands

    return commands.cmd_record(args)


def cmd_trace(args: argparse.Namespace) -> int:
    """`trace FILE`: counts, footprint, reads and writes, reuse."""
    from launcher import commands

    return commands.cmd_trace(args)


def cmd_stress(args: argparse.Namespace) -> int:
    """`stress`: many vCPUs of one or more VMs under overcommit, every page checked."""
    from launcher import commands

    return commands.cmd_stress(args)


def cmd_chaos(args: argparse.Namespace) -> int:
    """`chaos TOPOLOGY`: a run in which things go wrong on purpose."""
    from launcher import commands

    return commands.cmd_chaos(args)


def cmd_scenario(args: argparse.Namespace) -> int:
    """`scenario FILE...`: scripted protocol cases, expected against observed."""
    from launcher import scenario

    return scenario.cmd_scenario(args)


def cmd_sim(args: argparse.Namespace) -> int:
    """`sim`: random runs in virtual time."""
    from launcher import sim

    return sim.cmd_sim(args)


def cmd_check(args: argparse.Namespace) -> int:
    """`check RUN_DIR|EVENTS...`: the invariants of KVM against recorded events."""
    from launcher import check

    return check.cmd_check(args)


def cmd_replay(args: argparse.Namespace) -> int:
    """`replay RUN_DIR`: run recorded machines again and compare."""
    from launcher import replay

    return replay.cmd_replay(args)


def cmd_zoo(args: argparse.Namespace) -> int:
    """`zoo`: known bugs put back in, each must be noticed."""
    from launcher import zoo

    return zoo.cmd_zoo(args)


def cmd_keys(args: argparse.Namespace) -> int:
    """`keys NAME...`: key pairs for links that leave this machine."""
    from launcher import keys

    return keys.cmd_keys(args)


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


COMMANDS = (
    Command("run", "run one topology", arguments.run, cmd_run),
    Command(
        "compare", "run the same work under several modes and show the ratios", arguments.compare, cmd_compare
    ),
    Command(
        "record",
        "record the memory accesses of a program",
        arguments.record,
        cmd_record,
        rest=Rest.AFTER_DASHES,
    ),
    Command("trace", "show what a recorded trace holds", arguments.trace, cmd_trace),
    Command("stress", "many vCPUs under overcommit, with every page checked", arguments.stress, cmd_stress),
    Command(
        "chaos", "let things go wrong during a run and check that nothing is lost", arguments.chaos, cmd_chaos
    ),
    Command(
        "scenario",
        "run scripted protocol cases and compare with what is expected",
        arguments.scenario,
        cmd_scenario,
    ),
    Command("sim", "random runs in virtual time, one per seed", arguments.sim, cmd_sim),
    Command("zoo", "put known bugs back in and see which rule notices", arguments.zoo, cmd_zoo),
    Command("check", "check the events of a run against KVM's invariants", arguments.check, cmd_check),
    Command("replay", "run a recorded host again and compare what it does", arguments.replay, cmd_replay),
    Command("swapd", "run a swap daemon for hosts elsewhere", arguments.swapd, cmd_swapd),
    Command("keys", "make key pairs for links that leave this machine", arguments.keys, cmd_keys),
    Command("topologies", "list the ready-made topologies", arguments.none, cmd_topologies),
    Command(
        "test",
        "run the tests; the arguments go to pytest",
        arguments.none,
        cmd_test,
        needs="test",
        rest=Rest.ALL,
    ),
)
