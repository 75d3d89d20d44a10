"""The host has no memory left: whom the guest kernel chooses, when its pages go, and that every notice gets one answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from guest.boot import TaskSpec, init_kernel
from guest.mmu import set_cr3
from guest.oom import masks
from guest.run import vcpu_run
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.units import PAGE_SIZE
from proto.wire import (
    HC_AT_BARRIER,
    HC_OOM,
    HC_RELEASE,
    OOM_KILLED,
    OOM_PENDING,
    Entry,
    Exit,
    ExitReason,
    Inject,
)
from tests.guest.cpu_world import MS, Segments, World, config, ends, faults, once, works
from tests.guest.harness import Guest

FIRST_PAGE = 40
"""Of what a test says that tasks own."""


class Spaces(Segments):
    """One address space per entry of ``spaces``: how many pages it has beside its root, and on which CPUs its tasks are."""

    def __init__(self, spaces: list[tuple[int, list[int]]], vcpus: int = 1) -> None:
        cpus = [cpu for _, where in spaces for cpu in where]
        super().__init__(len(cpus), vcpus)
        specs = [
            TaskSpec(L.P_BM_WORK, cpu=cpu, space=s) for s, (_, where) in enumerate(spaces) for cpu in where
        ]
        init_kernel(self.kern, specs, vcpus, 256, 1)
        self.pages: list[list[int]] = []
        self.owners = self.kern[L.owners_base(len(cpus), vcpus) :]
        gfn = FIRST_PAGE
        for s, (pages, _) in enumerate(spaces):
            root = L.ALLOC_FIRST_GFN + s
            self.owners[gfn : gfn + pages] = root
            self.pages.append([root, *range(gfn, gfn + pages)])
            gfn += pages

    def free(self) -> list[int]:
        """The stack of pages given back."""
        found = []
        gfn = int(self.kern[L.K_FREE]) & 0xFFFF_FFFF
        while gfn:
            found.append(gfn)
            assert int(self.owners[gfn]) & L.OWNER_FREE
            gfn = int(self.owners[gfn]) & 0xFFFF_FFFF
        return found


class Told(World):
    """A world whose host sends notices and takes pages. ``when``: exits at which a number is told."""

    def __init__(
        self,
        spaces: Spaces,
        behaviours: list[Callable[..., tuple[int, int]]],
        cpu: int = 0,
        mode: str = "sync",
    ) -> None:
        vcpus = int(spaces.kern[L.K_VCPUS])
        super().__init__(config(mode, tasks=len(behaviours), vcpus=vcpus, vcpu_id=cpu), behaviours, spaces)
        self.tell: list[int] = []
        self.when: Callable[[Exit], bool] = lambda record: record.reason == ExitReason.KICK
        self.released: list[int] = []
        self.flushed = 0
        self.answers: list[tuple[int, int, int]] = []
        self.entry_hook = self._told

    def _told(self, record: Exit) -> Entry | None:
        if record.reason == ExitReason.HYPERCALL and record.arg0 == HC_RELEASE:
            first = record.gpa // PAGE_SIZE
            self.released += [first + i for i in range(64) if record.arg1 >> i & 1]
            self.flushed = len(self.released) if not record.arg1 else self.flushed
        elif record.reason == ExitReason.HYPERCALL and record.arg0 == HC_OOM:
            self.answers.append((record.arg1, record.gpa, record.gva))
        elif (
            (record.reason == ExitReason.HYPERCALL and record.arg0 == HC_AT_BARRIER)
            or not self.tell
            or not self.when(record)
        ):
            return None
        if self.tell and self.when(record):
            return self.entry(record)._replace(inject=Inject.OUT_OF_MEMORY, cr2=self.tell.pop(0))
        return self.entry(record)

    def state(self, task: int) -> int:
        return self.seg.word(task, L.T_STATE)


def kicked(then: Callable[..., tuple[int, int]] = ends) -> Callable[..., tuple[int, int]]:
    return once(L.RUN_KICK, then)


# -- who dies --------------------------------------------------------------------------------------------------
def test_the_largest_address_space_dies_and_its_pages_are_free() -> None:
    spaces = Spaces([(3, [0]), (9, [0]), (5, [0])])
    world = Told(spaces, [kicked(), ends, ends])
    world.tell = [1]
    world.run()
    assert [world.state(t) for t in range(3)] == [L.TS_DONE, L.TS_KILLED, L.TS_DONE]
    assert spaces.word(1, L.T_KILL_REASON) == L.KILL_SWAP_FULL
    assert spaces.word(1, L.T_KILL_PAGES) == 10, "its root table counts"
    assert sorted(world.released) == sorted(spaces.pages[1])
    assert world.flushed == 10, "every CPU has flushed before a page is free"
    assert sorted(spaces.free()) == sorted(spaces.pages[1])
    assert world.answers == [(1, 10, OOM_KILLED)]
    assert world.log.count(Kind.G_OOM_VICTIM) == world.log.count(Kind.TASK_KILLED) == 1
    assert int(spaces.kern[L.K_OOM]) == 0


def test_of_equals_the_first_dies() -> None:
    world = Told(Spaces([(4, [0]), (4, [0])]), [kicked(), ends])
    world.tell = [1]
    world.run()
    assert [world.state(t) for t in range(2)] == [L.TS_KILLED, L.TS_DONE]


def test_all_that_share_the_memory_die_together() -> None:
    world = Told(Spaces([(9, [0, 0, 0]), (2, [0])]), [kicked(works), works, works, ends])
    world.tell = [1]
    world.run()
    assert [world.state(t) for t in range(4)] == [L.TS_KILLED] * 3 + [L.TS_DONE]
    assert world.answers == [(1, 10, OOM_KILLED)]


def test_the_task_that_is_interrupted_may_be_the_one() -> None:
    spaces = Spaces([(9, [0]), (2, [0])])
    world = Told(spaces, [kicked(works), ends])
    world.tell = [1]
    world.run()
    assert world.state(0) == L.TS_KILLED
    assert world.runs[0] == 0, "it executed nothing after it was chosen"
    assert sorted(world.released) == sorted(spaces.pages[0])


def test_what_finished_tasks_had_goes_first_and_nobody_is_killed() -> None:
    spaces = Spaces([(9, [0]), (2, [0]), (20, [0])])
    world = Told(spaces, [ends, kicked(), once(L.RUN_BUDGET, once(L.RUN_BUDGET, ends))])
    world.tell = [1]
    world.run()
    assert world.log.count(Kind.TASK_KILLED) == 0
    assert world.answers == [(1, 10, 0)]
    assert sorted(world.released) == sorted(spaces.pages[0])


def test_nobody_is_killed_while_what_finished_tasks_had_is_on_its_way_back() -> None:
    """The next notice comes before that of another CPU's answer has been made good."""
    spaces = Spaces([(9, [0]), (2, [0]), (20, [0])])
    world = Told(spaces, [ends, kicked(), once(L.RUN_BUDGET, once(L.RUN_BUDGET, ends))])
    world.tell = [1, 2]
    world.when = lambda record: (
        record.reason == ExitReason.KICK
        or (record.reason == ExitReason.HYPERCALL and record.arg0 == HC_RELEASE)
    )
    world.run()
    assert world.log.count(Kind.TASK_KILLED) == 0
    assert world.answers == [(2, 0, OOM_PENDING), (2, 10, 0)]


