"""Settings of Flux (flux.py), and the room that a client's memory has for its role."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from fedexperts.algorithms.api import ClientFacts, ModelParts, refuse_below, refuse_idle
from fedexperts.algorithms.packing import Packing
from fedexperts.algorithms.role_sizes import account_of_role, sizes_of_roles
from fedexperts.algorithms.tuned_experts import TunedExperts
from fedexperts.costs.room import FLOAT_BYTES, TUNED_BYTES, Room
from fedexperts.errors import UserError, refuse_unknown
from fedexperts.moe.compressing.merge import MergeSettings
from fedexperts.moe.observing.low_bit_profile import ProfileBits
from fedexperts.moe.observing.utility import Unit
from fedexperts.moe.surgery.seam import MoeLayer


@dataclass(frozen=True, kw_only=True)
class FluxSettings(TunedExperts):
    """Settings of :class:`fedexperts.algorithms.flux.Flux`, with the paper's values where it has them."""

    num_tuned: int = 0
    """Experts of a client's role in all layers together (B_tune), fewer where its memory has room for fewer;
    0 for as many as there is room for."""
    others: Literal["merged", "kept", "absent"] = "merged"
    """Experts outside the role: merged into few, all kept frozen, or absent, so that tokens skip them."""
    merged_per_layer: int = 4
    """Slots for merged experts, as a mean over layers (B_non is that times the layers)."""
    merge: MergeSettings = field(default_factory=MergeSettings)
    """Way in which experts are merged."""
    profile: Literal["stale", "fresh"] = "stale"
    """Model that is profiled: the client's last, while the server averages, or this round's."""
    profile_bits: ProfileBits = 4
    """Bits of the experts' weights while they are profiled; 0 profiles them as they are."""
    profile_examples: int = 128
    """Training examples, at most, that a profile runs on."""
    profile_error: bool = False
    """Also profile this round's model as it is, and report the error of the profile that was used."""
    exploit_share: float = 0.3
    """Share of a role that is exploited in the first round (ε)."""
    exploit_share_last: float = 0.9
    """Share of a role that is exploited once it has grown; equal to ``exploit_share`` for a fixed one."""
    exploit_growth: float = 1 / 3
    """Share of all rounds after which ``exploit_share_last`` is reached."""
    train_explored: bool = False
    """Also train and send the explored experts; the paper only measures their utility."""
    utility: Literal["exact", "forward"] = "exact"
    """Utility of explored experts: by exact gradients of the local steps, or by forward passes with noise."""
    utility_per: Unit = "sample"
    """Unit that exact utilities sum over: sequences, or tokens."""
    probe_pairs: int = 1
    """Pairs of forward passes for each explored expert."""
    utility_decay: float = 0.5
    """Share that a utility keeps of its former value when it is measured again."""
    unvisited_bonus: float = 0.01
    """Growth of a utility in a round without measurement, as a share of the mean of those measured."""
    upload: Packing = "weights"
    """Form of tuned experts in an upload: float32 weights, or changes in fewer bits with error feedback."""
    coverage: int = 0
    """Clients that tune each expert within ``coverage_rounds``; 0 goes by utility alone (eq. 4)."""
    coverage_rounds: int = 10
    """Rounds within which each expert is to be covered."""
    coverage_load: float = 2.0
    """Most clients of one expert in a round, as a multiple of the mean."""

    uses_memory = True
    fits_slots = True

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, unknown values, and settings without effect."""
        super().__post_init__()
        refuse_unknown(self)
        refuse_below(self, {"exploit_share": 0, "exploit_growth": 0, "coverage_load": 0})
        least = {"num_tuned": 0, "unvisited_bonus": 0, "coverage": 0}
        ones = ("merged_per_layer", "profile_examples", "probe_pairs", "coverage_rounds", "coverage_load")
        refuse_below(self, least | dict.fromkeys(ones, 1), exclusive=False)
        if not self.exploit_share <= self.exploit_share_last <= 1:
            raise UserError(
                f"exploit_share_last must be from exploit_share ({self.exploit_share:g}) to 1, "
                f"not {self.exploit_share_last:g}"
            )
        if self.exploit_growth > 1:
            raise UserError(f"exploit_growth must be at most 1, not {self.exploit_growth:g}")
        if not 0 <= self.utility_decay < 1:
            raise UserError(f"utility_decay must be from 0 to below 1, not {self.utility_decay:g}")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        if self.others != "merged":
            refuse_idle(self, ("merge", "merged_per_layer"), f'with others = "{self.others}"')
        if self.merge.budget == "one_per_layer":
            refuse_idle(self, ("merged_per_layer",), 'with merge.budget = "one_per_layer"')
        if self.exploit_share_last == self.exploit_share:
            refuse_idle(self, ("exploit_growth",), "with a fixed exploit_share")
        if self.utility == "exact":
            refuse_idle(self, ("probe_pairs",), 'with utility = "exact"')
        else:
            names = ("utility_per", "train_explored")
            refuse_idle(self, names, 'with utility = "forward", which measures explored experts untrained')
        if not self.coverage:
            refuse_idle(self, ("coverage_rounds", "coverage_load"), "with coverage = 0")

    # Memory

    def num_merged(self, layers: Sequence[MoeLayer]) -> int | None:
        """Return the slots for merged experts in all layers (B_non); None if every expert is kept."""
        if self.others != "merged":
            return None if self.others == "kept" else 0
        return self.num_merged_in(len(layers))

    def num_merged_in(self, num_layers: int) -> int:
        """Return the slots for merged experts in so many layers."""
        return num_layers * (1 if self.merge.budget == "one_per_layer" else self.merged_per_layer)

    def room(self, parts: ModelParts) -> Room:
        """Return the account of a client's turn, by numbers of tuned and of frozen experts."""
        return replace(account_of_role(parts), tuned_bytes=self.tuned_bytes)

    @property
    def keeps_start(self) -> bool:
        """Whether a turn needs what it trains as it was before: to send changes."""
        return self.upload != "weights"

    @property
    def tuned_bytes(self) -> int:
        """Bytes of each parameter of a tuned expert, its start included where that is kept."""
        return TUNED_BYTES + FLOAT_BYTES * self.keeps_start

    def room_for(self, parts: ModelParts, clients: Sequence[ClientFacts]) -> Tensor:
        """Return how many experts each client has room to tune, by the account of ``plan``; int64 (C,).

        Raises:
            UserError: more experts are asked for than there are, or a client has no room for one.
        """
        return sizes_of_roles(
            parts, clients, self.room, num_tuned=self.num_tuned, num_merged=self.num_merged(parts.layers)
        )
