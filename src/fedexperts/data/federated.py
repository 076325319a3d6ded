"""Read all clients' data once, partition and split it, and keep it on disk until a client's turn."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedexperts.data.canaries import canaries
from fedexperts.data.clusters import cluster_inputs
from fedexperts.data.examples import Example
from fedexperts.data.files import files_in
from fedexperts.data.generated import (
    CommonKnowledge,
    has_common_knowledge,
    tinyworld_categories,
    tinyworld_num_clients,
    tinyworld_style,
)
from fedexperts.data.partition import Codes, Partition, partition_examples
from fedexperts.data.pool import Pool, PoolCounts, collect_pool
from fedexperts.data.settings import (
    CLIENT_NAME,
    OWN_DATA_KINDS,
    TINYWORLD,
    DataSettings,
    PartitionSettings,
)
from fedexperts.data.sources import iterate_examples, paths_of
from fedexperts.data.split import SPLITS, Split, reserved_prompts, split_examples
from fedexperts.data.spool import ExampleSpool
from fedexperts.data.tinyworld import COMMON_LABEL, restyle
from fedexperts.errors import UserError, known_options
from fedexperts.seeds import derive_random, derive_seed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataCounts:
    """Counts of what became of every record of the source."""

    source: PoolCounts
    """Left out before the partition."""
    num_without_client: int
    """Examples that the partition gave to nobody: clients left out, labels that no client was dealt."""
    num_over_client_limit: int
    """Examples left out by `data.partition.max_examples_per_client`."""
    num_moved: int
    """Examples moved to clients that a Dirichlet draw had left with too few."""
    num_used: int
    """Examples that the clients have."""

    def left_out(self) -> str:
        """Describe records that were read and are not used, by reason; empty if there are none."""
        reasons = {
            "of other labels": self.source.num_other_label,
            "without instruction": self.source.num_without_instruction,
            "without response": self.source.num_empty,
            "duplicates": self.source.num_duplicates,
            "over data.max_examples": self.source.num_over_limit,
            "with no client": self.num_without_client,
            "over the client's limit": self.num_over_client_limit,
        }
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        return f"; left out: {told}" if told else ""


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """Facts about one client that do not require reading its examples."""

    client_id: str
    name: str
    """Name of the client in the source, or the style of its answers in tinyworld; empty where there is
    neither."""
    sizes: dict[Split, int]
    """Examples in each split."""
    labels: dict[str, int]
    """Examples of each label, all splits together; without zeros."""
    num_test_trained_elsewhere: int
    """Test examples whose prompt another client trains on."""
    bounds: dict[Split, tuple[int, int]]
    """Start and end of each split in the spool, in bytes."""
    clusters: dict[int, int] = field(default_factory=dict)
    """Examples of each cluster of inputs, all splits together; empty but for a partition by clusters."""


class FederatedData:
    """Every client's examples in three splits, read from disk when asked; see :func:`load_federated_data`.

    Memory: a few hundred bytes for each client, whatever the number and the length of its examples.
    """

    def __init__(
        self,
        spool: ExampleSpool,
        clients: Sequence[ClientData],
        counts: DataCounts,
        *,
        label_names: Sequence[str],
    ) -> None:
        """Take over ``spool``, which :meth:`close` or the end of the process deletes."""
        self._spool = spool
        self._clients = {client.client_id: client for client in clients}
        self.client_ids: tuple[str, ...] = tuple(self._clients)
        """``client-000`` and on in the order of creation, or the names of files or of the site."""
        self.label_names = tuple(name for name in label_names if any(name in each.labels for each in clients))
        """The labels that occur, in the order of `data.labels`, of tinyworld's categories, or by name."""
        self.counts = counts
        """Counts of what became of every record of the source."""

    def client(self, client_id: str) -> ClientData:
        """Return name, sizes and labels of one client."""
        return self._clients[client_id]

    @known_options
    def examples(self, client_id: str, split: Split) -> list[Example]:
        """Return the examples of one split of a client, in an order that is the same in every process."""
        return self._spool.read(*self._clients[client_id].bounds[split])

    @known_options
    def num_examples(self, client_id: str, split: Split) -> int:
        """Return the number of examples in one split of a client."""
        return self._clients[client_id].sizes[split]

    def label_counts(self) -> dict[str, dict[str, int]]:
        """Return for each client the number of examples of each label, all splits together, without zeros."""
        return {client_id: dict(client.labels) for client_id, client in self._clients.items()}

    def client_names(self) -> dict[str, str]:
        """The name of each client by id; empty where its source has none."""
        return {client_id: client.name for client_id, client in self._clients.items()}

    def only(self, client_ids: Collection[str]) -> "FederatedData":
        """Return a view of these clients alone, over the same spool; its holder cannot reach the others."""
        clients = [client for name, client in self._clients.items() if name in client_ids]
        return FederatedData(self._spool, clients, self.counts, label_names=self.label_names)

    def close(self) -> None:
        """Delete the examples from disk; they cannot be read any more."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def no_data() -> FederatedData:
    """Return data with no client: all that a server over a network has."""
    source = _added([])
    counts = DataCounts(source=source, num_without_client=0, num_over_client_limit=0, num_moved=0, num_used=0)
    return FederatedData(ExampleSpool(), (), counts, label_names=())


def load_federated_data(settings: DataSettings, seed: int) -> FederatedData:
    """Read the source, give each client its examples, split them, and leave all of it on disk.

    The split is made before anything else uses the examples. Equal arguments (and an unchanged source) give
    equal examples in equal order in every process. No example is in two splits or with two clients, and of
    records with the same prompt and response only the first is kept. A prompt that one client trains on and
    another is tested on is counted. A mistake that the user can fix raises :class:`UserError`.
    """
    if settings.partition.kind in OWN_DATA_KINDS:
        return _load_files(settings)
    pool = _read_pool(settings, seed)
    clusters_N = _clusters(pool, settings.partition, seed)
    partition = partition_examples(
        pool.labels_N,
        pool.clients_N,
        _chosen_partition(settings),
        label_names=pool.label_names,
        rng=derive_random(seed, "partition"),
        clusters_N=clusters_N,
    )
    drawn = [
        _draw_client(pool, settings, seed, position, partition) for position in range(len(partition.indices))
    ]
    if has_common_knowledge(settings):
        drawn = _with_questions(drawn, settings, seed)
    trained_P = np.unique(np.concatenate([pool.prompts_N[each.splits["train"]] for each in drawn]))
    spool = ExampleSpool()
    clients = [_write_client(pool, spool, settings, each, trained_P, clusters_N) for each in drawn]
    pool.spool.close()
    counts = _count(pool, partition, num_used=_num_used(clients, settings))
    _log.info("%d clients with %d examples%s", len(clients), counts.num_used, counts.left_out())
    return FederatedData(spool, clients, counts, label_names=_label_names(pool, settings))


def _label_names(pool: Pool, settings: DataSettings) -> tuple[str, ...]:
    return (*pool.label_names, *[COMMON_LABEL] * has_common_knowledge(settings))


def _read_pool(settings: DataSettings, seed: int) -> Pool:
    label_order = tinyworld_categories(settings) if settings.source == TINYWORLD else settings.labels
    return collect_pool(iterate_examples(settings, seed), settings, seed, label_order=label_order)


def _clusters(pool: Pool, settings: PartitionSettings, seed: int) -> Codes | None:
    """Return the cluster of each example's input; None where the partition does not go by it."""
    if settings.kind != "clusters":
        return None
    examples = (pool.read(index) for index in range(len(pool)))
    return cluster_inputs(examples, settings.num_clusters, seed=derive_seed(seed, "clusters"))


