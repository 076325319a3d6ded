"""Single turns on a tiny model, and FedAvg of all experts to compare with."""

from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file

from fedexperts.algorithms.api import Client, ClientFacts, Kept, ModelParts
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.data.batches import Batch
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.moe.surgery.undo import undone
from fedexperts.running.experiment import run_experiment
from fedexperts.training.settings import TrainingSettings

CLIENTS = tuple(ClientFacts(client_id=name, num_train=5) for name in ("a", "b", "c"))


@dataclass(frozen=True, kw_only=True)
class ExpertsOnly(FedAvg):
    """FedAvg of all experts, without LoRA."""

    def shared_names(self, parts):
        return seam.expert_names(parts.layers)

    def trained(self, parts, sent):
        return super().trained(parts, sent)[1:]


@dataclass(frozen=True, kw_only=True)
class ExpertsByRows(ExpertsOnly):
    """The same, with each expert's rows run at once, as in slots: sums have another order."""

    def prepare_steps(self, client, kept, sent):
        for layer in client.parts.layers:
            split_layer(layer, SlotPlan(num_experts=layer.num_experts, kept=tuple(range(layer.num_experts))))


def make_parts(dtype=torch.float32, **settings):
    """A tiny Qwen2-MoE with LoRA of rank 2."""
    model = tiny_model("qwen2_moe", **settings).to(dtype).requires_grad_(False)
    seam.install_implementation(model)
    names = add_lora(model, AdapterSettings(rank=2), 0)
    return ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names)


def planned(algorithm, parts, cohort=("a", "b", "c"), clients=CLIENTS):
    """The server's state with the first round's roles."""
    state = replace(algorithm.init(parts, clients), seed=4, num_rounds=6)
    return algorithm.plan_round(state, cohort, 1)


def make_batch(seed=2):
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(12) < 4, -100, ids)
    return Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_examples=4, num_labels=32
    )


def make_client(parts, client_id="a", round_number=1, num_steps=2):
    return Client(
        client_id=client_id,
        round_number=round_number,
        num_rounds=6,
        seed=4,
        parts=parts,
        training=TrainingSettings(batch_size=4, num_local_steps=num_steps),
        num_train=5,
        draw_batches=lambda: [make_batch(at) for at in range(num_steps)],
        calibration_batches=lambda largest: [make_batch(8), make_batch(9)],
    )


def turn(algorithm, parts, state, client_id="a", kept=None, **client):
    """One client's upload and what it keeps; the model is undone."""
    sent = algorithm.download(state, client_id)
    with undone(parts.model, parts.layers):
        return algorithm.client_update(make_client(parts, client_id, **client), kept or Kept(), sent)


def run(config, folder, quiet):
    """A whole run's result, and the tensors of the server's last state."""
    result = run_experiment(config, folder, progress=quiet)
    path = max(folder.rglob("state-round-*.safetensors"))
    return result, load_file(path)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
