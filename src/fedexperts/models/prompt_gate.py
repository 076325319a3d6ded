"""Close what is a client's own for every prompt that does not look like the client's task.

A prompt is represented by the mean over its tokens of the last layer's output, with adapters and grafts
closed: as the pretrained model makes it, or one whose experts were received. A linear function of that
decides: above 0 grafts run as they are, else they are closed, for prompt and answer. In training mode they
are always open.

Shape suffixes: ``N`` prompts, ``B`` rows, ``T`` tokens, ``D`` hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedexperts.models.prompts import PerPrompt, Prompt, hidden_size
from fedexperts.moe.surgery.graft import grafts_of
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.undo import push_undo

NAME = "prompt_gate"
"""Attribute of the model."""
NAMES = (f"{NAME}.vector", f"{NAME}.bias")
"""Its parameters: (D,) and ()."""
RIDGE = 0.1
"""Weight of the squared norm of the fitted vector, for features of variance 1."""
_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class PromptGateForm:
    """Parts of a model that it closes."""

    first_graft: int
    """First of each layer's grafts that it closes; a shared one may stand before."""
    closes_lora: bool


class PromptGate(PerPrompt):
    """A decision for each row of the pass that runs: 1 for open, 0 for closed."""

    def __init__(self, size: int, form: PromptGateForm, device: torch.device) -> None:
        """Begin closed for every prompt."""
        super().__init__()
        self.form = form
        self.vector = nn.Parameter(torch.zeros(size, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros((), device=device), requires_grad=False)

    def numbers_of(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return which prompts open it."""
        return (self.represent(model, prompts) @ self.vector + self.bias > 0).float()

    def represent(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return what the model makes of prompts without adapters and grafts, float32 (N, D)."""
        found = []
        with _without_adapters(model):
            for start in range(0, len(prompts), _AT_ONCE):
                some = prompts[start : start + _AT_ONCE]
                with self.all_rows(0.0, len(some)):
                    hidden_BTD, lengths_B = self.last_hidden(model, some)
                is_token_BT = torch.arange(hidden_BTD.shape[1], device=lengths_B.device) < lengths_B[:, None]
                total_BD = (hidden_BTD.float() * is_token_BT.unsqueeze(-1)).sum(dim=1)
                found.append(total_BD / lengths_B.unsqueeze(-1))
        return torch.cat(found)

    @torch.no_grad()
    def fit(self, model: Any, own: Sequence[Prompt], others: Sequence[Prompt]) -> None:
        """Learn to tell ``own`` prompts from ``others``; see :func:`separate`."""
        vector_D, bias = separate(self.represent(model, own), self.represent(model, others))
        self.vector.copy_(vector_D)
        self.bias.copy_(bias)

    # Closing

    def opened(self, hidden_TD: Tensor) -> Tensor | float:
        """Return 1 or 0 for each token of a graft, shape (T, 1)."""
        rows = self.for_rows(hidden_TD)
        return 1.0 if rows is None else rows.to(hidden_TD.dtype)

    def factors(self, rows: Tensor, scaling: Mapping[str, float]) -> dict[str, Tensor]:
        """Return adapters' factors: the fixed ones, and 0 in rows that are closed."""
        return {name: rows * scale for name, scale in scaling.items()}


def separate(own_ND: Tensor, other_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector (D,) and bias of ``vector·x + bias``, above 0 for rows that are like ``own_ND``.

    Least squares to 1 and -1 in float64 on features of mean 0 and variance 1, both sides with half of the
    weight, and a ridge penalty: a vector that fits few prompts exactly would refuse the next.
    """
    rows_ND = torch.cat([own_ND, other_ND]).double()
    signs = ((len(own_ND), 1.0), (len(other_ND), -1.0))
    side_N = torch.cat([rows_ND.new_full((size,), sign) for size, sign in signs])
    share_N = torch.cat([rows_ND.new_full((size,), 0.5 / size) for size, _ in signs])
    mean_D = share_N @ rows_ND
    scale_D = (share_N @ (rows_ND - mean_D) ** 2).sqrt().clamp(min=1e-6)
    features_ND = (rows_ND - mean_D) / scale_D  # their mean and that of the sides are 0: so is the bias
    weighted_DN = (features_ND * share_N.unsqueeze(-1)).T
    penalty_DD = RIDGE * torch.eye(len(mean_D), dtype=torch.float64, device=rows_ND.device)
    vector_D = torch.linalg.solve(weighted_DN @ features_ND + penalty_DD, weighted_DN @ side_N) / scale_D
    return vector_D, -(vector_D @ mean_D)


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Run every LoRA adapter with a factor of 0 inside the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def add_prompt_gate(model: Any, layers: Sequence[MoeLayer], form: PromptGateForm) -> PromptGate:
    """Put a gate before the grafts that are there; it is closed for every prompt yet.

    Inside a client's turn it is undone at the end.
    """
    gate = PromptGate(hidden_size(model), form, model.get_input_embeddings().weight.device)
    detach = gate.attach(model, NAME, weighs_lora=form.closes_lora)
    grafts = [graft for layer in layers for graft in grafts_of(layer)[form.first_graft :]]
    for graft in grafts:
        graft.opened = gate.opened

    def undo() -> None:
        for graft in grafts:
            graft.opened = None
        detach()

    push_undo(undo)
    return gate


def names_of(model: Any) -> tuple[str, ...]:
    """Return the names of the gate's parameters; none where there is no gate."""
    return NAMES if hasattr(model, NAME) else ()


def notes_of(model: Any) -> dict[str, Any]:
    """Return the form of the model's gate as plain data; empty for none."""
    gate = getattr(model, NAME, None)
    return {} if gate is None else asdict(gate.form)
