"""Pure machines: events in, effects out; paths made of named steps.

A machine holds protocol state and nothing else: no socket, clock, file, thread, random number or environment. Whatever kernels
interleave (set-up of a fault, worker completion, ACK, wait and wake) is written as a *path*: a generator that yields

* ``step("name")`` between two steps: here another path may run. Real shells never stop there; a simulated world may park a path
  at any step and run somebody else.
* ``ask(request)`` where it needs an answer from another machine or from guest memory. The path sleeps until the answer comes.

`Machine.on` runs everything that can run and returns the effects in order. The same machine serves both worlds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, NamedTuple

STEP: Final = "step"


class Ask(NamedTuple):
    """A path waits for the answer to ``request``; the machine emitted it with the id ``ask_id``."""

    ask_id: int


Yield = str | Ask
Path = Generator[Yield, Any, Any]
"""Yields step names and Ask; is sent the answer of an Ask; its return value goes to the path that delegated to it."""


class MachineError(AssertionError):
    """Our bug: a machine was used against its contract. The process dies loudly with its story."""


class Machine:
    """Base of all machines.

    Subclasses implement `path_for(event, now_ns)` and emit effects with `emit`. ``now_ns`` is monotonic and only goes into
    records and deadlines. A path never sees a clock.
    """

    __slots__ = ("_ask_next", "_out", "_parked", "_pick", "_waiting", "now_ns")

    def __init__(self) -> None:
        self._out: list[Any] = []
        self._waiting: dict[int, Path] = {}
        self._ask_next = 1
        self.now_ns = 0
        self._parked: deque[tuple[Path, str]] = deque()
        self._pick: Callable[[str], bool] | None = None

    # -- for subclasses --------------------------------------------------------------------------------------------------
    def path_for(self, event: Any) -> Path | None:
        """The path that handles ``event``; None when it was handled at once."""
        raise NotImplementedError

    def emit(self, effect: Any) -> None:
        """Append an effect to what the running `on` returns."""
        self._out.append(effect)

    def new_ask(self) -> Ask:
        """A fresh request id; emit the request that carries it, then yield the Ask."""
        ask = Ask(self._ask_next)
        self._ask_next += 1
        return ask

    # -- for shells ----------------------------------------------------------------------------------------------------------
    def on(self, events: Iterable[Any], now_ns: int) -> list[Any]:
        """Handle ``events`` in order; returns the effects in order."""
        self.now_ns = now_ns
        for event in events:
            path = self.path_for(event)
            if path is not None:
                self._drive(path, None)
        self.settle()
        out, self._out = self._out, []
        return out

    def settle(self) -> None:
        """Called once after a batch of events, before its effects are returned: work that is cheaper in batches."""

    def answer(self, ask_id: int, value: Any) -> None:
        """Give the answer of an Ask to the path that waits for it (called by subclasses from `path_for`)."""
        path = self._waiting.pop(ask_id, None)
        if path is None:
            raise MachineError(f"{type(self).__name__}: answer to unknown request {ask_id}")
        self._drive(path, value)

    def park_with(self, pick: Callable[[str], bool] | None) -> None:
        """Simulated world only: ``pick(step)`` says whether to park a path at this step."""
        self._pick = pick

    def resume(self, index: int, now_ns: int) -> list[Any]:
        """Simulated world only: run the parked path number ``index`` on; returns the effects."""
        self.now_ns = now_ns
        path, _ = self._parked[index]
        del self._parked[index]
        self._drive(path, None)
        self.settle()
        out, self._out = self._out, []
        return out

    @property
    def parked(self) -> list[str]:
        """Names of the steps at which paths are parked."""
        return [name for _, name in self._parked]

    @property
    def waiting(self) -> int:
        """Number of paths that wait for an answer."""
        return len(self._waiting)

    def _drive(self, path: Path, value: Any) -> None:
        while True:
            try:
                got = path.send(value)
            except StopIteration:
                return
            value = None
            if isinstance(got, Ask):
                self._waiting[got.ask_id] = path
                return
            if self._pick is not None and self._pick(got):
                self._parked.append((path, got))
                return
