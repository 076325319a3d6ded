"""Seated models as fixtures."""

from collections.abc import Iterator

import pytest
from seated import Seated, assert_same_state, seat, state

from families import each_family


@pytest.fixture(params=each_family(), scope="module")
def seated(request: pytest.FixtureRequest) -> Seated:
    """One family of each layout in turn; all families among the slow tests."""
    return seat(request.param)


@pytest.fixture
def qwen() -> Iterator[Seated]:
    """The family of the shipped model; checked to be left as it was found."""
    found = seat("qwen2_moe")
    before = state(found.model)
    yield found
    assert_same_state(found.model, before)
