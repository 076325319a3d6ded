"""Cluster the inputs of examples: TF-IDF vectors of their words by K-means (scikit-learn)."""

import warnings
from collections.abc import Iterable
from typing import Final

import numpy as np

from fedexperts.data.examples import Example
from fedexperts.data.partition import Codes
from fedexperts.errors import UserError, needs_extra

MOST_WORDS: Final = 20_000
"""Words of the vectors, the most frequent ones; bounds the memory of the centroids."""
NUM_STARTS: Final = 4
"""Runs of K-means from different centroids, of which the tightest counts."""


def cluster_inputs(examples: Iterable[Example], num_clusters: int, *, seed: int) -> Codes:
    """Return the cluster of each example by the words of its instruction and context.

    One thread adds up, so that equal arguments give equal clusters on any number of cores.

    Raises:
        UserError: scikit-learn is absent, there are no words, or fewer different inputs than clusters.
    """
    try:  # an optional dependency
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise needs_extra('data.partition.kind = "clusters"', "scikit-learn", "clusters") from None
    texts = (f"{example.instruction}\n{example.context}" for example in examples)
    try:
        vectors_NW = TfidfVectorizer(max_features=MOST_WORDS, sublinear_tf=True).fit_transform(texts)
    except ValueError:  # the library's "empty vocabulary"
        raise UserError(
            'data.partition.kind is "clusters", but no input has a word of two letters to cluster by.'
        ) from None
    few = UserError(
        f"data.partition.num_clusters is {num_clusters}, but there are fewer different inputs among "
        f"{vectors_NW.shape[0]} examples."
    )
    if vectors_NW.shape[0] < num_clusters:
        raise few
    means = KMeans(num_clusters, n_init=NUM_STARTS, random_state=seed % 2**32)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return np.asarray(means.fit_predict(vectors_NW), dtype=np.int64)
        except ConvergenceWarning:  # fewer different vectors than clusters
            raise few from None
