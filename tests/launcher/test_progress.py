"""What is shown while a run is under way, on a terminal and elsewhere."""

from __future__ import annotations

import io
import itertools

import pytest

from launcher.progress import ERASE, PLAIN_EVERY_MAX_S, PLAIN_EVERY_S, Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def _run(shown: Progress, clock: list[float], seconds: int, text: str = "{}") -> None:
    """As a loop does: ask often, update when it is due."""
    for _ in range(seconds):
        clock[0] += 1.0
        if shown.due():
            shown.update(text.format(clock[0]))


def test_a_line_that_says_the_same_does_not_come_again(clock: list[float]) -> None:
    out = io.StringIO()
    shown = Progress(out, "x")
    shown.phase("compiling the kernels")
    _run(shown, clock, 300, "compiling the kernels")
    shown.phase("running")
    assert out.getvalue() == "x: compiling the kernels\nx: running\n"


def test_ten_minutes_are_a_handful_of_lines_and_a_new_phase_is_quick_again(clock: list[float]) -> None:
    out = io.StringIO()
    shown = Progress(out)
    shown.phase("running")
    began = clock[0]
    _run(shown, clock, 600)
    times = [float(line) - began for line in out.getvalue().splitlines()[1:]]
    assert times[0] == PLAIN_EVERY_S
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert max(gaps) <= PLAIN_EVERY_MAX_S
    assert 10 <= len(times) <= 25
    shown.phase("checking")
    began = clock[0]
    _run(shown, clock, int(PLAIN_EVERY_S))
    assert float(out.getvalue().splitlines()[-1]) == began + PLAIN_EVERY_S


def test_on_a_terminal_one_line_changes_often(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = _Terminal()
    shown = Progress(out, "run")
    shown.phase("starting")
    _run(shown, clock, 10, "a line that is longer than the terminal {}")
    assert "\n" not in out.getvalue()
    lines = out.getvalue().split(ERASE)[1:]
    assert len(lines) == 11
    assert all(len(line) <= 19 for line in lines)
    shown.say("stays")
    shown.done()
    assert out.getvalue().endswith(f"{ERASE}run: stays\n")


def test_a_closed_stream_ends_the_output_and_nothing_else(clock: list[float]) -> None:
    shown = Progress(_Closed())
    for step in (shown.phase, shown.say, shown.update):
        step("text")
    clock[0] += 10_000
    assert not shown.due()
