"""What the end-to-end tests share. That nothing is left behind is checked by tests/conftest.py, after every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import commands
from tests.e2e.runs import TIMEOUT_S, Caller, Runner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """Starts commands; none of their processes outlives the test."""
    made = Runner(tmp_path)
    yield made
    made.stop_all()


@pytest.fixture
def caller(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    """Calls commands in this process."""
    # The title is for a process that is all the launcher's.
    monkeypatch.setattr(commands, "_title", lambda: None)
    return Caller(tmp_path, capsys)
