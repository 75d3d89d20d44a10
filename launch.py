#!/usr/bin/env python3
"""The command line of asyncpf: `python3 launch.py [COMMAND] [ARGUMENTS]`; `--help` lists the commands.

Purpose: start on a machine that has nothing but Python. This file needs the standard library only, and it
parses on Pythons older than the oldest supported one, so that those get a message instead of a syntax error.
The arguments are checked first, then the bootstrap makes sure that the dependencies can be imported, then the
command runs.

Nobody imports this file except the entry point of an installed wheel.
"""

from __future__ import annotations

import os
import sys

OLDEST_PYTHON = (3, 11)


def main(argv: list[str] | None = None, *, installed: bool = False) -> int:
    """Run one command and return its exit code: 0 finished, 1 ran and failed, 2 bad usage or configuration.

    argv: the arguments without the program's name; the process's own by default.
    installed: True when started from a wheel, whose installer has seen to the dependencies.
    Raises SystemExit (0 after `--help`, 2 on bad usage) as argparse does.
    """
    if sys.version_info < OLDEST_PYTHON:
        sys.stderr.write(
            "asyncpf: error: this is Python {}.{} ({}), but 3.11 or newer is needed: "
            "start launch.py with a newer one, such as python3.11\n".format(
                *sys.version_info[:2], sys.executable
            )
        )
        return 2
    from launcher import bootstrap, cli

    arguments = sys.argv[1:] if argv is None else argv
    request = cli.parse(arguments)
    try:
        bootstrap.prepare(request.needs, arguments, installed=installed)
    except bootstrap.BootstrapError as error:
        sys.stderr.write(f"asyncpf: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("asyncpf: interrupted before anything was started\n")
        return 130
    return cli.run(request)


def _leave(code: int) -> None:
    """End this process at once: everything was closed before, and taking a hundred modules and their machine code apart takes longer
    than the end of a run.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more: Python's own way says so
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
