"""Every bug of the zoo is caught, and the code as it is is clean under the same trials."""

from __future__ import annotations

import json

import pytest

from launcher.cli import main
from tests.zoo import catalogue
from tests.zoo.catalogue import AS_IN_KVM, BUGS, NOT_HERE
from tests.zoo.core import Bug, try_out


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.ident)
def test_bug_is_caught_and_the_code_without_it_is_clean(bug: Bug) -> None:
    result = try_out(bug)
    assert result.clean == ()
    assert result.caught, (result.invariants, result.others)


@pytest.mark.parametrize("bug", AS_IN_KVM, ids=lambda bug: bug.ident)
def test_what_kvm_does_to_this_day_is_seen_in_the_code_as_it_is(bug: Bug) -> None:
    complaints = " ".join(try_out(bug).clean)
    assert any(number in complaints for number in bug.breaks)


def test_no_bug_is_listed_twice() -> None:
    idents = [bug.ident for bug in (*BUGS, *AS_IN_KVM)] + list(NOT_HERE)
    assert len(idents) == len(set(idents))


def test_the_command_shows_them_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a few of them: that each is caught and clean is tested above."""
    few = tuple(bug for bug in BUGS if bug.ident in ("BZ-05", "BZ-28", "D-03"))
    monkeypatch.setattr(catalogue, "BUGS", few)
    assert main(["zoo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in report["bugs"]] == ["BZ-05", "BZ-28", "D-03"]
    assert all(row["caught"] and row["clean"] for row in report["bugs"])
    assert main(["zoo"]) == 0
    text = capsys.readouterr().out
    assert all(ident in text for ident in (*NOT_HERE, *(bug.ident for bug in (*few, *AS_IN_KVM))))