def test_one_after_the_other_until_nobody_is_left() -> None:
    spaces = Spaces([(9, [0]), (5, [0])])
    world = Told(spaces, [kicked(works), works])
    world.tell = [1, 2, 3]
    world.when = lambda record: (
        record.reason in (ExitReason.KICK, ExitReason.HYPERCALL) and record.arg0 != HC_RELEASE
    )
    world.run()
    assert [world.state(t) for t in range(2)] == [L.TS_KILLED] * 2
    assert world.answers[:2] == [(1, 10, OOM_KILLED), (2, 6, OOM_KILLED)]
    assert world.answers[2:] == [(3, 0, 0)], "nothing is left to give"


def test_a_kernel_lock_is_released() -> None:
    spaces = Spaces([(9, [0]), (2, [0])])
    spaces.set_word(0, L.T_PROGRAM, L.P_SYSCALLS)
    spaces.set_word(0, L.T_PC, 19)  # holds the lock that T_AUX1 names
    spaces.kern[L.K_LOCKS] = 1
    world = Told(spaces, [kicked(works), ends])
    world.tell = [1]
    world.run()
    assert world.state(0) == L.TS_KILLED
    assert spaces.kern[L.K_LOCKS] == 0


# -- where the notice comes ----------------------------------------------------------------------------------------
def test_a_sleeper_is_not_woken_but_its_memory_goes_and_then_it_dies() -> None:
    spaces = Spaces([(9, [0]), (2, [0])])
    world = Told(
        spaces, [once(L.RUN_BUDGET, faults), once(L.RUN_KICK, once(L.RUN_BUDGET, ends))], mode="interrupt"
    )
    world.tell = [1]
    world.when = lambda record: record.reason == ExitReason.KICK and world.state(0) == L.TS_SLEEPING
    asleep: list[int] = []
    before = world.entry_hook

    def hook(record: Exit) -> Entry | None:
        if record.arg0 == HC_RELEASE and record.reason == ExitReason.HYPERCALL:
            asleep.append(world.state(0))
        return before(record)

    world.entry_hook = hook
    world.run()
    assert asleep
    assert set(asleep) == {L.TS_SLEEPING}
    assert world.state(0) == L.TS_KILLED
    assert world.counter(L.VC_READY) >= 1, "its wake-up came and was used"
    assert world.cpu.sleepers.count() == (0, 0)
    assert spaces.word(0, L.T_OPS) == 0


