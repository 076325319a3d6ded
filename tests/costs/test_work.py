"""Work counted while operations run is what can be computed by hand from their shapes."""

from collections import Counter

import pytest
import torch
from torch.nn import functional

from fedexperts.costs.devices import DEVICES, Device
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.costs.work import PhaseWork, WorkMeter, as_figures, count_moved, counting, from_figures
from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.errors import UserError
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings

RATES = {
    "half_tflops": 2e-6,
    "float32_tflops": 1e-6,
    "memory_gb_per_s": 1e-3,
    "host_gb_per_s": 1e-4,
    "disk_gb_per_s": 1e-5,
    "memory_gb": 1.0,
    "download_mbit": 8.0,
    "upload_mbit": 4.0,
}
SLOW = Device(**RATES)
"""A million operations in float32, a million bytes of memory, a hundred thousand of host, ten of disk."""


def counted(run):
    meter = WorkMeter()
    with counting(meter):
        run()
    return meter


def flops_of(meter):
    return sum(one.flops * count for one, count in meter.operations.items())


def test_a_linear_layer_is_counted_by_hand_forward_and_backward():
    rows, weight = torch.randn(7, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    grad = torch.randn(7, 5)
    meter = counted(lambda: functional.linear(rows, weight).backward(grad))
    work = meter.work(SLOW)["train"]
    one = 2 * 7 * 3 * 5
    # Each of the three products reads two of the three matrices and writes the third, 4 bytes a number; the
    # gradients of the two inputs are written as they are made.
    assert work.flops == 3 * one
    assert work.memory_bytes == 3 * 4 * (7 * 3 + 5 * 3 + 7 * 5)
    assert work.seconds == pytest.approx(3 * max(one / 1e6, 4 * 71 / 1e6), rel=1e-12)


def test_a_frozen_weight_saves_a_third():
    rows, weight = torch.randn(7, 3, requires_grad=True), torch.randn(5, 3)
    assert flops_of(counted(lambda: functional.linear(rows, weight).sum().backward())) == 2 * 2 * 7 * 3 * 5


def test_rows_grouped_by_expert_are_counted_whatever_their_split():
    rows, weight = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4, 12)
    for first in (3, 8):
        offsets = torch.tensor([first, 8], dtype=torch.int32)
        meter = counted(
            lambda offsets=offsets: (
                functional.grouped_mm(rows, weight, offs=offsets).square().sum().backward()
            )
        )
        assert flops_of(meter) == 2 * (2 * 8 * 4 * 12)


def test_attention_is_two_products_forward_and_five_backward():
    query = torch.randn(2, 3, 5, 4, requires_grad=True)
    meter = counted(lambda: functional.scaled_dot_product_attention(query, query, query).sum().backward())
    assert flops_of(meter) == (2 + 5) * (2 * 2 * 3 * 5 * 5 * 4)


def test_numbers_of_16_bits_run_at_their_own_rate():
    rows = torch.zeros(40, 1000, dtype=torch.bfloat16)
    meter = counted(lambda: rows @ rows.T)
    products = [one for one in meter.operations if one.flops]
    assert [one.is_half for one in products] == [True]
    one = {"flops": products[0].flops, "num_bytes": products[0].num_bytes}
    assert SLOW.operation_seconds(**one, is_half=True) == 2 * 40 * 1000 * 40 / 2e6


def test_views_cost_nothing_and_a_gather_reads_its_rows():
    table = torch.zeros(1000, 4)
    assert counted(lambda: table.T.reshape(4, 10, 100)[0].expand(3, 10, 100)).operations.total() == 0
    work = counted(lambda: functional.embedding(torch.tensor([1, 2]), table)).work(SLOW)["train"]
    assert work.memory_bytes == 2 * (2 * 4 * 4) + 2 * 8


def test_questions_about_a_tensor_cost_nothing():
    """A dry run asks for devices, a real one does not; both must count the same."""
    table = torch.zeros(1000, 4)
    assert counted(lambda: torch.ops.prim.device(table)).operations.total() == 0


