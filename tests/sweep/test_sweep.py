"""Every call of host and daemons that may fail fails once, and the run ends in one of the documented ways; the whole sweep, with every
error and every call, is `python -m tests.sweep`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from host.outbox import Outbox
from proto import curve
from swapd.uring import Uring
from tests.swapd.conftest import needs_uring
from tests.sweep import talk, times
from tests.sweep.__main__ import free_port
from tests.sweep.calls import MEMORY, Fault
from tests.sweep.judge import ENDED, HANDLED, RESTARTED, Court, Limits, Result
from tests.sweep.sites import Shot, Site, Sweep
from tests.sweep.talk import Saved

NOT_REACHED: Final = {
    r"host\.(faults|faulty_shell) .*|swapd\.faulty .*": "a run with a schedule of faults (tests/host/test_faulty_shell.py, tests/e2e)",
    r"host\.\w+ \w+\.(slots_lost|gone)": "a daemon that is gone for good ends this run, which has no replicas (tests/host/test_remote.py)",
    r"host\.\w+ \w+\.unstick|host\.shortage .*": "swap that is all used up (tests/host/test_shortage.py)",
    r"host\.copies Copies\.blocks_used": "simulated worlds, which look at it",
    r"host\.logged Replaying.*": "`replay` and its tests, no part of a run",
    r"host\.warm .*|swapd\.\w+ warm": "in the zygote, before anything is there that could suffer",
    r"swapd\.engine Engine\.(submit|reap)": "requests of blocks that the file does not have, which no host of ours makes",
    r"swapd\.swapfile (_probe_by_trial|_time_of|scattered_reads|killed_reader|_reader_child)": "the probe before a run",
    r"proto\.curve (_private_folder|_write)": "`keys`",
    r"proto\.door Door\.answer": "the answer to a stranger: the harness has none (tests/swapd/test_remote.py)",
    r"proto\.files read_regular": "read by commands before a run",
    r"proto\.image ImageReader\.(__init__|check_pages)": "looked through before a run (tests/fuzz, tests/proto/test_image.py)",
    r"proto\.inputlog (InputLog\..*|ended_early)": "`replay` and the summary",
    r"proto\.segments (Segment\.collapse|attach)": "more than 2 MiB; in the zygote",
    r"swapd\.uring Uring\.(reap|close)": "after a refusal of the kernel that lasts; with operations at the device at the end",
    r"swapd\.timer Timer\.expired": "a device so fast that its model has to wait: depends on the machine",
    # Reached only when another call has failed before.
    r"swapd\.kept_file (open_kept|_open)": "after an error",
    r"swapd\.(swapfile create|uring _setup)": "after an error",
    r"proto\.(image ImageWriter|inputlog InputLogWriter)\.__init__": "after an error",
    r"proto\.(segments _create_one|trace_writer _create_file)": "after an error",
}
"""Pattern of module and function -> why no conversation gets there."""


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Court]:
    folder = tmp_path_factory.mktemp("sweep")
    curve.make_keys(folder / "keys", ["daemon", "host"])
    times.warm()
    with times.short_times(), Sweep() as sweep:
        yield Court(sweep, folder, folder / "keys", free_port())


@pytest.fixture(scope="module")
def saved(court: Court) -> Saved:
    return court.save()


@pytest.fixture(scope="module")
def reached(court: Court, saved: Saved) -> tuple[dict[Site, int], dict[Site, int]]:
    """Sites of a conversation from the boot, and of one from an image."""
    return court.reached(None), court.reached(saved)


def test_every_call_that_looks_like_input_and_output_is_judged(court: Court) -> None:
    assert court.sweep.unknown == []


def test_what_is_not_reached_has_a_reason(
    court: Court, reached: tuple[dict[Site, int], dict[Site, int]]
) -> None:
    needs_uring()
    places = {f"{site.module} {site.function}" for site in court.sweep.faults}
    left = {
        str(site)
        for site in court.sweep.faults
        if site not in reached[0]
        and site not in reached[1]
        and not any(re.fullmatch(one, f"{site.module} {site.function}") for one in NOT_REACHED)
    }
    assert left == set()
    stale = [one for one in NOT_REACHED if not any(re.fullmatch(one, place) for place in places)]
    assert stale == []


def test_a_conversation_goes_through_everything(court: Court) -> None:
    outcome, held = court.try_one(None)
    assert outcome == HANDLED
    assert held.slept > 10, "pages were waited for asynchronously"
    assert min(held.versions.values()) >= 1
    assert max(held.versions.values()) >= 3


def _picked(court: Court, here: set[Site]) -> list[Site]:
    """All that are more than memory, and of the others the first of each function."""
    functions: set[tuple[str, str]] = set()
    picked = []
    for site in sorted(here):
        only_memory = court.sweep.faults[site] == (MEMORY,)
        if not only_memory or (site.module, site.function) not in functions:
            picked.append(site)
        if only_memory:
            functions.add((site.module, site.function))
    return picked


@pytest.mark.parametrize("part", range(4))
def test_the_first_call_of_every_site_may_fail(
    court: Court, saved: Saved, reached: tuple[dict[Site, int], dict[Site, int]], part: int
) -> None:
    live, restored = reached
    result = Result()
    # The conversation from an image is the shorter one.
    sites = _picked(court, live.keys() | restored.keys())[part::4]
    for site in sites:
        court.sweep_site(site, result, Limits(1, 1), saved if site in restored else None)
    assert [f"{one.shot}: {one.what}" for one in result.findings] == []
    assert len(sites) - result.fired <= 2, "what depends on time may not be reached again"


# -- the judge itself ------------------------------------------------------------------------------------------------------------------
def _site(court: Court, text: str) -> Site:
    found = [site for site in court.sweep.faults if text in str(site)]
    assert len(found) == 1, found
    return found[0]


def _fault(name: str, court: Court, site: Site) -> Fault:
    return next(fault for fault in court.sweep.faults[site] if fault.name == name)


def _shoot(court: Court, saved: Saved, text: str, fault: str, n: int = 1) -> str:
    site = _site(court, text)
    outcome, _ = court.try_one(Shot(site, _fault(fault, court, site), n), saved)
    assert court.sweep.fired
    return outcome


def test_outcomes_are_told_apart(court: Court, saved: Saved) -> None:
    assert _shoot(court, saved, "HostSockets.send: self.router.send #1", "EAGAIN", 3) == HANDLED
    assert _shoot(court, saved, "Timer.__init__: _libc.timerfd_create", "EMFILE") == RESTARTED
    assert _shoot(court, saved, "link.py bind_router: socket.bind", "EADDRINUSE") == ENDED


def test_a_lost_entry_is_a_hang(court: Court, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "retry", lambda _: None)
    monkeypatch.setattr(talk, "BOUND_S", 1.5)
    with pytest.raises(talk.HangError):
        _shoot(court, saved, "HostSockets.send: self.router.send #1", "EHOSTUNREACH", 1)


def test_a_descriptor_that_stays_is_seen(court: Court, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uring()
    leaked: list[int] = []
    release = Uring._release

    def forgets(ring: Uring) -> None:
        leaked.append(os.dup(ring.eventfd))
        release(ring)

    monkeypatch.setattr(Uring, "_release", forgets)
    monkeypatch.setattr("tests.sweep.judge.LEAVE_S", 0.05)
    try:
        with pytest.raises(AssertionError, match="left behind"):
            court.try_one(None, saved)
    finally:
        for fd in leaked:
            os.close(fd)


def test_a_wrong_page_is_seen(court: Court, saved: Saved) -> None:
    wrong = Saved(saved.image, {**saved.versions, 20: saved.versions[20] + 1})
    with pytest.raises(AssertionError, match="gfn 20 is not as written last"):
        court.try_one(None, wrong)


def test_an_error_from_nowhere_is_no_documented_end(
    court: Court, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("swapd.service.Service.turn", breaks)
    with pytest.raises(AssertionError, match="dies again and again"):
        court.try_one(None, saved)
