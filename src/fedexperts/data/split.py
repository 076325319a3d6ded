"""Split a client's examples into train, validation and test, with no prompt in two of them."""

import random
from collections.abc import Hashable, Sequence
from typing import Final, Literal

from fedexperts.data.settings import SplitSettings
from fedexperts.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")


def split_examples(
    prompts: Sequence[Hashable], settings: SplitSettings, *, client: str, rng: random.Random
) -> dict[Split, list[int]]:
    """Return positions of one client's examples in each split, shuffled; ``prompts`` has a key per example.

    Sizes are the shares, rounded, with at least one test example. Examples with the same prompt and different
    responses stay together, so that no prompt that is trained on is tested: a group goes to the test if it
    still fits there, else to validation, else to train. ``client`` names the owner in an error.
    """
    size = len(prompts)
    num_test = max(1, round(size * settings.test))
    room: dict[Split, int] = {"test": num_test, "validation": round(size * settings.validation)}
    splits: dict[Split, list[int]] = {name: [] for name in SPLITS}
    for group in _shuffled_groups(prompts, rng):
        chosen: Split = next((name for name, free in room.items() if len(group) <= free), "train")
        if chosen in room:
            room[chosen] -= len(group)
        splits[chosen] += group
    for name in SPLITS:
        if not splits[name] and name != "validation":
            raise UserError(
                f"{client} has {size} examples with {len(set(prompts))} different prompts, which leaves none "
                f"for its {name} split; it needs more of them, or other shares in data.split."
            )
    assert sorted(position for own in splits.values() for position in own) == list(range(size))
    return splits


def _shuffled_groups(prompts: Sequence[Hashable], rng: random.Random) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(position)
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    return shuffled
