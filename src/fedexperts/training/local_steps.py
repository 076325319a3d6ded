"""Local steps: the one training loop, for every algorithm."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.errors import UserError
from fedexperts.moe.observing.label_logits import logits_only_where
from fedexperts.tensors import Tensors

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter; stored as ``optimizer.<what>.<parameter>``."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Section ``[training]``: the local steps of one client in one round."""

    num_local_steps: int = 5
    """Optimizer steps per client and round (papers.md A.4: 5)."""
    batch_size: int = 8
    """Examples per step."""
    lr: float = 3e-3
    """Learning rate of what travels, in the first round."""
    lr_final_share: float = 0.025
    """Learning rate of the last round as a share of the first's; cosine over rounds (FLEx: 4e-5 to 1e-6)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clip: float = 1.0
    """Largest gradient norm over everything trained; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradients."""
    router_aux_loss: float = 0.0
    """Coefficient of the load-balancing loss; 0 leaves it out (the family must have one)."""
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    """AdamW's moments of personal tensors: anew in each round, as FLEx's release does, or kept."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        for name in ("num_local_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise UserError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.lr_final_share <= 1:
            raise UserError(f"lr_final_share must be from 0 to 1, not {self.lr_final_share}")
        for name in ("weight_decay", "gradient_clip", "router_aux_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}")


class NonFiniteLossError(UserError):
    """A loss or gradient that is NaN or infinite: the client's round is refused."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    names: tuple[str, ...]
    lr: float


@dataclass(kw_only=True)
class LocalResult:
    """What happened in the local steps."""

    losses: list[float] = field(default_factory=list)
    """Mean cross-entropy over label tokens before each step, in nats, without the load-balancing loss."""
    gradient_norms: list[float] = field(default_factory=list)
    num_examples: int = 0
    num_labels: int = 0
    num_tokens: int = 0
    untrained: tuple[str, ...] = ()
    """Parameters that got no gradient in any step: a guard against experts that silently never train."""
    moments: Tensors = field(default_factory=dict)
    """AdamW's state of the parameters that were asked for, by ``optimizer.<what>.<parameter>``."""

    def metrics(self) -> dict[str, float]:
        """The figures that a round's log keeps."""
        return {
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "train_loss_first": self.losses[0],
            "train_loss_last": self.losses[-1],
            "gradient_norm": max(self.gradient_norms),
            "num_examples": self.num_examples,
            "num_labels": self.num_labels,
            "num_tokens": self.num_tokens,
            "num_untrained": len(self.untrained),
        }


def learning_rate_share(round: int, num_rounds: int, settings: TrainingSettings) -> float:
    """Learning rate of ``round`` (from 1) as a share of the first's: cosine over rounds, flat within one."""
    progress = 0.0 if num_rounds == 1 else min((round - 1) / (num_rounds - 1), 1.0)
    low = settings.lr_final_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def local_steps(
    model: Any,
    batches: Sequence[Batch],
    groups: Sequence[ParameterGroup],
    settings: TrainingSettings,
    *,
    seed: int,
    moments: Mapping[str, Tensor] | None = None,
    keep_moments_of: Sequence[str] = (),
    on_step: Callable[[float], None] = lambda loss: None,
) -> LocalResult:
    """Train the parameters named in ``groups``, one step for each batch; everything else is frozen.

    Args:
        model: a causal language model of transformers; left in evaluation mode with nothing trainable.
        batches: each with ``input_ids``, ``attention_mask``, ``labels`` of shape (batch, length).
        groups: parameters by name, with their learning rates.
        settings: the section ``[training]``.
        seed: for dropout; the global generator is left as it was.
        moments: AdamW's state to go on from, as :attr:`LocalResult.moments` gives it.
        keep_moments_of: parameters whose AdamW state is wanted in the result.
        on_step: called with each step's loss.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; the model is then of no use.
    """
    parameters = _train_only(model, [name for group in groups for name in group.names])
    optimizer = _optimizer(parameters, groups, settings)
    _load_moments(optimizer, parameters, moments or {})
    result, seen = LocalResult(), set()
    with _training_mode(model, settings), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(model, batch, settings.router_aux_loss)
            norm = _clip(parameters.values(), settings.gradient_clip)
            _refuse_non_finite(len(result.losses) + 1, loss, norm)
            optimizer.step()
            seen |= {name for name, parameter in parameters.items() if parameter.grad is not None}
            _count(result, batch, loss, norm)
            on_step(loss)
    result.untrained = tuple(name for name in parameters if name not in seen)
    result.moments = _moments_of(optimizer, parameters, keep_moments_of)
    _train_only(model, [])
    return result