def test_a_notice_inside_of_kernel_code_changes_nothing_there() -> None:
    spaces = Spaces([(9, [0]), (2, [0])])
    world = Told(spaces, [faults, works], mode="interrupt")
    world.access_faults_first = True
    world.tell = [1]
    world.when = lambda record: (
        record.reason == ExitReason.NESTED and record.cpl == 0 and world.state(0) == L.TS_RUNNING
    )
    world.run(until_ns=100 * MS)
    assert world.answers == [(1, 10, OOM_KILLED)]
    assert world.state(0) == L.TS_KILLED
    assert world.cpu.apf.strays == 0


def test_a_notice_at_the_first_exit_of_a_boot() -> None:
    world = Told(Spaces([(9, [0]), (2, [0])]), [ends, ends], mode="interrupt")
    world.tell = [1]
    world.when = lambda record: record.reason == ExitReason.BOOT
    world.run()
    assert [world.state(t) for t in range(2)] == [L.TS_KILLED, L.TS_DONE]


def test_an_idle_cpu_takes_it() -> None:
    spaces = Spaces([(9, [1]), (2, [0])], vcpus=2)
    world = Told(spaces, [works, once(L.RUN_NESTED, ends)], mode="interrupt")
    spaces.set_word(0, L.T_STATE, L.TS_RUNNABLE)
    world.tell = [1]
    world.when = lambda record: record.reason == ExitReason.HLT
    world.run()
    assert world.answers == [(1, 10, OOM_KILLED)]
    assert spaces.word(0, L.T_DIE) == L.DIE_CHOSEN, "its own CPU retires it"


# -- other CPUs ----------------------------------------------------------------------------------------------------
def two_cpus() -> tuple[Spaces, Told, Told]:
    """A process of two threads, one executing on each CPU, and a small one; the notice has come to CPU 0."""
    spaces = Spaces([(9, [0, 1]), (2, [0])], vcpus=2)
    behaviours = [kicked(works), works, ends]
    zero, one = Told(spaces, behaviours, 0), Told(spaces, behaviours, 1)
    one.step_first()
    while zero.state(1) != L.TS_RUNNING:
        one.step()
    zero.tell = [1]
    zero.step_first()
    while not zero.answers:
        zero.step()
    return spaces, zero, one


def test_no_page_goes_while_a_thread_executes_elsewhere() -> None:
    spaces, zero, one = two_cpus()
    assert zero.answers == [(1, 0, OOM_KILLED | OOM_PENDING)]
    assert zero.released == []
    assert [spaces.word(t, L.T_DIE) for t in range(3)] == [L.DIE_STOPPED, L.DIE_CHOSEN, 0]
    for _ in range(20):
        one.step()
    assert one.state(1) == L.TS_KILLED
    assert sorted(one.released) == sorted(spaces.pages[0])
    assert one.answers == [(1, 10, 0)]
    zero.run(until_ns=100 * MS)
    assert zero.answers[1:] == []
    assert zero.state(0) == L.TS_KILLED


def test_a_thread_in_kernel_code_counts_as_stopped_when_its_cpu_was_told() -> None:
    spaces, zero, one = two_cpus()
    one.tell = [0]
    one.behaviours[1] = kicked(works)
    states: list[tuple[int, int]] = []
    before = one.entry_hook

    def hook(record: Exit) -> Entry | None:
        states.append((one.state(1), spaces.word(1, L.T_DIE)))
        return before(record)

    one.entry_hook = hook
    while not one.answers:
        one.step()
    assert one.answers == [(1, 10, 0)]
    assert states[0] == (L.TS_RUNNING, L.DIE_CHOSEN)
    assert set(states[1:]) == {(L.TS_RUNNING, L.DIE_STOPPED)}, "its pages go before it is retired"
    assert one.state(1) == L.TS_KILLED
    assert zero.released == []


def test_a_second_notice_while_the_first_victim_dies_kills_nobody_else() -> None:
    spaces, zero, _ = two_cpus()
    zero.tell = [2]
    zero.when = lambda _: True
    zero.behaviours[2] = kicked(works)
    while len(zero.answers) < 2:
        zero.step()
    assert zero.answers[1] == (2, 0, OOM_PENDING)
    assert spaces.word(2, L.T_DIE) == 0


