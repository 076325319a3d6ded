"""Define the settings of one run: sections, each of which lives with the component that it configures."""

from dataclasses import dataclass, field
from functools import partial

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.aggregation import AggregationSettings
from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.privacy import PrivacySettings
from fedexperts.config.build import CLASSES, UNKNOWN
from fedexperts.data.settings import SITE, DataSettings
from fedexperts.errors import UserError
from fedexperts.evaluation.settings import WHENS, EvaluationSettings
from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.clock_settings import ClockSettings
from fedexperts.federation.cohort import CohortSettings
from fedexperts.federation.scoring import FACETS
from fedexperts.federation.transport import TransportSettings
from fedexperts.models.adapters import AdapterSettings
from fedexperts.models.load import ModelSettings
from fedexperts.plugins import not_registered
from fedexperts.training.settings import TrainingSettings

MOST_THREADS = 1024
"""Threads that torch is asked for at most: it starts as many as it is told to."""

_BY_CONCURRENCY = "0 with [asynchronous]: asynchronous.concurrency says how many are at work"
_BY_STALENESS = "0 with [asynchronous]: no step waits, and asynchronous.max_staleness refuses late uploads"
_BY_BUFFER = "at most asynchronous.buffer: no step of the server would count"
_BY_MEAN = (
    '"mean" or "clipped" with [asynchronous]: which change is extreme cannot be told where clients began '
    "from different states"
)
_NOT_PRIVATE = "0 with [asynchronous]: epsilon is accounted for rounds in which clients are asked at once"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One resolved configuration: the only record of what ran."""

    seed: int = 0
    """Seed of everything random in the run: partition, cohorts, batches, LoRA's start, dropout."""
    rounds: int = 10
    """Number of rounds; each is one exchange with a cohort."""
    threads: int = 2
    """Threads torch uses for one operation; another number may change the last bits of a result."""
    keep_states: int = 2
    """States of the last rounds that stay on disk, with what clients kept then: `fedexperts rewind` goes back
    to one of them."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """The pretrained model."""
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    """LoRA on non-expert parameters."""
    data: DataSettings = field(default_factory=DataSettings)
    """Source of the examples, and their partition over clients."""
    cohort: CohortSettings = field(default_factory=CohortSettings)
    """Clients that take part in a round."""
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    """The server's mean over uploads."""
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    """Differential privacy of clients."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Local steps."""
    algorithm: Algorithm = field(
        metadata={CLASSES: ALGORITHMS, UNKNOWN: partial(not_registered, "algorithm")}
    )
    """The federated algorithm: `name` says which, the other keys are its own."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Scores to compute, and when."""
    transport: TransportSettings = field(default_factory=TransportSettings)
    """Transport for downloads and uploads."""
    clock: ClockSettings | None = None
    """The simulated clock."""
    asynchronous: AsynchronousSettings | None = None
    """Steps of the server that do not wait for all."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and memory that nothing is chosen by."""
        for name, least in (("seed", 0), ("rounds", 0), ("threads", 1), ("keep_states", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.threads > MOST_THREADS:
            raise UserError(f"threads must be at most {MOST_THREADS}, not {self.threads}")
        if self.aggregation.kind != "mean" and not self.algorithm.uses_mean:
            raise UserError(
                f'aggregation.kind is "{self.aggregation.kind}", but has no effect with this algorithm: it '
                "has a rule of its own, or averages nothing"
            )
        if self.privacy.is_on:
            self._check_privacy()
        if self.clock is not None:
            self._check_clock(self.clock)
        if self.asynchronous is not None:
            self._check_asynchronous(self.asynchronous)
        if self.transport.name == "inprocess" and self.clock is None:
            self._refuse_waiting()
        if self.transport.clients == "process" and not self.algorithm.fits_slots:
            raise UserError(
                'transport.clients is "process", but clients of this algorithm need the whole model: leave '
                'it at "resident"'
            )
        if self.data.partition.kind == "site":
            self._check_sites()
        if self.algorithm.changes_experts:
            self._refuse_frozen_experts()
        if self.cohort.memory_gb and not self.algorithm.uses_memory:
            raise UserError(
                f"cohort.memory_gb is {list(self.cohort.memory_gb)}, but has no effect with this algorithm: "
                "it does not choose by memory"
            )

    def _check_privacy(self) -> None:
        """Refuse a method whose uploads clipping and noise do not cover, and rules that undo their bound."""
        if not self.algorithm.has_private_form:
            raise UserError(
                f"privacy.clip_norm is {self.privacy.clip_norm:g}, but [privacy] does not cover this "
                "algorithm: its server uses more of an upload than one mean of its tensors"
            )
        if self.aggregation.kind != "mean":
            raise UserError(
                f'aggregation.kind is "{self.aggregation.kind}", but has no effect with [privacy], which has '
                "a mean of its own"
            )
        for name in ("max_change_factor", "max_change_norm"):
            value = getattr(self.cohort, name)
            if value and self.privacy.noise == "server":
                raise UserError(
                    f"cohort.{name} is {value:g}, but must be 0 with [privacy]: refusing one client because "
                    "of the others is not covered, and changes are clipped anyway"
                )

    def _check_asynchronous(self, settings: AsynchronousSettings) -> None:
        """Refuse what has no meaning where clients begin from different states, and two orders or none."""
        is_simulated = self.transport.name == "inprocess"
        if is_simulated and self.clock is None:
            raise UserError(
                f"asynchronous.buffer is {settings.buffer}, but nothing says which uploads come first: add a "
                'section [clock], or set transport.name to "flower"'
            )
        if not is_simulated and self.clock is not None:
            raise UserError(
                'clock is set, but with [asynchronous] and transport.name = "flower" uploads count as they '
                "come, which is no order that simulated seconds could have: leave the section out"
            )
        if not (self.algorithm.has_private_form and self.algorithm.uses_mean):
            raise UserError(
                f"asynchronous.buffer is {settings.buffer}, but this algorithm has no asynchronous form: its "
                "server takes more of an upload than one mean of its tensors, or nothing"
            )
        cohort, transport, privacy = self.cohort, self.transport, self.privacy
        for is_wrong, key, value, demand in (
            (cohort.size, "cohort.size", cohort.size, _BY_CONCURRENCY),
            (transport.round_seconds, "transport.round_seconds", transport.round_seconds, _BY_STALENESS),
            (cohort.min_uploads > settings.buffer, "cohort.min_uploads", cohort.min_uploads, _BY_BUFFER),
            (self.aggregation.holds_uploads, "aggregation.kind", f'"{self.aggregation.kind}"', _BY_MEAN),
            (privacy.is_on, "privacy.clip_norm", privacy.clip_norm, _NOT_PRIVATE),
        ):
            if is_wrong:
                raise UserError(f"{key} is {value}, but must be {demand}")

    def _refuse_waiting(self) -> None:
        """Refuse settings about who comes first where clients take turns and nothing says how long."""
        for key, value in (
            ("transport.round_seconds", self.transport.round_seconds),
            ("cohort.over_select", self.cohort.over_select),
        ):
            if value:
                raise UserError(
                    f"{key} is {value:g}, but has no effect in process without a simulated clock: add a "
                    'section [clock], or set transport.name to "flower"'
                )

    def _check_sites(self) -> None:
        """Refuse what only somebody with all clients' data and devices could do."""
        if self.data.source != SITE:
            raise UserError(
                f'data.source is "{self.data.source}", but with data.partition.kind "site" each site names '
                f'its own data: it must be "{SITE}"'
            )
        if self.transport.name != "flower" or not self.transport.connection:
            raise UserError(
                'data.partition.kind is "site", but no process here has the data of the sites: start the run '
                'with fedexperts server and fedexperts site, or try it here on files with kind "file"'
            )
        for key, value in (("clock", self.clock), ("cohort.memory_gb", self.cohort.memory_gb)):
            if value:
                raise UserError(
                    f'{key} is set but has no effect with data.partition.kind "site": a device is its site\'s'
                )

    def _refuse_frozen_experts(self) -> None:
        """Refuse a form of frozen experts with an algorithm that does not leave them frozen."""
        for key, value, default in (
            ("experts_bits", self.model.experts_bits, "0"),
            ("experts_kernel", f'"{self.model.experts_kernel}"', '"transformers"'),
        ):
            if str(value) != default:
                raise UserError(
                    f"model.{key} is {value}, but this algorithm trains or replaces experts themselves, and "
                    f"it is for experts that stay frozen: it must be {default}"
                )

    def _check_clock(self, clock: ClockSettings) -> None:
        """Refuse a limit of memory that nothing is chosen by, and a target that is never scored."""
        if clock.limits_memory and self.cohort.memory_gb:
            raise UserError("clock.limits_memory is true, but cohort.memory_gb already says what memory is")
        if clock.limits_memory and not self.algorithm.uses_memory:
            raise UserError(
                "clock.limits_memory has no effect with this algorithm: it does not choose by memory"
            )
        scores = (*self.evaluation.mean_scores, *(f"{name}_{when}" for name in FACETS for when in WHENS))
        if clock.target and clock.target not in scores:
            raise UserError(
                f'clock.target is "{clock.target}", which is not evaluated; it must be one of '
                f"{', '.join(scores)}"
            )
