"""Graft personal experts beside the experts of a layer, each behind a sigmoid gate (FLEx, eq. 2).

With routed output ``M(x)``, graft ``S`` and gate ``g, b``: ``y = M(x) + sigmoid(g·x + b) S(x)``; the gated
outputs of several grafts are added. The frozen experts, the router and the shared expert are unchanged.

Shape suffixes: ``T`` tokens, ``D`` hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedexperts.errors import refuse_unknown
from fedexperts.moe.surgery import one_expert, seam
from fedexperts.moe.surgery.padding import is_token
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class GraftForm:
    """Construction of a graft; the same on all layers."""

    gate: Literal["sigmoid", "none"] = "sigmoid"
    """``none`` fixes the gate open at 1: the ablation under which the paper's model collapses."""
    gate_init: Literal["router_row", "zero"] = "router_row"
    """Initial gate vector: the router's row of the chosen expert (reading 2), or zero."""
    gate_bias: float = 0.0
    """Initial gate bias: 0 is half open before the router's row has an effect, -4 is nearly closed."""
    mix: Literal["add", "convex"] = "add"
    """``add``: M + s S (eq. 2); ``convex``: (1 - s) M + s S, with M the routed sum (reading 1)."""
    lora_rank: int = 0
    """Rank of LoRA on the graft's matrices over a frozen copy; 0 trains the graft in full."""
    lora_alpha: float = 16.0
    """LoRA scale; the update is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        refuse_unknown(self)


class GraftedExpert(nn.Module):
    """One expert's weights and a gate, in float32 whatever the model's dtype, so that small steps count."""

    def __init__(self, layer: MoeLayer, expert: int, form: GraftForm, seed: int) -> None:
        """Copy ``expert`` of ``layer``; with LoRA the copy is a view of the original if that is frozen.

        An expert in few bits is copied as it runs, rounded.
        """
        super().__init__()
        self.form, self.expert = form, expert
        self.opened: Callable[[Tensor], Tensor | float] | None = None
        """Factor of the gate by token, for hidden states (T, D): 1, or (T, 1)."""
        weights = layer.expert(expert)
        if form.lora_rank:
            self._keep_origin(weights, is_stored=seam.stores_experts(layer))
            self._add_lora(form.lora_rank, seed)
        else:
            self.weights = nn.ParameterDict({name: _master(weight) for name, weight in weights.items()})
        if form.gate == "sigmoid":
            row = layer.router_row(expert)
            row = row if form.gate_init == "router_row" else torch.zeros_like(row)
            self.gate_weight = _master(row)
            self.gate_bias = nn.Parameter(torch.full((1,), form.gate_bias, device=row.device))

    def _keep_origin(self, weights: Mapping[str, Tensor], *, is_stored: bool) -> None:
        """Keep the frozen base of LoRA: views of the layer's weights, or buffers where there is no such."""
        # A tuned slot moves in training, and a LoRA graft's base must not move with it.
        self._origin = {
            name: weight.detach().clone() if weight.requires_grad else weight.detach()
            for name, weight in weights.items()
        }
        if not is_stored:
            for name, weight in self._origin.items():
                self.register_buffer(f"origin_{name}", weight, persistent=False)

    def _add_lora(self, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in self._origin.items():
            if weight.dim() != 2:
                continue
            rows, columns = weight.shape
            bound = columns**-0.5
            start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
            self.lora_A[name] = nn.Parameter(start.to(weight.device))
            self.lora_B[name] = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def expert_weights(self) -> dict[str, Tensor]:
        """Return the graft's matrices by parameter name, as one expert of the layer has them."""
        if not self.form.lora_rank:
            return dict(self.weights.items())
        scale = self.form.lora_alpha / self.form.lora_rank
        return {
            name: weight.float() + scale * (self.lora_B[name] @ self.lora_A[name])
            if name in self.lora_A
            else weight
            for name, weight in self._origin.items()
        }

    def openness(self, hidden_TD: Tensor) -> Tensor:
        """Return the gate's value per token, shape (T, 1), in the dtype of ``hidden_TD``."""
        if self.form.gate == "none":
            gate_T1 = hidden_TD.new_ones(hidden_TD.shape[0], 1)
        else:
            score_T1 = hidden_TD.float() @ self.gate_weight.unsqueeze(-1) + self.gate_bias
            gate_T1 = torch.sigmoid(score_T1).to(hidden_TD.dtype)
        return gate_T1 if self.opened is None else gate_T1 * self.opened(hidden_TD)

    def forward(self, experts: Any, hidden_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Return the layer's output with the graft, shape (T, D); see ``Addition``."""
        gate_T1 = self.openness(hidden_TD)
        grafted_TD = one_expert.expert_output(experts, hidden_TD, self.expert_weights())
        kept_TD = (1 - gate_T1) * routed_TD if self.form.mix == "convex" else routed_TD
        return kept_TD + gate_T1 * grafted_TD


class GraftedExperts(nn.ModuleList):
    """Several grafts beside one layer: gated outputs are added; convex mixes are averaged."""

    def openness(self, hidden_TD: Tensor) -> Tensor:
        """Return each gate's value per token, shape (T, number of grafts), in the dtype of ``hidden_TD``."""
        return torch.cat([cast(GraftedExpert, one).openness(hidden_TD) for one in self], dim=-1)

    def forward(self, experts: Any, hidden_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Return the layer's output with the grafts, shape (T, D); see ``Addition``."""
        grafts = [cast(GraftedExpert, one) for one in self]
        if grafts[0].form.mix == "convex":
            return torch.stack([one(experts, hidden_TD, routed_TD) for one in grafts]).mean(0)
        output_TD = routed_TD
        for one in grafts:
            output_TD = one(experts, hidden_TD, output_TD)
        return output_TD


def _master(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float().clone())


Chosen = Sequence[int | Sequence[int]]
"""Experts to copy, for each layer: one, or several."""


def graft(layers: Sequence[MoeLayer], chosen: Chosen, form: GraftForm, seed: int) -> tuple[str, ...]:
    """Graft a copy of expert ``chosen[i]`` beside ``layers[i]``, or of each expert where it names several.

    Returns the names of the new parameters: under ``<experts>.graft``, or ``<experts>.graft.<position>`` of
    several.

    Raises:
        UserError: a chosen index is not an expert of its layer.
    """
    # All are built before one is installed, so that a mistake leaves the model unchanged.
    made = [_made(layer, experts, form, seed) for layer, experts in zip(layers, chosen, strict=True)]
    names: list[str] = []
    for layer, one in zip(layers, made, strict=True):
        seam.add_to_layer(layer, one.to(next(layer.experts.parameters()).device))
        names += [f"{seam.addition_name(layer)}.{name}" for name, _ in one.named_parameters()]
    return tuple(names)


def _made(
    layer: MoeLayer, experts: int | Sequence[int], form: GraftForm, seed: int
) -> GraftedExpert | GraftedExperts:
    if isinstance(experts, int):
        return GraftedExpert(layer, experts, form, derive_seed(seed, "graft", layer.index))
    assert experts, "at least one expert is grafted"
    return GraftedExperts(
        GraftedExpert(layer, expert, form, derive_seed(seed, "graft", layer.index, position))
        for position, expert in enumerate(experts)
    )


def grafts_of(layer: MoeLayer) -> tuple[GraftedExpert, ...]:
    """Return the grafts beside one layer."""
    addition = seam.addition_of(layer)
    if isinstance(addition, GraftedExperts):
        return tuple(cast(GraftedExpert, one) for one in addition)
    return () if addition is None else (cast(GraftedExpert, addition),)


def graft_names(layers: Sequence[MoeLayer]) -> tuple[str, ...]:
    """Return the names of the parameters of all grafts that are there."""
    return tuple(
        f"{seam.addition_name(layer)}.{name}"
        for layer in layers
        if seam.addition_of(layer) is not None
        for name, _ in seam.addition_of(layer).named_parameters()
    )


def ungraft(layers: Sequence[MoeLayer]) -> None:
    """Remove all grafts."""
    for layer in layers:
        if seam.addition_of(layer) is not None:
            seam.take_from_layer(layer)


@contextmanager
def grafted(
    layers: Sequence[MoeLayer], chosen: Chosen, form: GraftForm, seed: int
) -> Iterator[tuple[str, ...]]:
    """Install grafts as :func:`graft` does inside a ``with`` block, and remove them after it."""
    names = graft(layers, chosen, form, seed)
    try:
        yield names
    finally:
        ungraft(layers)


class GateMeter:
    """Meter of the mean openness of each layer's gates over the tokens it has counted, padding left out."""

    def __init__(self) -> None:
        self._sum: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}

    def observe(self, layer: MoeLayer, hidden_TD: Tensor, *_: Tensor) -> None:
        """Add one layer's tokens; pass this to :func:`fedexperts.moe.surgery.seam.watch_experts`."""
        is_token_T = is_token(hidden_TD.shape[0])
        with torch.no_grad():
            opened_TG = seam.addition_of(layer).openness(hidden_TD).float()
            opened_TG = opened_TG if is_token_T is None else opened_TG[is_token_T]
            opened = float(opened_TG.mean(dim=-1).sum())
        self._sum[layer.index] = self._sum.get(layer.index, 0.0) + opened
        self._num_tokens[layer.index] = self._num_tokens.get(layer.index, 0) + opened_TG.shape[0]

    def means(self) -> dict[int, float]:
        """Return the mean openness by layer, from 0 (closed) to 1; the mean over several gates."""
        return {index: total / self._num_tokens[index] for index, total in self._sum.items()}


def names_of_kind(names: Mapping[str, Any] | Sequence[str], *, is_gate: bool) -> tuple[str, ...]:
    """Return those of a graft's parameter ``names`` that belong to the gate, or those that do not."""
    return tuple(name for name in names if name.endswith((".gate_weight", ".gate_bias")) is is_gate)
