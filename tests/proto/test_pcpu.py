"""Run tokens: one holder per token, nobody forgotten, nothing lost with a killed process."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import pcpu
from proto.atomics import py_add, py_load, py_store
from proto.pcpu import CLAIM, HEAD_RUN_MAX, Pcpu, U64Array, make_eventfds, owned_token, pcpu_words, want

PATIENCE_NS = 30_000_000_000
"""Longer than any wait of a correct run; a lost wake-up ends here, with TimeoutError."""
ONE_SECOND_NS = 1_000_000_000
INSIDE, VIOLATIONS, GRANTS, GO, READY, STOP = (8 * i for i in range(6))
"""Words of the tests' own shared page."""


@dataclass
class Board:
    """Shared words, eventfds and the children of one test."""

    vcpus: int
    pcpus: int
    seg: U64Array
    page: U64Array
    eventfds: list[int]
    children: list[int] = field(default_factory=list)

    def end(self, cpu: int, slice_ns: int = pcpu.SLICE_NS) -> Pcpu:
        return Pcpu(self.seg, cpu, self.eventfds, self.pcpus, slice_ns)

    def fork(self, body: Callable[[], None]) -> int:
        """A child that runs ``body`` and exits with 0, or 1 after an exception."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                body()
                code = 0
            finally:
                os._exit(code)
        self.children.append(pid)
        return pid

    def reap(self, pid: int) -> int:
        """Exit status of a child; kills it when it is not done in time."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.children.remove(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        raise AssertionError(f"child {pid} hangs; holders {self.end(-1).holders()}")

    def wait_for(self, word: int, at_least: int) -> None:
        deadline = time.monotonic() + 30
        while py_load(self.page, word) < at_least:
            assert time.monotonic() < deadline, f"word {word} stays at {py_load(self.page, word)}"
            time.sleep(0.0005)

    def states(self) -> list[int]:
        first = pcpu.PC_TOKENS + self.vcpus * 8
        return [int(word) for word in self.seg[first : first + self.vcpus]]

    def put_state(self, cpu: int, state: int) -> None:
        self.seg[pcpu.PC_TOKENS + self.vcpus * 8 + cpu] = state

    def waits(self, cpu: int, head: bool = False) -> int:
        return want(self.seg, cpu, self.vcpus, self.pcpus, head, 1)

    def owns(self, cpu: int) -> bool:
        return owned_token(self.seg, cpu, self.pcpus) >= 0

    def passes(self, cpu: int) -> int:
        """``cpu`` gives its token up; the vCPU that got it looks once, as it would when woken."""
        token = owned_token(self.seg, cpu, self.pcpus)
        assert token >= 0
        served = pcpu.pass_on(self.seg, cpu, self.vcpus, token, 2)
        if served >= 0:
            assert pcpu.look_again(self.seg, served, self.vcpus, self.pcpus, 3) == token
        return served


def new_board(vcpus: int, pcpus: int) -> Board:
    words = pcpu_words(vcpus)
    seg = np.frombuffer(mmap.mmap(-1, words * 8), np.uint64)
    page = np.frombuffer(mmap.mmap(-1, 4096), np.uint64)
    return Board(vcpus, pcpus, seg, page, make_eventfds(vcpus))


def clear_away(board: Board) -> None:
    for pid in board.children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for fd in board.eventfds:
        os.close(fd)


@pytest.fixture
def make_board() -> Iterator[Callable[[int, int], Board]]:
    boards: list[Board] = []

    def make(vcpus: int, pcpus: int) -> Board:
        boards.append(new_board(vcpus, pcpus))
        return boards[-1]

    yield make
    for board in boards:
        clear_away(board)