@pytest.mark.parametrize("step", ["oom-noticed", "oom-chosen", "oom-taken"])
def test_the_other_thread_stops_at_any_step(step: str) -> None:
    """Whoever comes last gives the pages back, once."""
    spaces = Spaces([(9, [0, 1]), (2, [0])], vcpus=2)
    behaviours = [kicked(works), works, works]
    zero, one = Told(spaces, behaviours, 0), Told(spaces, behaviours, 1)
    one.step_first()
    while zero.state(1) != L.TS_RUNNING:
        one.step()
    zero.tell = [1]
    parked: list[str] = []
    zero.cpu.park_with(lambda name: name == step)

    def meanwhile(name: str) -> None:
        parked.append(name)
        for _ in range(30):
            one.step()

    zero.parked_hook = meanwhile
    zero.step_first()
    for _ in range(200):
        zero.step()
        if zero.powered_down:
            break
    for _ in range(30):
        one.step()
    assert sorted(zero.released + one.released) == sorted(spaces.pages[0])
    final = [one for one in zero.answers + one.answers if not one[2] & OOM_PENDING]
    assert [(number, pages) for number, pages, _ in final] == [(1, 10)]
    assert sorted(spaces.free()) == sorted(spaces.pages[0])


# -- the allocator ---------------------------------------------------------------------------------------------------
def test_pages_given_back_are_handed_out_again_before_new_ones() -> None:
    guest = Guest([TaskSpec(L.P_SEQUENTIAL, pages=4, ops=64)])
    owners = guest.kern[int(guest.kern[L.K_OWNERS]) :]
    for gfn, following in ((100, 101), (101, 102), (102, 0)):
        owners[gfn] = L.OWNER_FREE | following
    guest.kern[L.K_FREE] = 100
    guest.run(budget=50)
    root = int(guest.task(0)[L.T_CR3]) >> 12
    assert [int(owners[gfn]) for gfn in (100, 101, 102)] == [root] * 3
    assert int(guest.kern[L.K_FREE]) & 0xFFFF_FFFF == 0
    assert int(guest.kern[L.K_FREE]) >> 32 == 3, "every change is counted"
    # Three tables and four pages, of which three came from the stack.
    assert int(guest.kern[L.K_ALLOC_NEXT]) == L.ALLOC_FIRST_GFN + 1 + 4
    assert guest.counter(L.VC_INTEGRITY_ERRORS) == 0
    assert np.count_nonzero(owners[: guest.memory_pages] == root) == 8


def test_every_page_of_a_guest_has_the_owner_whose_table_maps_it() -> None:
    guest = Guest([TaskSpec(L.P_STAMP, pages=6, ops=80, space=s) for s in range(3)], frames=64)
    guest.run(budget=30)
    owners = guest.kern[int(guest.kern[L.K_OWNERS]) :]
    for number in range(3):
        cr3 = int(guest.task(number)[L.T_CR3])
        mapped = {
            guest.gfn_of(cr3, int(guest.task(number)[L.T_BASE]) + page * PAGE_SIZE) for page in range(6)
        }
        assert None not in mapped
        assert {int(owners[gfn]) for gfn in mapped if gfn is not None} == {cr3 >> 12}


def test_a_faster_cpu_at_the_stack_is_not_robbed() -> None:
    """The top is exchanged together with a count of changes: an allocation between load and exchange makes it fail."""
    guest = Guest([TaskSpec(L.P_SEQUENTIAL, pages=1, ops=4)])
    guest.control[L.CTL_BARRIER] = 1
    guest.kern[L.K_FREE] = 7 << 32 | 100
    owners = guest.kern[int(guest.kern[L.K_OWNERS]) :]
    owners[100] = L.OWNER_FREE
    set_cr3(guest.cpus[0], int(guest.task(0)[L.T_CR3]))
    for _ in range(200):
        code = vcpu_run(guest.cpus[0], 0, 1)
        if code == L.RUN_NESTED:
            guest.serve(int(guest.vps[0][L.VP_X_GPA]))
        if code == L.RUN_DONE:
            break
    assert int(guest.kern[L.K_FREE]) == 8 << 32


@pytest.mark.parametrize("seed", range(5))
def test_masks_name_every_page_once(seed: int) -> None:
    rng = random.Random(seed)
    gfns = rng.sample(range(3000), rng.choice((1, 2, 63, 64, 65, 900)))
    named = [first + i for first, mask in masks(np.array(gfns, np.int64)) for i in range(64) if mask >> i & 1]
    assert named == sorted(gfns)
    assert all(0 < mask < 1 << 64 and first % 64 == 0 for first, mask in masks(np.array(gfns, np.int64)))
