"""One seed per purpose, derived from the run's seed by name and never by the order of calls."""

import hashlib
import random


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, e.g. ``derive_seed(run_seed, "batches", client_id, round)``.

    Equal arguments give equal seeds on every machine and in every process, so that a client needs nothing but
    the run's seed, and a resumed run draws what the uninterrupted one would have drawn.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_random(seed: int, *purpose: str | int) -> random.Random:
    """A generator of the standard library for ``purpose``; see :func:`derive_seed`."""
    return random.Random(derive_seed(seed, *purpose))
