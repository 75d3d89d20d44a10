"""Saving the VM of a bench and restoring it into a fresh one, by the machines' own events."""

from __future__ import annotations

from typing import Any, NamedTuple

from host import events as ev
from host.saving import PageWalk
from proto.image import Content
from proto.layout import XF_RESTART
from proto.wire import ExitReason
from tests.host.harness import Bench

Page = tuple[Content, bytes]


class Image(NamedTuple):
    """vCPU states as plain records, contents of every page."""

    states: list[dict[str, Any]]
    pages: list[Page]


def pause(bench: Bench) -> None:
    """Ask every vCPU to stop. Those in guest mode are kicked; `let_stop` is their exit."""
    for machine in bench.vcpus:
        bench.feed(machine, ev.Pause(machine.cpu))


def let_stop(bench: Bench, cpu: int = 0, reason: ExitReason = ExitReason.KICK, **fields: int) -> None:
    """The exit of a vCPU in guest mode at which it can stop."""
    flags = fields.pop("flags", 0)
    bench.exit(cpu, reason, flags=flags | XF_RESTART, **fields)


def paused(bench: Bench) -> list[int]:
    """Numbers of the vCPUs that said that they stand."""
    return [one.cpu for one in bench.told if isinstance(one, ev.Paused)]


def walk(bench: Bench, request: Any) -> None:
    """Go over all pages of a bench; the device serves whenever nothing else moves."""
    pages = PageWalk(len(bench.vm.state))
    done = False
    todo: list[Any] = [ev.Walk()]
    while not done:
        for event in todo:
            for effect in pages.on((event,), bench.now):
                if isinstance(effect, ev.WalkDone):
                    done = True
                else:
                    bench.feed(bench.vm, request(effect.hvp))
        todo = [one for one in bench.told if isinstance(one, ev.PageSaved | ev.PageLoaded)]
        bench.told = [one for one in bench.told if one not in todo]
        if not todo and not done:
            bench.vcpu_pages[::512] = int(bench.vmc[0]) << 2
            bench.feed(bench.vm, ev.LookAtGrace())
            moved = bench.serve()
            waiting = bench.vm.grace_pending or bench.told
            assert moved or waiting, "the walk stands still"
            todo = [one for one in bench.told if isinstance(one, ev.PageSaved | ev.PageLoaded)]
            bench.told = [one for one in bench.told if one not in todo]
        for event in todo:
            if isinstance(event, ev.PageSaved):
                bench.image[event.hvp] = (event.content, event.data)


def save(bench: Bench) -> Image:
    """The image of a bench whose vCPUs stand."""
    assert sorted(set(paused(bench))) == list(range(len(bench.vcpus)))
    bench.image = {}
    walk(bench, ev.SavePage)
    states = [machine.state().to_plain() for machine in bench.vcpus]
    return Image(states, [bench.image[hvp] for hvp in range(len(bench.vm.state))])


def restore(image: Image, *, skip: tuple[int, ...] = (), **options: Any) -> Bench:
    """A fresh bench with the image in it; the vCPUs have not run yet. ``skip``: vCPUs that get no state."""
    bench = Bench(pages=len(image.pages), vcpus=len(image.states), **options)
    walk(bench, lambda hvp: ev.LoadPage(hvp, *image.pages[hvp]))
    for machine, state in zip(bench.vcpus, image.states, strict=True):
        if machine.cpu not in skip:
            bench.feed(machine, ev.Restore(machine.cpu, state))
    return bench


def refusals(bench: Bench) -> list[str]:
    """What the restored vCPUs would not take."""
    return [one.refused for one in bench.told if isinstance(one, ev.Restored) and one.refused]


def resume(bench: Bench, cpu: int = 0, **fields: int) -> None:
    """The first exit of a restored vCPU."""
    bench.exit(cpu, ExitReason.RESUME, **{"flags": XF_RESTART, **fields})
