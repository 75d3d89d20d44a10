"""Whose processes a launcher ends when its zygote was killed."""

from __future__ import annotations

import os
import signal
import subprocess

from launcher.orphans import Orphans
from tests import processes

WAIT_S = 10.0
PARENT = "sleep 600 & echo $!; read line"
"""A shell with a child, until its standard input is closed."""


def start(group: int | None) -> tuple[subprocess.Popen[str], int]:
    """The shell, and its child."""
    shell = subprocess.Popen(
        ["sh", "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=group,
    )
    assert shell.stdout is not None
    return shell, int(shell.stdout.readline())


def end(shell: subprocess.Popen[str]) -> None:
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.close()
    shell.wait(WAIT_S)
    shell.stdout.close()


def test_what_the_zygote_forked_goes_and_what_others_started_stays() -> None:
    other, others_child = start(None)
    zygote, zygotes_child = start(0)
    orphans = Orphans(zygote.pid)
    try:
        # Both children become this process's now.
        end(other)
        end(zygote)
        orphans.reap()
        assert processes.wait_gone([zygotes_child], WAIT_S) == set()
        assert others_child in processes.children(os.getpid())
        assert "sleep" in processes.command_line(others_child), "alive"
    finally:
        os.kill(others_child, signal.SIGKILL)
        os.waitpid(others_child, 0)
