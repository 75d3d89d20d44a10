"""What cannot be run is refused before anything starts: exit code 2, and file, key, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import options
from tests.e2e.runs import BM, MIXED, Ended, Runner

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
def test_a_topology_that_makes_no_sense(old: str, new: str, parts: tuple[str, ...], runner: Runner) -> None:
    assert old in BM
    path = runner.file(BM.replace(old, new))
    out = runner.folder / "out"
    _refused(runner.start("run", str(path), out=out).end(), *parts)
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
    words: tuple[str, ...], parts: tuple[str, ...], runner: Runner
) -> None:
    path = runner.file(BM)
    out = runner.folder / "out"
    _refused(runner.start("run", str(path), *words, out=out).end(), *parts)
    assert not out.exists(), "what the refused run had created is gone"


def test_a_missing_trace_and_a_missing_topology(runner: Runner) -> None:
    _refused(
        runner.command("run", str(runner.file(REPLAY))), "small.toml", "vm[0].task[0].trace", "some.apft"
    )
    _refused(runner.command("run", str(runner.folder / "none.toml")), "none.toml", "no such file")


def test_a_foreign_and_a_truncated_trace(runner: Runner) -> None:
    path = runner.file(REPLAY)
    trace = runner.folder / "some.apft"
    trace.write_bytes(b"\x7fELF" + bytes(200))
    _refused(runner.command("run", str(path)), "some.apft", "magic", "not an asyncpf trace")
    shipped = Path(options.__file__).parents[1] / "traces" / "sort.apft"
    trace.write_bytes(shipped.read_bytes()[:5000])
    _refused(runner.command("run", str(path)), "some.apft", "truncated", "5000")
    _refused(runner.command("trace", str(trace)), "some.apft", "truncated", "5000")


def test_a_run_directory_that_cannot_be_used(runner: Runner) -> None:
    path = runner.file(MIXED)
    full = runner.folder / "full"
    full.mkdir()
    (full / "mine").write_text("precious")
    _refused(runner.start("run", str(path), out=full).end(), "--out", str(full), "not empty")
    assert [entry.name for entry in full.iterdir()] == ["mine"]
    # Even root cannot create these.
    _refused(runner.start("run", str(path), out=full / "mine").end(), "--out", "cannot be written")
    _refused(runner.start("run", str(path), out=Path("/proc/asyncpf")).end(), "--out", "cannot be written")


def test_bad_usage(runner: Runner) -> None:
    ended = runner.command("run", "quickstart", "--mode", "telepathy")
    assert ended.code == 2
    assert "telepathy" in ended.stderr
    assert "interrupt" in ended.stderr
