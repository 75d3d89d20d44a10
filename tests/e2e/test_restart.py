"""A run whose guests are saved and restored on their way: nothing is lost, every sleeper goes on, nothing stays behind."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from proto.events import Kind
from proto.image import ImageReader
from proto.trace import event_files, read_file
from tests import processes
from tests.e2e.runs import END_BOUND_S, HOST, Ended, Runner, assert_good

MOVED = (
    HOST.replace("allowance_mib = 8", "allowance_mib = 4")
    + """
[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 100_000

[[vm.task]]
workload = "uniform"
count = 3
memory_kib = 4096

[[vm.task]]
workload = "stamp"
count = 2
memory_kib = 2048

[[vm.task]]
workload = "syscalls"
count = 2
memory_kib = 3072
"""
)
"""User-mode and kernel-mode faults at six times the memory the host gives, until the time is over."""
MODES = (("interrupt", "mainline"), ("exception", "v7"), ("halt", "mainline"), ("sync", "mainline"))


def events_of(ended: Ended, kind: Kind) -> np.ndarray:
    """Events of a kind in all sets of processes of the run, set by set."""
    assert ended.out is not None
    parts = [read_file(path).events for path in event_files(ended.out)]
    return np.concatenate([part[part["kind"] == kind] for part in parts])


@pytest.mark.parametrize(("mode", "profile"), MODES)
def test_guests_go_on_in_fresh_processes(mode: str, profile: str, runner: Runner) -> None:
    moves = ("500ms", "750ms") if mode == "interrupt" else ("500ms",)
    words = ["--mode", mode, "--profile", profile, "--seconds", "1"]
    ended = runner.run(MOVED, *words, *(word for at in moves for word in ("--restart-at", at)))
    summary = assert_good(ended)
    assert summary["tasks"]["done"] == 7
    moved = summary["save_restore"]
    assert (moved["planned"], moved["done"]) == (len(moves), len(moves))
    assert moved["down_ms"] > 0
    assert moved["image_pages"] > 1000
    assert 1.0 <= summary["seconds"] < 1.0 + moved["down_ms"] / 1000
    assert ended.out is not None
    assert not (ended.out / "image").exists()
    saved, restored = events_of(ended, Kind.STATE_SAVE), events_of(ended, Kind.STATE_RESTORE)
    assert len(saved) == len(restored) == 2 * len(moves)
    assert sorted(saved["c"].tolist()) == sorted(restored["c"].tolist()), "EN comes back as it was"
    assert all(saved["c"]) == (mode in ("interrupt", "exception"))
    assert not restored["b"].any(), "a fresh host is in no synthetic halt"
    check = runner.command("check", str(ended.out))
    assert check.code == 0, check.stdout


def test_saved_in_one_run_and_restored_in_another(runner: Runner) -> None:
    path = runner.file(MOVED)
    image = runner.folder / "image"
    ended = runner.start(
        "run", str(path), "--json", "--seconds", "30", "--save-at", "500ms", "--image", str(image)
    ).end()
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert (summary["ended"], summary["integrity"]["errors"]) == ("saved", 0)
    assert summary["tasks"]["unfinished"] == 7
    with ImageReader(image) as reader:
        reader.check_pages()
        assert reader.pages == 32 * 256
    # Another host: more memory, other daemons.
    words = ["--set", "host.allowance_mib=6", "--seconds", "1.5", "--restart-at", "1s"]
    again = assert_good(runner.run(MOVED, "--restore", str(image), *words, name="again"))
    assert again["tasks"]["done"] == 7
    assert (again["save_restore"]["planned"], again["save_restore"]["done"]) == (2, 2)
    assert again["integrity"]["reads_checked"] > summary["integrity"]["reads_checked"]
    assert 0.9 < again["seconds"] < 1.4, "what was measured before the image is the other run's"
    refused = runner.run(MOVED, "--restore", str(image), "--set", "vm.vcpus=3", name="other")
    assert (refused.code, refused.stdout) == (2, "")
    assert "vm[0].vcpus: the image has 2, the topology 3" in refused.stderr
    raw = bytearray(image.read_bytes())
    raw[8192] ^= 1
    image.write_bytes(raw)
    damaged = runner.run(MOVED, "--restore", str(image), name="damaged")
    assert damaged.code == 2
    assert "damaged" in damaged.stderr


def test_a_restart_that_comes_too_late_fails_the_run(runner: Runner) -> None:
    short = "".join(
        f"{line}\nops = 10\n" if line.startswith("workload") else f"{line}\n" for line in MOVED.splitlines()
    )
    ended = runner.run(short, "--seconds", "60", "--restart-at", "50s")
    assert ended.code == 1
    assert "1 restores were asked for, 0 took place" in ended.stderr


@pytest.mark.parametrize(
    ("moment", "how"),
    [(": preparing", "signal"), ("restoring memory", "launcher"), ("restoring memory", "host-0")],
)
def test_whoever_goes_in_the_middle_nothing_stays(moment: str, how: str, runner: Runner) -> None:
    path = runner.file(MOVED)
    run = runner.start("run", str(path), "--json", "--seconds", "60", "--restart-at", "300ms")
    run.wait_for(": running")
    run.said.clear()
    run.wait_for(moment)
    others = run.descendants()
    if how == "signal":
        run.process.send_signal(signal.SIGINT)
        ended = run.end(END_BOUND_S)
        assert ended.summary["ended"] == "interrupted"
    elif how == "launcher":
        run.process.kill()
        run.process.wait(END_BOUND_S)
    else:
        victim = run.pid_of(how)
        others |= run.descendants()
        os.kill(victim, signal.SIGKILL)
        ended = run.end(END_BOUND_S)
        assert ended.summary["ended"] == "failed:host-0 killed by SIGKILL"
    assert processes.wait_gone(others, END_BOUND_S) == set()
    assert list(Path(tempfile.gettempdir()).glob("asyncpf*")) == []
