"""Define the settings of the data: source, partition over clients, and splits."""

import re
from dataclasses import dataclass, field
from typing import Final

from fedexperts.data.tinyworld import MOST_ENTITIES
from fedexperts.errors import UserError

PARTITION_KINDS: Final = (
    "natural",
    "iid",
    "pathological",
    "dirichlet",
    "quantity",
    "clusters",
    "file",
    "site",
)
SHARED_KINDS: Final = ("dirichlet", "quantity", "clusters")
"""Partitions by shares that are drawn from a Dirichlet distribution."""
OWN_DATA_KINDS: Final = ("file", "site")
"""Partitions in which nothing is divided: each client comes with data of its own."""
TEMPLATES: Final = ("auto", "chat", "alpaca")
TINYWORLD: Final = "tinyworld"
SITE: Final = "site"
"""Source of an experiment whose sites each have data of their own, which only they can name."""
CLIENT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Names of clients: they are names of folders too."""
ALPHA_RANGE: Final = (1e-12, 1e12)
"""Range of the Dirichlet parameter: all to one client, and equal shares; gamma variates of far larger ones
are not found."""


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """The names of a record's fields in the source."""

    instruction: str = "instruction"
    """Field with the instruction."""
    context: str = "context"
    """Field with a passage that the instruction refers to, or "" for none; left at its default, `input` is
    tried too, and the field may be absent."""
    response: str = "response"
    """Field with the answer to learn; left at its default, `output` is tried too."""
    label: str = "category"
    """Field with the category that label partitions go by; left at its default, it may be absent if no label
    is needed."""
    client: str = ""
    """Field with the client or domain that the natural partition goes by."""
    messages: str = "messages"
    """Field with a conversation, as OpenAI or ShareGPT write it; left at its default, `conversations` is
    tried too, in records without an instruction."""

    def __post_init__(self) -> None:
        for name in ("instruction", "response"):
            if not getattr(self, name):
                raise UserError(f"data.fields.{name} is empty; it must name a field of the source.")


