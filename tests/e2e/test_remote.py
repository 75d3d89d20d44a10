"""Daemons elsewhere, on loopback: a run whose pages lie behind tcp survives what happens to the process over there."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, Final

import pytest

from proto import curve
from swapd.kept_file import open_kept
from tests import processes
from tests.e2e.runs import END_BOUND_S, MIXED, POLL_S, RUN_BOUND_S, Launched, Runner, assert_good

SIZE: Final = ("--size", "64", "--set", "allow_tmpfs=true")
LONG: Final = MIXED.replace("rate_ops_per_s = 200_000", "rate_ops_per_s = 4000")
"""Slow enough that several things can happen to its daemon: some 5 s."""
assert LONG != MIXED
ENDLESS: Final = "".join(line for line in LONG.splitlines(keepends=True) if not line.startswith("ops"))
"""Until it is stopped."""
TINY: Final = (
    '[host]\nallowance_mib = 2\n[[vm]]\nmemory_mib = 4\n[[vm.task]]\nworkload = "stamp"\nmemory_kib = 64\n'
)
"""For what does not come so far as to run."""


class Far:
    """A daemon on its own, and the topology that leads to it."""

    def __init__(self, runner: Runner, *more: str, keys: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.runner = runner
        self.file = runner.folder / "swap"
        self.more = more
        self.connect = f'\n[[swapd]]\nconnect = "tcp://127.0.0.1:{self.port}"\n{keys}'
        self.command = self.start()

    def start(self) -> Launched:
        """Start the supervisor, again with the same file."""
        self.command = self.runner.start(
            "swapd", "--listen", f"tcp://127.0.0.1:{self.port}", "--file", str(self.file), *SIZE, *self.more
        )
        self.says("listening")
        return self.command

    def says(self, text: str) -> None:
        """Wait until the supervisor has said that: its lines are read by another thread."""
        deadline_s = time.monotonic() + RUN_BOUND_S
        while not any(text in line for line in self.command.said):
            assert self.command.process.poll() is None, self.command.said
            assert time.monotonic() < deadline_s, self.command.said
            time.sleep(POLL_S)

    def long_run(self, more: str = "", text: str = LONG) -> Launched:
        """A run with this daemon, once it is under way. more: further keys of its table."""
        path = self.runner.file(text + self.connect + more)
        run = self.runner.start("run", str(path), "--json", out=self.runner.folder / "out")
        run.wait_for(": running")
        return run

    @property
    def worker(self) -> int:
        """The process that serves."""
        return self.command.pid_of("swapd-0")

    def leave(self) -> None:
        """Ctrl-C; it must go in order and leave its file alone."""
        self.command.process.send_signal(signal.SIGINT)
        ended = self.command.end(END_BOUND_S)
        assert ended.code == 0, ended.stderr
        assert ended.stderr.endswith("stopped\n")
        kept = open_kept(self.file, 0, allow_tmpfs=True)
        kept.close()


@pytest.fixture
def keys(tmp_path: Path) -> str:
    curve.make_keys(tmp_path / "keys", ["daemon", "host", "stranger"])
    return f'key = "{tmp_path}/keys/host.key"\nserver_key = "{tmp_path}/keys/daemon.pub"\n'


def locked(folder: Path) -> tuple[str, ...]:
    return ("--key", f"{folder}/keys/daemon.key", "--allow", f"{folder}/keys/host.pub")


def assert_survived(ended: Any) -> dict[str, Any]:
    """As `assert_good`; late messages of a dead incarnation may have been refused."""
    assert ended.code == 0, ended.stderr
    summary: dict[str, Any] = ended.summary
    assert summary["ended"] == "finished"
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["integrity"]["errors"] == 0
    assert summary["tasks"]["killed"] == summary["tasks"]["unfinished"] == 0
    assert not summary["check"]["violations"]
    return summary


def test_two_runs_one_after_the_other(runner: Runner, keys: str) -> None:
    far = Far(runner, *locked(runner.folder), keys=keys)
    for name, beside in (("alone", ""), ("beside", "\n[[swapd]]\n")):
        summary = assert_good(runner.run(MIXED + beside + far.connect, name=name))
        assert summary["swap"]["in_pages"] > 100
        assert summary["swap"]["out_pages"] > 100
        assert summary["totals"]["fences"] == 0
    far.leave()
    assert sum("goodbye" in line for line in far.command.said) == 2
    assert any("1 keys allowed" in line for line in far.command.said)


def test_killed_again_and_again(runner: Runner) -> None:
    far = Far(runner)
    run = far.long_run()
    pid = far.worker
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    for _ in range(4):
        pid = far.worker
        os.kill(pid, signal.SIGKILL)
        processes.wait_gone([pid], END_BOUND_S)
        time.sleep(0.4)
    summary = assert_survived(run.end())
    assert summary["totals"]["fences"] >= 2, "at least some of them fell into the run"
    assert summary["totals"]["resent"] > 0
    outage = summary["outage"]
    assert outage["count"] >= 2, "also of daemons that this run does not start"
    assert outage["down_ms"]["median"] > 0
    assert outage["work_by_ms"]["0"] is not None
    assert outage["work_per_100ms_down"] is not None
    far.leave()


def test_a_stopped_process_and_a_killed_supervisor_are_replaced(runner: Runner) -> None:
    far = Far(runner)
    run = far.long_run()
    worker = far.worker
    os.kill(worker, signal.SIGSTOP)
    assert processes.wait_gone([worker], END_BOUND_S) == set()
    far.says("not at work")
    worker = far.worker
    far.command.process.kill()
    assert processes.wait_gone([worker], END_BOUND_S) == set(), "it dies with its supervisor"
    far.start()
    summary = assert_survived(run.end())
    assert summary["totals"]["fences"] >= 1, far.command.said
    far.leave()


def test_a_file_that_was_lost_ends_the_run(runner: Runner) -> None:
    far = Far(runner)
    run = far.long_run()
    worker = far.worker
    far.command.process.kill()
    processes.wait_gone([worker], END_BOUND_S)
    far.file.unlink()
    far.start()
    ended = run.end()
    assert ended.code == 1
    assert "without the pages it had acknowledged" in ended.stderr
    far.leave()


def test_a_daemon_that_does_not_come_back_ends_the_run(runner: Runner) -> None:
    far = Far(runner)
    run = far.long_run("give_up_seconds = 1\n")
    far.leave()
    ended = run.end()
    assert ended.code == 1
    assert "was silent for 1 s (give_up_seconds)" in ended.stderr


def test_a_wrong_key_gets_nowhere_and_a_second_host_waits(runner: Runner, keys: str) -> None:
    far = Far(runner, *locked(runner.folder))
    first = far.long_run(keys, ENDLESS)
    wrong = {
        "works for another host": keys,
        "refuses this host's key": keys.replace("host.key", "stranger.key"),
        "the handshake failed": keys.replace("daemon.pub", "stranger.pub"),
        "swapd-0 at tcp://127.0.0.1": "",
    }
    for k, (says, key) in enumerate(wrong.items()):
        ended = runner.run(TINY + far.connect + "give_up_seconds = 1\n" + key, name=f"wrong{k}")
        assert ended.code == 1
        assert says in ended.stderr
    first.process.send_signal(signal.SIGINT)
    summary = first.end().summary
    assert summary["ended"] == "interrupted"
    assert summary["swap"]["in_pages"] > 0
    assert summary["integrity"]["errors"] == summary["tasks"]["killed"] == summary["totals"]["fences"] == 0
    far.leave()
    assert any("refused" in line for line in far.command.said)