def test_phases_of_a_stopwatch_are_phases_of_work_and_what_surrounds_the_turn_is_not():
    watch, square = Stopwatch(), torch.ones(2, 2)

    def turn():
        square @ square
        with watch.phase("profile"):
            square @ square
            square @ square

    with watch.phase("rounds"):
        meter = counted(turn)
    found = meter.work(SLOW)
    assert {phase: own.flops for phase, own in found.items()} == {"train": 16, "profile": 32}


def test_bytes_that_a_method_moves_take_their_time_and_without_a_clock_nothing_happens():
    count_moved("disk", 5)

    def turn():
        count_moved("disk", 10_000)
        count_moved("host", 100_000)

    assert counted(turn).work(SLOW)["train"] == PhaseWork(host_bytes=100_000, disk_bytes=10_000, seconds=2.0)


def test_every_operation_may_have_a_cost_of_its_own():
    device = Device(**RATES, operation_us=1000.0)
    for is_training in (True, False):
        with torch.set_grad_enabled(is_training):
            meter = counted(lambda: torch.ones(1) + torch.ones(1))
        assert meter.work(device)["train"].seconds == pytest.approx(0.003 + 20 / 1e6)


def test_an_operation_without_gradients_may_cost_less():
    weight, inputs = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)

    def turn():
        (weight @ inputs).sum().backward()
        with torch.no_grad():
            _ = weight @ inputs

    meter = counted(turn)
    flops, numbers = Counter(), Counter()
    for one, count in meter.operations.items():
        flops[one.has_grad] += one.flops * count
        numbers[one.has_grad] += count
    assert flops == {True: 2 * 16, False: 16}
    costs = {"operation_us": 1000.0, "no_grad_operation_us": 10.0}
    added = meter.work(Device(**RATES, **costs))["train"].seconds - meter.work(SLOW)["train"].seconds
    assert added == pytest.approx(1e-3 * numbers[True] + 1e-5 * numbers[False])


def test_work_survives_its_way_through_a_message():
    work = {"train": PhaseWork(flops=3, seconds=0.1), "load": PhaseWork(host_bytes=4, disk_bytes=5)}
    assert from_figures(as_figures(work)) == work


def block_flops(config, tokens):
    """Forward floating-point operations of one layer of a Qwen2-MoE, by hand."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = hidden // heads
    projections = hidden * head * (2 * heads + 2 * config.num_key_value_heads)
    attention = 2 * tokens * heads * head
    routed = config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size
    shared = 3 * hidden * config.shared_expert_intermediate_size + hidden
    router = hidden * config.num_experts
    return 2 * tokens * (projections + attention + routed + shared + router)


def test_a_forward_pass_is_counted_by_hand():
    model = tiny_model("qwen2_moe").requires_grad_(False)
    seam.install_implementation(model)
    config, ids = model.config, torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        meter = counted(lambda: model(input_ids=ids))
    head = 2 * 24 * config.hidden_size * config.vocab_size
    assert flops_of(meter) == config.num_hidden_layers * block_flops(config, 24) + head


def batch(seed):
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :4] = IGNORED_LABEL
    return Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_examples=2, num_labels=16
    )


def test_counting_changes_no_bit_of_local_steps():
    def trained(meter):
        model = tiny_model("qwen2_moe").requires_grad_(False)
        seam.install_implementation(model)
        names = tuple(name for name, _ in model.named_parameters() if "experts" in name)
        with counting(meter):
            local_steps(
                model,
                [batch(0), batch(1)],
                [ParameterGroup(names=names, lr=1e-2)],
                TrainingSettings(),
                seed=0,
            )
        return model.state_dict()

    plain, metered = trained(None), trained(WorkMeter())
    assert all(torch.equal(plain[name], metered[name]) for name in plain)


@pytest.mark.parametrize("name", ["disk_gb_per_s", "operation_us", "no_grad_operation_us"])
def test_a_rate_that_nothing_can_be_divided_by_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be"):
        Device(**{**RATES, name: -1.0})


def test_named_devices_are_ordered_as_one_would_expect():
    seconds = {n: d.operation_seconds(flops=10**15, num_bytes=0, is_half=True) for n, d in DEVICES.items()}
    assert sorted(seconds, key=seconds.__getitem__) == ["rtx_4090", "l20", "laptop", "phone"]
