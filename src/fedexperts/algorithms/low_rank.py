"""Arithmetic on LoRA's pairs of matrices, and a LoRA rank for each client.

The resident model's LoRA has rank ``adapter.rank``, the largest. A client of a smaller rank has zeros in the
other rows of A and columns of B: they add nothing and get no gradient, so they stay zero, and they are not
sent. The update is multiplied by ``adapter.alpha / adapter.rank`` whatever a client's own rank is, so that
products of all clients are in one unit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedexperts.algorithms.api import Algorithm, ClientFacts, ModelParts, ServerState
from fedexperts.errors import UserError
from fedexperts.messages import Upload
from fedexperts.seeds import derive_random
from fedexperts.tensors import Tensors

_A, _B = ".lora_A.", ".lora_B."
RANK = "rank"
"""Order to a client that has a rank of its own, and a figure of its upload."""


@dataclass(frozen=True, kw_only=True)
class LoraPair:
    """Names of one module's LoRA: the update of ``weight`` (out, in) is proportional to B A."""

    a: str
    """A, shape (r, in)."""
    b: str
    """B, shape (out, r)."""
    weight: str
    """The frozen weight that LoRA sits on."""


def pairs_of(names: Iterable[str]) -> tuple[LoraPair, ...]:
    """Return the pairs among ``names``, in their order; other names are passed over."""
    return tuple(
        LoraPair(a=name, b=name.replace(_A, _B), weight=f"{name.partition(_A)[0]}.base_layer.weight")
        for name in names
        if _A in name
    )


def scaling(parts: ModelParts) -> float:
    """Return the factor of B A in the model: ``adapter.alpha / adapter.rank``."""
    return parts.adapter.alpha / parts.adapter.rank


def cut(tensors: Mapping[str, Tensor], rank: int | None) -> Tensors:
    """Return the first ``rank`` rows of each A and columns of each B; all of them for None."""
    return {
        name: (tensor[:rank] if _A in name else tensor[:, :rank]).contiguous()
        for name, tensor in tensors.items()
    }


def padded(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """Return each A with zero rows, and each B with zero columns, up to the shapes of ``like``."""
    return {name: _padded(tensor, like[name].shape) for name, tensor in tensors.items()}


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = (due - have for due, have in zip(shape, tensor.shape, strict=True))
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows)).contiguous()


def cut_upload(upload: Upload, rank: int | None) -> Upload:
    """Return ``upload`` with ``rank`` of each pair, and the rank among its figures; unchanged for None."""
    if rank is None:
        return upload
    measured = {**upload.measured, RANK: float(rank)}
    return replace(upload, tensors=cut(upload.tensors, rank), measured=measured)


def best_of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the best approximation of B A, (out, k) times (k, in), whose rank is ``rank``.

    The singular values all go to B; the rows of A are orthonormal. B A itself is never formed: it is
    decomposed through QR of both factors, in float64. If the product is of full size below ``rank``, the
    rest is zero.
    """
    left, core_left = torch.linalg.qr(b.double())
    right, core_right = torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return cut_or_pad((left @ u) * values, vh @ right.T, rank)


def principal_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the best approximation of ``weight`` (out, in) of rank ``rank``.

    Each gets the square roots of the singular values; in float64.
    """
    u, values, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    roots = values.sqrt()
    return cut_or_pad(u * roots, roots[:, None] * vh, rank)


def cut_or_pad(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (``rank``, in) and B (out, ``rank``): the first of what there is, zeros for what is not."""
    a, b = a[:rank], b[:, :rank]
    return _padded(a, torch.Size((rank, a.shape[1]))), _padded(b, torch.Size((b.shape[0], rank)))


@dataclass(frozen=True, kw_only=True)
class ClientRanks(Algorithm):
    """An algorithm whose clients have LoRA ranks of their own."""

    ranks: tuple[int, ...] = ()
    """LoRA rank of each client, cycled over the clients in their order; empty for ``adapter.rank``."""
    ranks_drawn: bool = False
    """Draw each client's rank from ``ranks`` by the run's seed, instead of cycling."""

    def __post_init__(self) -> None:
        """Refuse ranks below 1, and a draw that leaves no choice."""
        if any(rank < 1 for rank in self.ranks):
            raise UserError(f"ranks must be at least 1, but are {list(self.ranks)}")
        if self.ranks_drawn and len(set(self.ranks)) < 2:
            raise UserError(
                f"ranks_drawn has no effect with ranks {list(self.ranks)}: give two different ones"
            )

    def init(self, parts: ModelParts, clients: Sequence[ClientFacts]) -> ServerState:
        """Return the state before the first round.

        Raises:
            UserError: a rank is above ``adapter.rank``, so the model's LoRA has no room for it.
        """
        largest = max(self.ranks, default=0)
        if largest > parts.adapter.rank:
            raise UserError(
                f"algorithm.ranks has {largest}, but adapter.rank is {parts.adapter.rank}: no client's rank "
                "may be above it"
            )
        return super().init(parts, clients)

    def rank_of(self, state: ServerState, client_id: str) -> int | None:
        """Return a client's rank: the next in the order of clients, or drawn; None for ``adapter.rank``."""
        if not self.ranks:
            return None
        if self.ranks_drawn:
            return derive_random(state.seed, RANK, client_id).choice(list(self.ranks))
        return self.ranks[state.position(client_id) % len(self.ranks)]
