"""The zygote by itself: forks, reports, kills, and what a role is left with."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.zygote import EXIT_ORPHANED, make_context, restrict
from launcher.zygote_link import (
    APP_DIR,
    EXIT_BUG,
    EXIT_USAGE,
    Child,
    Exited,
    Forked,
    Gone,
    Ready,
    Report,
    Zygote,
    describe_exit,
    describe_status,
)
from proto import segments
from proto.topology import Topology

WAIT_S = 30.0
SIZES = {"frames": 1 << 20, "control": 8192, "pcpu": 4096}
ROLES = dict.fromkeys(("host", "vcpu", "swapd"), "tests.launcher.test_zygote:role")


def role(context: Any, *arguments: int) -> None:
    """What the forked processes do: write down what they were given, then what the number says."""
    number, epoch = (*arguments, 0, 0)[:2]
    (context.run_dir / f"told-{number}-{epoch}").write_text(f"{sorted(context.segments)} {os.getpid()}")
    if number == 1:
        raise ValueError("told to")
    if number == 2:
        time.sleep(WAIT_S)
    if number == 3:
        sys.exit(9)


def _config(run_dir: Path) -> dict[str, Any]:
    topology = Topology.from_dict({"host": {"allowance_mib": 2}, "vm": [{"vcpus": 1, "memory_mib": 96}]})
    return {
        "run_id": "0",
        "run_dir": str(run_dir),
        "endpoint": "",
        "tcp_endpoint": "",
        "topology": topology.to_dict(),
        "segments": [[name, size] for name, size in SIZES.items()],
        "swap_files": [[16, False, "ext4", "pread"]] * 5,
        "traces": [["a.apft", 10, 20]],
        "trace_bytes": 1 << 20,
        "events": "events",
        "image": "",
        "lamport": 0,
        "log_inputs": "",
        "roles": ROLES,
    }


class _Ready:
    """A zygote that has been set up, with all reports so far."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / "logs").mkdir()
        self.run_dir = run_dir
        self.zygote = Zygote(run_dir / "logs" / "zygote-0.log", [])
        made = segments.create(SIZES)
        files = [os.memfd_create("swap") for _ in range(5)]
        self.zygote.send_setup(_config(run_dir), [segment.fd for segment in made.values()] + files)
        for segment in made.values():
            segment.close()
        for fd in files:
            os.close(fd)
        self.reports: list[Report] = []

    def until(self, kind: type[Any], count: int = 1) -> list[Any]:
        """Receive until there were `count` reports of a kind in all; returns them."""
        deadline_s = time.monotonic() + WAIT_S
        while len(found := [report for report in self.reports if isinstance(report, kind)]) < count:
            assert self.zygote.wait_report(deadline_s - time.monotonic()), self.reports
            self.reports += self.zygote.receive()
            assert kind is Gone or Gone() not in self.reports, (
                self.run_dir / "logs/zygote-0.log"
            ).read_text()
        return found

    def run(self, *children: Child) -> list[Exited]:
        """Fork and wait for the ends."""
        self.zygote.fork(children)
        return self.until(Exited, len(children))


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[_Ready]:
    made = _Ready(tmp_path)
    made.until(Ready)
    yield made
    made.zygote.stop(5.0)
    made.zygote.close()


def test_forks_are_reported_before_ends_and_ends_once(ready: _Ready) -> None:
    children = [Child("vcpu", 0, 0), Child("vcpu", 1, 0), Child("vcpu", 3, 0), Child("swapd", 0, 7)]
    ended = {report.child: report.status for report in ready.run(*children)}
    assert {child: os.waitstatus_to_exitcode(status) for child, status in ended.items()} == dict(
        zip(children, (0, EXIT_BUG, 9, 0), strict=True)
    )
    forked = [report.child for report in ready.reports if isinstance(report, Forked)]
    assert forked == children
    for child in children:
        kinds = [type(r) for r in ready.reports if isinstance(r, Forked | Exited) and r.child == child]
        assert kinds == [Forked, Exited]
    assert "ValueError: told to" in (ready.run_dir / "logs" / "vcpu-1.log").read_text()
    assert (ready.run_dir / "told-0-0").read_text().startswith("['control', 'frames', 'pcpu'] ")
    assert (ready.run_dir / "told-0-7").read_text().startswith("['frames'] "), "a daemon maps the frames only"


def test_kill_ends_one_process_and_foreign_pids_are_left_alone(ready: _Ready) -> None:
    victim = Child("vcpu", 2, 0)
    ready.zygote.fork([victim])
    (forked,) = ready.until(Forked)
    ready.zygote.kill(os.getpid())
    ready.zygote.kill(forked.pid)
    (ended,) = ready.until(Exited)
    assert (ended.child, ended.status) == (victim, int(signal.SIGKILL))
    ready.zygote.kill(forked.pid)
    assert ready.run(Child("swapd", 0, 1))


