"""FLEx: Liu et al., arXiv 2506.00965, "Personalized Federated LLMs via Expert Grafting".

Pretrained experts and routers stay frozen. LoRA on the non-expert parameters travels and is averaged; each
client grafts one private expert per MoE layer, a copy of the pretrained expert that best reconstructs the
layer on the client's data (eq. 4), behind a sigmoid gate (eq. 2), and keeps it. ``reading N`` points to
docs/algorithms/flex.md, which also lists the ablations that the settings make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedexperts.algorithms.api import (
    Algorithm,
    Client,
    Kept,
    ModelParts,
    ServerState,
    TrainedGroup,
    refuse_below,
    refuse_idle,
    upload_of,
)
from fedexperts.algorithms.closed_gates import ClosedGates
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError, refuse_unknown
from fedexperts.messages import Expected, Sent, Upload
from fedexperts.models import prompt_gate
from fedexperts.models.prompt_gate import PromptGate, PromptGateForm
from fedexperts.models.prompts import Prompt
from fedexperts.moe.choosing.selection import Choice, Selection, choose_experts, draw_experts
from fedexperts.moe.choosing.subsets import LARGEST
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GateMeter, GraftForm
from fedexperts.moe.surgery.in_place import adapt_in_place, adapted_names
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_seed
from fedexperts.tensors import Tensors
from fedexperts.training.local_steps import Correction

CHOSEN = "chosen_experts"
"""Kept beside the graft: the copied expert of each MoE layer, int64 (L,), or (L, num_grafts) with several."""
SHARED = "shared_graft_experts"
"""Kept beside: the expert of each MoE layer that the shared graft is a copy of, int64 (L,)."""
GATE_MEAN = "gate_mean"
"""Table of an upload: mean openness of each grafted layer's gates in training, float32 (L,)."""


