"""All stories by the invariant that they break, and how one is told."""

from __future__ import annotations

from typing import Final

from tests.report import stories_of_faults, stories_of_ready
from tests.report.check_story import Story
from tests.report.story_register import Stories

STORIES: Final[Stories] = stories_of_faults.STORIES | stories_of_ready.STORIES


def tell(number: int, *, bad: bool) -> tuple[Story, bool]:
    """The story of an invariant, broken or told right, and whether it is one of a recorded kernel."""
    profile, recorded, teller = STORIES[number]
    story = Story(profile)
    teller(story, bad)
    return story, recorded
