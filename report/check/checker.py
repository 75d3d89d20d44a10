"""`Checker`: feed it events in merged order, window by window, then ask for the verdict.

    checker = Checker("mainline")
    checker.feed(events)            # any number of times
    verdict = checker.finish("my run")

Invariants: what it remembers grows with vCPUs and live tokens, never with events; a window is not kept after `feed` returns.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from proto.errors import UserError
from proto.trace import Events, Kind, event_dicts
from proto.units import MAX_VCPUS
from report.check.engine import check_end, check_events
from report.check.profiles import BOUND_NS, PROFILE_NAMES, config_of
from report.check.rules import LIVENESS, RULES, Rule
from report.check.state import (
    FOUND_AT,
    FOUND_INV,
    FOUND_SINCE,
    FOUND_TOKEN,
    FOUND_VCPU,
    FOUND_VM,
    G_FOUND,
    G_STOPPED,
    VCPUS_MAX,
    fresh_tables,
    grown,
    with_vms,
)
from report.check.verdict import HELD, SKIPPED, VIOLATED, Finding, Verdict

SEQ_BITS: Final = 32
VMS_MAX: Final = MAX_VCPUS
"""Each VM of a run has a vCPU."""
STOPPED_IN_TIME: Final = 1


class Checker:
    """The state of one check."""

    def __init__(
        self,
        profile: str,
        *,
        recorded: bool = False,
        unordered: bool = False,
        joined: bool = False,
        bound_ns: int = BOUND_NS,
    ) -> None:
        """recorded: events of a kernel. unordered: completions may be logged behind their ready events. joined: the events begin in
        the middle of a run. UserError for a profile that does not exist.
        """
        if profile not in PROFILE_NAMES:
            raise UserError("unknown profile", found=profile, allowed=", ".join(PROFILE_NAMES))
        self.profile = profile
        self.recorded = recorded
        self.events = 0
        self._tables = fresh_tables(
            config_of(profile, recorded=recorded, unordered=unordered, joined=joined, bound_ns=bound_ns)
        )
        self._examples: dict[int, list[dict[str, Any]]] = {}
        self._shown = 0

    @property
    def stopped(self) -> bool:
        """A STOP was among the events."""
        return bool(self._tables.g[G_STOPPED])

    @property
    def violations(self) -> int:
        """Broken invariants so far, each as often as it was broken."""
        return int(self._tables.broken.sum())

    def feed(self, events: Events) -> None:
        """Check the next events, dtype EVENT, in merged order. UserError for a vCPU that no token can name, and for a VM
        that no run has.
        """
        if not len(events):
            return
        highest = int(events["vcpu"].max())
        if highest >= VCPUS_MAX:
            raise UserError("impossible vCPU in an event", found=highest, allowed=f"0 to {VCPUS_MAX - 1}")
        vm = int(events["vm"].max())
        if vm >= VMS_MAX:
            raise UserError("impossible VM in an event", found=vm, allowed=f"0 to {VMS_MAX - 1}")
        self._tables = with_vms(self._tables, vm + 1)
        start = 0
        while (start := check_events(self._tables, events, start)) < len(events):
            self._tables = grown(self._tables)
        self.events += len(events)
        self._keep_examples(events)

    def finish(self, name: str, *, cut: str = "", finished: bool | None = None, source: str = "") -> Verdict:
        """The verdict. cut: why the events do not reach the end of the run; then liveness is not judged.

        finished: every task was done; by default, nothing was stopped.
        """
        if not cut and int(self._tables.g[G_STOPPED]) > STOPPED_IN_TIME:
            cut = "the run was interrupted"
        if not cut:
            check_end(self._tables, not self.stopped if finished is None else finished)
            self._keep_examples(np.empty(0, np.uint8))
        notes = [f"only safety was checked: {cut}"] if cut else []
        findings = [self._finding(rule, cut) for rule in RULES]
        kind = source or ("recorded kernel" if self.recorded else "run")
        return Verdict(name, self.profile, kind, self.events, not cut, notes, findings)

    def _finding(self, rule: Rule, cut: str) -> Finding:
        broken, checks = int(self._tables.broken[rule.number]), int(self._tables.checks[rule.number])
        reason = rule.why_not(self.profile, recorded=self.recorded)
        note = rule.checked_part(recorded=self.recorded)
        if not reason and cut and rule.kind == LIVENESS and not broken:
            reason = f"liveness, and {cut}"
        if reason:
            return Finding(rule.number, rule.text, rule.kind, SKIPPED, reason=reason)
        if not broken:
            return Finding(rule.number, rule.text, rule.kind, HELD, checks, note=note)
        examples = self._examples.get(rule.number, [])
        return Finding(
            rule.number, rule.text, rule.kind, VIOLATED, max(checks, broken), broken, note, examples=examples
        )

    def _keep_examples(self, events: Any) -> None:
        """Turn what was found in this window into plain values, before the window goes."""
        found = self._tables.found
        for k in range(self._shown, int(self._tables.g[G_FOUND])):
            at, since = int(found[k, FOUND_AT]), int(found[k, FOUND_SINCE])
            example = {
                "vm": int(found[k, FOUND_VM]),
                "vcpu": int(found[k, FOUND_VCPU]),
                "token": int(found[k, FOUND_TOKEN]),
                "kind": Kind(int(events["kind"][at])).name if at >= 0 else "",
                "event": next(event_dicts(events[at : at + 1])) if at >= 0 else None,
                "since": _event_name(since) if since else "",
            }
            self._examples.setdefault(int(found[k, FOUND_INV]), []).append(example)
        self._shown = int(self._tables.g[G_FOUND])


def _event_name(event_id: int) -> str:
    """proc:seq of an `event_id`."""
    return f"{(event_id >> SEQ_BITS) - 1}:{event_id & ((1 << SEQ_BITS) - 1)}"
