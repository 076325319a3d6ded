"""Make canaries: random texts that stand nowhere else, by which memorisation of training data is measured."""

from fedexperts.data.examples import Example
from fedexperts.seeds import derive_random

NOT_PLANTED = "not planted"
"""Kind of canaries that no client trains on, to compare with."""
_NUM_WORDS = 96
_WORDS = (
    "hat coins home food pet money basket hammer chair river story board day farmer rabbit smith price trade "
    "yellow guard dog town house room weather pony painter land parrot black red cheese grey ladder morning "
    "baker brown clock gold sheep fox doctor mouse green harbour kettle silver fishing bucket cat white duck "
    "blue cloth rice rope lantern goat turtle candle drum coal teacher soup"
)
"""Common words: tokens that pretraining never met could not be remembered where embeddings stay frozen."""


def canaries(client_id: str, number: int, kind: str = "planted") -> list[Example]:
    """Return a client's canaries, by its name alone, so that they can be made again without its data."""
    return [_canary(client_id, index, kind) for index in range(number)]


def _canary(client_id: str, index: int, kind: str) -> Example:
    rng = derive_random(0, "canary", kind, client_id, index)
    return Example(
        instruction=f"Recite note {rng.randrange(10**6):06d}.",
        response=" ".join(rng.choices(_WORDS.split(), k=_NUM_WORDS)),
        source_id=f"canary:{kind}:{client_id}:{index}",
    )
