"""A daemon killed with hundreds of reads and writes in flight, and its frames and slots in use again at once: every page is right.

Two controls do without the fence. Whether the device at hand shows the damage then is a matter of microseconds, and reported. With one
that is slow, what was in flight is done for sure after the successor went to work. (In virtual time: tests/zoo D-04 and D-13.)
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from host import events as ev
from proto.machine import MachineError
from swapd import swapfile
from tests.swapd.killed import PAGES, World

KILLS = int(os.environ.get("FENCE_KILLS", "6"))
IN_FLIGHT = 200
BETWEEN = 512
"""Pages checked between two kills."""
CONTROL_TRIES = int(os.environ.get("FENCE_CONTROL_TRIES", "2"))
"""Each takes a second or two; more by hand."""


@pytest.fixture
def world(tmp_path: Path, disk_dir: Path) -> Iterator[World]:
    probe = swapfile.probe_fence(disk_dir)
    engine = "uring" if probe.reliable and probe.rounds else "pread"
    made = World(tmp_path, disk_dir, engine, seed=1)
    made.start(0)
    made.fill()
    yield made
    made.close()


def _ready(world: World, since: int) -> bool:
    return world.checked > since + BETWEEN and world.busy(IN_FLIGHT)


def test_every_page_is_right_after_kills_with_hundreds_in_flight(
    world: World, record_testsuite_property: Callable[[str, object], None]
) -> None:
    flights: Counter[int] = Counter()
    for _ in range(KILLS):
        world.until(partial(_ready, world, world.checked))
        flights += world.kill()
        world.fence()
        world.start(world.epoch + 1)
        world.fenced()
    world.finish()
    assert world.damage == 0
    assert min(flights.values()) >= KILLS * IN_FLIGHT // 16
    assert sum(flights.values()) >= KILLS * IN_FLIGHT
    assert world.checked > 2 * PAGES + KILLS * BETWEEN, "written once, read at the end, and in between"
    record_testsuite_property("fence_in_flight_at_kills", dict(flights))
    record_testsuite_property("fence_pages_checked", world.checked)


@pytest.mark.parametrize("fenced", [True, False])
def test_a_slow_device_does_harm_without_the_fence_and_none_with_it(world: World, fenced: bool) -> None:
    """What was in flight lands when the fence waits for it, or after a thousand pages more."""
    world.slow_device = True
    world.until(lambda: world.busy(IN_FLIGHT))
    world.kill()
    assert len(world.late) >= IN_FLIGHT
    if fenced:
        world.fence()
    world.start(world.epoch + 1)
    world.fenced()
    world.until(partial(_settled, world, world.checked))
    world.land()
    world.finish()
    assert (world.damage == 0) == fenced


def test_a_stopped_daemon_keeps_what_it_was_told_until_it_is_killed_and_fenced(world: World) -> None:
    world.until(lambda: world.busy(IN_FLIGHT))
    world.stop()
    # Answers that were on their way come; from then on nothing does.
    told = world.named()
    while told != (told := _after(world, 0.3)):
        pass
    assert len(told) >= IN_FLIGHT
    kept = _after(world, 0.6)
    assert kept == told, "nothing is given up"
    frames, slots = world.free()
    for frame, slot in kept:
        assert frame not in frames
        assert slot not in slots
    with pytest.raises(MachineError, match="before epoch 0 was fenced"):
        world.swap.on((ev.DaemonUp(0, 1),), 0)
    world.kill()
    with pytest.raises(MachineError, match="before epoch 0 was fenced"):
        world.swap.on((ev.DaemonUp(0, 1),), 0)
    assert world.named() == kept
    world.fence()
    world.start(world.epoch + 1)
    world.fenced()
    world.finish()
    assert world.damage == 0


def _after(world: World, seconds: float) -> set[tuple[int, int]]:
    """What is unanswered when that time has passed."""
    until_s = time.monotonic() + seconds
    world.until(lambda: time.monotonic() > until_s)
    return world.named()


def _settled(world: World, since: int) -> bool:
    return world.checked > since + PAGES or world.damage > 0


def test_control_without_the_fence(
    world: World, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """The successor is there already when its predecessor dies, and goes to work while the device may still be at it."""
    if world.ctx.swap_files[0].engine != "uring":
        pytest.skip("without io_uring and direct I/O nothing lands late here")
    tries = 0
    while tries < CONTROL_TRIES and not world.damage:
        tries += 1
        world.start(world.epoch + 1)
        world.until(lambda: world.has_come(world.epoch + 1) and world.busy(IN_FLIGHT))
        world.kill()
        world.fenced()  # a lie
        world.until(partial(_settled, world, world.checked))
    if not world.damage:
        world.finish()
    record_testsuite_property("fence_control_damage", f"{world.damage} after {tries} kills")
    if not world.damage:
        pytest.skip(f"no damage in {tries} kills without a fence: this device is done too soon")
