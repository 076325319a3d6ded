"""Leave out of a site's answers what the site does not tell, and add noise to its routing histograms."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedexperts.algorithms.privacy import secret_generator
from fedexperts.federation.edge import REQUIRED_METRICS
from fedexperts.federation.scoring import ROUTING_NAMES, SUBJECTS
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.messages import Upload
from fedexperts.tensors import Tensors


def told(upload: Upload, settings: SiteSettings, num_train: int) -> Upload:
    """Return the part of an answer that the server may have.

    Args:
        upload: the answer as the site keeps it.
        settings: says what may be told.
        num_train: training examples with a label, by which this upload's tensors are weighed; 1 if they are
            not.
    """
    if "counts" not in settings.tell:
        upload = _without_counts(upload, num_train)
    tables = upload.tables if "experts" in settings.tell else {}
    return replace(upload, beside=_beside(upload.beside, settings), tables=tables)


def _without_counts(upload: Upload, num_train: int) -> Upload:
    """Return an upload that is weighed as one site, and tells no number of examples."""
    return replace(
        upload,
        weights={name: weight / num_train for name, weight in upload.weights.items()},
        metrics={
            name: value
            for name, value in upload.metrics.items()
            if not name.startswith("num_") or name in REQUIRED_METRICS
        },
    )


def _beside(beside: Tensors, settings: SiteSettings) -> Tensors:
    untold: Sequence[str] = () if "routing" in settings.tell else ROUTING_NAMES
    kept = {
        name: tensor
        for name, tensor in beside.items()
        if name not in untold and (name != SUBJECTS or "exam" in settings.tell)
    }
    if not settings.routing_noise:
        return kept
    # The server knows the run's seed, so this noise must come from elsewhere.
    generator = secret_generator()
    noised = {
        name: noisy_counts(kept[name], settings.routing_noise, generator)
        for name in ROUTING_NAMES
        if name in kept
    }
    return kept | noised


def noisy_counts(counts: Tensor, scale: float, generator: np.random.Generator) -> Tensor:
    """Return counts with Laplace noise of this scale, rounded and not below 0; -1 (no expert) stays."""
    noise = torch.as_tensor(generator.laplace(scale=scale, size=tuple(counts.shape)))
    noised = (counts + noise).round().clamp(min=0).to(counts.dtype)
    return torch.where(counts < 0, counts, noised)