def _chosen_partition(settings: DataSettings) -> PartitionSettings:
    if settings.source != TINYWORLD:
        return settings.partition
    return replace(settings.partition, num_clients=tinyworld_num_clients(settings))


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """One client's examples before they are written."""

    client_id: str
    number: int
    """Number of the client in the source."""
    splits: Mapping[Split, NDArray[np.int64]]
    """Indices in the pool of the examples in each split."""
    questions: Mapping[Split, Sequence[Example]] = field(default_factory=dict)
    """Questions on common knowledge beside them."""


def _draw_client(
    pool: Pool, settings: DataSettings, seed: int, position: int, partition: Partition
) -> _Drawn:
    """Split the examples of the client at ``position``."""
    client_id = f"client-{position:03d}"
    number = partition.clients[position] if partition.clients else position
    name, _ = _identity(pool, settings, number)
    indices = _limit(partition.indices[position], settings, derive_random(seed, "client limit", client_id))
    told, rng = f"{client_id} ({name})" if name else client_id, derive_random(seed, "split", client_id)
    chosen = _split(pool, settings, indices, told, rng)
    return _Drawn(client_id=client_id, number=number, splits=chosen)


def _split(
    pool: Pool, settings: DataSettings, indices: Sequence[int], client: str, rng: random.Random
) -> dict[Split, NDArray[np.int64]]:
    """Return the indices in the pool of each split; ``client`` names the owner in an error."""
    splits = split_examples(
        [int(pool.prompts_N[index]) for index in indices],
        settings.split,
        client=client,
        rng=rng,
        is_reserved=reserved_prompts(settings.split, settings.split_seed),
    )
    return {
        split: np.array([indices[place] for place in own], dtype=np.int64) for split, own in splits.items()
    }


