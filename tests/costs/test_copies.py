"""Copies beside the model are predicted for every method, and are the tensors that a real turn holds."""

import gc
from dataclasses import replace

import pytest
import torch

from fedexperts.algorithms import ALGORITHMS
from fedexperts.config.build import is_required
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import Batch
from fedexperts.federation.inprocess import InProcess
from fedexperts.federation.personal import PersonalStore
from fedexperts.messages import Download
from fedexperts.models.adapters import AdapterSettings
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.plan.counting import Counter
from fedexperts.plan.settings import PlanSettings
from fedexperts.running.checking import check_experiment
from fedexperts.running.workbench import open_workbench
from fedexperts.tensors import num_bytes

REQUIRED = {
    "experts_per_layer": 2,
    "mu": 0.1,
    "server_lr": 0.1,
    "strength": 0.1,
    "federated_rounds": 2,
    "personal_layers": 1,
    "head_steps": 1,
    "variant": "T",
}
NEEDS = dict.fromkeys(
    ("flux", "flux_plus", "graft_and_merge"), ("algorithm.num_tuned=4", "algorithm.merged_per_layer=2")
)
NEEDS["fmes"] = ("algorithm.num_tuned=4",)
FEW_EXPERTS = {"esft", "fedmoe", "flux", "flux_plus", "graft_and_merge", "fmes"}
"""Methods that send the experts that have changed: all of them are counted."""
STACKS = {"flora", "frlora"}
"""Methods that send, from the second round on, one LoRA for each client of the last cohort."""
OFTEN = {"flex", "scaffold"}
"""Methods of the fast suite; the others run with the slow tests."""


def storages(tensors):
    found = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage._cdata: storage.nbytes() for storage in found}


def live(kind=torch.Tensor):
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


class Meter:
    """Counts the bytes of tensors that have come into being since :meth:`start` and live at a local step.

    Left out are those that a prediction has under another name, the batches, the state of the generator that
    dropout leaves as it was (bytes), and single numbers.
    """

    def __init__(self, model):
        self.model, self.most = model, 0

    def start(self):
        gc.collect()
        self.before = live()  # Held, so that no address is used again.

    def step(self, loss):
        known = [*self.before, *self.model.parameters(), *self.model.buffers()]
        known += [p.grad for p in self.model.parameters() if p.grad is not None]
        for batch in live(Batch):
            known += [batch.input_ids, batch.attention_mask, batch.labels]
        for optimizer in live(torch.optim.Optimizer):
            known += [t for state in optimizer.state.values() for t in state.values()]
        tensors = live()
        known += [t for t in tensors if t.dtype == torch.uint8 or not t.dim()]
        others = storages(known)
        self.most = max(self.most, sum(size for key, size in storages(tensors).items() if key not in others))


@pytest.fixture
def config(method, make_config):
    needed = (
        f"algorithm.{name}={REQUIRED[name]}"
        for name, item in ALGORITHMS[method].__dataclass_fields__.items()
        if is_required(item)
    )
    return make_config(method, "data.partition.num_clients=2", "rounds=2", *needed, *NEEDS.get(method, ()))


def take_turns(bench, folder):
    """Let one client take two rounds; return the copies it held in the second, and the server's state."""
    runtime, algorithm = bench.scorer(PersonalStore(folder)).runtime, bench.algorithm
    state = replace(algorithm.init(bench.parts, runtime.facts()), seed=bench.config.seed)
    client_id, meter = bench.data.client_ids[0], Meter(bench.parts.model)
    for number in (1, 2):
        state = algorithm.plan_round(state, [client_id], number)
        download = Download(
            round_number=number,
            task="train",
            sent=algorithm.download(state, client_id),
            kept_round=number - 1,
            config_sha256=runtime.settings.config_sha256,
        )
        if number == 2:
            meter.start()
            runtime.watcher.step_done = meter.step
        [delivery] = InProcess(runtime).exchange([(client_id, download)])
        assert not delivery.upload.failure
        state = algorithm.server_update(state, [(client_id, delivery.upload)])
    return meter.most, state


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in sorted(ALGORITHMS)],
)
def test_client_and_server_hold_what_was_predicted(method, config, tmp_path):
    predicted = check_experiment(config)
    with open_workbench(config, Stopwatch()) as bench:
        copies, state = take_turns(bench, tmp_path)
        lora = num_bytes(seam.tensor_views(bench.parts.model, bench.parts.lora_names))
    if method in FEW_EXPERTS:
        assert 0 < copies < predicted.memory.copies
    elif method == "fmd":
        # Experts that came lie off the device; a cache is full or not.
        assert 0 < copies <= predicted.memory.copies + predicted.memory.offloaded
    elif method in STACKS:
        # A stack of one client's LoRA has come, with its rank as a number, in place of LoRA's start if any.
        assert abs(copies - predicted.memory.copies) <= lora + 8
    else:
        assert copies == predicted.memory.copies
    kept = num_bytes(state.tensors) + num_bytes(state.beside)
    assert predicted.server_bytes == kept or method in STACKS


def test_a_plan_counts_the_copies():
    settings = PlanSettings(batch=2, seq=48, dtype="float32", adapter=AdapterSettings(rank=4))
    counter = Counter(tiny_model("qwen3_moe").config, settings)
    memory, trained = counter.memory, counter.trained
    # What came, LoRA's start, and the client's own part, all in float32; the choice of an expert by layer.
    layers = counter.experts.num_layers
    assert memory.copies == 4 * (2 * trained["travelling"] + trained["personal"]) + 8 * layers
    assert memory.total == memory.activations + counter.before_activations.total
