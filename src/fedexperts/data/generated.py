"""Use the generated world as a source: choose its examples and each client's style."""

import math
from collections.abc import Iterator
from dataclasses import replace

from fedexperts.data.examples import Example
from fedexperts.data.settings import DataSettings
from fedexperts.data.tinyworld import CATEGORIES, STYLES, make_example, num_prompts
from fedexperts.errors import UserError


def tinyworld_categories(settings: DataSettings) -> tuple[str, ...]:
    """Return the categories that ``data.labels`` keeps, in its order; all where it is empty."""
    for label in settings.labels:
        if label not in CATEGORIES:
            raise UserError(
                f'data.labels names "{label}", which is absent; present are {", ".join(CATEGORIES)}.'
            )
    return settings.labels or tuple(CATEGORIES)


def tinyworld_num_clients(settings: DataSettings) -> int:
    """Return the number of clients; one for each category where the setting is 0."""
    return settings.partition.num_clients or len(tinyworld_categories(settings))


def tinyworld_style(settings: DataSettings, client: int) -> str:
    """Return the style of client number ``client``; two clients with the same category get different styles.

    Client i has style i; from one pass over the categories to the next the styles move on by one.
    """
    if settings.tinyworld.styles == "neutral":
        return "neutral"
    lap, category = divmod(client, len(tinyworld_categories(settings)))
    return STYLES[(category + lap) % len(STYLES)]


def generate_tinyworld(settings: DataSettings, seed: int) -> Iterator[Example]:
    """Yield the examples of all clients; all prompts are different.

    For a natural partition client i gets category i (from the first again when all are used), in its style,
    and ``Example.client`` holds its number. For other partitions the same number of examples cycles through
    the categories in the neutral style, because their clients are not known yet.
    """
    categories = tinyworld_categories(settings)
    _require_enough_prompts(categories, settings)
    size = settings.tinyworld.examples_per_client
    for number in range(tinyworld_num_clients(settings) * size):
        if settings.partition.kind == "natural":
            client, position = divmod(number, size)
            lap, column = divmod(client, len(categories))
            style, index = tinyworld_style(settings, client), lap * size + position
            example = make_example(seed=seed, category=categories[column], index=index, style=style)
            yield replace(example, client=str(client))
        else:
            index, column = divmod(number, len(categories))
            yield make_example(seed=seed, category=categories[column], index=index)


def _require_enough_prompts(categories: tuple[str, ...], settings: DataSettings) -> None:
    size, num_clients = settings.tinyworld.examples_per_client, tinyworld_num_clients(settings)
    if settings.partition.kind == "natural":
        needed = math.ceil(num_clients / len(categories)) * size
    else:
        needed = math.ceil(num_clients * size / len(categories))
    for category in categories:
        if needed > num_prompts(category):
            raise UserError(
                f"{num_clients} clients (data.partition.num_clients) of {size} examples "
                f'(data.tinyworld.examples_per_client) need {needed} prompts of "{category}"; '
                f"tinyworld has {num_prompts(category)}."
            )