def _with_questions(drawn: Sequence[_Drawn], settings: DataSettings, seed: int) -> list[_Drawn]:
    """Replace some of each client's examples by questions on common knowledge."""
    common = CommonKnowledge(settings, seed, {each.number: len(each.splits["train"]) for each in drawn})
    made = []
    for each in drawn:
        questions = common.questions(each.number, {split: len(own) for split, own in each.splits.items()})
        kept = {split: own[: len(own) - len(questions[split])] for split, own in each.splits.items()}
        made.append(replace(each, splits=kept, questions=questions))
    return made


def _write_client(
    pool: Pool,
    spool: ExampleSpool,
    settings: DataSettings,
    drawn: _Drawn,
    trained_P: NDArray[np.uint64],
    clusters_N: Codes | None = None,
) -> ClientData:
    """Append one client's examples to ``spool``."""
    name, restyled = _identity(pool, settings, drawn.number)
    labels: Counter[str] = Counter()
    bounds: dict[Split, tuple[int, int]] = {}
    sizes: dict[Split, int] = {}
    for split in SPLITS:
        start = spool.size_bytes
        examples = [restyled(pool.read(int(index))) for index in drawn.splits[split]]
        examples = _mixed(examples, drawn.questions.get(split, ()))
        if split == "train":
            examples += canaries(drawn.client_id, settings.num_canaries) * settings.canary_copies
        for example in examples:
            spool.append(example)
            labels[example.label] += 1
        sizes[split], bounds[split] = len(examples), (start, spool.size_bytes)
    return ClientData(
        client_id=drawn.client_id,
        name=name,
        sizes=sizes,
        # No prompt is in two splits of one client: whoever trains on it is another. Nobody is trained in the
        # wording in which a question on common knowledge is tested.
        num_test_trained_elsewhere=_num_among(pool.prompts_N[drawn.splits["test"]], trained_P),
        labels={label: labels[label] for label in _label_names(pool, settings) if labels[label]},
        bounds=bounds,
        clusters={} if clusters_N is None else _cluster_counts(clusters_N, drawn),
    )


def _num_among(own: NDArray[np.uint64], sorted_P: NDArray[np.uint64]) -> int:
    """Return how many of a client's prompts are among those of all, which are sorted once."""
    first, behind = (np.searchsorted(sorted_P, own, side) for side in ("left", "right"))
    return int((first < behind).sum())


def _cluster_counts(clusters_N: Codes, drawn: _Drawn) -> dict[int, int]:
    """Return how many of a client's examples are of each cluster."""
    own = clusters_N[np.concatenate(list(drawn.splits.values()))].tolist()
    return dict(sorted(Counter(own).items()))


def _num_used(clients: Sequence[ClientData], settings: DataSettings) -> int:
    """Return the number of the source's examples that clients have, planted ones not counted."""
    num_planted = settings.num_canaries * settings.canary_copies
    return sum(sum(client.sizes.values()) - num_planted for client in clients)


def _mixed(examples: Sequence[Example], asked: Sequence[Example]) -> list[Example]:
    """Return both in one order in which every beginning has its share of each facet."""
    groups: dict[str, list[Example]] = {"": list(examples)}
    for question in asked:
        groups.setdefault(question.facet or question.label, []).append(question)
    places = [
        ((place + 0.5) / len(group), rank, example)
        for rank, group in enumerate(groups.values())
        for place, example in enumerate(group)
    ]
    return [example for _, _, example in sorted(places, key=lambda item: item[:2])]


def _identity(pool: Pool, settings: DataSettings, number: int) -> tuple[str, Callable[[Example], Example]]:
    """Return the name of client ``number`` of the source, and the function that rewrites its examples."""
    is_natural = settings.partition.kind == "natural"
    if settings.source != TINYWORLD:
        return pool.client_names[number] if is_natural else "", lambda example: example
    style = tinyworld_style(settings, number)
    return style, lambda example: example if is_natural else restyle(example, style)


