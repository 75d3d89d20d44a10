"""Recording: lackey's text becomes accesses, a real program becomes a file, and its figures are right."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.lackey import LackeyParser
from launcher.record import _queued_s, record
from launcher.reuse import TraceReport, format_report, reuse_distances, trace_report
from proto.errors import UserError
from proto.tracefile import load_trace
from proto.tracewriter import TraceWriter

ROOT = Path(__file__).resolve().parents[2]
QUEUE_BOUND_S = 30.0
needs_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind is not installed (Debian package: valgrind)"
)


def parse(*pieces: bytes) -> tuple[list[tuple[int, str]], LackeyParser]:
    parser = LackeyParser()
    got: list[tuple[int, str]] = []
    for piece in pieces:
        words, is_write = parser.feed(piece)
        got += [(int(word) * 8, "W" if write else "R") for word, write in zip(words, is_write, strict=True)]
    return got, parser


def test_parser_on_lines_of_every_kind() -> None:
    text = (
        b"==12== Lackey, an example Valgrind tool\n"
        b"I  0401ab70,3\n"
        b" S 1fff000778,8\n"
        b" L 04222c20,4\n"
        b" M 0421dbc4,4\n"
        b" L 00001ffe,4\n"  # crosses a page
        b" M 00000fff,2\n"  # crosses a page, read and written
        b" S 00003008,32\n"  # a vector
        b" L ffffffffff600000,1\n"
        b"\n"
        b"==12== \n"
    )
    got, parser = parse(text)
    assert got == [
        (0x1FFF000778, "W"),
        (0x4222C20, "R"),
        *((0x421DBC0, kind) for kind in "RW"),
        *((address, "R") for address in (0x1FF8, 0x2000)),
        *((address, kind) for kind in "RW" for address in (0xFF8, 0x1000)),
        *((address, "W") for address in (0x3008, 0x3010, 0x3018, 0x3020)),
        (0xFFFFFFFFFF600000, "R"),
    ]
    assert parser.unreadable == 0
    assert list(parser.messages) == ["==12== Lackey, an example Valgrind tool", "", "==12== "]


@pytest.mark.parametrize(
    "line",
    [
        b" ", b" L", b" L ", b" L 10", b" L ,8", b" L 10,", b" L 10,0", b" L 10,513", b" L 10,9999", b" L 1g,8",
        b" L 10,x", b" L  10,8", b" X 10,8", b" L10,8", b" L 11112222333344445,8", b" L ffffffffffffffff,8",
        b" L -1,8", b" L 10,8 ", b" L 10,,8", b" L 1,0,8", b" L A0,8",
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [b"", b" S 20,8\n"])
def test_malformed_lines_are_counted_and_left_out(before: bytes, line: bytes) -> None:
    got, parser = parse(before + line + b"\n S 30,8\n")
    assert got == [(0x20, "W")] * bool(before) + [(0x30, "W")]
    assert parser.unreadable == 1


ACCESS = st.tuples(st.sampled_from("LSMI"), st.integers(0, 2**64 - 513), st.integers(1, 512))


@settings(deadline=None, max_examples=40)
@given(accesses=st.lists(ACCESS, max_size=60), cuts=st.lists(st.integers(0, 1500), max_size=5))
def test_parser_agrees_with_its_naive_twin_however_the_text_is_cut(
    accesses: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    expected = []
    text = b""
    for kind, address, size in accesses:
        text += (b"I  " if kind == "I" else f" {kind} ".encode()) + f"{address:08x},{size}\n".encode()
        words = sorted({byte & ~7 for byte in (*range(address, address + size, 8), address + size - 1)})
        expected += [
            (word, mode) for mode in {"L": "R", "S": "W", "M": "RW", "I": ""}[kind] for word in words
        ]
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    got, parser = parse(*pieces)
    assert got == expected
    assert parser.unreadable == 0


def test_a_line_without_end_is_not_kept() -> None:
    got, parser = parse(*[b"x" * 40_000] * 5, b"\n L 10,8\n")
    assert got == [(0x10, "R")]
    assert parser.unreadable == 2


def naive_distances(pages: list[int], count: int) -> npt.NDArray[np.int64]:
    stack: list[int] = []
    distances = np.zeros(count, np.int64)
    for page in pages:
        if page in stack:
            distances[stack.index(page)] += 1
            stack.remove(page)
        stack.insert(0, page)
    return distances


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), length=st.integers(1, 1500))
def test_reuse_distances_agree_with_a_list_kept_by_hand(seed: int, count: int, length: int) -> None:
    pages = np.random.default_rng(seed).integers(0, count, length)
    got = reuse_distances((pages << 10).astype(np.uint32), count)
    assert np.array_equal(got, naive_distances(pages.tolist(), count))


def report_of(path: Path, pages: list[int]) -> TraceReport:
    words = np.array(pages, np.uint64) * np.uint64(512)
    with TraceWriter(path, command=["prog"], tool="tool") as writer:
        writer.append(words, np.array(pages) == 3)
        writer.finish("exit status 0")
    return trace_report(path)


def test_report_of_a_cyclic_scan(tmp_path: Path) -> None:
    report = report_of(tmp_path / "t.apft", list(range(20)) * 10)
    assert report.written_pages == 1
    assert report.hot_percent == 10.0
    assert report.distances[19] == 180
    assert report.lru_faults == {75: 200, 50: 200, 25: 200, 10: 200}
    figures = report.as_dict()
    assert figures["reuse_distance_pages"] == [
        [0, 0, 0],
        [1, 1, 0],
        [2, 3, 0],
        [4, 7, 0],
        [8, 15, 0],
        [16, 19, 180],
    ]
    assert "20 pages" in format_report(report)


@needs_valgrind
def test_a_real_program_is_recorded_and_keeps_its_streams(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    code = (
        f"from pathlib import Path; from launcher.record import record; record(['cat'], Path({str(path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        input=b"through\n",
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == b"through\n"
    assert b"program: exit status 0" in done.stderr
    info, vpns, _ = load_trace(path)
    assert info.command == ("cat",)
    assert info.tool.startswith("valgrind-")
    assert min(info.reads, info.writes) > 1000
    assert len(vpns) > 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.apft"]


@needs_valgrind
@pytest.mark.parametrize(
    ("script", "ended"), [("exit 3", "exit status 3"), ("kill -KILL $$", "signal SIGKILL")]
)
def test_how_the_program_ended_is_reported(tmp_path: Path, script: str, ended: str) -> None:
    assert record(["sh", "-c", script], tmp_path / "t.apft").ended == ended


@needs_valgrind
def test_the_limit_is_exact_and_stops_the_program(tmp_path: Path) -> None:
    info = record(["sh", "-c", "while :; do :; done"], tmp_path / "t.apft", 12_345)
    assert (info.accesses, info.ended) == (12_345, "limit")


@needs_valgrind
def test_a_stopped_program_may_clean_up(tmp_path: Path) -> None:
    cleaned = tmp_path / "cleaned"
    record(
        ["sh", "-c", f"trap 'echo > {cleaned}; exit' TERM; while :; do :; done"], tmp_path / "t.apft", 500_000
    )
    assert cleaned.exists()


def test_waiting_for_a_core_is_no_time_for_the_clean_up() -> None:
    """Two that want the same core: what the other computes, this one waits. Without such figures in the kernel it is 0."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    programs = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        deadline_s = time.monotonic() + QUEUE_BOUND_S
        told = Path("/proc/self/schedstat").exists()
        while told and _queued_s(programs[0].pid) < 0.1:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        for program in programs:
            program.kill()
            program.wait()


@needs_valgrind
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_recorded_and_stops_the_program(tmp_path: Path, number: int) -> None:
    path = tmp_path / "t.apft"
    # The program says which process it is, then ignores every polite request to stop.
    script = "trap '' INT TERM; echo $$; while :; do :; done"
    code = (
        "from pathlib import Path; from launcher.record import record;"
        f"record(['sh', '-c', {script!r}], Path({str(path)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert load_trace(path)[0].ended == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.apft"]


def test_a_missing_valgrind_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match=r"apt install valgrind"):
        record(["true"], tmp_path / "t.apft")


@needs_valgrind
def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    with pytest.raises(UserError, match="no such program"):
        record(["no-such-program-here"], path)
    with pytest.raises(UserError, match="no program"):
        record([], path)
    with pytest.raises(UserError, match="at least one"):
        record(["true"], path, 0)
    with pytest.raises(UserError, match="cannot write"):
        record(["true"], tmp_path / "none" / "t.apft")
    assert not list(tmp_path.iterdir())