@dataclass(frozen=True, kw_only=True)
class Flex(Algorithm):
    """Shared LoRA on non-experts, one private grafted expert per MoE layer, or several."""

    graft: GraftForm = field(default_factory=GraftForm)
    """Form of the grafted expert, and of its gate."""
    num_grafts: int = 1
    """Private experts per MoE layer: 1 in the paper, at most 8 (reading 5); 0 for none."""
    placement: Literal["beside", "in_place"] = "beside"
    """``beside``: copies are grafted; ``in_place``: the chosen experts themselves are trained (reading 9)."""
    shared_graft: bool = False
    """Add one more graft per MoE layer, which is sent and averaged (reading 10)."""
    experts: bool = False
    """Also train, send and average all routed experts, which FLEx keeps frozen (reading 12)."""
    own_model: Literal["trained", "received"] = "trained"
    """The shared part of a client's own model: as the client trained it, or as it came, with the private part
    alone as trained (reading 12)."""
    graft_lr_scale: float = 1.0
    """Learning rate of the grafted expert as a multiple of ``training.lr``."""
    gate_lr_scale: float = 1.0
    """Learning rate of the gate as a multiple of ``training.lr``."""
    selection: Selection = "reconstruction"
    """Choice of the copied expert: eq. 4, most tokens, largest sum of routing weights, or a draw."""
    calibration: Literal["own", "majority_label", "other"] = "own"
    """Texts to choose by: the client's, those of its most frequent label, or another corpus (reading 4)."""
    calibration_examples: int = 128
    """Training examples or other texts, at most, that the copied expert is chosen by (reading 4)."""
    calibration_file: str = ""
    """The other corpus: JSON lines with a field ``text``, of which the first are taken."""
    off_task: str = ""
    """Texts on which the private gates learn to stay closed, with the purpose that a client's own model
    forgets less (reading 13): ``tinyworld``, or JSON lines of texts, or of instructions with responses; empty
    for none."""
    off_task_weight: float = 1.0
    """Weight of that loss beside the client's own."""
    off_task_examples: int = 256
    """Texts of ``off_task``, at most, of which each local step takes a batch in turn."""
    prompt_gate: str = ""
    """Public texts from which a client learns to know the prompts of its task; for every other prompt its own
    part is closed, and its model is the one that it received (reading 14). ``tinyworld``, or JSON lines of
    texts, or of instructions with responses; empty for none."""
    prompt_gate_examples: int = 256
    """Texts of ``prompt_gate``, and training examples of the client, at most."""
    layers: tuple[int, ...] = ()
    """MoE layers that get a graft, counted from 0; empty takes all, as the paper does."""

    keeps_lora: ClassVar[bool] = False
    """Whether LoRA is the client's own, which the prompt gate then closes too."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and settings without effect."""
        refuse_unknown(self)
        refuse_below(self, {"graft_lr_scale": 0, "gate_lr_scale": 0, "off_task_weight": 0})
        counts = ("calibration_examples", "off_task_examples", "prompt_gate_examples")
        refuse_below(self, dict.fromkeys(counts, 1), exclusive=False)
        if not 0 <= self.num_grafts <= LARGEST:
            raise UserError(f"num_grafts must be from 0 to {LARGEST}, not {self.num_grafts}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers must not name a layer twice, but is {list(self.layers)}")
        if self.calibration == "other" and not self.calibration_file:
            raise UserError('calibration_file is empty, but must name a file with calibration = "other"')
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        texts = ("calibration", "calibration_examples", "calibration_file")
        if not self.num_grafts:
            refuse_idle(self, ("placement", "selection", *texts), "with num_grafts = 0")
        if not self.num_grafts and not self.shared_graft:
            names = ("graft", "graft_lr_scale", "gate_lr_scale", "layers")
            refuse_idle(self, names, "with num_grafts = 0 and no shared_graft")
        if self.experts and (self.graft.lora_rank or self.placement == "in_place"):
            raise UserError(
                'experts is true, so the experts move: graft.lora_rank must be 0 and placement "beside", '
                f'not {self.graft.lora_rank} and "{self.placement}"'
            )
        if not self.off_task:
            refuse_idle(self, ("off_task_weight", "off_task_examples"), "without off_task")
        elif not self.num_grafts or self.placement == "in_place" or self.graft.gate == "none":
            raise UserError(f'off_task is "{self.off_task}", but there is no private gate that could close')
        self._refuse_prompt_gate()
        if self.selection == "random":
            refuse_idle(self, texts, 'with selection = "random"')
        if self.calibration != "other":
            refuse_idle(self, ("calibration_file",), f'with calibration = "{self.calibration}"')
        if self.placement == "in_place":
            refuse_idle(self, ("gate_lr_scale", "shared_graft"), 'with placement = "in_place"')
            if self.graft != GraftForm(lora_rank=self.graft.lora_rank, lora_alpha=self.graft.lora_alpha):
                raise UserError('graft has settings of gate or mix: none has an effect with "in_place"')

    def _refuse_prompt_gate(self) -> None:
        if not self.prompt_gate:
            refuse_idle(self, ("prompt_gate_examples",), "without prompt_gate")
        elif not self.num_grafts or self.placement == "in_place":
            raise UserError(f'prompt_gate is "{self.prompt_gate}", but there is no private graft to close')
        elif self.own_model == "trained" and not self.keeps_lora:
            raise UserError(
                f'prompt_gate is "{self.prompt_gate}", which leaves the model that was received where it is '
                'closed: own_model must be "received", not "trained"'
            )

    @property
    def public_texts(self) -> Mapping[str, tuple[str, int]]:
        """Texts to choose by, to keep gates closed on, and to tell the task's prompts from."""
        fields = (
            ("calibration_file", self.calibration_examples),
            ("off_task", self.off_task_examples),
            ("prompt_gate", self.prompt_gate_examples),
        )
        named = {name: (getattr(self, name), largest) for name, largest in fields}
        return {name: texts for name, texts in named.items() if texts[0]}

    # Names

    @property
    def changes_experts(self) -> bool:
        return self.experts or self.placement == "in_place"

    def grafted_layers(self, parts: ModelParts) -> tuple[MoeLayer, ...]:
        """Return the MoE layers that get a graft.

        Raises:
            UserError: the model lacks one of them, or has fewer experts than grafts are asked for.
        """
        for index in self.layers:
            if not 0 <= index < len(parts.layers):
                raise UserError(
                    f"algorithm.layers has {index}: the MoE layers are 0 to {len(parts.layers) - 1}"
                )
        layers = tuple(layer for layer in parts.layers if not self.layers or layer.index in self.layers)
        fewest = min(layer.num_experts for layer in layers)
        if self.num_grafts > fewest:
            raise UserError(
                f"algorithm.num_grafts is {self.num_grafts}: a layer has only {fewest} experts to copy"
            )
        return layers

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return LoRA, the parameters of the shared graft, and the experts if they are trained."""
        experts = seam.expert_names(parts.layers) if self.experts else ()
        return (*parts.lora_names, *self._graft_names(parts, is_shared=True), *experts)

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the parameters of private experts and gates, and of the prompt gate once it is there."""
        return (*self.private_experts(parts), *prompt_gate.names_of(parts.model))

    def private_experts(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the parameters of private grafts and gates, or of experts adapted in place."""
        return (*self._graft_names(parts, is_shared=False), *adapted_names(parts.layers))

    def _graft_names(self, parts: ModelParts, *, is_shared: bool) -> tuple[str, ...]:
        """The shared graft is the first of those beside a layer."""
        first = tuple(f"{seam.addition_name(layer)}.0." for layer in parts.layers if self.shared_graft)
        return tuple(n for n in grafting.graft_names(parts.layers) if n.startswith(first) is is_shared)

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return LoRA, the experts if they are trained, then grafts and gates, each at its own rate."""
        groups = [TrainedGroup(names=parts.lora_names)]
        if self.experts:
            experts = seam.fused_names(seam.expert_names(parts.layers))
            groups.append(TrainedGroup(names=tuple(sorted(experts))))
        private, shared = self.private_experts(parts), self._graft_names(parts, is_shared=True)
        for names, keeps in ((private, True), (shared, False)):
            for is_gate, scale in ((False, self.graft_lr_scale), (True, self.gate_lr_scale)):
                kind = grafting.names_of_kind(names, is_gate=is_gate)
                groups.append(TrainedGroup(names=kind, lr_scale=scale, keeps_optimizer=keeps))
        return tuple(groups)

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return what is averaged, and the gates' openness by layer."""
        gates = torch.empty(len(self.grafted_layers(parts)), device="meta")
        expected = super().expected(parts, state, client_id)
        return Expected(tensors=expected.tensors, tables={GATE_MEAN: gates} if self.has_gates else {})

    @property
    def has_gates(self) -> bool:
        """Whether a graft is added beside each layer."""
        return self.shared_graft or (self.num_grafts > 0 and self.placement == "beside")

    # The choice of experts

    def choose(self, client: Client) -> Choice:
        """Choose on the pretrained model: LoRA is at its start here, whatever has been averaged."""
        return choose_experts(
            self.selection,
            client.parts.model,
            self.grafted_layers(client.parts),
            lambda: self._calibration_batches(client),
            self.num_grafts,
            seed=derive_seed(client.seed, "calibration", client.client_id),
        )

    def _calibration_batches(self, client: Client) -> Sequence[Batch]:
        return client.calibration_batches(
            self.calibration_examples,
            is_majority_label=self.calibration == "majority_label",
            texts=self.calibration_file,
            key="algorithm.calibration_file",
        )

    def _choice(self, client: Client, kept: Kept) -> Choice:
        """Return the private experts of each layer, chosen now if the client is new."""
        if not self.num_grafts:
            return [() for _ in self.grafted_layers(client.parts)]
        if not kept:
            return self.choose(client)
        return [tuple(experts) for experts in kept.beside[CHOSEN].reshape(-1, self.num_grafts).tolist()]

    def _shared_choice(self, parts: ModelParts) -> Choice:
        """Return the expert of each layer that the shared graft copies: the same for all (reading 10)."""
        return draw_experts(self.grafted_layers(parts), 1, derive_seed(parts.seed, "shared_graft"))

    def _beside(self, parts: ModelParts, choice: Choice) -> Tensors:
        """Return the choices as they are kept."""
        beside = {}
        if self.num_grafts:
            chosen = torch.tensor(choice)
            beside[CHOSEN] = chosen.squeeze(1) if self.num_grafts == 1 else chosen
        if self.shared_graft:
            beside[SHARED] = torch.tensor(self._shared_choice(parts)).squeeze(1)
        return beside

    # The client's half

    def blank(self, parts: ModelParts) -> Kept:
        """Return the first experts chosen everywhere: grafts are of one size whichever expert is copied."""
        choice = [tuple(range(self.num_grafts)) for _ in self.grafted_layers(parts)]
        return Kept(beside=self._beside(parts, choice))

    def prepare(self, parts: ModelParts) -> None:
        """Add the shared graft alone, as the server has it."""
        if self.shared_graft:
            layers = self.grafted_layers(parts)
            grafting.graft(layers, self._shared_choice(parts), self.graft, parts.seed)

    def _add_experts(self, parts: ModelParts, choice: Choice, seed: int) -> None:
        """Graft the shared and the private experts, or adapt the private ones in place."""
        layers = self.grafted_layers(parts)
        if self.placement == "in_place":
            rank, alpha = self.graft.lora_rank, self.graft.lora_alpha
            adapt_in_place(layers, choice, lora_rank=rank, lora_alpha=alpha, seed=seed)
        elif self.shared_graft:
            both = [first + own for first, own in zip(self._shared_choice(parts), choice, strict=True)]
            grafting.graft(layers, both, self.graft, seed)
        elif self.num_grafts:
            one_or_several = [own[0] if self.num_grafts == 1 else own for own in choice]
            grafting.graft(layers, one_or_several, self.graft, seed)

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Add the client's own experts, chosen now if the client is new, and load what travelled."""
        parts = client.parts
        choice = self._choice(client, kept)
        self._add_experts(parts, choice, client.seed)
        if self.prompt_gate:
            form = PromptGateForm(first_graft=int(self.shared_graft), closes_lora=self.keeps_lora)
            prompt_gate.add_prompt_gate(parts.model, parts.layers, form)
        seam.load_tensors(parts.model, {**sent.tensors, **kept.parameters})
        if self.prompt_gate and not kept:
            self._fit_prompt_gate(client)
        own = seam.current(parts.model, self.personal_names(parts))
        return Kept(parameters=own, beside=self._beside(parts, choice), optimizer=kept.optimizer)

    def _fit_prompt_gate(self, client: Client) -> None:
        """Fit the gate to the client's prompts, as the experts that are in place see them."""
        texts, largest = self.prompt_gate, self.prompt_gate_examples
        others = client.calibration_batches(largest, texts=texts, key="algorithm.prompt_gate")
        gate: PromptGate = getattr(client.parts.model, prompt_gate.NAME)
        gate.fit(client.parts.model, _prompts(client.calibration_batches(largest)), _prompts(others))

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train what is shared and what is private together; send the one, keep the other."""
        is_new = not kept
        kept = self.install(client, kept, sent)
        if self.prompt_gate and self.experts and not is_new:
            self._fit_prompt_gate(client)
        meter, watched = GateMeter(), self.grafted_layers(client.parts) if self.has_gates else ()
        closing = self._closing(client)
        with seam.watch_experts(watched, meter.observe):
            result = client.train(
                self.trained(client.parts, sent), optimizer_state=kept.optimizer, correction=closing
            )
        means = torch.tensor([mean for _, mean in sorted(meter.means().items())])
        tables = {GATE_MEAN: means} if self.has_gates else {}
        upload = upload_of(client, self.shared_names(client.parts), sent, result, tables=tables)
        kept = self.keep(client, kept, result)
        if self.own_model == "received":
            seam.load_tensors(client.parts.model, sent.tensors)
        return upload, kept

    def _closing(self, client: Client) -> Correction | None:
        """Return what trains the private gates to stay closed off the task, if that is asked for."""
        if not self.off_task:
            return None
        batches = client.calibration_batches(
            self.off_task_examples, texts=self.off_task, key="algorithm.off_task"
        )
        gates = grafting.names_of_kind(self.private_experts(client.parts), is_gate=True)
        layers = self.grafted_layers(client.parts)
        start = client.round_number * client.training.num_local_steps
        return ClosedGates(
            client.parts.model, layers, gates, batches, self.off_task_weight, start
        ).as_correction()

    def describe(self, kept: Kept) -> Tensors:
        """Return the copied experts of each layer."""
        return kept.beside


def _prompts(batches: Sequence[Batch]) -> list[Prompt]:
    """Return the prompts of batches; a text without one counts whole."""
    return [
        prompt if len(prompt) > 1 else tuple(row[mask.bool()].tolist())
        for batch in batches
        for prompt, row, mask in zip(batch.prompts(), batch.input_ids, batch.attention_mask, strict=True)
    ]
