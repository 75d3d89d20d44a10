"""How a module of stories lists them by the invariant that each breaks."""

from __future__ import annotations

from collections.abc import Callable

from tests.report.check_story import Story

Teller = Callable[[Story, bool], None]
"""Tells a story, bad or good."""
Stories = dict[int, tuple[str, bool, Teller]]
"""By invariant: profile, events of a recorded kernel, story."""


def registering(stories: Stories) -> Callable[..., Callable[[Teller], Teller]]:
    """The decorator that puts a story into the list: `@tells(number, profile, recorded=...)`."""

    def tells(
        number: int, profile: str = "mainline", *, recorded: bool = False
    ) -> Callable[[Teller], Teller]:
        def register(teller: Teller) -> Teller:
            assert number not in stories
            stories[number] = (profile, recorded, teller)
            return teller

        return register

    return tells