Make = Callable[[int, int], Board]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile before anything is forked."""
    pcpu.warm_up()
    board = new_board(2, 1)
    for word in (INSIDE, VIOLATIONS):
        py_add(board.page, word, 0)
    py_store(board.page, GO, 0)
    clear_away(board)


# ---- many processes ---------------------------------------------------------------------------------------


def hammer(board: Board, cpu: int, rounds: int) -> None:
    """Take and give a token ``rounds`` times, counting how many are inside at once."""
    own, rng = board.end(cpu, slice_ns=50_000), random.Random(cpu)
    py_add(board.page, READY, 1)
    board.wait_for(GO, 1)
    for _ in range(rounds):
        assert own.acquire(head=rng.random() < 0.3, timeout_ns=PATIENCE_NS) >= 0
        if int(py_add(board.page, INSIDE, 1)) + 1 > board.pcpus:
            py_add(board.page, VIOLATIONS, 1)
        for _ in range(rng.randrange(20)):
            py_load(board.page, INSIDE)
        if rng.random() < 0.1:
            os.sched_yield()
        py_add(board.page, INSIDE, -1)
        py_add(board.page, GRANTS, 1)
        own.release()


@pytest.mark.parametrize(
    ("vcpus", "pcpus", "rounds"), [(2, 1, 3000), (3, 2, 2000), (6, 5, 800), (16, 2, 300), (16, 1, 200)]
)
def test_holders_never_exceed_tokens_and_nobody_is_forgotten(
    make_board: Make, monkeypatch: pytest.MonkeyPatch, vcpus: int, pcpus: int, rounds: int
) -> None:
    # The periodic second look would hide a lost wake-up.
    monkeypatch.setattr(pcpu, "LOOK_AGAIN_MS", 3_600_000)
    board = make_board(vcpus, pcpus)
    pids = [board.fork(lambda cpu=cpu: hammer(board, cpu, rounds)) for cpu in range(vcpus)]  # type: ignore[misc]
    board.wait_for(READY, vcpus)
    py_store(board.page, GO, 1)
    assert [board.reap(pid) for pid in pids] == [0] * vcpus
    assert py_load(board.page, VIOLATIONS) == 0
    assert py_load(board.page, GRANTS) == vcpus * rounds
    observer = board.end(-1)
    assert observer.holders() == []
    assert board.states() == [pcpu.IDLE] * vcpus
    assert observer.handovers > 0


def hammer_until_stopped(board: Board, cpu: int) -> None:
    own = board.end(cpu, slice_ns=50_000)
    for turn in range(10_000_000):
        if py_load(board.page, STOP):
            return
        own.acquire(head=turn % 3 == 0, timeout_ns=PATIENCE_NS)
        py_add(board.page, GRANTS, 1)
        own.release()


@pytest.mark.parametrize("seed", range(3))
def test_survivors_go_on_when_others_are_killed_at_any_point(make_board: Make, seed: int) -> None:
    board, rng = make_board(8, 2), random.Random(seed)
    pids = [board.fork(lambda cpu=cpu: hammer_until_stopped(board, cpu)) for cpu in range(8)]  # type: ignore[misc]
    observer = board.end(-1)
    for victim in rng.sample(range(8), 6):
        board.wait_for(GRANTS, int(py_load(board.page, GRANTS)) + rng.randrange(1, 60))
        os.kill(pids[victim], signal.SIGKILL)
        assert board.reap(pids[victim]) == -signal.SIGKILL
        observer.release_for(victim)
        pids[victim] = 0
    board.wait_for(GRANTS, int(py_load(board.page, GRANTS)) + 500)
    py_store(board.page, STOP, 1)
    assert [board.reap(pid) for pid in pids if pid] == [0, 0]
    assert observer.holders() == []


def test_token_of_a_killed_holder_goes_to_the_waiter(make_board: Make) -> None:
    board = make_board(2, 1)

    def hold() -> None:
        board.end(0).acquire()
        py_add(board.page, READY, 1)
        signal.pause()

    def follow() -> None:
        board.end(1).acquire(timeout_ns=PATIENCE_NS)
        py_add(board.page, GRANTS, 1)

    holder = board.fork(hold)
    board.wait_for(READY, 1)
    waiter = board.fork(follow)
    deadline = time.monotonic() + 30
    while board.states()[1] != pcpu.WAITING:
        assert time.monotonic() < deadline
    os.kill(holder, signal.SIGKILL)
    assert board.reap(holder) == -signal.SIGKILL
    observer = board.end(-1)
    assert observer.holders() == [0]
    assert py_load(board.page, GRANTS) == 0
    assert observer.release_for(0) == 1
    assert board.reap(waiter) == 0
    assert observer.holders() == [1]
    assert observer.release_for(1) == 1
    assert observer.holders() == []
    assert observer.release_for(1) == 0


# ---- killed between two instructions ------------------------------------------------------------------------


def test_giver_killed_between_claim_and_hand_over(make_board: Make) -> None:
    board = make_board(3, 1)
    assert board.waits(0) == 0
    assert board.waits(1) == -1
    board.put_state(1, CLAIM + 0)
    assert board.end(-1).release_for(0) == 1
    assert board.owns(1)
    assert os.eventfd_read(board.eventfds[1]) >= 1


def test_giver_killed_between_hand_over_and_wake_up(make_board: Make) -> None:
    board = make_board(3, 1)
    assert board.waits(0) == 0
    assert board.waits(1) == -1
    assert pcpu.pass_on(board.seg, 0, 3, 0, 1) == 1
    assert board.end(-1).release_for(0) == 0
    assert os.eventfd_read(board.eventfds[1]) == 1
    assert board.owns(1)


def test_giver_killed_after_freeing_before_its_second_look(make_board: Make) -> None:
    board = make_board(3, 1)
    board.waits(0)
    board.waits(1)
    # The word is free, the waiter was told nothing: it finds the token itself at its next look.
    board.seg[pcpu.PC_TOKENS] = 0
    assert pcpu.look_again(board.seg, 1, 3, 1, 1) == 0


def test_killed_waiter_is_never_served(make_board: Make) -> None:
    board = make_board(3, 1)
    board.waits(0)
    board.waits(1)
    board.waits(2)
    assert board.end(-1).release_for(1) == 0
    assert board.passes(0) == 2
    assert board.states()[1] == pcpu.DEAD


def test_killed_waiter_that_was_served_returns_the_token(make_board: Make) -> None:
    board = make_board(3, 1)
    board.waits(0)
    board.waits(1)
    board.waits(2)
    assert pcpu.pass_on(board.seg, 0, 3, 0, 1) == 1
    assert board.end(-1).release_for(1) == 1
    assert board.owns(2)


def test_killed_while_it_claimed_itself(make_board: Make) -> None:
    board = make_board(2, 1)
    board.put_state(1, CLAIM + 1)
    assert board.end(-1).release_for(1) == 0
    assert board.states()[1] == pcpu.DEAD


def test_dead_vcpu_that_a_living_giver_has_claimed(make_board: Make) -> None:
    board = make_board(3, 1)
    board.waits(0)
    board.waits(1)
    board.put_state(1, CLAIM + 0)

    def hand_over() -> None:
        board.seg[pcpu.PC_TOKENS] = 1 + 1

    giver = threading.Timer(0.05, hand_over)
    giver.start()
    returned = board.end(-1).release_for(1)
    giver.join(10)
    assert returned == 1
    assert board.end(-1).holders() == []


def test_giver_and_its_receiver_both_dead(make_board: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcpu, "CLAIM_WAIT_NS", 1_000_000)
    board = make_board(3, 1)
    board.waits(0)
    board.waits(1)
    board.waits(2)
    board.put_state(1, CLAIM + 0)
    observer = board.end(-1)
    assert observer.release_for(1) == 0
    assert observer.release_for(0) == 1
    assert board.owns(2)


def test_holder_given_up_for_dead_by_mistake_is_told(make_board: Make) -> None:
    board = make_board(2, 1)
    first = board.end(0)
    first.acquire()
    board.end(-1).release_for(0)
    with pytest.raises(RuntimeError, match="given up for dead"):
        first.release()
    assert board.end(-1).holders() == []


# ---- order ------------------------------------------------------------------------------------------------------


def test_waiters_are_served_in_ring_order_each_once_per_round(make_board: Make) -> None:
    board = make_board(5, 1)
    for cpu in range(5):
        board.waits(cpu)
    running, order = 0, []
    for _ in range(12):
        served = board.passes(running)
        board.waits(running)
        order.append(served)
        running = served
    assert order == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]


def test_woken_vcpu_jumps_the_queue(make_board: Make) -> None:
    board = make_board(5, 1)
    for cpu in range(4):
        board.waits(cpu)
    board.waits(4, head=True)
    assert board.passes(0) == 4
    assert board.passes(4) == 1


def test_a_stream_of_queue_jumpers_does_not_starve_the_ring(make_board: Make) -> None:
    board = make_board(4, 1)
    board.waits(0)
    board.waits(1, head=True)
    board.waits(2)
    board.waits(3)
    running, order = 0, []
    for _ in range(2 * board.vcpus * (HEAD_RUN_MAX + 1)):
        served = board.passes(running)
        order.append(served)
        # 0 and 1 always come back at once and jump, 2 and 3 wait in line
        board.waits(running, head=running < 2)
        running = served
    for cpu in (2, 3):
        turns = [i for i, served in enumerate(order) if served == cpu]
        assert turns
        assert max(np.diff([-1, *turns])) <= board.vcpus * (HEAD_RUN_MAX + 1)
    assert order[:3] == [1, 0, 1]


def test_head_counts_once_per_slice(make_board: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    board = make_board(2, 1)
    board.waits(0)
    clock = [10 * ONE_SECOND_NS]
    monkeypatch.setattr("proto.pcpu.time.monotonic_ns", lambda: clock[0])
    late = board.end(1, slice_ns=1000)
    seen: list[int] = []
    for advance_ns in (0, 999, 1, 500, 500):
        clock[0] += advance_ns
        with pytest.raises(TimeoutError):
            seen_by_leave(late, seen, board)
    assert seen == [pcpu.WAITING_HEAD, pcpu.WAITING, pcpu.WAITING_HEAD, pcpu.WAITING, pcpu.WAITING_HEAD]


def seen_by_leave(waiter: Pcpu, seen: list[int], board: Board) -> None:
    """Acquire with no time, noting the state published while waiting."""
    real = pcpu.leave

    def noting(seg: U64Array, cpu: int, vcpus: int) -> bool:
        seen.append(board.states()[cpu])
        return real(seg, cpu, vcpus)

    pcpu.leave = noting
    try:
        waiter.acquire(head=True, timeout_ns=0)
    finally:
        pcpu.leave = real


@dataclass
class Twin:
    """The rules written down naively: who waits, whose turn it is."""

    vcpus: int
    pcpus: int
    holders: set[int] = field(default_factory=set)
    waiting: dict[int, bool] = field(default_factory=dict)
    cursor: int = 0
    head_run: int = 0

    def serve(self) -> int:
        """Who gets the token that was just given up; -1: nobody."""
        ring = [(self.cursor + i) % self.vcpus for i in range(self.vcpus)]
        heads = [cpu for cpu in ring if self.waiting.get(cpu)]
        if heads and self.head_run < HEAD_RUN_MAX:
            self.head_run += 1
            chosen = heads[0]
        else:
            chosen = next((cpu for cpu in ring if cpu in self.waiting), -1)
            if chosen >= 0:
                self.head_run = 0
                self.cursor = (chosen + 1) % self.vcpus
        if chosen >= 0:
            del self.waiting[chosen]
            self.holders.add(chosen)
        return chosen


@settings(deadline=None, max_examples=80)
@given(
    vcpus=st.integers(1, 7),
    pcpus=st.integers(1, 4),
    ops=st.lists(
        st.tuples(st.sampled_from(["want", "head", "give", "leave", "die"]), st.integers(0, 6)), max_size=60
    ),
)
def test_kernels_agree_with_the_naive_twin(vcpus: int, pcpus: int, ops: list[tuple[str, int]]) -> None:
    pcpus = min(pcpus, vcpus)
    board, twin, dead = new_board(vcpus, pcpus), Twin(vcpus, pcpus), set()
    try:
        for op, number in ops:
            cpu = number % vcpus
            if cpu in dead:
                continue
            if op in ("want", "head") and cpu not in twin.holders and cpu not in twin.waiting:
                took = board.waits(cpu, op == "head")
                if len(twin.holders) < pcpus:
                    assert took >= 0
                    twin.holders.add(cpu)
                else:
                    assert took == -1
                    twin.waiting[cpu] = op == "head"
            elif op == "give" and cpu in twin.holders:
                twin.holders.remove(cpu)
                assert board.passes(cpu) == twin.serve()
            elif op == "leave" and cpu in twin.waiting:
                assert pcpu.leave(board.seg, cpu, vcpus)
                del twin.waiting[cpu]
            elif op == "die":
                had = cpu in twin.holders
                twin.waiting.pop(cpu, None)
                twin.holders.discard(cpu)
                dead.add(cpu)
                assert board.end(-1).release_for(cpu) == int(had)
                served = twin.serve() if had else -1
                if served >= 0:
                    assert pcpu.look_again(board.seg, served, vcpus, pcpus, 3) >= 0
            owners = [cpu for cpu in range(vcpus) if board.owns(cpu)]
            assert set(owners) == twin.holders
            assert not twin.waiting or len(owners) == pcpus, "a token is free while somebody waits"
            assert pcpu.others_wait(board.seg, -1, vcpus) == bool(twin.waiting)
    finally:
        clear_away(board)


# ---- one end -------------------------------------------------------------------------------------------------------


def test_time_out_leaves_the_queue(make_board: Make) -> None:
    board = make_board(2, 1)
    first, second = board.end(0), board.end(1)
    first.acquire()
    with pytest.raises(TimeoutError, match=r"vCPU 1: no run token .* holders: \[0\]"):
        second.acquire(timeout_ns=2_000_000)
    assert not second.held
    assert not first.waiting_others()
    assert first.release() == -1
    assert second.acquire(timeout_ns=2_000_000) >= 0
    second.release()


def test_claimed_waiter_waits_for_its_token_past_the_time_out(make_board: Make) -> None:
    board = make_board(2, 1)
    board.waits(0)
    second = board.end(1)

    def claim_then_hand_over() -> None:
        deadline = time.monotonic() + 10
        while board.states()[1] != pcpu.WAITING and time.monotonic() < deadline:
            time.sleep(0.0002)
        board.put_state(1, CLAIM + 0)
        time.sleep(0.1)
        board.seg[pcpu.PC_TOKENS] = 1 + 1
        os.eventfd_write(board.eventfds[1], 1)

    giver = threading.Thread(target=claim_then_hand_over)
    giver.start()
    try:
        second.acquire(timeout_ns=50_000_000)
    finally:
        giver.join(10)
    assert second.held
    assert board.states()[1] == pcpu.IDLE


def test_token_that_comes_after_all_is_found_by_the_next_acquire(
    make_board: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcpu, "CLAIM_WAIT_NS", 1_000_000)
    board = make_board(2, 1)
    board.waits(0)
    second = board.end(1)

    def claimed(seg: U64Array, cpu: int, vcpus: int) -> bool:  # noqa: ARG001
        board.put_state(1, CLAIM + 0)
        return False

    monkeypatch.setattr(pcpu, "leave", claimed)
    with pytest.raises(TimeoutError):
        second.acquire(timeout_ns=0)
    board.seg[pcpu.PC_TOKENS] = 1 + 1
    assert second.acquire(timeout_ns=0) >= 0
    second.release()
    assert board.end(-1).holders() == []


def test_stale_wake_ups_do_not_count_as_tokens(make_board: Make) -> None:
    board = make_board(2, 1)
    board.waits(0)
    for _ in range(5):
        os.eventfd_write(board.eventfds[1], 1)
    with pytest.raises(TimeoutError):
        board.end(1).acquire(timeout_ns=5_000_000)


def test_stalled_names_holders_without_a_sign_of_life(
    make_board: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = make_board(3, 2)
    clock = [10 * ONE_SECOND_NS]
    monkeypatch.setattr("proto.pcpu.time.monotonic_ns", lambda: clock[0])
    first, second, observer = board.end(0), board.end(1), board.end(-1)
    bound_ns = 1000
    assert observer.stalled(clock[0] + ONE_SECOND_NS, bound_ns) == []
    first.acquire()
    clock[0] += 600
    second.acquire()
    assert observer.stalled(clock[0] + 400, bound_ns) == []
    assert observer.stalled(clock[0] + 401, bound_ns) == [0]
    assert observer.stalled(clock[0] + 1001, bound_ns) == [0, 1]
    clock[0] += 401
    assert not first.waiting_others()
    assert first.holder_since_ns == clock[0]
    assert observer.stalled(clock[0] + 600, bound_ns) == [1]
    # granted to a process that never looks: counts from the grant
    board.waits(2)
    assert second.release() == 2
    assert observer.stalled(clock[0] + 1001, bound_ns) == [0, 2]
    first.release()
    assert first.holder_since_ns == 0
    assert observer.stalled(clock[0] + 1001, bound_ns) == [2]


def test_warm_up_leaves_nothing_to_compile_after_the_fork() -> None:
    kernels = (
        "want",
        "look_again",
        "owned_token",
        "pass_on",
        "others_wait",
        "leave",
        "mark_dead",
        "drop_claims",
    )
    before = {name: len(getattr(pcpu, name).signatures) for name in kernels}
    board = new_board(2, 1)
    try:
        first, second = board.end(0), board.end(1)
        first.acquire(head=True)
        with pytest.raises(TimeoutError):
            second.acquire(timeout_ns=0)
        first.waiting_others()
        first.release()
        first.release_for(1)
    finally:
        clear_away(board)
    assert all(before.values())
    assert {name: len(getattr(pcpu, name).signatures) for name in kernels} == before


def test_more_tokens_than_vcpus(make_board: Make) -> None:
    board = make_board(2, 64)
    first, second = board.end(0), board.end(1)
    assert first.pcpus == 2
    first.acquire(timeout_ns=0)
    second.acquire(timeout_ns=0)
    assert board.end(-1).holders() == [0, 1]
    first.release()
    second.release()


def test_wrong_use_is_refused(make_board: Make) -> None:
    board = make_board(2, 1)
    for cpu, pcpus in ((2, 1), (-2, 1), (0, 0)):
        with pytest.raises(ValueError, match="run tokens"):
            Pcpu(board.seg, cpu, board.eventfds, pcpus)
    with pytest.raises(ValueError, match="segment of 5 words"):
        Pcpu(board.seg[:5], 0, board.eventfds, 1)
    first = board.end(0)
    with pytest.raises(AssertionError):
        first.release()
    first.acquire()
    with pytest.raises(AssertionError):
        first.acquire()
    with pytest.raises(AssertionError):
        board.end(-1).acquire()
