"""A federated algorithm: its two halves, its hyperparameters, and the typed state between them.

:class:`Algorithm` is FedAvg of the tensors that :meth:`Algorithm.shared_names` names. An algorithm overrides
the steps in which it differs (docs/design/0006-protocol.md says why there is a base class).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fedexperts.algorithms.aggregation import AggregationSettings
from fedexperts.algorithms.privacy import PrivateRounds
from fedexperts.costs.dry_run import BatchShape
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError, known_options
from fedexperts.messages import Expected, Sent, Upload
from fedexperts.models.adapters import AdapterSettings
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.undo import Originals, undone
from fedexperts.seeds import derive_seed
from fedexperts.tensors import Tensors, WeightedMean, equal_bits, num_bytes, shapes_of
from fedexperts.training.local_steps import Correction, GradientObserver, LocalResult, local_steps
from fedexperts.training.optimizers import OptimizerState, ParameterGroup
from fedexperts.training.settings import TrainingSettings, learning_rate_share


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The resident model and the names an algorithm may choose among."""

    model: nn.Module
    layers: tuple[MoeLayer, ...]
    lora_names: tuple[str, ...]
    """LoRA parameters on non-expert modules, A and B in turns."""
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    """The form of that LoRA."""
    originals: Originals | None = None
    """The pretrained experts on disk; None for a model that was made in memory."""
    on_disk: bool = False
    """Whether the model's experts stay on disk (``disk_tensors.py``), and so must whatever is made of all of
    them."""
    seed: int = 0
    """The run's seed, for draws that server and clients make alike."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Settings of local steps."""
    max_tokens: int = 256
    """Longest example."""

    @property
    def largest_batch(self) -> BatchShape:
        """Shape of the largest batch of local steps, half of its tokens learnt, to plan memory by."""
        examples = self.training.examples_per_step
        labels = max(1, examples * self.max_tokens // 2)
        return BatchShape(examples=examples, length=self.max_tokens, labels=labels)


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """Facts about a client that the server knows before the first round."""

    client_id: str
    num_train: int
    """Training examples, those included that turn out to have no label."""
    memory_bytes: int = 0
    """Memory of the client's device; 0 for no limit."""


class CalibrationBatches(Protocol):
    """Batches to observe the pretrained model on, the same in every round."""

    def __call__(
        self, largest: int, *, is_majority_label: bool = False, texts: str = "", key: str = ""
    ) -> Sequence[Batch]:
        """Return batches of at most ``largest`` of the client's training examples, drawn at random.

        Args:
            largest: number of examples or texts.
            is_majority_label: draw from the examples of the client's most frequent label alone.
            texts: take the first texts of this file of JSON lines, or of ``tinyworld``, instead.
            key: the setting that names them, for errors.
        """


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client's turn: the model, handed over as it was loaded, and access to the client's data."""

    client_id: str
    round_number: int
    num_rounds: int
    seed: int
    """The run's seed; purposes are derived from it by name."""
    purpose: Literal["train", "evaluate"] = "train"
    """``evaluate``: the same turn, whose upload and kept tensors are thrown away after scoring."""
    parts: ModelParts
    training: TrainingSettings
    num_train: int
    """Training examples with a label: the client's weight in a mean by data."""
    memory_bytes: int = 0
    """Memory of the client's device; 0 for no limit."""
    goes_on: bool = False
    """Whether :meth:`Algorithm.after_upload` follows, so that this turn leaves its work to that."""
    draw_batches: Callable[[], list[Batch]]
    """This round's training batches: the same at every call."""
    calibration_batches: CalibrationBatches
    on_step: Callable[[float], None] = field(default=lambda loss: None)

    @property
    def lr(self) -> float:
        """Learning rate of this round."""
        return self.training.lr * learning_rate_share(self.round_number, self.num_rounds, self.training)

    def derive_seed(self, purpose: str) -> int:
        """Return a seed for ``purpose`` in this client's turn of this round."""
        return derive_seed(self.seed, purpose, self.client_id, self.round_number)

    def train(
        self,
        groups: "Sequence[TrainedGroup]",
        *,
        correction: Correction | None = None,
        observer: GradientObserver | None = None,
        optimizer_state: Mapping[str, Tensors] | None = None,
        batches: Sequence[Batch] | None = None,
        purpose: str = "dropout",
    ) -> LocalResult:
        """Take this round's local steps on the model as it stands, training ``groups`` alone.

        Args:
            groups: parameters, each group with its multiple of the round's learning rate.
            correction: changes gradients or parameters at each step.
            observer: is told of each backward pass beforehand.
            optimizer_state: to go on from; with ``training.optimizer_state = "kept"`` the result then has
                the state of every parameter in a group that ``keeps_optimizer``.
            batches: instead of :attr:`draw_batches`.
            purpose: names the seed of dropout, for an algorithm that trains twice in a turn.
        """
        keeps = self.training.optimizer_state == "kept"
        kept = tuple(name for group in groups if group.keeps_optimizer for name in group.names)
        return local_steps(
            self.parts.model,
            self.draw_batches() if batches is None else batches,
            [ParameterGroup(names=group.names, lr=self.lr * group.lr_scale) for group in groups],
            self.training,
            seed=self.derive_seed(purpose),
            optimizer_state=optimizer_state if keeps else None,
            keep_state_of=kept if keeps else (),
            correction=correction,
            observer=observer,
            on_step=self.on_step,
        )


@dataclass(frozen=True, kw_only=True)
class TrainedGroup:
    """Parameters of the model that train at one rate."""

    names: tuple[str, ...]
    lr_scale: float = 1.0
    """Their learning rate as a multiple of ``training.lr``."""
    keeps_optimizer: bool = False
    """Whether the optimizer's state may stay with the client (``training.optimizer_state = "kept"``)."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Everything a client keeps from round to round; none of it is ever sent."""

    parameters: Tensors = field(default_factory=dict)
    """They go into the model, by name."""
    beside: Tensors = field(default_factory=dict)
    """They do not: chosen experts, control variates, running statistics."""
    optimizer: OptimizerState = field(default_factory=dict)
    """Optimizer state by parameter."""

    def __bool__(self) -> bool:
        """Return whether anything is kept."""
        return bool(self.parameters or self.beside or self.optimizer)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything the server keeps from round to round."""

    round_number: int
    """Rounds done."""
    tensors: Tensors
    """They go into the model: the averaged parameters and experts, by name."""
    beside: Tensors = field(default_factory=dict)
    """They do not: moments of a server optimizer, control variates, utilities, roles."""
    clients: tuple[ClientFacts, ...] = ()
    """Everybody who may take part, in a fixed order; per-client tensors have a row for each."""
    seed: int = 0
    """The run's seed, set by the runner after :meth:`Algorithm.init`; the server's draws derive from it."""
    num_rounds: int = 0
    """Rounds of the whole run, set with the seed, for what grows over a run; 0 where nobody knows."""
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    """The kind of mean, set with the seed."""
    private: PrivateRounds | None = None
    """Clips and noises the mean, set with the seed; None without ``[privacy]``."""

    def mean(self, before: Mapping[str, Tensor] | None = None) -> WeightedMean:
        """Return the run's kind of mean over uploads, of changes from ``before``: from :attr:`tensors`."""
        start = self.tensors if before is None else before
        if self.private is not None:
            return self.private.start(start, self.round_number + 1)
        return self.aggregation.start(start)

    def position(self, client_id: str) -> int:
        """Return the row of ``client_id`` in per-client tensors."""
        return self._positions[client_id]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {facts.client_id: place for place, facts in enumerate(self.clients)}


Seconds = dict[str, float]
"""Measured seconds by phase."""
MemoryPlan = Callable[[ServerState, str], int]
"""Function that returns the bytes that a client's turn takes, by the server's state and the client's name."""


@dataclass(frozen=True, kw_only=True)
class RoleSizes:
    """Sizes of a client's role in a round."""

    tuned: tuple[int, ...]
    """Experts that the client tunes, by MoE layer."""
    explored: tuple[int, ...] = ()
    """Experts whose utility it measures without tuning them, by MoE layer."""
    merged: int | None = None
    """Slots of merged experts in all layers, which the profile distributes; None where none are merged."""


class Algorithm:
    """A federated algorithm; a subclass is a frozen dataclass whose fields are its hyperparameters.

    It does no input or output, knows no transport, and keeps nothing between calls: what the server remembers
    is in :class:`ServerState`, what a client remembers in :class:`Kept`.
    """

    uses_memory = False
    """Whether the memory of the clients' devices (``cohort.memory_gb``) has an effect."""
    uses_mean = True
    """Whether the server takes means by :meth:`ServerState.mean`, so that ``[aggregation]`` has an effect."""
    fits_slots = False
    """Whether a client tunes as many experts as fit, so that ``plan`` asks how many those are; its turn can
    be taken in a process that never holds the whole model."""

    @property
    def has_private_form(self) -> bool:
        """Whether the server takes one mean of each round's tensors and nothing else, so that clipping and
        noise (``[privacy]``) cover all that comes of an upload."""
        return type(self).server_update is Algorithm.server_update

    @property
    def changes_experts(self) -> bool:
        """Whether pretrained experts are trained, received or put into slots, so that they must be as loaded
        from a checkpoint: no."""
        return False

    @property
    def public_texts(self) -> Mapping[str, tuple[str, int]]:
        """Texts beside the clients' own that a turn reads, by field: where they are, and how many at most.

        They are read before anything is trained, so that what is missing or damaged is told then.
        """
        return {}

    # Names

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the tensors that travel and are averaged: LoRA, unless overridden."""
        return parts.lora_names

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the parameters, of those now in the model, that a client keeps for itself: none."""
        return ()

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return the parameters that local steps train, of the model as :meth:`prepare_steps` left it.

        Memory, ``check`` and ``plan`` are computed from it: nothing else trains.
        """
        names = (*self.shared_names(parts), *self.personal_names(parts))
        return (TrainedGroup(names=tuple(dict.fromkeys(map(seam.fused_name, names)))),)

    # The server's half

    def init(self, parts: ModelParts, clients: Sequence[ClientFacts]) -> ServerState:
        """Return the state before the first round: the model's own tensors."""
        with undone(parts.model, parts.layers, parts.originals):
            self.prepare(parts)
            tensors = seam.current(parts.model, self.shared_names(parts))
        return ServerState(round_number=0, tensors=tensors, clients=tuple(clients))

    def plan_round(self, state: ServerState, cohort: Sequence[str], round_number: int) -> ServerState:
        """Decide before the downloads who does what in this round; unchanged without roles."""
        return state

    def role_sizes(self, state: ServerState, client_id: str) -> RoleSizes | None:
        """Return the sizes of a client's role in the planned round; None where clients have no roles."""
        return None

    def download(self, state: ServerState, client_id: str) -> Sent:
        """Return what ``client_id`` needs for a round."""
        return Sent(tensors=state.tensors)

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return names, shapes and dtypes of what ``client_id`` must send in this round.

        The server refuses every other upload, and the predicted bytes follow from it.
        """
        return Expected(tensors=shapes_of(state.tensors))

    def memory_plan(self, parts: ModelParts) -> MemoryPlan:
        """Return what a client's turn takes; only asked for where the algorithm :attr:`fits_slots`."""
        raise NotImplementedError

    def opened(self, state: ServerState, upload: Upload) -> Upload:
        """Return an upload with the tensors that it stands for: itself, where nothing is packed."""
        return upload

    def server_update(self, state: ServerState, uploads: Iterable[tuple[str, Upload]]) -> ServerState:
        """Fold the uploads, one at a time and in their order, into the next round's state."""
        return next_state(state, tensors=mean_of(state, uploads))

    def server_model(self, state: ServerState) -> Sent:
        """Return what the server's own model is made of, nothing personal in it."""
        return Sent(tensors=state.tensors)

    # The client's half

    def blank(self, parts: ModelParts) -> Kept:
        """Return what :meth:`install` can start from without a look at data: to predict sizes."""
        return Kept(parameters=seam.current(parts.model, self.personal_names(parts)))

    def server_view(self, kept: Kept, sent: Sent) -> Sent:
        """Return what the server's model is made of, as a client that keeps ``kept`` knows it."""
        return sent

    def prepare(self, parts: ModelParts) -> None:
        """Add to the model what every client and the server add alike: nothing, unless overridden."""

    def install_shared(self, parts: ModelParts, sent: Sent) -> None:
        """Put what travelled into the model."""
        self.prepare(parts)
        seam.load_tensors(parts.model, sent.tensors)

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Make the model the client's own as it stands before local steps; return what the client keeps."""
        self.install_shared(client.parts, sent)
        seam.load_tensors(client.parts.model, kept.parameters)
        return kept

    def prepare_steps(self, client: Client, kept: Kept, sent: Sent) -> None:
        """Change the installed model for local steps, where they run on another form: not at all."""

    def holds(self, kept: Kept, sent: Sent) -> Mapping[str, Tensor]:
        """Return tensors that the model must hold, bit for bit, after :meth:`install`: a guard."""
        return {**sent.tensors, **kept.parameters}

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Install, take local steps, and return what is sent and what is kept.

        The model is left as the client's own model after training.
        """
        kept = self.install(client, kept, sent)
        self.prepare_steps(client, kept, sent)
        result = client.train(self.trained(client.parts, sent), optimizer_state=kept.optimizer)
        return upload_of(client, self.shared_names(client.parts), sent, result), self.keep(
            client, kept, result
        )

    def goes_on(self, kept: Kept) -> bool:
        """Return whether a client that keeps ``kept`` has work that its upload need not wait for: no."""
        return False

    def after_upload(self, client: Client, before: Kept, sent: Sent, kept: Kept) -> tuple[Kept, Seconds]:
        """Do that work on the model as it was loaded; return what is kept, and seconds by phase.

        Args:
            client: in a turn of its own.
            before: what the client kept before the turn that has sent its upload.
            sent: what came in that turn.
            kept: what :meth:`client_update` returned.

        Raises:
            UserError: the work is impossible; ``kept`` is kept.
        """
        return kept, {}

    def keep(self, client: Client, kept: Kept, result: LocalResult) -> Kept:
        """Return what the client keeps after local steps: its personal parameters as trained."""
        own = seam.current(client.parts.model, self.personal_names(client.parts))
        return Kept(parameters=own, beside=kept.beside, optimizer=result.optimizer_state)

    def server_bytes(self, state: ServerState) -> int:
        """Return the bytes that the server keeps from the first round on, of which ``state`` is the start."""
        return num_bytes(state.tensors) + num_bytes(state.beside)

    def bytes_beside(self, parts: ModelParts, kept: Kept, sent: Sent) -> int:
        """Return the bytes of tensors that a client holds beside the model during local steps.

        What came and what is kept, unless overridden; a method that makes further copies adds theirs.
        """
        return sum(map(num_bytes, (sent.tensors, sent.beside, kept.parameters, kept.beside)))

    def describe(self, kept: Kept) -> Tensors:
        """Return facts about a client's model for the result and the report, as small tensors."""
        return {}


def next_state(
    state: ServerState, *, tensors: Tensors | None = None, beside: Tensors | None = None
) -> ServerState:
    """Return the state one round later, with new tensors where they are given."""
    return replace(
        state,
        round_number=state.round_number + 1,
        tensors=state.tensors if tensors is None else tensors,
        beside=state.beside if beside is None else beside,
    )


def mean_of(state: ServerState, uploads: Iterable[tuple[str, Upload]]) -> Tensors:
    """Return each tensor's mean over the uploads that bring it: by default weighted (FedAvg, Algorithm 1).

    A name that nobody brought keeps its value. The default mean holds one upload at a time.
    """
    mean = state.mean()
    for _, upload in uploads:
        mean.add(upload.tensors, upload.weights)
    return mean.mean(like=state.tensors)


Weighting = Literal["examples", "equal"]
"""Weight of a client in a mean: its number of training examples, or the same for all."""


@known_options
def weights_of(upload: Upload, weighting: Weighting) -> Mapping[str, float]:
    """Return the weight of each tensor of ``upload``."""
    return upload.weights if weighting == "examples" else dict.fromkeys(upload.tensors, 1.0)


def upload_of(
    client: Client,
    names: Sequence[str],
    sent: Sent,
    result: LocalResult,
    *,
    beside: Tensors | None = None,
    tables: Tensors | None = None,
    measured: Mapping[str, float] | None = None,
) -> Upload:
    """Return an upload of the model's tensors ``names``, weighted by the client's number of examples.

    ``num_unchanged`` counts those that the local steps left bit for bit as they came.
    """
    tensors = seam.current(client.parts.model, names)
    unchanged = sum(
        name in sent.tensors and equal_bits(tensor, sent.tensors[name]) for name, tensor in tensors.items()
    )
    return Upload(
        tensors=tensors,
        weights=dict.fromkeys(tensors, float(client.num_train)),
        beside=beside or {},
        tables=tables or {},
        metrics=result.metrics() | {"num_unchanged": float(unchanged)},
        measured=dict(measured or {}),
    )


def trained_names(algorithm: Algorithm, parts: ModelParts, sent: Sent) -> tuple[str, ...]:
    """Return the names of all parameters that ``algorithm`` trains in the model as it stands."""
    groups = algorithm.trained(parts, sent)
    return tuple(dict.fromkeys(name for group in groups for name in group.names))


def refuse_below(settings: object, limits: Mapping[str, float], *, exclusive: bool = True) -> None:
    """Raise UserError if a field of ``settings`` is not above (or at) its limit."""
    for name, limit in limits.items():
        value = getattr(settings, name)
        if not (value > limit if exclusive else value >= limit):
            raise UserError(f"{name} must be {'above' if exclusive else 'at least'} {limit:g}, not {value}")


def refuse_idle(settings: Any, names: Sequence[str], reason: str) -> None:
    """Raise UserError if one of the settings ``names``, which have no effect, is not at its default."""
    for item in fields(settings):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        value = getattr(settings, item.name)
        if item.name in names and value != default:
            shown = f"is {value}" if isinstance(value, str | int | float | tuple) else "is set"
            raise UserError(f"{item.name} {shown}, but has no effect {reason}")
