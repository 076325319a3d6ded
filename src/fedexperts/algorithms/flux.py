"""Flux: Chen, Wan, Li, Su, Yu, EuroSys 2026, arXiv 2508.19078, equations 1 to 4.

Each client tunes the experts that its role in a round names, holds all others merged into few frozen ones,
and sends the tuned experts alone. The server averages each over the clients that tuned it, and assigns roles
by how useful an expert's training is to a client. ``reading N`` points to docs/algorithms/flux.md.

Shape suffixes: ``C`` clients, ``L`` MoE layers, ``E`` experts of the largest layer, ``N`` experts of all
layers in a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedexperts.algorithms.api import (
    Client,
    ClientFacts,
    Kept,
    MemoryPlan,
    ModelParts,
    RoleSizes,
    Seconds,
    ServerState,
    upload_of,
)
from fedexperts.algorithms.flux_kept import (
    EXPERT,
    LOST,
    PROFILE,
    profile_in,
    profile_tensors,
    received_tensors,
    with_profile,
    without_prefix,
)
from fedexperts.algorithms.flux_settings import FluxSettings
from fedexperts.algorithms.packing import pack_with_feedback, packed_shapes, unpack
from fedexperts.algorithms.tuned_experts import (
    CHANGED,
    FROZEN,
    NUM_EXPERTS,
    ROLE,
    ROLES,
    SCORES,
    TOKENS,
    counts_of_role,
    names_of_role,
    places_in,
    places_of,
)
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.messages import Expected, Sent, Upload
from fedexperts.moe.choosing.roles import covering, drawn_from, exploit_share, largest_load, most_useful
from fedexperts.moe.compressing.merge import MergePlan, plan_merge
from fedexperts.moe.compressing.role_slots import (
    any_merge,
    by_layer,
    is_whole,
    slot_table,
    table_size,
    unmerged,
)
from fedexperts.moe.observing.activations import Activations, collect_activations
from fedexperts.moe.observing.low_bit_profile import (
    Profile,
    ProfileBits,
    frequency_error,
    low_bit_profile,
)
from fedexperts.moe.observing.probe import probed_utility
from fedexperts.moe.observing.routing_use import UseMeter
from fedexperts.moe.observing.utility import (
    GradientMeter,
    Utility,
    add_utilities,
    start_graph_at_embedding,
)
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import split_layer
from fedexperts.seeds import derive_random, derive_seed
from fedexperts.tensors import Tensors, num_bytes
from fedexperts.training.local_steps import LocalResult

EXPLORED = "explored"
"""Beside the server's tensors: experts that a client looks at without tuning them, bool (C, L, E); also
beside a download's, (L, E)."""
VISITS = "visits"
"""Times a client has measured the utility of an expert, int64 (C, L, E); ``SCORES`` are the utilities."""
TUNED_IN = "tuned_in"
"""Last round in which a client tuned an expert, int64 (C, L, E); 0 for never."""
FREQUENCIES = "frequencies"
"""Share of each layer's choices by a client's last profile, float64 (C, L, E); all 0 before the first."""
HELD = "held"
"""Version of each expert that a client holds, as ``CHANGED`` counts them, int64 (C, L, E)."""
MASTERS = "masters"
"""Whether a client holds that version in float32, bool (C, L, E)."""
NUM_TUNED = "num_tuned"
"""Experts for which each client has room in its role, int64 (C,)."""
UTILITY = "utility"
"""Beside an upload's tensors: utility of each expert, float64 (L, E); -1 where it was not measured."""
FREQUENCY = "frequency"
"""Beside an upload's tensors: share of each layer's choices by the profile, float64 (L, E)."""
SLOTS = "slots"
"""Among an upload's tables: the slot that runs for each expert, int16 (L, E); -1 for none."""
PARTS = "parts"
"""Among an upload's tables: each expert's part, int8 (L, E): 2 tuned, 1 explored, 0 neither."""

