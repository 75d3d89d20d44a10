"""What a check found: one finding per invariant, as values and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

HELD: Final = "held"
VIOLATED: Final = "violated"
SKIPPED: Final = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One invariant. checks: how often it was put to the test. examples: the first events that break it (plain values).

    note: what of it was checked when not all of it was. reason: why it was skipped.
    """

    number: int
    text: str
    kind: str
    status: str
    checks: int = 0
    violations: int = 0
    note: str = ""
    reason: str = ""
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one run or one recording. notes: what is missing in the events, and why the run counts as cut."""

    name: str
    profile: str
    source: str
    events: int
    liveness: bool
    notes: list[str]
    findings: list[Finding]

    @property
    def violated(self) -> list[Finding]:
        """The invariants that do not hold."""
        return [one for one in self.findings if one.status == VIOLATED]

    @property
    def ok(self) -> bool:
        """Whether nothing is violated."""
        return not self.violated

    def note_stop(self, *, stopped: bool) -> None:
        """Say what a run that was stopped in its work is not held to."""
        if stopped and self.liveness:
            self.notes.append("the run was stopped: faults that were under way then are not judged")

    def summary(self) -> dict[str, Any]:
        """The short form for summary.json: violations by number with the first events, numbers skipped."""
        return {
            "events": self.events,
            "liveness": self.liveness,
            "violations": {f"I{one.number}": one.violations for one in self.violated},
            "examples": {
                f"I{one.number}": [one.text, *map(event_text, one.examples)] for one in self.violated
            },
            "skipped": [f"I{one.number}" for one in self.findings if one.status == SKIPPED],
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "name": self.name,
            "profile": self.profile,
            "source": self.source,
            "events": self.events,
            "ok": self.ok,
            "liveness": self.liveness,
            "notes": self.notes,
            "invariants": [
                {
                    "id": f"I{one.number}",
                    "kind": one.kind,
                    "text": one.text,
                    "status": one.status,
                    "checks": one.checks,
                    "violations": one.violations,
                    "note": one.note,
                    "reason": one.reason,
                    "examples": one.examples,
                }
                for one in self.findings
            ],
        }


def render(verdict: Verdict) -> str:
    """For people: what is violated with its events, what held, what was skipped and why."""
    return "".join(f"{line}\n" for line in _lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    held = [one for one in verdict.findings if one.status == HELD]
    skipped = [one for one in verdict.findings if one.status == SKIPPED]
    yield (
        f"{verdict.name}: {verdict.events:,} events, {verdict.profile}: {len(held)} invariants held, "
        f"{len(verdict.violated)} violated, {len(skipped)} skipped"
    )
    yield from (f"  note      {note}" for note in verdict.notes)
    for one in verdict.violated:
        yield f"  VIOLATED  I{one.number:<3} {one.text} ({one.violations} of {one.checks})"
        yield from (f"              {event_text(example)}" for example in one.examples)
    for one in held:
        tested = f"{one.checks:,} checks" if one.checks else "never put to the test"
        yield f"  held      I{one.number:<3} {one.text} ({tested}{'; ' + one.note if one.note else ''})"
    for one in skipped:
        yield f"  skipped   I{one.number:<3} {one.text}: {one.reason}"


def event_text(example: dict[str, Any]) -> str:
    """One breaking event in a line."""
    where = f"vm {example['vm']} vcpu {example['vcpu']}"
    token = f" token {example['token']:#x}" if example["token"] else ""
    since = f", since {example['since']}" if example["since"] else ""
    event = example["event"]
    if event is None:
        return f"{where}{token}: at the end{since}"
    fields = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("vm", "vcpu", "kind", "cause"))
    return f"{where}{token}: {example['kind']} {fields}{since}"
