"""Recording what machines are told and do, and running them again from that.

`InputRecorder` stands where a shell calls its machines: ``recorder.on(machine, events, now_ns)`` instead of ``machine.on(events, now_ns)``.
What a machine does outside of itself while it runs goes through ports (memory, observer) that add to ``recorder.acts``: the op code,
the arguments, the results. `Tape` is the other end: replaying ports ask it, it returns the recorded results, and raises `Departure` when
the machine does something else than it did then.

Invariants
* Machines see no difference: the recorder returns what they return, and raises what they raise after it was written down.
* A machine that is changed by anything but `on` and `resume` cannot be replayed: worlds tell their machines everything by events.
* `Rerun` ends at the first difference: what would follow from it is no difference of its own.

Not handled here: files (proto/inputlog.py), the ports of a role (host/logged.py). Knows no processes: a simulated world may use it, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

from proto.inputlog import ON, RESUME, Call, Op
from proto.machine import Machine, MachineError
from proto.records import RecordError, RecordTypes, show_value

OP_PARK: Final = 0
PARK: Final = Op("park", ("step",), "b")
"""Act 0 of every role: whether a path rests at a step."""
BEFORE: Final = 5
"""Earlier calls of a machine that are shown with a difference."""
ACTS_SHOWN: Final = 6
"""Acts of a call that are shown before the one that differs."""
_RESULT_TYPES: Final[dict[str, tuple[type[Any], ...]]] = {"i": (int,), "b": (bool,), "y": (bytes,)}


class Sink(Protocol):
    """Where calls are written (proto/inputlog.py `InputLogWriter`)."""

    def append(
        self, machine: int, kind: int, now_ns: int, inputs: Any, acts: Sequence[Any], effects: Any
    ) -> None:
        """One call."""
        ...

    def flush(self) -> None:
        """What was appended must survive from here."""
        ...


class InputRecorder:
    """Records the calls of a set of machines. ``acts`` is for their ports."""

    __slots__ = ("_machines", "_sink", "_types", "acts")

    def __init__(self, types: RecordTypes, sink: Sink) -> None:
        self._types = types
        self._sink = sink
        self._machines: dict[Machine, int] = {}
        self.acts: list[Any] = []
        """Of the call under way, flat: op code, arguments, results. A port adds each act as it happens."""

    def watch(self, machines: Iterable[Machine]) -> None:
        """Number the machines in the order of the log's description."""
        for machine in machines:
            self._machines[machine] = len(self._machines)

    def on(self, machine: Machine, events: Sequence[Any], now_ns: int) -> list[Any]:
        """`Machine.on`, written down."""
        self.acts.clear()
        inputs = self._plain(events)
        try:
            effects = machine.on(events, now_ns)
        except Exception as error:
            self._raised(machine, ON, now_ns, inputs, error)
            raise
        self._sink.append(self._machines[machine], ON, now_ns, inputs, self.acts, self._plain(effects))
        return effects

    def resume(self, machine: Machine, index: int, now_ns: int) -> list[Any]:
        """`Machine.resume`, written down."""
        self.acts.clear()
        try:
            effects = machine.resume(index, now_ns)
        except Exception as error:
            self._raised(machine, RESUME, now_ns, index, error)
            raise
        self._sink.append(self._machines[machine], RESUME, now_ns, index, self.acts, self._plain(effects))
        return effects

    def parking(self, pick: Callable[[str], bool]) -> Callable[[str], bool]:
        """What to give to `Machine.park_with` instead of ``pick``."""
        acts = self.acts

        def picked(step: str) -> bool:
            rests = pick(step)
            acts.extend((OP_PARK, step, rests))
            return rests

        return picked

    def _plain(self, records: Iterable[Any]) -> list[Any]:
        numbers = self._types.numbers
        try:
            return [(numbers[type(record)], record) for record in records]
        except KeyError as error:
            raise MachineError(f"{error} is not among the record types") from error

    def _raised(self, machine: Machine, kind: int, now_ns: int, inputs: Any, error: Exception) -> None:
        self._sink.append(self._machines[machine], kind, now_ns, inputs, self.acts, raised_text(error))
        self._sink.flush()


