"""An optional model of the device's service time, on top of the real I/O.

Purpose: to ask "what if the device were a disk, or remote memory" on whatever device there is. `ServiceModel`
says when an operation would be over, `Delayer` holds answers back until then. The real operation always takes
place; an answer goes out at the later of the real and the modelled end, so a model can make a device slower,
never faster.

Invariants: pure and deterministic: the n-th modelled operation of a seed has the same service time
everywhere; first come, first served; at most `parallel` modelled operations are in service at a time; every
completion is answered exactly once.

Deliberately not handled: the clock (callers pass ``now_ns``), bandwidth, seek distance, caches and garbage
collection of real devices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import NamedTuple, Self

_U64 = 0xFFFF_FFFF_FFFF_FFFF
_NORMAL = NormalDist()

KINDS = ("fixed", "lognormal", "exponential")


@dataclass(frozen=True)
class ServiceSpec:
    """What a modelled device is like.

    ``kind``: distribution of the service time; ``scale_ns``: the value (fixed), the median (lognormal) or the
    mean (exponential); ``sigma``: standard deviation of the logarithm (lognormal only); ``parallel``:
    operations in service at a time; ``writes``: whether writes are modelled too (otherwise they pass through
    and take no place).
    """

    kind: str
    scale_ns: int
    sigma: float = 0.0
    parallel: int = 1
    writes: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"service model: kind {self.kind!r} (allowed: {', '.join((*PRESETS, *KINDS))})")
        if not 0 <= self.scale_ns <= 60_000_000_000:
            raise ValueError(f"service model: scale_ns {self.scale_ns} (allowed: 0..60000000000)")
        if not 0.0 <= self.sigma <= 4.0:
            raise ValueError(f"service model: sigma {self.sigma} (allowed: 0..4)")
        if not 1 <= self.parallel <= 65_536:
            raise ValueError(f"service model: parallel {self.parallel} (allowed: 1..65536)")

    @classmethod
    def parse(cls, value: str | Mapping[str, object]) -> Self:
        """From a preset's name, or from a table with ``kind`` (a preset or a distribution) and fields to
        override.

        Raises ValueError for an unknown name, an unknown or missing field, or a field of the wrong type.
        """
        given = {"kind": value} if isinstance(value, str) else dict(value)
        allowed = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(set(given) - set(allowed)):
            raise ValueError(f"service model: unknown field {unknown[0]!r} (allowed: {', '.join(allowed)})")
        kind = given.pop("kind", None)
        if not isinstance(kind, str):
            raise ValueError(f"service model: kind is {kind!r} (needed: a string)")  # noqa: TRY004 (bad input)
        if kind not in PRESETS and kind in KINDS and "scale_ns" not in given:
            raise ValueError(f"service model: kind {kind!r} needs scale_ns")
        for name, found in given.items():
            _check_type(name, found, allowed[name])
        base = PRESETS.get(kind)
        fresh = {"scale_ns": 0, **given}
        return replace(base, **given) if base else cls(kind=kind, **fresh)  # type: ignore[arg-type,return-value]


def _check_type(name: str, found: object, wanted: object) -> None:
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}[str(wanted)]
    if not isinstance(found, kinds) or (isinstance(found, bool) and wanted != "bool"):
        raise ValueError(f"service model: {name} is {found!r} (needed: {wanted})")


# Assumed figures, of the right order for 4 KiB random reads; none was measured here. The spread is that of an
# ordinary day, without the rare long stalls of real devices.
PRESETS: dict[str, ServiceSpec] = {
    "nvme": ServiceSpec("lognormal", 80_000, sigma=0.25, parallel=64),
    "ssd": ServiceSpec("lognormal", 150_000, sigma=0.35, parallel=32),  # SATA: 32 queued commands
    "hdd": ServiceSpec("lognormal", 8_000_000, sigma=0.4, parallel=1, writes=True),  # one arm, for writes too
    "network": ServiceSpec(
        "lognormal", 250_000, sigma=0.5, parallel=128, writes=True
    ),  # another machine's memory
}


def _mix(value: int) -> int:
    """A 64-bit finaliser (splitmix64): every input bit changes every output bit with probability about one
    half.
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _U64
    return value ^ (value >> 31)


