"""Settings of local steps, and the learning rates that follow from them."""

import math
from dataclasses import dataclass
from typing import Literal

from fedexperts.errors import UserError, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Section ``[training]``: the local steps of one client in one round."""

    num_local_steps: int = 5
    """Optimizer steps per client and round (papers.md A.4: 5)."""
    batch_size: int = 8
    """Examples per step."""
    accumulation: int = 1
    """Micro-batches that a step's batch is split into: less memory, more time, the same gradient."""
    replay: str = ""
    """Public texts of which every step also trains on some, beside the client's own examples: a file of JSON
    lines with `text`, or `instruction` and `response`, or `tinyworld` (instructions of the embedded model's
    corpus with plain answers, no question of its exam); empty for none."""
    replay_size: int = 0
    """Texts of ``replay`` in each step's batch, taken in turn; 0 for as many as ``batch_size``."""
    replay_texts: int = 256
    """Texts of ``replay`` at most, the first ones."""
    lr: float = 3e-3
    """Learning rate of what travels, in the first round."""
    lr_final_share: float = 0.025
    """Learning rate of the last round as a share of the first's; cosine over rounds (FLEx: 4e-5 to 1e-6)."""
    step_schedule: Literal["flat", "linear", "cosine"] = "flat"
    """Learning rate within a round, from its first step to its last."""
    step_final_share: float = 1.0
    """Learning rate of a round's last step as a share of its first's; for ``linear`` and ``cosine`` only."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """AdamW, SGD or Adafactor of PyTorch, or AdamW with 8-bit moments (extra ``low-bit-optimizer``)."""
    momentum: float = 0.0
    """SGD's momentum; the other optimizers take none."""
    weight_decay: float = 0.0
    """Weight decay: decoupled from the gradient, but part of it with ``sgd``."""
    gradient_clip: float = 1.0
    """Largest gradient norm over everything trained; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradients."""
    router_aux_loss: float = 0.0
    """Coefficient of the load-balancing loss; 0 leaves it out (the family must have one)."""
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    """The optimizer's state of personal tensors: anew in each round, as FLEx's release does, or kept."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and settings without effect."""
        refuse_unknown(self)
        for name in ("num_local_steps", "batch_size", "accumulation", "replay_texts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.replay_size < 0:
            raise UserError(f"replay_size must be 0 (batch_size) or more, not {self.replay_size}")
        if not self.lr > 0:
            raise UserError(f"lr must be above 0, not {self.lr}")
        for name in ("lr_final_share", "step_final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("weight_decay", "gradient_clip", "router_aux_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must be from 0 to below 1, not {self.momentum}")
        self._refuse_idle()

    @property
    def num_replayed(self) -> int:
        """Texts of ``replay`` in each step's batch."""
        return (self.replay_size or self.batch_size) if self.replay else 0

    @property
    def examples_per_step(self) -> int:
        """Examples of each step's batch, replayed texts among them."""
        return self.batch_size + self.num_replayed

    def _refuse_idle(self) -> None:
        for name in ("replay_size", "replay_texts"):
            value = getattr(self, name)
            if not self.replay and value != getattr(type(self), name):
                raise UserError(f"{name} is {value}, but has no effect without replay")
        if self.accumulation > self.batch_size:
            raise UserError(
                f"accumulation is {self.accumulation}, but must be at most batch_size, which is "
                f"{self.batch_size}"
            )
        if self.momentum and self.optimizer != "sgd":
            raise UserError(
                f'momentum is {self.momentum}, but has no effect with optimizer "{self.optimizer}"'
            )
        if self.optimizer_state == "kept" and self.optimizer == "sgd" and not self.momentum:
            raise UserError('optimizer_state is "kept", but "sgd" without momentum has no state')
        if self.step_schedule == "flat" and self.step_final_share != 1:
            raise UserError(f'step_final_share is {self.step_final_share}, but step_schedule is "flat"')
        if self.step_schedule != "flat" and self.step_final_share == 1:
            raise UserError(
                f'step_schedule is "{self.step_schedule}", but step_final_share is 1: set it lower'
            )
        if self.step_schedule != "flat" and self.num_local_steps == 1:
            raise UserError(f'step_schedule is "{self.step_schedule}", but num_local_steps is 1')


def learning_rate_share(round_number: int, num_rounds: int, settings: TrainingSettings) -> float:
    """Learning rate of a round (from 1) as a share of the first round's: cosine over rounds."""
    progress = 0.0 if num_rounds == 1 else min((round_number - 1) / (num_rounds - 1), 1.0)
    return _cosine(progress, settings.lr_final_share)


def step_share(step: int, num_steps: int, settings: TrainingSettings) -> float:
    """Learning rate of a step (from 1) as a share of the round's first step's."""
    if settings.step_schedule == "flat" or num_steps == 1:
        return 1.0
    progress, low = (step - 1) / (num_steps - 1), settings.step_final_share
    return _cosine(progress, low) if settings.step_schedule == "cosine" else 1 - (1 - low) * progress


def _cosine(progress: float, low: float) -> float:
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
