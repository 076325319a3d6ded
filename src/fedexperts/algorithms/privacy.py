"""Clip clients' changes and add Gaussian noise, so that the shared model is differentially private.

The unit of protection is a whole client, as in McMahan et al., ICLR 2018, arXiv 1710.06963.
"""

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedexperts.algorithms.aggregation import norm_of, start_of
from fedexperts.errors import UserError, refuse_unknown
from fedexperts.messages import Upload
from fedexperts.seeds import derive_seed
from fedexperts.tensors import Tensors, WeightedMean

_FROM_THE_SYSTEM = -1


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Section ``[privacy]``: differential privacy of whole clients; off unless ``clip_norm`` is set."""

    clip_norm: float = 0.0
    """Largest L2 norm of an upload's change over all its tensors; a longer change is scaled down to it. 0: no
    limit, and no privacy."""
    noise_multiplier: float = 0.0
    """Standard deviation of the Gaussian noise as a multiple of ``clip_norm``; 0 clips alone."""
    noise: Literal["server", "client"] = "server"
    """Place of the noise. ``server``: in the sum of a round; it protects clients from all who get the model,
    not from the server. ``client``: in each upload, all of it; it protects from the server too, and the mean
    has much more noise."""
    delta: float = 1e-5
    """Probability with which the bound epsilon may fail; well below 1 / number of clients."""
    noise_seed: int = -1
    """Seed of the noise, for experiments that must be repeatable: who knows it can take the noise off. -1
    draws it from the operating system."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and noise without a limit to which it is measured."""
        refuse_unknown(self)
        for name in ("clip_norm", "noise_multiplier"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more and finite, not {getattr(self, name)}")
        if not 0 < self.delta < 1:
            raise UserError(f"delta must be above 0 and below 1, not {self.delta}")
        if self.noise_seed < _FROM_THE_SYSTEM:
            raise UserError(
                f"noise_seed must be -1 (from the operating system) or more, not {self.noise_seed}"
            )
        if self.noise_multiplier and not self.clip_norm:
            raise UserError(
                f"noise_multiplier is {self.noise_multiplier:g}, but clip_norm is 0: noise is a multiple of "
                "clip_norm, so set both"
            )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        for name in ("noise", "delta", "noise_seed"):
            value = getattr(self, name)
            if not self.noise_multiplier and value != getattr(type(self), name):
                raise UserError(f"{name} is {value}, but has no effect with noise_multiplier = 0")

    @property
    def is_on(self) -> bool:
        """Whether changes are clipped."""
        return self.clip_norm > 0

    def generator(self, *names: str | int) -> np.random.Generator:
        """Return where the noise of one round, or of one client in it, comes from."""
        if self.noise_seed == _FROM_THE_SYSTEM:
            return secret_generator()
        return _keyed(derive_seed(self.noise_seed, "privacy", *names))

    def private(
        self, upload: Upload, came: Mapping[str, Tensor], client_id: str, round_number: int
    ) -> Upload:
        """Return what a client sends: every client weighs the same, and what only reports need stays away.

        With ``noise = "client"`` the change from ``came``, the client's tensors before its turn, is clipped
        and noised.
        """
        bare = replace(upload, weights=dict.fromkeys(upload.tensors, 1.0), tables={}, measured={})
        if self.noise == "server":
            return bare
        changes = clipped(upload.tensors, came, self.clip_norm)
        generator, deviation = self.generator(client_id, round_number), self.noise_multiplier * self.clip_norm
        tensors = {
            name: (start_of(name, old, came) + changes[name] + gaussian(old, deviation, generator)).to(
                old.dtype
            )
            for name, old in upload.tensors.items()
        }
        return replace(bare, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class PrivateRounds:
    """The server's share of ``[privacy]``."""

    settings: PrivacySettings
    cohort_size: int
    """Clients that every round asks: the number by which sums are divided, whoever answers."""

    def start(self, before: Mapping[str, Tensor], round_number: int) -> WeightedMean:
        """Return a mean to which nothing has been added; changes are measured from ``before``."""
        if self.settings.noise == "client":
            return WeightedMean()
        return PrivateMean(before, self.settings, self.cohort_size, self.settings.generator(round_number))


class PrivateMean(WeightedMean):
    """Sum of clipped changes plus Gaussian noise, over a number of clients that is fixed beforehand."""

    def __init__(
        self,
        before: Mapping[str, Tensor],
        settings: PrivacySettings,
        cohort_size: int,
        generator: np.random.Generator,
    ) -> None:
        """Draw the noise of each of the tensors ``before``, in the order of their names."""
        super().__init__()
        self._before, self._cohort_size, self._clip_norm = before, cohort_size, settings.clip_norm
        deviation = settings.noise_multiplier * settings.clip_norm
        self._totals = {name: gaussian(before[name], deviation, generator) for name in sorted(before)}

    def add(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Add the clipped change of one client; its weights do not count."""
        for name, change in clipped(tensors, self._before, self._clip_norm).items():
            self._totals[name] += change

    def mean(self, like: Mapping[str, Tensor]) -> Tensors:
        """Means in the dtypes of ``like``."""
        return {name: self.exact(name).to(old.dtype) for name, old in like.items()}

    def exact(self, name: str) -> Tensor:
        """Return where one tensor ends, in float64."""
        return self._before[name].double() + self._totals[name] / self._cohort_size

    def names(self) -> Iterable[str]:
        """All names: noise comes to each, whoever answered."""
        return self._totals.keys()


def clipped(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], clip_norm: float) -> Tensors:
    """Return the changes from ``before`` in float64, scaled down together where they are too long."""
    changes = {name: tensor.double() - start_of(name, tensor, before) for name, tensor in tensors.items()}
    norm = norm_of(changes.values())
    return (
        {name: change * (clip_norm / norm) for name, change in changes.items()}
        if norm > clip_norm
        else changes
    )


def secret_generator() -> np.random.Generator:
    """Return a generator with a key of 128 bits from the operating system.

    Torch's takes 32 bits of a seed alone: who knows a few values can try them all, and take the noise off.
    """
    return _keyed(secrets.randbits(128))


def _keyed(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def gaussian(like: Tensor, deviation: float, generator: np.random.Generator) -> Tensor:
    """Return Gaussian noise of one tensor's shape, in float64."""
    return torch.as_tensor(generator.standard_normal(tuple(like.shape)), dtype=torch.float64) * deviation
