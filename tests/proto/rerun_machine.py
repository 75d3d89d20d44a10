"""A machine of two paths and one port, small enough to know every one of its calls, and its recorded log."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from proto.inputlog import Description, InputLog, InputLogWriter, Op
from proto.machine import Machine, MachineError
from proto.machine import Path as MachinePath
from proto.records import RecordTypes
from proto.rerun import InputRecorder, Rerun, Tape, op_table


class Add(NamedTuple):
    address: int


class Slowly(NamedTuple):
    times: int


class Sum(NamedTuple):
    total: int


class Port(Protocol):
    def read(self, address: int) -> int:
        """A word of the outside."""
        ...


OP_READ: Final = 1
OPS: Final = op_table(((OP_READ, Op("read", ("address",), "i")),))
TYPES: Final = RecordTypes((Add, Slowly, Sum))
NAMES: Final = ("one", "two")


class Adder(Machine):
    """Adds words of its port; 13 is too much for it."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self.port = port
        self.total = 0

    def path_for(self, event: Any) -> MachinePath | None:
        if isinstance(event, Slowly):
            return self.slowly(event.times)
        self.add(event.address)
        return None

    def add(self, address: int) -> None:
        self.total += self.port.read(address)
        if self.total == 13:
            raise MachineError("thirteen")
        self.emit(Sum(self.total))

    def slowly(self, times: int) -> MachinePath:
        for i in range(times):
            self.add(i)
            yield f"step {i}"


class Memory:
    """The outside: word a is 10 * a + 1 as long as nobody changes it."""

    def __init__(self, acts: list[Any]) -> None:
        self.acts = acts
        self.extra = 0

    def read(self, address: int) -> int:
        found = 10 * address + 1 + self.extra
        self.acts += (OP_READ, address, found)
        return found


class Replayed:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def read(self, address: int) -> int:
        return int(self.tape.take(OP_READ, address)[0])


class Told:
    """Two adders that are recorded. The first one parks at every other step."""

    def __init__(self, path: Path) -> None:
        self.log = InputLogWriter(
            path, Description("adders", "run", NAMES, tuple(TYPES.shapes()), OPS, parks=True)
        )
        self.recorder = InputRecorder(TYPES, self.log)
        self.memory = Memory(self.recorder.acts)
        self.machines = [Adder(self.memory), Adder(self.memory)]
        self.machines[0].park_with(self.recorder.parking(lambda step: step in ("step 0", "step 2")))
        self.machines[1].park_with(self.recorder.parking(lambda _: False))
        self.recorder.watch(self.machines)


def tell_story(path: Path) -> Told:
    """Eight calls: sums, parked and resumed paths, a changing memory. Closed."""
    told = Told(path)
    on, resume = told.recorder.on, told.recorder.resume
    one, two = told.machines
    on(two, [Add(1), Add(2)], 100)
    on(one, [Slowly(4)], 200)
    told.memory.extra = 5
    on(two, [Add(1)], 200)
    resume(one, 0, 300)
    told.memory.extra = 7
    on(two, [], 150)
    resume(one, 0, 400)
    on(two, [Slowly(2)], 500)
    on(one, [Add(3)], 600)
    told.log.close()
    return told


def rerun(log: InputLog) -> Rerun:
    """Fresh adders for a log."""
    tape = Tape(OPS)
    return Rerun(
        [Adder(Replayed(tape)), Adder(Replayed(tape))], NAMES, TYPES, tape, parks=log.description.parks
    )