class ServiceModel:
    """``spec.parallel`` servers, first come first served, with service times drawn from ``seed``."""

    def __init__(self, spec: ServiceSpec, seed: int) -> None:
        self.spec = spec
        self._key = _mix(seed & _U64)
        self._drawn = 0
        self._last_ns = 0
        self._free_ns = [0] * spec.parallel  # a heap: when each server is free

    def admit(self, tag: int, now_ns: int, is_write: bool) -> int:
        """Let an operation queue at ``now_ns``; returns when the modelled device is done with it.

        ``now_ns`` never goes backwards (ValueError): with it, operations start in the order of their
        admission.
        """
        if now_ns < self._last_ns:
            raise ValueError(
                f"service model: tag {tag} admitted at {now_ns} ns, before the last at {self._last_ns} ns"
            )
        self._last_ns = now_ns
        if is_write and not self.spec.writes:
            return now_ns
        start_ns = max(now_ns, self._free_ns[0])
        finish_ns = start_ns + self._service_ns()
        heapq.heapreplace(self._free_ns, finish_ns)
        return finish_ns

    def _service_ns(self) -> int:
        spec = self.spec
        self._drawn += 1
        if spec.kind == "fixed":
            return spec.scale_ns
        bits = _mix((self._key + self._drawn * 0x9E3779B97F4A7C15) & _U64)
        uniform = ((bits >> 12) + 0.5) * 2.0**-52  # strictly between 0 and 1, exactly representable
        if spec.kind == "exponential":
            return int(-spec.scale_ns * math.log(uniform))
        return int(spec.scale_ns * math.exp(spec.sigma * _NORMAL.inv_cdf(uniform)))


class Due(NamedTuple):
    """Answers to send now, as (tag, res), and when to look again (None: nothing is held back)."""

    answers: list[tuple[int, int]]
    next_ns: int | None


class Delayer:
    """Holds back real completions until the modelled device would be done, too.

    Tags are unique among the operations that were admitted and not answered.
    """

    def __init__(self, model: ServiceModel) -> None:
        self._model = model
        self._finish_ns: dict[int, int] = {}  # admitted, really under way
        self._held: list[tuple[int, int, int, int]] = []  # a heap of (finish, order, tag, res), really done
        self._held_tags: set[int] = set()
        self._order = 0

    def __len__(self) -> int:
        """Operations admitted and not answered."""
        return len(self._finish_ns) + len(self._held)

    def admit(self, tag: int, now_ns: int, is_write: bool) -> int:
        """An operation was given to the engine; returns its modelled end. Raises ValueError if the tag is in
        use.
        """
        if tag in self._finish_ns or tag in self._held_tags:
            raise ValueError(f"delayer: tag {tag} was admitted and is not answered yet")
        finish_ns = self._model.admit(tag, now_ns, is_write)
        self._finish_ns[tag] = finish_ns
        return finish_ns

    def poll(self, done: Iterable[tuple[int, int]], now_ns: int) -> Due:
        """Take real completions (tag, res), failed ones too; returns what is to be answered at ``now_ns``.

        Answers come in the order of their modelled ends. Raises KeyError for a tag that is not under way.
        """
        for tag, res in done:
            heapq.heappush(self._held, (self._finish_ns.pop(tag), self._order, tag, res))
            self._held_tags.add(tag)
            self._order += 1
        answers = []
        while self._held and self._held[0][0] <= now_ns:
            _, _, tag, res = heapq.heappop(self._held)
            self._held_tags.remove(tag)
            answers.append((tag, res))
        return Due(answers, self._held[0][0] if self._held else None)
