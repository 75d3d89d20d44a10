"""What a bug of the zoo is, and how it is shown to be caught.

A bug is a patch over one rule or step of the production code, made of `Patch`es that are undone afterwards, and one or more trials. A
trial runs the code and returns complaints: an invariant by its number ("I47"), or a difference to what was expected. It must return
none while the code is as it is, and some while the patch is in.

Deliberately not here: bugs that cannot exist in this design or are KVM's own behaviour (tests/zoo/catalogue.py says which and why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from proto.machine import MachineError
from proto.profile import PROFILES, Profile
from sim.hostside import SimulationError

_UNSET: Final = object()


class Patch(NamedTuple):
    """While the bug is in, ``owner.name`` is ``value``."""

    owner: Any
    name: str
    value: Any


class Rule(NamedTuple):
    """While the bug is in, profile ``profile`` is this one."""

    profile: str
    changed: Profile


@contextmanager
def patched(changes: Sequence[Patch | Rule]) -> Iterator[None]:
    """Put a bug in, and take it out again whatever happens."""
    undo: list[Callable[[], None]] = []
    try:
        # Not at once: what was put in must be taken out again if a later change fails.
        undo.extend(map(_apply, changes))
        yield
    finally:
        for back in reversed(undo):
            back()


def _apply(change: Patch | Rule) -> Callable[[], None]:
    if isinstance(change, Rule):
        before = PROFILES[change.profile]
        PROFILES[change.profile] = change.changed
        return lambda: PROFILES.__setitem__(change.profile, before)
    own = vars(change.owner).get(change.name, _UNSET)
    if own is _UNSET:
        raise AttributeError(f"{change.owner.__name__} has no {change.name}: the patch is out of date")
    setattr(change.owner, change.name, change.value)
    return lambda: setattr(change.owner, change.name, own)


@dataclass(frozen=True, slots=True)
class Trial:
    """``run`` returns complaints. ``name`` says by which scenario, seeds or steps."""

    name: str
    run: Callable[[], list[str]]

    def complaints(self) -> list[str]:
        """`run`, where a machine that stops itself is a complaint, too."""
        try:
            return self.run()
        except (MachineError, SimulationError) as error:
            return [f"stopped: {str(error).splitlines()[0]}"]


@dataclass(frozen=True, slots=True)
class Bug:
    """``lived``: where and when. ``breaks``: invariants of spec §4.4 of which at least one must be complained of; () = bytes differ or
    the run differs from what was expected.
    """

    ident: str
    title: str
    lived: str
    profile: str
    breaks: tuple[str, ...]
    changes: tuple[Patch | Rule, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """``invariants``: those that fired, by number; ``others``: differences and stops; ``by``: the trials that complained."""

    bug: Bug
    clean: tuple[str, ...]
    invariants: tuple[str, ...]
    others: tuple[str, ...]
    by: tuple[str, ...]

    @property
    def caught(self) -> bool:
        """Every trial that names invariants fires one that it must; without any, something differs."""
        if not self.bug.breaks:
            return bool(self.invariants or self.others)
        return bool(set(self.bug.breaks) & set(self.invariants))

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        bug = self.bug
        return {
            "id": bug.ident, "title": bug.title, "lived": bug.lived, "profile": bug.profile, "must_break": list(bug.breaks),
            "caught": self.caught, "clean": not self.clean, "clean_complaints": list(self.clean),
            "invariants": list(self.invariants), "differences": list(self.others), "by": list(self.by),
        }  # fmt: skip


def try_out(bug: Bug, clean_cache: dict[str, list[str]] | None = None) -> Result:
    """Run the trials without the bug and with it. ``clean_cache``: complaints of trials that ran clean already, by name."""
    cache = {} if clean_cache is None else clean_cache
    clean: list[str] = []
    found: list[str] = []
    by: list[str] = []
    for trial in bug.trials:
        if trial.name not in cache:
            cache[trial.name] = trial.complaints()
        clean += [f"{trial.name}: {text}" for text in cache[trial.name]]
        with patched(bug.changes):
            complaints = trial.complaints()
        if complaints:
            by.append(next((c[1:] for c in complaints if c.startswith("@")), trial.name))
            found += [c for c in complaints if not c.startswith("@")]
    numbers = sorted({c for c in found if is_invariant(c)}, key=lambda c: int(c[1:]))
    others = tuple(dict.fromkeys(c for c in found if not is_invariant(c)))
    return Result(bug, tuple(clean), tuple(numbers), others, tuple(by))


def is_invariant(text: str) -> bool:
    """Whether a complaint is the number of an invariant."""
    return text[:1] == "I" and text[1:].isdecimal()
