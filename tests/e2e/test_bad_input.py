"""What cannot be run is refused before anything starts: exit code 2, and file, key, what was found and what is allowed.

Nothing starts, so the command is called in this process; that a process of its own makes the same of it is shown once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import options
from tests.e2e.runs import BM, MIXED, Caller, Ended, Runner

REPLAY = '[[vm]]\nmemory_mib = 32\n[[vm.task]]\nworkload = "replay"\ntrace = "some.apft"\n[host]\nallowance_mib = 8\n'


def _refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    message = ended.stderr.partition("asyncpf: error: ")[2]
    assert message, ended.stderr
    assert "Traceback" not in ended.stderr
    for part in (*parts, "allowed"):
        assert part in message


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("vcpus = 2", "vcpu = 2", ("small.toml", "vm[0].vcpu", "vcpus")),
        ("vcpus = 2", 'vcpus = "two"', ("small.toml", "vm[0].vcpus", "'two'", "whole number")),
        ("vcpus = 2", "vcpus = 0", ("small.toml", "vm[0].vcpus", "0", "1 to 1_024")),
        ("allowance_mib = 8", "allowance_mib = 64", ("small.toml", "host.allowance_mib", "64", "at most 32")),
        ("memory_kib = 16_384", "memory_kib = 65_536", ("small.toml", "vm[0].memory_mib", "32")),
        ("[host]", "[host", ("small.toml", "TOML")),
    ],
)
def test_a_topology_that_makes_no_sense(old: str, new: str, parts: tuple[str, ...], caller: Caller) -> None:
    assert old in BM
    out = caller.folder / "out"
    _refused(caller.run(caller.file(BM.replace(old, new)), out), *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--mode", "interrupt", "--profile", "v3"), ("profile", "v3", "mainline")),
        (("--mode", "halt", "--profile", "v3"), ("profile", "v3", "v7")),
        (("--set", "vm.vcpuz=3"), ("vm.vcpuz", "vcpus")),
        (("--set", "swapd.directory=/dev/shm"), ("small.toml", "swapd[0].directory", "tmpfs", "/dev/shm")),
        (("--set", "swapd.size_mib=2097152"), ("small.toml", "swapd[0].directory", "not enough space")),
        (
            (
                "--set",
                "host.allowance_mib=1000000",
                "--set",
                "vm.memory_mib=1000000",
                "--set",
                "swapd.size_mib=8",
            ),
            ("shared memory", "1000000", "allowance_mib"),
        ),
    ],
)
def test_what_this_machine_or_kvm_does_not_have(
    words: tuple[str, ...], parts: tuple[str, ...], caller: Caller
) -> None:
    out = caller.folder / "out"
    _refused(caller.run(caller.file(BM), out, *words), *parts)
    assert not out.exists(), "what the refused run had created is gone"


def test_a_missing_trace_and_a_missing_topology(caller: Caller, runner: Runner) -> None:
    missing = caller.command("run", str(caller.file(REPLAY)))
    _refused(missing, "small.toml", "vm[0].task[0].trace", "some.apft")
    as_process = runner.command("run", str(runner.folder / "none.toml"))
    _refused(as_process, "none.toml", "no such file")
    assert caller.command("run", str(runner.folder / "none.toml")) == as_process


def test_a_foreign_and_a_truncated_trace(caller: Caller) -> None:
    path = caller.file(REPLAY)
    trace = caller.folder / "some.apft"
    trace.write_bytes(b"\x7fELF" + bytes(200))
    _refused(caller.command("run", str(path)), "some.apft", "magic", "not an asyncpf trace")
    shipped = Path(options.__file__).parents[1] / "traces" / "sort.apft"
    trace.write_bytes(shipped.read_bytes()[:5000])
    _refused(caller.command("run", str(path)), "some.apft", "truncated", "5000")
    _refused(caller.command("trace", str(trace)), "some.apft", "truncated", "5000")


def test_a_run_directory_that_cannot_be_used(caller: Caller) -> None:
    path = caller.file(MIXED)
    full = caller.folder / "full"
    full.mkdir()
    (full / "mine").write_text("precious")
    _refused(caller.run(path, full), "--out", str(full), "not empty")
    assert [entry.name for entry in full.iterdir()] == ["mine"]
    # Even root cannot create these.
    _refused(caller.run(path, full / "mine"), "--out", "cannot be written")
    _refused(caller.run(path, Path("/proc/asyncpf")), "--out", "cannot be written")


def test_bad_usage(runner: Runner) -> None:
    ended = runner.command("run", "quickstart", "--mode", "telepathy")
    assert ended.code == 2
    assert "telepathy" in ended.stderr
    assert "interrupt" in ended.stderr