def _limit(indices: Sequence[int], settings: DataSettings, rng: random.Random) -> Sequence[int]:
    most = settings.partition.max_examples_per_client
    return sorted(rng.sample(indices, most)) if 0 < most < len(indices) else indices


def _count(pool: Pool, partition: Partition, *, num_used: int) -> DataCounts:
    num_given = sum(len(indices) for indices in partition.indices)
    return DataCounts(
        source=pool.counts,
        num_without_client=len(pool) - num_given,
        num_over_client_limit=num_given - num_used,
        num_moved=partition.num_moved,
        num_used=num_used,
    )


def load_site_data(settings: DataSettings, name: str) -> FederatedData:
    """Read all data of ``settings.source`` as those of the one client ``name``.

    Nobody else's data, seed or number has a part in it: the split is drawn by ``data.split_seed`` (0 where it
    is not set), so that it is the same in every run, and no run trains on another's test examples.
    """
    return _load_owners(settings, {name: settings.source})


def _load_files(settings: DataSettings) -> FederatedData:
    """Read each file as one client, exactly as a site of its own would read it."""
    paths = paths_of(settings)
    if settings.partition.kind != "file" or not paths:
        raise UserError(
            f'data.source "{settings.source}" gives no files: with data.partition.kind = "file" it must be a '
            'folder or a list of files; data of kind "site" are at the sites.'
        )
    files = [file for path in paths for file in (files_in(path) if path.is_dir() else (path,))]
    owners: dict[str, str | tuple[str, ...]] = {}
    for file in files:
        name = file.name.partition(".")[0]
        if name in owners or not CLIENT_NAME.fullmatch(name):
            reason = f"is that of {owners[name]} too" if name in owners else "is no name of a client"
            raise UserError(f'data.source: file "{file}" is a client, but its name "{name}" {reason}.')
        owners[name] = str(file)
    return _load_owners(settings, owners)


def _load_owners(settings: DataSettings, owners: Mapping[str, str | tuple[str, ...]]) -> FederatedData:
    spool, clients, pool_counts, labels = ExampleSpool(), [], [], set[str]()
    prompts: list[Mapping[Split, NDArray[np.uint64]]] = []
    for name, source in owners.items():
        own = replace(settings, source=source)
        pool = _read_pool(own, max(settings.split_seed, 0))
        drawn = _draw_owner(pool, own, name)
        clients.append(_write_client(pool, spool, own, drawn, np.empty(0, dtype=np.uint64)))
        prompts.append({split: pool.prompts_N[chosen] for split, chosen in drawn.splits.items()})
        pool_counts.append(pool.counts)
        labels.update(pool.label_names)
        pool.spool.close()
    trained_P = np.unique(np.concatenate([own["train"] for own in prompts]))
    clients = [
        replace(client, num_test_trained_elsewhere=_num_among(own["test"], trained_P))
        for client, own in zip(clients, prompts, strict=True)
    ]
    num_used, source_counts = _num_used(clients, settings), _added(pool_counts)
    counts = DataCounts(
        source=source_counts,
        num_without_client=0,
        num_over_client_limit=source_counts.num_usable - num_used,
        num_moved=0,
        num_used=num_used,
    )
    _log.info("%d clients with %d examples%s", len(clients), num_used, counts.left_out())
    return FederatedData(spool, clients, counts, label_names=sorted(labels))


def _draw_owner(pool: Pool, settings: DataSettings, name: str) -> _Drawn:
    """Split a client's own examples."""
    least, seed = settings.partition.min_examples, max(settings.split_seed, 0)
    if len(pool) < least:
        raise UserError(f"{name} has {len(pool)} usable examples; data.partition.min_examples is {least}.")
    indices = _limit(range(len(pool)), settings, derive_random(seed, "own data limit"))
    chosen = _split(pool, settings, indices, name, derive_random(seed, "own data split"))
    return _Drawn(client_id=name, number=0, splits=chosen)


def _added(counts: Sequence[PoolCounts]) -> PoolCounts:
    totals: Counter[str] = Counter({name: 0 for name in PoolCounts.__dataclass_fields__})
    for each in counts:
        totals.update(asdict(each))
    return PoolCounts(**totals)