OVERLAPPED = "profile_overlapped"
"""Phase of the profile for the next round, for which the upload need not wait."""
LARGEST_UTILITY = 1e100
"""Greater ones count as this, so that no client can spoil a sum."""
LEAST_FREQUENCY = 1e-12
"""Frequency of all measured experts below which there is no rate of utility to frequency."""
ACTIVATION_BYTES = 2**30
"""Largest size of the activations that outputs are clustered and merges fitted by."""


@dataclass(frozen=True, kw_only=True)
class StepsTaken:
    """Local steps, and what was measured meanwhile."""

    result: LocalResult
    tokens_LE: Tensor
    """Tokens that reached each expert, int64."""
    utility_LE: Tensor
    """Utility of each expert, float64; -1 where it was not measured."""
    tables: Tensors = field(default_factory=dict)
    """Further tables for the report."""


@dataclass(frozen=True, kw_only=True)
class Flux(FluxSettings):
    """Tune the most useful experts within a memory, merge the others into few; roles change by round."""

    # The server's half

    def init(self, parts: ModelParts, clients: Sequence[ClientFacts]) -> ServerState:
        """Return the model's experts in float32, and what the server remembers of each client: nothing."""
        num_tuned_C = self.room_for(parts, clients)
        state = super().init(parts, clients)
        size = state.beside[ROLES].shape
        kinds = {torch.int64: (VISITS, TUNED_IN, HELD), torch.bool: (EXPLORED, MASTERS)}
        beside = {
            name: torch.zeros(size, dtype=dtype)
            for dtype, names in (kinds | {torch.float64: (FREQUENCIES,)}).items()
            for name in names
        }
        return replace(state, beside={**state.beside, **beside, NUM_TUNED: num_tuned_C})

    def plan_round(self, state: ServerState, cohort: Sequence[str], round_number: int) -> ServerState:
        """Assign roles: the most useful experts are exploited (eq. 4), others explored at random."""
        places = [state.position(client_id) for client_id in cohort]
        worth_CN = torch.stack([self.worth(state, client_id).flatten() for client_id in cohort])
        rooms = state.beside[NUM_TUNED][places].tolist()
        tuned_CN = self._assigned(state, places, worth_CN, self._exploited(state, rooms), round_number)
        explored_CN = torch.zeros_like(tuned_CN)
        for row, client_id in enumerate(cohort):
            others_N = torch.isfinite(worth_CN[row]) & ~tuned_CN[row]
            rng = derive_random(state.seed, "explore", client_id, round_number)
            explored_CN[row] = drawn_from(others_N, rooms[row] - int(tuned_CN[row].sum()), rng)
        if self.train_explored:
            tuned_CN, explored_CN = tuned_CN | explored_CN, torch.zeros_like(explored_CN)
        size = state.beside[ROLES].shape
        roles = {name: torch.zeros(size, dtype=torch.bool) for name in (ROLES, EXPLORED)}
        roles[ROLES][places] = tuned_CN.reshape(-1, *size[1:])
        roles[EXPLORED][places] = explored_CN.reshape(-1, *size[1:])
        return replace(state, beside=state.beside | roles)

    def _exploited(self, state: ServerState, rooms: Sequence[int]) -> list[int]:
        """Return how many experts each client exploits; all where there is room for all (reading 3)."""
        number = int(state.beside[NUM_EXPERTS].sum())
        share = exploit_share(
            state.round_number,
            state.num_rounds,
            first=self.exploit_share,
            last=self.exploit_share_last,
            growth=self.exploit_growth,
        )
        return [room if room == number else max(1, round(share * room)) for room in rooms]

    def _assigned(
        self,
        state: ServerState,
        places: Sequence[int],
        worth_CN: Tensor,
        numbers: Sequence[int],
        round_number: int,
    ) -> Tensor:
        """Return the experts that each client of the cohort exploits, bool (C, N)."""
        if not self.coverage:
            return most_useful(worth_CN, numbers)
        is_recent_CN = state.beside[TUNED_IN].flatten(1) > max(round_number - self.coverage_rounds, 0)
        need_N = (self.coverage - is_recent_CN.sum(dim=0)).clamp(min=0)
        # In the first rounds experts fall due one after the other, so that need is spread over rounds.
        number = worth_CN.shape[1]
        is_due_N = torch.arange(number) * self.coverage_rounds < round_number * number
        load = max(self.coverage, largest_load(numbers, number, self.coverage_load))
        return covering(
            worth_CN,
            numbers,
            counts_CN=~is_recent_CN[list(places)],
            need_N=need_N * (is_due_N & torch.isfinite(worth_CN).any(dim=0)),
            most_N=torch.full((number,), load),
        )

    def worth(self, state: ServerState, client_id: str) -> Tensor:
        """Return what each expert is worth to a client, float64 (L, E); -inf beyond a layer's experts.

        That is its utility. One without is worth its frequency at the rate of those with (reading 2); before
        a client's first report all are drawn at random.
        """
        place = state.position(client_id)
        utility_LE, frequency_LE = state.beside[SCORES][place], state.beside[FREQUENCIES][place]
        is_known_LE = state.beside[VISITS][place] > 0
        if bool(frequency_LE.any()):
            weight = frequency_LE[is_known_LE].sum()
            rate = utility_LE[is_known_LE].sum() / weight if weight > LEAST_FREQUENCY else torch.ones(())
            worth_LE = torch.where(is_known_LE, utility_LE, rate * frequency_LE)
        else:
            generator = torch.Generator().manual_seed(derive_seed(state.seed, "first role", client_id))
            worth_LE = torch.rand(utility_LE.shape, generator=generator, dtype=torch.float64)
        is_expert_LE = torch.arange(utility_LE.shape[1]) < state.beside[NUM_EXPERTS].unsqueeze(1)
        return worth_LE.masked_fill(~is_expert_LE, -torch.inf)

    def role_sizes(self, state: ServerState, client_id: str) -> RoleSizes:
        """Return how many experts the client tunes and explores by layer, and its merged slots."""
        sizes = super().role_sizes(state, client_id)
        explored = tuple(state.beside[EXPLORED][state.position(client_id)].sum(dim=1).tolist())
        others = int(state.beside[NUM_EXPERTS].sum()) - sum(sizes.tuned) - sum(explored)
        merged = min(self.num_merged_in(len(explored)), others) if self.others == "merged" else None
        return replace(sizes, explored=explored, merged=merged)

    def due(self, state: ServerState, client_id: str) -> Tensor:
        """Return the experts of which a client does not hold the present version, or not as precisely."""
        place, changed_LE = state.position(client_id), state.beside[CHANGED]
        due_LE = changed_LE > state.beside[HELD][place]
        if state.beside[FROZEN].dtype != torch.float32:
            due_LE |= state.beside[ROLES][place] & ~state.beside[MASTERS][place] & (changed_LE > 0)
        return due_LE

    def download(self, state: ServerState, client_id: str) -> Sent:
        """Return the client's role, and each expert that is due."""
        sent = super().download(state, client_id)
        explored_LE = state.beside[EXPLORED][state.position(client_id)]
        return replace(sent, beside={**sent.beside, EXPLORED: explored_LE})

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return the tuned experts, tokens, utilities and frequencies, and the tables for the report."""
        expected = super().expected(parts, state, client_id)
        tensors, beside, size = dict(expected.tensors), dict(expected.beside), state.beside[CHANGED].shape
        if self.upload != "weights":
            packed, parts_beside = packed_shapes(_experts_of(state, tensors), self.upload)
            tensors, beside = tensors | packed, beside | parts_beside
        beside |= {name: _shape(size, torch.float64) for name in (UTILITY, FREQUENCY)}
        tables = {SLOTS: _shape(size, torch.int16), PARTS: _shape(size, torch.int8)}
        return Expected(tensors=tensors, beside=beside, tables=tables)

    def memory_plan(self, parts: ModelParts) -> MemoryPlan:
        """Return the plan that sizes roles: each client's own has tuned, explored and merged experts."""
        room, num_merged = self.room(parts), self.num_merged(parts.layers)

        def planned(state: ServerState, client_id: str) -> int:
            place = state.position(client_id)
            tuned, explored = (int(state.beside[name][place].sum()) for name in (ROLES, EXPLORED))
            return room.turn(tuned, explored + room.frozen(tuned + explored, num_merged))

        return planned

    def opened(self, state: ServerState, upload: Upload) -> Upload:
        """Return the weights of which an upload has the changes."""
        if self.upload == "weights":
            return upload
        experts = _experts_of(state, upload.tensors)
        changes = unpack(experts, upload.beside, state.tensors, self.upload)
        weights = {name: state.tensors[name] + change for name, change in changes.items()}
        return replace(upload, tensors={**upload.tensors, **weights})

    def remember(self, state: ServerState, client_id: str, upload: Upload, beside: Tensors) -> None:
        """Update utilities, and note what the client tuned and which experts it holds now."""
        place, role_LE = state.position(client_id), state.beside[ROLES][state.position(client_id)]
        measured_LE = upload.beside[UTILITY].clamp(max=LARGEST_UTILITY)
        is_measured_LE, was_known_LE = measured_LE >= 0, state.beside[VISITS][place] > 0
        old_LE = state.beside[SCORES][place]
        again_LE = self.utility_decay * old_LE + (1 - self.utility_decay) * measured_LE
        bonus = self.unvisited_bonus * measured_LE[is_measured_LE].sum() / is_measured_LE.sum().clamp(min=1)
        unvisited_LE = torch.where(was_known_LE, old_LE + bonus, old_LE)
        visited_LE = torch.where(was_known_LE, again_LE, measured_LE)
        due_LE, was_tuned_LE = self.due(state, client_id), role_LE & (upload.beside[TOKENS] > 0)
        beside[SCORES][place] = torch.where(is_measured_LE, visited_LE, unvisited_LE)
        beside[VISITS][place] += is_measured_LE
        beside[TUNED_IN][place][was_tuned_LE] = state.round_number + 1
        beside[FREQUENCIES][place] = upload.beside[FREQUENCY].clamp(0, 1)
        beside[HELD][place] = state.beside[CHANGED]
        beside[MASTERS][place] = torch.where(due_LE, role_LE, beside[MASTERS][place])

    # The client's half

    def blank(self, parts: ModelParts) -> Kept:
        """Return a profile without tokens, which stands for any: only sizes are asked for."""
        size = (len(parts.layers), max(layer.num_experts for layer in parts.layers))
        counts = torch.zeros(size, dtype=torch.int64)
        return Kept(beside=profile_tensors(Profile(tokens_LE=counts, attention_LE=counts.double())))

    def server_view(self, kept: Kept, sent: Sent) -> Sent:
        """Return what came now and what came earlier: together the server's model."""
        return replace(sent, tensors=received_tensors(kept, sent))

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Make the model the server's, by what came now and earlier, and keep that (reading 5)."""
        parts, received = client.parts, received_tensors(kept, sent)
        if sent.beside[ROLE].shape != (size := table_size(parts.layers)):
            raise UserError(
                f"the server's roles are for {tuple(sent.beside[ROLE].shape)} layers and experts, but the "
                f"client's model has {size}"
            )
        self.install_shared(parts, Sent(tensors=received))
        places = places_of(parts.layers)
        experts = {f"{EXPERT}{name}": tensor for name, tensor in received.items() if name in places}
        return Kept(beside={**kept.beside, **experts, FROZEN: _blank_weight(parts.layers[0])})

    def holds(self, kept: Kept, sent: Sent) -> Mapping[str, Tensor]:
        """Return what came, experts in the model's dtype."""
        dtype = kept.beside[FROZEN].dtype
        experts = {name: tensor.to(dtype) for name, tensor in received_tensors(kept, Sent()).items()}
        return {**sent.tensors, **experts}

    def prepare_steps(self, client: Client, kept: Kept, sent: Sent) -> None:
        """Put the role's experts into slots, tuned ones in float32, and the others as ``others`` says."""
        needs_pass = self.merge.needs_activations and self._merges(client, kept, sent)
        with self.activations(client) if needs_pass else nullcontext() as activations:
            plans = self.planned(client, kept, sent, activations)
        self.fill_slots(client, kept, sent, plans)

    def start_steps(self, client: Client, kept: Kept, sent: Sent) -> tuple[Tensors, dict[str, float]]:
        """Do the same in a turn; return what the client keeps beside from now on, and figures to report."""
        self.prepare_steps(client, kept, sent)
        return {}, {}

    def _merges(self, client: Client, kept: Kept, sent: Sent) -> bool:
        """Return whether experts are merged by a profile."""
        layers = client.parts.layers
        is_all = is_whole(layers, sent.beside[ROLE])
        return bool(self.num_merged(layers)) and not is_all and profile_in(kept) is not None

    def planned(
        self, client: Client, kept: Kept, sent: Sent, activations: Activations | None
    ) -> list[MergePlan]:
        """Return the slots of each layer by role and profile, and by activations where merging needs them."""
        layers = client.parts.layers
        tuned, explored = (by_layer(layers, sent.beside[part]) for part in (ROLE, EXPLORED))
        return self.compacted(client, profile_in(kept), tuned, explored, activations)

    def fill_slots(self, client: Client, kept: Kept, sent: Sent, plans: list[MergePlan]) -> None:
        """Put planned slots in place of each layer's experts, tuned ones in float32; empties ``plans``."""
        layers, role_LE = client.parts.layers, sent.beside[ROLE]
        for layer in layers:
            # Taken by pop: merged experts are in memory twice in one layer only.
            plan = plans.pop(0)
            split_layer(layer, plan.slots, plan.weights, order=self.order)
        received = received_tensors(kept, Sent())
        masters = {name: received[name] for name in names_of_role(layers, role_LE) if name in received}
        seam.load_tensors(client.parts.model, masters)
        if self.utility == "exact" and not is_whole(layers, role_LE):
            start_graph_at_embedding(client.parts.model)

    def compacted(
        self,
        client: Client,
        profile: Profile | None,
        tuned: Sequence[Sequence[int]],
        explored: Sequence[Sequence[int]],
        activations: Activations | None,
    ) -> list[MergePlan]:
        """Return the slots of each layer: tuned experts, explored ones, and what is left of the others.

        Raises:
            UserError: the profile counts no token in a layer whose experts are to be merged.
        """
        layers, roles = client.parts.layers, list(zip(tuned, explored, strict=True))
        num_merged = self.num_merged(layers)
        if not num_merged or sum(map(len, tuned)) == sum(layer.num_experts for layer in layers):
            return [
                unmerged(layer, own, frozen, keeps=num_merged is None)
                for layer, (own, frozen) in zip(layers, roles, strict=True)
            ]
        if not profile:
            return any_merge(layers, roles, num_merged)
        tokens_LE, attention_LE = profile.by_layer(layers)
        return plan_merge(
            layers,
            tokens_LE=tokens_LE,
            attention_LE=attention_LE,
            num_merged=num_merged,
            tuned=tuned,
            kept=explored,
            settings=self.merge,
            activations=activations if self.merge.needs_activations else None,
            seed=client.derive_seed("merge"),
        )

    @contextmanager
    def activations(self, client: Client) -> Iterator[Activations]:
        """Give activations of the model as it came, from one pass."""
        with TemporaryDirectory(prefix="fedexperts-") if client.parts.on_disk else nullcontext() as folder:
            yield collect_activations(
                client.parts.model,
                client.parts.layers,
                client.calibration_batches(self.profile_examples),
                byte_limit=ACTIVATION_BYTES,
                folder=Path(folder) if folder else None,
                on_excess="subsample",
                seed=client.derive_seed("activations"),
            )

    def bytes_beside(self, parts: ModelParts, kept: Kept, sent: Sent) -> int:
        """Add what is trained as it was before, where a turn needs that."""
        names = self._sent_names(parts, sent) if self.keeps_start else ()
        return super().bytes_beside(parts, kept, sent) + num_bytes(seam.tensor_views(parts.model, names))

    def _sent_names(self, parts: ModelParts, sent: Sent) -> tuple[str, ...]:
        return (parts.lora_names if self.lora else ()) + names_of_role(parts.layers, sent.beside[ROLE])

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Profile, merge, take local steps on the tuned experts, and send those with their utilities."""
        parts, role_LE, watch = client.parts, sent.beside[ROLE], Stopwatch()
        kept = self.install(client, kept, sent)
        with watch.phase("profile"):
            used, fresh = self._profiles(client, kept)
        if client.goes_on:
            del watch.seconds["profile"]  # :meth:`after_upload` makes the fresh one, and times it
        elif used is not fresh:
            watch.seconds[OVERLAPPED] = watch.seconds.pop("profile")
        figures = self._profile_errors(client, used, fresh)
        with watch.phase("merge"):
            chosen, merged = self.start_steps(client, with_profile(kept, used), sent)
        experts, names = names_of_role(parts.layers, role_LE), self._sent_names(parts, sent)
        before = seam.current(parts.model, names) if self.keeps_start else {}
        steps = self.take_steps(client, sent)
        upload = upload_of(
            client,
            names,
            Sent(tensors=received_tensors(kept, sent)),
            steps.result,
            beside={TOKENS: steps.tokens_LE, UTILITY: steps.utility_LE, FREQUENCY: used.frequency()},
            tables={SLOTS: slot_table(parts.layers), PARTS: _parts(sent), **steps.tables},
            measured=counts_of_role(role_LE, steps.tokens_LE) | figures | merged,
        )
        upload = replace(self._weighted(upload, parts, steps.tokens_LE), seconds=watch.seconds)
        started = {name: before[name] for name in experts if name in before}
        upload, lost = self._packed(parts.layers, upload, started, kept)
        kept = self.keep(client, replace(kept, beside={**kept.beside, **chosen, **lost}), steps.result)
        self.finish(client, before)
        return upload, with_profile(kept, fresh) if self.profile == "stale" else kept

    def goes_on(self, kept: Kept) -> bool:
        """Return whether a profile of the last visit is there to go by, and none of this visit is judged."""
        return self.profile == "stale" and not self.profile_error and profile_in(kept) is not None

    def after_upload(self, client: Client, before: Kept, sent: Sent, kept: Kept) -> tuple[Kept, Seconds]:
        """Profile the model as it came, to go by in the next round."""
        watch = Stopwatch()
        with watch.phase(OVERLAPPED):
            self.install(client, before, sent)
            fresh = self._profile(client, self.profile_bits)
        return with_profile(kept, fresh), watch.seconds

    def finish(self, client: Client, before: Tensors) -> None:
        """Make the model the client's own after the upload: it is, as it was trained."""

    def _packed(
        self, layers: Sequence[MoeLayer], upload: Upload, before: Tensors, kept: Kept
    ) -> tuple[Upload, Tensors]:
        """Return the upload with changes of experts in few bits, and what they lost, for the next time."""
        if self.upload == "weights":
            return upload, {}
        changes = {name: upload.tensors[name] - start for name, start in before.items()}
        packed, beside, lost = pack_with_feedback(changes, without_prefix(kept.beside, LOST), self.upload)
        tensors = {**upload.tensors, **packed}
        packed_upload = replace(upload, tensors=tensors, beside={**upload.beside, **beside})
        # The server leaves an idle expert out: what that one has lost waits for a round that counts.
        places, tokens_LE = places_of(layers), upload.beside[TOKENS]
        return packed_upload, {f"{LOST}{n}": lost[n] for n in lost if tokens_LE[places[n]] > 0}

    def _profiles(self, client: Client, kept: Kept) -> tuple[Profile, Profile]:
        """Return the profile to go by, and one of the model as it came, to go by in the next round.

        The server averages meanwhile, in the paper; here the time it takes is told apart (reading 4), or
        :meth:`after_upload` takes the fresh one.
        """
        last = profile_in(kept) if self.profile == "stale" else None
        if last is not None and (client.goes_on or client.purpose == "evaluate"):
            return last, last
        fresh = self._profile(client, self.profile_bits)
        return last or fresh, fresh

    def _profile(self, client: Client, bits: ProfileBits) -> Profile:
        profile = low_bit_profile(
            client.parts.model,
            client.parts.layers,
            client.calibration_batches(self.profile_examples),
            bits=bits,
            with_attention=self.others == "merged" and self.merge.weighting == "attention_frequency",
            seed=client.derive_seed("profile"),
            on_disk=client.parts.on_disk,
        )
        if not profile:
            raise UserError(f"client {client.client_id}: the profile of its experts counts no token")
        return profile

    def _profile_errors(self, client: Client, used: Profile, fresh: Profile) -> dict[str, float]:
        """Return the errors of the profile that is used, and of one that were as fresh as can be."""
        if not self.profile_error or client.purpose == "evaluate":
            return {}
        exact = self._profile(client, 0)
        return {
            "profile_error": frequency_error(used, exact),
            "profile_error_fresh": frequency_error(fresh, exact),
        }

    def take_steps(self, client: Client, sent: Sent) -> StepsTaken:
        """Take local steps and measure utilities (eq. 3).

        A client that tunes every expert has nothing to choose, and measures nothing.
        """
        parts, use = client.parts, UseMeter(client.parts.layers)
        chooses = not is_whole(parts.layers, sent.beside[ROLE])
        probed = self._probed(client, sent) if chooses and self.utility == "forward" else None
        gradients = GradientMeter(parts.layers, self.utility_per) if chooses else None
        with use.watching(), nullcontext() if gradients is None else gradients.watching():
            result = client.train(self.trained(parts, sent), observer=gradients)
        utility_LE = torch.full(sent.beside[ROLE].shape, -1.0, dtype=torch.float64)
        if gradients is not None:
            utility_LE = add_utilities(parts.layers, gradients.utility(), utility_LE)
        if probed is not None:
            probed_LE = add_utilities(parts.layers, probed, utility_LE)
            utility_LE = torch.where(sent.beside[EXPLORED], probed_LE, utility_LE)
        return StepsTaken(result=result, tokens_LE=use.tokens(), utility_LE=utility_LE)

    def _probed(self, client: Client, sent: Sent) -> Utility:
        """Estimate the explored experts' utilities by forward passes alone."""
        return probed_utility(
            client.parts.model,
            client.parts.layers,
            client.draw_batches(),
            by_layer(client.parts.layers, sent.beside[EXPLORED]),
            num_pairs=self.probe_pairs,
            seed=client.derive_seed("probes"),
        )

    def describe(self, kept: Kept) -> Tensors:
        """Return the profile that the client keeps."""
        return {name: kept.beside[name] for name in PROFILE.values() if name in kept.beside}


def _experts_of(state: ServerState, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return those of ``tensors`` that are of experts."""
    places = places_in(state)
    return {name: tensor for name, tensor in tensors.items() if places[name][0] >= 0}


def _shape(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(size), dtype=dtype, device="meta")


def _blank_weight(layer: MoeLayer) -> Tensor:
    """Return one value in the dtype of the model's experts."""
    return torch.zeros(1, dtype=next(iter(layer.expert(0).values())).dtype)


def _parts(sent: Sent) -> Tensor:
    """Return each expert's part in the round, int8 (L, E): 2 tuned, 1 explored, 0 neither."""
    return 2 * sent.beside[ROLE].to(torch.int8) + sent.beside[EXPLORED].to(torch.int8)
