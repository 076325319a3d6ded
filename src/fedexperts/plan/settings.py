"""Settings of ``fedexperts plan``."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Algorithm
from fedexperts.config.build import default_of, is_required
from fedexperts.config.schema import RunConfig
from fedexperts.costs.dry_run import BatchShape
from fedexperts.errors import UserError
from fedexperts.models.adapters import AdapterSettings
from fedexperts.models.load import Dtype
from fedexperts.moe.surgery.graft import GraftForm
from fedexperts.training.settings import TrainingSettings

LARGEST_SHARE = 0.9
"""Share of a memory above which a plan is tight: a process and its allocator take more than tensors."""

BY_SLOTS = "flux"
"""The method that is suggested where too little fits: its experts are tuned in part."""

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[a-z]*)")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Method, memory and the sizes that they depend on; the defaults are FLEx's released ones."""

    method: str = "flex"
    """Name of an algorithm (docs/algorithms)."""
    memory: str = ""
    """Memory of a client, such as ``24GB`` (10^9 bytes) or ``24GiB`` (2^30); empty asks for no fit."""
    batch: int = 4
    """Examples of a batch (papers.md A.4: 4)."""
    seq: int = 512
    """Tokens of an example, padding included (papers.md A.4: 512)."""
    label_share: float = 0.5
    """Share of a batch's tokens that are learnt: those of responses, which alone have logits."""
    dtype: Dtype = "bfloat16"
    """Dtype of all weights that are not trained and not in few bits."""
    gradient_checkpointing: bool = True
    """Whether activations are recomputed in the backward pass (papers.md A.4: yes)."""
    adapter: AdapterSettings = field(
        default_factory=lambda: AdapterSettings(
            rank=32, alpha=64.0, dropout=0.05, target_modules=("q_proj", "k_proj", "v_proj")
        )
    )
    """LoRA on non-experts; where a model lacks one of the targets, all linear modules of attention."""
    graft: GraftForm = field(default_factory=lambda: GraftForm(lora_rank=32, lora_alpha=64.0))
    """FLEx's grafted expert; ``graft.lora_rank=0`` trains it in full."""

    def __post_init__(self) -> None:
        """Refuse what no plan can be made for."""
        if self.method not in ALGORITHMS:
            raise UserError(f'method is "{self.method}"; it must be one of {", ".join(ALGORITHMS)}')
        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.label_share <= 1:
            raise UserError(f"label_share must be above 0 and at most 1, not {self.label_share}")
        if self.dtype not in get_args(Dtype):
            raise UserError(f'dtype is "{self.dtype}"; it must be one of {", ".join(get_args(Dtype))}')
        if self.memory:
            parse_memory(self.memory)

    @property
    def is_by_slots(self) -> bool:
        """Whether the plan asks how many experts fit into slots, not what the method takes as it is."""
        return ALGORITHMS[self.method].fits_slots

    @property
    def algorithm(self) -> Algorithm:
        """The method with its defaults and ``graft``.

        A number without a default is planned as 1 (rates change no size, and FedMoE tunes one expert per
        layer), a choice as its last value.
        """
        cls = ALGORITHMS[self.method]
        hints, values = get_type_hints(cls), dict[str, Any]()
        for item in fields(cls):  # type: ignore[arg-type]
            if item.name == "graft" and isinstance(default_of(item), GraftForm):
                values[item.name] = self.graft
            elif is_required(item):
                choices = get_args(hints[item.name])
                values[item.name] = choices[-1] if choices else hints[item.name](1)
        return cls(**values)

    @property
    def shape(self) -> BatchShape:
        """Of the batch."""
        labels = max(1, round(self.batch * self.seq * self.label_share))
        return BatchShape(examples=self.batch, length=self.seq, labels=labels)

    @property
    def training(self) -> TrainingSettings:
        """As local steps are told."""
        return TrainingSettings(
            batch_size=self.batch, gradient_checkpointing=self.gradient_checkpointing, num_local_steps=1
        )


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan(PlanSettings):
    """A plan for an experiment as ``run`` would run it."""

    config: RunConfig
    """The experiment."""

    @classmethod
    def of(cls, config: RunConfig, name: str, memory: str) -> "ExperimentPlan":
        """Return the plan for ``config``, whose method is registered as ``name``."""
        return cls(
            config=config,
            method=name,
            memory=memory,
            batch=config.training.examples_per_step,
            seq=config.data.max_tokens,
            dtype=config.model.dtype,
            gradient_checkpointing=config.training.gradient_checkpointing,
            adapter=config.adapter,
        )

    @property
    def algorithm(self) -> Algorithm:
        own, planned = self.config.algorithm, ALGORITHMS[self.method]
        return own if type(own) is planned else super().algorithm

    @property
    def training(self) -> TrainingSettings:
        return replace(
            self.config.training,
            batch_size=self.batch,
            gradient_checkpointing=self.gradient_checkpointing,
            num_local_steps=1,
        )


def parse_memory(text: str) -> int:
    """Bytes of an amount such as ``24GB`` or ``512 MiB``.

    Raises:
        UserError: it is none, or has no unit.
    """
    match = _AMOUNT.fullmatch(text.strip().lower())
    if match is None or match["unit"] not in _UNITS or float(match["number"]) == 0:
        raise UserError(
            f'memory is "{text}"; it must be an amount above 0 with a unit, such as 24GB, 24GiB or 512MB'
        )
    return int(float(match["number"]) * _UNITS[match["unit"]])