def _train_only(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    wanted = set(names)
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
        if name in wanted:
            found[name] = parameter
    assert found.keys() == wanted, f"not parameters of the model: {sorted(wanted - found.keys())[:3]}"
    return {name: found[name] for name in names}


def _optimizer(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], settings: TrainingSettings
) -> torch.optim.AdamW:
    listed = [
        {"params": [parameters[name] for name in group.names], "lr": group.lr}
        for group in groups
        if group.names
    ]
    return torch.optim.AdamW(listed, weight_decay=settings.weight_decay, fused=True)


def _load_moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        if f"optimizer.step.{name}" in moments:
            optimizer.state[parameter] = {
                what: moments[f"optimizer.{what}.{name}"].to(parameter.device, copy=True) for what in MOMENTS
            }


def _moments_of(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], names: Sequence[str]
) -> Tensors:
    return {
        f"optimizer.{what}.{name}": optimizer.state[parameters[name]][what].detach().cpu().clone()
        for name in names
        for what in MOMENTS
        if optimizer.state[parameters[name]]
    }


@contextmanager
def _training_mode(model: Any, settings: TrainingSettings) -> Iterator[None]:
    model.train()
    if settings.gradient_checkpointing:
        _checkpointing(model, "enable", {"use_reentrant": False})
    if settings.router_aux_loss and getattr(model, "router_aux_loss_coef", None) is None:
        raise UserError(
            f"training.router_aux_loss is {settings.router_aux_loss}, but {type(model).__name__} has no "
            "load-balancing loss: set it to 0"
        )
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            _checkpointing(model, "disable")
        model.eval()


def _checkpointing(model: Any, verb: str, *arguments: Any) -> None:
    """Late releases of transformers 5 call it activation checkpointing, and warn of the old name."""
    new = getattr(model, f"activation_checkpointing_{verb}", None)
    (new or getattr(model, f"gradient_checkpointing_{verb}"))(*arguments)


def _backward(model: Any, batch: Batch, router_aux_loss: float) -> float:
    device = next(model.parameters()).device
    next_labels = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(device)
    is_asked = next_labels != IGNORED_LABEL
    with logits_only_where(is_asked, model):
        output = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
            **({"output_router_logits": True} if router_aux_loss else {}),
        )
    loss = functional.cross_entropy(output.logits.float(), next_labels[is_asked])
    total = loss + router_aux_loss * output.aux_loss if router_aux_loss else loss
    total.backward()
    return float(loss.detach())


def _clip(parameters: Any, largest: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), largest if largest > 0 else math.inf)
    return float(norm)


def _refuse_non_finite(step: int, loss: float, norm: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"loss at local step {step} is {loss}")
    if not math.isfinite(norm):
        raise NonFiniteLossError(f"gradient norm at local step {step} is {norm}")


def _count(result: LocalResult, batch: Batch, loss: float, norm: float) -> None:
    result.losses.append(loss)
    result.gradient_norms.append(norm)
    result.num_examples += batch.num_examples
    result.num_labels += batch.num_labels
    result.num_tokens += int(batch.attention_mask.sum())


def _cuda_devices(model: nn.Module) -> list[int]:
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