@dataclass(frozen=True, kw_only=True)
class TinyworldSettings:
    """Size of each client's share of the generated data set, its common knowledge and its disagreement."""

    examples_per_client: int = 160
    """Examples for each client, all splits together; with the default shares 100 train, 20 validate, 40
    test."""
    disagreement: float = 1.0
    """Share of the houses that answer in a style of their own; the others answer neutrally. 0: all clients
    agree on the answers; 1: no two houses do."""
    clients_per_house: int = 1
    """Clients that answer in the same style."""
    common_share: float = 0.0
    """Share of each client's examples that is about common knowledge: new people, places and things, of whose
    facts each client is taught a part and is also asked those that only others were taught. 0: the clients
    have nothing to learn from each other; 1: nothing else."""
    num_entities: int = 12
    """New people, places and things of common knowledge, with six facts each."""
    taught_share: float = 0.6
    """Share of the facts that each client draws and is taught; its training questions ask them in turn."""

    def __post_init__(self) -> None:
        for name in ("examples_per_client", "clients_per_house", "num_entities"):
            if getattr(self, name) < 1:
                raise UserError(f"data.tinyworld.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_entities > MOST_ENTITIES:
            raise UserError(
                f"data.tinyworld.num_entities is {self.num_entities}; it must be at most {MOST_ENTITIES}: "
                "there are no more names."
            )
        for name in ("disagreement", "common_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.tinyworld.{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if not 0 < self.taught_share <= 1:
            raise UserError(
                f"data.tinyworld.taught_share is {self.taught_share}; it must be above 0 and at most 1."
            )
        if self.disagreement == 0:
            self._refuse_idle("clients_per_house", "with data.tinyworld.disagreement = 0")
        if self.common_share == 0:
            for name in ("num_entities", "taught_share"):
                self._refuse_idle(name, "with data.tinyworld.common_share = 0")

    def _refuse_idle(self, name: str, reason: str) -> None:
        value = getattr(self, name)
        if value != TinyworldSettings.__dataclass_fields__[name].default:
            raise UserError(f"data.tinyworld.{name} is {value}, but has no effect {reason}.")


@dataclass(frozen=True, kw_only=True)
class PartitionSettings:
    """Assignment of examples to clients."""

    kind: str = "natural"
    """"natural" by the client field, "iid" at random in equal parts, "pathological" a few labels for each
    client, "dirichlet" shares of each label drawn from a Dirichlet distribution, "quantity" such shares of
    all examples, whatever their labels, "clusters" such shares of each cluster of similar inputs, "file" one
    client for each file, "site" all data on a machine are the client of that machine."""
    num_clients: int = 0
    """Number of clients; 0 takes as many as the source has: one for each value of the client field, or for
    tinyworld one for each category. With kind "site" the number of sites that the server waits for."""
    labels_per_client: int = 1
    """Labels for each client of a pathological partition."""
    alpha: float = 0.5
    """Concentration α of a Dirichlet partition (kinds "dirichlet", "quantity", "clusters"): near 0 each
    label, all examples, or each cluster go to one client, at large values all clients are alike."""
    num_clusters: int = 10
    """Clusters of inputs in a partition of kind "clusters"."""
    min_examples: int = 10
    """Minimum number of examples of a client: a Dirichlet partition moves examples from the largest clients,
    a natural one leaves smaller clients out, any other is refused."""
    max_examples_per_client: int = 0
    """Maximum number of examples of a client, drawn at random before its split; 0 keeps all."""

    def __post_init__(self) -> None:
        _require_one_of("data.partition.kind", self.kind, PARTITION_KINDS)
        least, largest = ALPHA_RANGE
        if not least <= self.alpha <= largest:
            raise UserError(
                f"data.partition.alpha is {self.alpha}; it must be finite and greater than 0, "
                f"from {least:g} to {largest:g}."
            )
        for name, least in _LEAST_COUNTS.items():
            if getattr(self, name) < least:
                raise UserError(
                    f"data.partition.{name} is {getattr(self, name)}; it must be at least {least}."
                )
        if 0 < self.max_examples_per_client < self.min_examples:
            raise UserError(
                f"data.partition.max_examples_per_client is {self.max_examples_per_client}; it must be 0 (no "
                f"limit) or at least data.partition.min_examples, which is {self.min_examples}."
            )
        for name, kinds in _KINDS_WITH.items():
            is_default = getattr(self, name) == PartitionSettings.__dataclass_fields__[name].default
            if self.kind not in kinds and not is_default:
                uses = " uses it." if len(kinds) == 1 else " use it."
                raise UserError(
                    f"data.partition.{name} is {getattr(self, name)} but data.partition.kind is "
                    f'"{self.kind}"; only ' + ", ".join(f'"{kind}"' for kind in kinds) + uses
                )


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Shares of each client's examples; the rest is for training."""

    validation: float = 0.125
    """Share of a client's examples kept for validation, from 0 to below 1."""
    test: float = 0.25
    """Share of a client's examples kept for testing, above 0 and below 1; at least one example."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UserError(f"data.split.validation is {self.validation}; it must be from 0 to below 1.")
        if not 0 < self.test < 1:
            raise UserError(f"data.split.test is {self.test}; it must be above 0 and below 1.")
        if self.validation + self.test >= 1:
            raise UserError(
                f"data.split.validation ({self.validation}) and data.split.test ({self.test}) sum to "
                f"{self.validation + self.test:g}; below 1 is needed, or nothing is left to train on."
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The `[data]` section."""

    source: str | tuple[str, ...] = TINYWORLD
    """"tinyworld", a file (JSON lines, a JSON array, CSV, each also .gz, or parquet), a folder or a list of
    files, the name of a Hugging Face data set, or "site" where each site has its own."""
    hub_config: str = ""
    """Configuration of the Hugging Face data set; "" for its default."""
    hub_split: str = "train"
    """Split of the Hugging Face data set whose records are divided among the clients."""
    revision: str = ""
    """Commit, tag or branch of the Hugging Face data set; "" for its newest."""
    max_examples: int = 0
    """Maximum number of examples kept from the source, drawn at random by the run's seed; 0 keeps all."""
    labels: tuple[str, ...] = ()
    """Labels kept, in the order in which a pathological partition deals them; empty keeps all."""
    max_tokens: int = 256
    """Maximum number of tokens of prompt and response together; longer examples are cut at the end and
    counted."""
    template: str = "auto"
    """Wording of prompts: "chat" by the tokenizer's template, "alpaca", or "auto" for chat if the tokenizer
    has a template."""
    fields: FieldMap = field(default_factory=FieldMap)
    """Names of the source's fields."""
    tinyworld: TinyworldSettings = field(default_factory=TinyworldSettings)
    """Size and style of the generated data set."""
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    """Partition of the examples over clients."""
    split: SplitSettings = field(default_factory=SplitSettings)
    """Split of each client's examples into train, validation and test."""
    split_seed: int = -1
    """Seed that decides by the prompt alone which examples may be validated on and which tested, for every
    partition and every seed of a run, so that what a search validates on is in no run's test; -1 leaves it
    to the run's seed, and a suite that searches takes 0."""
    num_canaries: int = 0
    """Random texts that each client trains on beside its examples, so that `fedexperts extract` can measure
    what models give away; 0 for none."""
    canary_copies: int = 1
    """Times that each of them stands among the training examples."""

    def __post_init__(self) -> None:
        _require_one_of("data.template", self.template, TEMPLATES)
        if not self.source:
            raise UserError(f'data.source is empty; it must be "{TINYWORLD}", a path or a data set name.')
        if self.max_tokens < 2:
            raise UserError(f"data.max_tokens is {self.max_tokens}; it must be at least 2.")
        if self.max_examples < 0:
            raise UserError(f"data.max_examples is {self.max_examples}; it must be 0 (all) or more.")
        if self.num_canaries < 0 or self.canary_copies < 1:
            name, least = ("num_canaries", 0) if self.num_canaries < 0 else ("canary_copies", 1)
            raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.canary_copies > 1 and not self.num_canaries:
            raise UserError(
                f"data.canary_copies is {self.canary_copies}, but has no effect with data.num_canaries = 0."
            )
        if self.split_seed < -1:
            raise UserError(f"data.split_seed is {self.split_seed}; it must be -1 (none) or more.")
        if self.split_seed >= 0 and not self.split.validation:
            raise UserError(
                f"data.split_seed is {self.split_seed} but has no effect: data.split.validation is 0."
            )
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"data.labels names a label twice: {', '.join(self.labels)}.")
        if self.partition.kind in OWN_DATA_KINDS:
            self._check_own_data()
        if self.source == SITE and self.partition.kind != "site":
            raise UserError(f'data.source is "{SITE}", which needs data.partition.kind = "site".')
        if self.source in (TINYWORLD, SITE):
            self._refuse_unused(("fields", "hub_config", "hub_split", "revision"))
        else:
            self._refuse_unused(("tinyworld",))
            self._require_client_field()
        if self.source == SITE:
            self._refuse_unused(("tinyworld",))

    def _check_own_data(self) -> None:
        """Refuse what only divided data have, and a number of clients that says nothing or is not said."""
        kind, num_clients = self.partition.kind, self.partition.num_clients
        if self.source == TINYWORLD:
            allowed = "a list of files or a folder" if kind == "file" else f'"{SITE}"'
            raise UserError(
                f'data.source is "{TINYWORLD}", but with data.partition.kind "{kind}" clients come with '
                f"their own data: it must be {allowed}."
            )
        if self.labels or self.fields.client:
            name = "data.labels" if self.labels else "data.fields.client"
            raise UserError(f'{name} is set but has no effect with data.partition.kind = "{kind}".')
        if kind == "file" and num_clients:
            raise UserError(
                f"data.partition.num_clients is {num_clients}, but each file is a client: it must be 0."
            )
        if kind == "site" and not num_clients:
            raise UserError(
                'data.partition.num_clients is 0; with kind "site" it must be the number of sites to await.'
            )

    def _refuse_unused(self, names: tuple[str, ...]) -> None:
        defaults = {"fields": FieldMap(), "tinyworld": TinyworldSettings(), "hub_split": "train"}
        for name in names:
            if getattr(self, name) != defaults.get(name, ""):
                raise UserError(f'data.{name} is set but has no effect with data.source = "{self.source}".')

    def _require_client_field(self) -> None:
        if self.partition.kind == "natural" and not self.fields.client:
            raise UserError(
                'data.partition.kind is "natural" but data.fields.client is empty; it must name the field '
                "that tells the client, or another kind be chosen: iid, pathological, dirichlet, quantity, "
                "clusters or file."
            )
        divides = self.partition.kind not in ("natural", *OWN_DATA_KINDS)
        if divides and self.partition.num_clients == 0:
            raise UserError(
                f'data.partition.num_clients is 0; a partition of kind "{self.partition.kind}" needs the '
                "number of clients."
            )


_LEAST_COUNTS: Final = {
    "num_clients": 0,
    "labels_per_client": 1,
    "num_clusters": 2,
    "min_examples": 2,
    "max_examples_per_client": 0,
}
_KINDS_WITH: Final = {
    "labels_per_client": ("pathological",),
    "alpha": SHARED_KINDS,
    "num_clusters": ("clusters",),
}
"""Kinds of partition that use a setting, of those that only some do."""


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f'{key} is "{value}"; it must be one of {", ".join(allowed)}.')