class Departure(Exception):  # noqa: N818 - not an error
    """The machine did something else than what was recorded."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected = expected
        self.got = got


class Tape:
    """The recorded acts of the call that runs. Replaying ports call `take`. ``words``: names of numbers, by argument."""

    __slots__ = ("_acts", "_at", "_ops", "_words", "taken")

    def __init__(self, ops: Sequence[Op], words: Mapping[str, type[IntEnum]] | None = None) -> None:
        self._ops = tuple(ops)
        self._words = words or {}
        self._acts: tuple[Any, ...] = ()
        self._at = 0
        self.taken = 0
        """Acts of this call so far."""

    def load(self, acts: tuple[Any, ...]) -> None:
        """The acts of the next call."""
        self._acts = acts
        self._at = 0
        self.taken = 0

    def take(self, code: int, *args: Any) -> tuple[Any, ...]:
        """The machine does this: its recorded results. Raises Departure."""
        op = self._ops[code]
        start = self._at
        middle = start + 1 + len(args)
        end = middle + len(op.results)
        found = self._acts[start:end]
        results = found[1 + len(args) :]
        if found[: 1 + len(args)] != (code, *args) or not _fit(op, results):
            raise Departure(self.next(), self._text(op, args))
        self._at = end
        self.taken += 1
        return results

    def next(self) -> str:
        """The recorded act that comes next, in words."""
        return next(self._texts(self._at), "nothing more")

    @property
    def used_up(self) -> bool:
        """Whether every recorded act was taken."""
        return self._at == len(self._acts)

    def all(self) -> list[str]:
        """All acts of the call, in words."""
        return list(self._texts(0))

    def _texts(self, at: int) -> Iterator[str]:
        """The acts from ``at`` on; what is none ends it."""
        acts = self._acts
        while at < len(acts):
            code = acts[at]
            if type(code) is not int or not 0 <= code < len(self._ops):
                yield f"no act: {code!r}"
                return
            op = self._ops[code]
            results = at + 1 + len(op.args)
            end = results + len(op.results)
            yield self._text(op, acts[at + 1 : results], acts[results:end])
            at = end

    def _text(self, op: Op, args: Sequence[Any], results: Sequence[Any] = ()) -> str:
        shown = ", ".join(
            f"{name}={show_value(value, self._words.get(name))}"
            for name, value in zip(op.args, args, strict=False)
        )
        answer = " -> " + ", ".join(show_value(value) for value in results) if results else ""
        return f"{op.name}({shown}){answer}"


class Difference(NamedTuple):
    """The first call that did not go as recorded. ``same``: what it did before that, as text; ``before``: earlier calls of the machine."""

    number: int
    machine: str
    since_start_ns: int
    inputs: list[str]
    same: list[str]
    expected: list[str]
    got: list[str]
    before: list[tuple[int, list[str]]]


class Rerun:
    """Runs machines again. ``machines`` in the order of the log's description, fresh, with ports that ask ``tape``."""

    def __init__(
        self,
        machines: Sequence[Machine],
        names: Sequence[str],
        types: RecordTypes,
        tape: Tape,
        *,
        parks: bool,
    ) -> None:
        self._machines = machines
        self._names = names
        self._types = types
        self._tape = tape
        self._before: list[deque[Call]] = [deque(maxlen=BEFORE) for _ in machines]
        self._start_ns = 0
        self.calls = self.events = self.effects = self.acts = 0
        self.raised = ""
        """What the last call raised, then and now."""
        if parks:
            for machine in machines:
                machine.park_with(lambda step: bool(tape.take(OP_PARK, step)[0]))

    def run(
        self, calls: Iterable[Call], until: int | None = None, shown: Callable[[Call], None] | None = None
    ) -> Difference | None:
        """Run ``calls`` up to number ``until``; returns the first difference. ``shown`` is told each call before it runs."""
        for call in calls:
            if until is not None and call.number > until:
                return None
            if call.number == 1:
                self._start_ns = call.now_ns
            if shown is not None:
                shown(call)
            difference = self._one(call)
            if difference is not None:
                return difference
            self._before[call.machine].append(call)
            self.raised = call.raised
            self.calls += 1
            self.acts += self._tape.taken
            self.effects += len(call.effects)
        return None

    def words(self, call: Call) -> list[str]:
        """The inputs of a call in words."""
        if call.kind == RESUME:
            return [f"resume parked path {call.inputs}"]
        return [self._shown(plain) for plain in call.inputs]

    def effects_of(self, call: Call) -> list[str]:
        """The recorded effects of a call in words."""
        return [f"raised {call.raised}"] if call.raised else [self._shown(plain) for plain in call.effects]

    def acts_of(self, call: Call) -> list[str]:
        """The recorded acts of a call in words."""
        self._tape.load(call.acts)
        return self._tape.all()

    def _one(self, call: Call) -> Difference | None:
        tape = self._tape
        tape.load(call.acts)
        machine = self._machines[call.machine]
        got: list[Any] = []
        raised = ""
        try:
            if call.kind == ON:
                events = [self._types.read(plain) for plain in call.inputs]
                self.events += len(events)
                got = machine.on(events, call.now_ns)
            else:
                got = machine.resume(call.inputs, call.now_ns)
        except Departure as found:
            return self._differs(call, [found.expected], [found.got])
        except RecordError as error:
            return self._differs(call, ["an input that this version knows"], [str(error)])
        # A rule that was changed may fail in any way; that is what is looked for.
        except Exception as error:  # noqa: BLE001
            raised = raised_text(error)
        if not raised and not tape.used_up and not call.raised:
            return self._differs(call, [tape.next()], ["the end of the call"])
        if raised != call.raised:
            got_text = [f"raised {raised}"] if raised else [self._types.show(effect) for effect in got]
            return self._differs(call, self.effects_of(call), got_text)
        return self._compare(call, got)

    def _compare(self, call: Call, got: Sequence[Any]) -> Difference | None:
        same = self._types.same
        for index, effect in enumerate(got):
            if index >= len(call.effects) or not same(call.effects[index], effect):
                return self._effects_differ(call, got, index)
        if len(got) < len(call.effects):
            return self._effects_differ(call, got, len(got))
        return None

    def _effects_differ(self, call: Call, got: Sequence[Any], index: int) -> Difference:
        expected = self.effects_of(call)[index:] or ["no more effects"]
        return self._differs(
            call, expected, [self._types.show(effect) for effect in got[index:]] or ["no more effects"]
        )

    def _differs(self, call: Call, expected: list[str], got: list[str]) -> Difference:
        same = self._tape.all()[: self._tape.taken][-ACTS_SHOWN:]
        before = [(earlier.number, self.words(earlier)) for earlier in self._before[call.machine]]
        since_ns = call.now_ns - self._start_ns
        name = self._names[call.machine]
        return Difference(call.number, name, since_ns, self.words(call), same, expected, got, before)

    def _shown(self, plain: Any) -> str:
        try:
            return self._types.show(self._types.read(plain))
        except RecordError as error:
            return f"no record: {error}"


def raised_text(error: Exception) -> str:
    """What is recorded of an exception: compared as text."""
    return f"{type(error).__name__}: {error}"


def op_table(ops: Sequence[tuple[int, Op]]) -> tuple[Op, ...]:
    """Ops by code, `PARK` first. Raises MachineError when codes are not 1, 2, 3, ..."""
    table = [PARK]
    for code, op in ops:
        if code != len(table) or not set(op.results) <= set(_RESULT_TYPES):
            raise MachineError(f"op {op.name} has code {code}, {len(table)} is next")
        table.append(op)
    return tuple(table)


def _fit(op: Op, results: Sequence[Any]) -> bool:
    return len(results) == len(op.results) and all(
        type(value) in _RESULT_TYPES[kind] for kind, value in zip(op.results, results, strict=True)
    )