def test_stop_kills_and_reaps_everything(ready: _Ready) -> None:
    ready.zygote.fork([Child("vcpu", 2, 0), Child("swapd", 2, 0)])
    pids = [report.pid for report in ready.until(Forked, 2)]
    assert ready.zygote.stop(WAIT_S) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert ready.until(Gone) == [Gone()]


def test_a_setup_that_cannot_be_used_ends_the_zygote_with_its_story(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "zygote-0.log"
    zygote = Zygote(log, [])
    try:
        zygote.send_setup(_config(tmp_path), [])
        assert zygote.wait_report(WAIT_S)
        assert zygote.receive() == [Gone()]
        assert zygote.wait(WAIT_S) == 1
        assert "0 descriptors for 3 segments and 5 swap files" in log.read_text()
    finally:
        zygote.stop(5.0)
        zygote.close()


def test_a_zygote_removes_what_it_was_told_to_when_its_launcher_is_not_there(tmp_path: Path) -> None:
    folder, file, other = tmp_path / "run", tmp_path / "socket", tmp_path / "other"
    (folder / "logs").mkdir(parents=True)
    (folder / "link").symlink_to(other)
    file.touch()
    other.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        # Process 1 is not its parent: the launcher has died meanwhile.
        done = subprocess.run(
            [sys.executable, "-m", "launcher.zygote", str(theirs.fileno()), "1", str(folder), str(file)],
            cwd=APP_DIR,
            pass_fds=(theirs.fileno(),),
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == 75
    assert not folder.exists()
    assert not file.exists()
    assert other.is_dir(), "what a link points to is not ours"


def test_a_launcher_that_had_not_read_everything_is_gone_all_the_same(tmp_path: Path) -> None:
    """Its end of the link is reset then, not closed."""
    made = _Ready(tmp_path)
    assert made.zygote.wait_report(WAIT_S)
    made.zygote.close()
    assert made.zygote.wait(WAIT_S) == EXIT_ORPHANED, (tmp_path / "logs" / "zygote-0.log").read_text()


def test_a_setup_for_a_zygote_that_is_gone_goes_nowhere(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    zygote = Zygote(tmp_path / "logs" / "zygote-0.log", [])
    zygote.kill_zygote()
    zygote.wait(WAIT_S)
    zygote.send_setup(_config(tmp_path), [])
    zygote.fork([Child("vcpu", 0, 0)])
    assert zygote.receive() == [Gone()]
    zygote.close()


def test_a_zygote_that_does_not_read_is_not_waited_for(ready: _Ready) -> None:
    ready.zygote._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 50_000))
    os.kill(ready.zygote.pid, signal.SIGSTOP)
    for _ in range(10_000):
        ready.zygote.kill(1 << 22)
        if ready.zygote._process.poll() is not None:
            break
    assert ready.zygote.wait(WAIT_S) == -signal.SIGKILL
    assert ready.until(Gone) == [Gone()]


def test_started_by_hand_it_says_how_it_is_started() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.zygote"],
        cwd=APP_DIR,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == EXIT_USAGE
    assert "started by the launcher" in done.stderr


def _context_in_child(transport: str) -> Any:
    """A context of this process, as the child of a daemon with that transport would have it."""
    config = _config(Path("/nowhere"))
    config["topology"]["swapd"] = [{"transport": transport}, {}]
    config["swap_files"] = config["swap_files"][:2]
    made = segments.create(SIZES)
    fds = [os.dup(segment.fd) for segment in made.values()] + [os.memfd_create("swap") for _ in range(2)]
    for segment in made.values():
        segment.close()
    return make_context(config, fds)


@pytest.mark.parametrize(("transport", "sees"), [("ipc", ["frames"]), ("tcp", [])])
def test_a_daemon_is_left_with_its_own_file_and_at_most_the_frames(transport: str, sees: list[str]) -> None:
    context = _context_in_child(transport)
    mapped = dict(context.segments)
    left = restrict(context, Child("swapd", 0, 0))
    assert sorted(left.segments) == sees
    assert [name for name, segment in mapped.items() if segment.address] == sees
    assert [file.fd >= 0 for file in left.swap_files] == [True, False]
    os.fstat(left.swap_files[0].fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(context.swap_files[1].fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(context.eventfds[0])
    os.close(left.swap_files[0].fd)
    for segment in left.segments.values():
        segment.close()


def test_host_and_vcpus_are_left_without_swap_files() -> None:
    context = _context_in_child("ipc")
    left = restrict(context, Child("vcpu", 0, 0))
    assert [file.fd for file in left.swap_files] == [-1, -1]
    for file in context.swap_files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file.fd)
    assert sorted(left.segments) == sorted(SIZES)
    assert left.traces[0].accesses == 20
    for fd in left.eventfds:
        os.close(fd)
    for segment in left.segments.values():
        segment.close()


def test_exit_codes_in_words() -> None:
    assert describe_status(0) == "exit code 0"
    assert describe_status(70 << 8) == "exit code 70"
    assert describe_status(int(signal.SIGSEGV) | 0x80) == "killed by SIGSEGV", "with a core dump"
    assert describe_exit(-40) == "killed by signal 40"
