"""Columns of copies against a dictionary that holds the same, under random operations."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from host.copies import SLOTS_PER_DAEMON, Copies

DAEMONS = 3
BLOCKS = 20
STEPS = 900
GONE_AT = (400, 700)


@dataclass
class Twin:
    """What `Copies` must say, in the plainest way: slot -> its copies, and which of them hold the page."""

    slots: dict[int, list[int]] = field(default_factory=dict)
    good: dict[int, int] = field(default_factory=dict)
    named: dict[int, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    """Given back, and named by a request."""
    bad: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)

    def give_back(self, copy: int) -> None:
        if self.named.get(copy, 0):
            self.waiting.add(copy)

    def used(self) -> set[int]:
        held = {copy for copies in self.slots.values() for copy in copies} | self.waiting
        return {copy for copy in held if copy // SLOTS_PER_DAEMON not in self.gone}

    def singles(self) -> int:
        return sum(good == 1 for good in self.good.values())


class Play:
    """Both of them, and who is up."""

    def __init__(self, seed: int, replicas: int) -> None:
        self.rng = random.Random(seed)
        self.real = Copies([BLOCKS] * DAEMONS, replicas)
        self.twin = Twin()
        self.replicas = replicas
        self.up = set(range(DAEMONS))

    def is_up(self, daemon: int) -> bool:
        return daemon in self.up

    def written(self, *, wanted: bool) -> int | None:
        """A slot with a page, or one that is being written."""
        found = [slot for slot, good in self.twin.good.items() if (good > 0) is wanted]
        return self.rng.choice(sorted(found)) if found else None

    def take(self) -> None:
        usable = self.up - self.twin.gone
        slot = self.real.take(self.is_up)
        if slot < 0:
            free = set(range(DAEMONS)) - self.twin.gone
            blocked = self.twin.used() | self.twin.bad
            assert all(sum(c // SLOTS_PER_DAEMON == d for c in blocked) == BLOCKS for d in free)
            return
        copies = self.real.copies(slot)
        assert copies[0] == slot
        assert not set(copies) & (self.twin.used() | self.twin.bad), (
            "a block that is in use, or bad, was given out"
        )
        assert len({copy // SLOTS_PER_DAEMON for copy in copies}) == len(copies) <= self.replicas
        if slot // SLOTS_PER_DAEMON in usable:
            assert {copy // SLOTS_PER_DAEMON for copy in copies} <= usable
        self.twin.slots[slot], self.twin.good[slot] = copies, 0

    def finish(self) -> None:
        slot = self.written(wanted=False)
        if slot is None:
            return
        copies = self.twin.slots.pop(slot)
        del self.twin.good[slot]
        good = [copy for copy in copies if self.rng.random() < 0.8]
        for copy in copies:
            if copy not in good:
                self.twin.give_back(copy)
        if not good:
            self.real.free(slot)
            return
        sum_ = self.rng.getrandbits(64)
        name = self.real.written(slot, good, sum_)
        assert name == good[0]
        assert [self.real.xxh3(copy) for copy in good] == [sum_] * len(good)
        self.twin.slots[name], self.twin.good[name] = good, len(good)

    def rewrite(self) -> None:
        slot = self.written(wanted=True)
        if slot is None:
            return
        copies = self.twin.slots.pop(slot)
        del self.twin.good[slot]
        up = [copy for copy in copies if copy // SLOTS_PER_DAEMON in self.up]
        for copy in copies:
            if up and copy not in up:
                self.twin.give_back(copy)
        name = self.real.rewrite(slot, self.is_up)
        now = self.real.copies(name)
        assert now[: len(up or copies)] == (up or copies)
        self.twin.slots[name], self.twin.good[name] = now, 0

    def free(self) -> None:
        slot = self.written(wanted=True)
        if slot is None:
            return
        for copy in self.twin.slots.pop(slot):
            self.twin.give_back(copy)
        del self.twin.good[slot]
        self.real.free(slot)

    def quarantine(self) -> None:
        slot = self.written(wanted=True)
        if slot is None or self.rng.random() < 0.9:
            return
        copy = self.rng.choice(self.twin.slots[slot])
        assert self.real.quarantine(slot, copy)
        assert not self.real.quarantine(slot, copy), "only once"
        self.twin.bad.add(copy)
        self.twin.slots[slot].remove(copy)
        self.twin.good[slot] -= 1
        if not self.twin.slots[slot]:
            del self.twin.slots[slot], self.twin.good[slot]
            self.real.free(slot)

    def name(self) -> None:
        copies = sorted(copy for copies in self.twin.slots.values() for copy in copies)
        if copies:
            copy = self.rng.choice(copies)
            if self.twin.named.get(copy, 0) < 3:
                self.real.name(copy)
                self.twin.named[copy] = self.twin.named.get(copy, 0) + 1

    def unname(self) -> None:
        named = sorted(copy for copy, count in self.twin.named.items() if count)
        if named:
            copy = self.rng.choice(named)
            self.real.unname(copy)
            self.twin.named[copy] -= 1
            if not self.twin.named[copy]:
                self.twin.waiting.discard(copy)

    def change_up(self) -> None:
        self.up ^= {self.rng.randrange(DAEMONS)}
        self.up -= self.twin.gone

    def lose(self) -> None:
        """A daemon never comes back."""
        daemon = self.rng.randrange(DAEMONS)
        if daemon in self.twin.gone:
            return
        lost = set(self.real.gone(daemon))
        self.up.discard(daemon)
        self.twin.gone.add(daemon)
        mine = set()
        for slot, copies in list(self.twin.slots.items()):
            left = [copy for copy in copies if copy // SLOTS_PER_DAEMON != daemon]
            if self.twin.good[slot]:
                self.twin.good[slot] = len(left)
            self.twin.slots[slot] = left
            if not left:
                if self.twin.good.pop(slot) == 0 and len(copies) and slot not in lost:
                    self.real.free(slot)
                else:
                    mine.add(slot)
                del self.twin.slots[slot]
        assert lost == mine

    def agree(self) -> None:
        for slot, copies in self.twin.slots.items():
            assert (self.real.copies(slot), self.real.good(slot)) == (copies, self.twin.good[slot])
        assert sorted(self.real.blocks_used()) == sorted(self.twin.used())
        assert self.real.used == len(self.twin.used())
        assert self.real.singles == (self.twin.singles() if self.replicas > 1 else 0)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_columns_and_dictionary_agree(seed: int, replicas: int) -> None:
    play = Play(seed, replicas)
    steps = [
        play.take, play.take, play.finish, play.finish, play.finish, play.rewrite, play.free, play.quarantine, play.name, play.unname,
        play.change_up,
    ]  # fmt: skip
    for step in range(STEPS):
        (play.lose if step in GONE_AT else play.rng.choice(steps))()
        play.agree()
    assert play.twin.bad
    assert play.twin.gone


def test_a_slot_has_two_copies_where_two_daemons_are_up() -> None:
    copies = Copies([4, 4, 4], 2)
    one, other = (copies.take(lambda _: True) for _ in range(2))
    assert [copy // SLOTS_PER_DAEMON for copy in copies.copies(one)] == [0, 1]
    assert [copy // SLOTS_PER_DAEMON for copy in copies.copies(other)] == [1, 2]
    alone = copies.take(lambda daemon: daemon == 2)
    assert [copy // SLOTS_PER_DAEMON for copy in copies.copies(alone)] == [2]
    nobody = copies.take(lambda _: False)
    assert len(copies.copies(nobody)) == 2, "both will come"


def test_a_rewrite_takes_the_place_of_a_copy_that_is_down() -> None:
    copies = Copies([4, 4, 4], 2)
    slot = copies.written(copies.take(lambda _: True), [0, SLOTS_PER_DAEMON], 7)
    name = copies.rewrite(slot, lambda daemon: daemon != 0)
    assert [copy // SLOTS_PER_DAEMON for copy in copies.copies(name)] == [1, 2]
    assert copies.used == 2


def test_a_block_that_a_request_names_is_not_given_out() -> None:
    copies = Copies([1], 1)
    slot = copies.written(copies.take(lambda _: True), [0], 7)
    copies.name(slot)
    copies.free(slot)
    assert copies.take(lambda _: True) == -1
    assert copies.used == 1
    copies.unname(slot)
    assert copies.take(lambda _: True) == slot
