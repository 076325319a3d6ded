"""FMD: all experts train with few on the device; numbers are FedAvg's, and what moves is counted."""

from dataclasses import replace

import pytest
import torch
from turns import CLIENTS, ExpertsByRows, assert_same, make_parts, planned, run, turn

from fedexperts.algorithms.fmd import CACHE_BYTES, Fmd, cache_of
from fedexperts.algorithms.fmq import Fmq
from fedexperts.costs.devices import DEVICES
from fedexperts.costs.work import WorkMeter, counting
from fedexperts.errors import UserError
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery.expert_cache import offloaded
from fedexperts.moe.surgery.undo import undone
from fedexperts.plan.counting import Counter
from fedexperts.plan.settings import PlanSettings
from fedexperts.run_directory import read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.tensors import num_bytes

SHORT = (
    "rounds=1",
    "data.partition.num_clients=2",
    "evaluation.exam.source=none",
    "evaluation.matrix=false",
    'evaluation.metrics=["loss"]',
)
ONE = 3 * 32 * 16 * 4
"""Bytes of an expert of the tiny model."""


def rounds(algorithm, parts, number=2):
    """The server's tensors after some rounds of two clients."""
    state = planned(algorithm, parts, ("a", "b"))
    for round_number in range(1, number + 1):
        uploads = [(name, turn(algorithm, parts, state, name, round_number=round_number)[0]) for name in "ab"]
        state = algorithm.server_update(state, uploads)
    return state.tensors


def test_the_tiny_model_s_experts_have_the_size_that_is_counted_here():
    assert num_bytes(make_parts().layers[0].expert(0)) == ONE


@pytest.fixture(scope="module")
def fedavg():
    return rounds(ExpertsByRows(experts=True), make_parts())


@pytest.fixture(scope="module")
def resident():
    return rounds(Fmq(form="lora"), make_parts())


@pytest.mark.parametrize(("num_held", "store"), [(0.5, "host"), (5, "host"), (12, "host"), (1, "disk")])
def test_it_is_fedavg_of_all_experts_bit_for_bit_at_any_size_of_the_cache(num_held, store, fedavg):
    fmd = Fmd(cache_gb=num_held * ONE / 1e9, store=store)
    assert_same(rounds(fmd, make_parts()), fedavg)


def test_lora_trains_and_travels_beside_the_experts_if_it_is_asked_for():
    parts = make_parts()
    experts = planned(Fmd(), parts).tensors
    algorithm = Fmd(lora=True)
    upload, _ = turn(algorithm, parts, planned(algorithm, parts), "a")
    assert upload.tensors.keys() == {*parts.lora_names, *experts}
    assert any(bool(upload.tensors[name].any()) for name in parts.lora_names if "lora_B" in name)


@pytest.mark.slow
def test_a_run_with_lora_is_fedavg_s_but_for_the_order_of_sums(make_config, tmp_path, quiet):
    one, expected = run(make_config("fedavg_experts", *SHORT), tmp_path / "fedavg", quiet)
    other, found = run(make_config("fmd", *SHORT, "algorithm.lora=true"), tmp_path / "fmd", quiet)
    for name, tensor in expected.items():
        # Adam divides by the root of a squared gradient, so that rounding of small ones moves a weight by a
        # share of the learning rate, 3e-3, in each of two steps.
        assert torch.allclose(found[name], tensor, atol=4e-4), name
    assert other["mean"]["loss_before"] == pytest.approx(one["mean"]["loss_before"], abs=1e-4)


@pytest.mark.parametrize(("num_held", "store"), [(0.1, "host"), (1, "host"), (12, "disk")])
def test_prefetched_experts_train_as_resident_ones_in_as_few_bits_do(num_held, store, resident):
    fmd = Fmd(form="prefetched", cache_gb=num_held * ONE / 1e9, store=store)
    assert_same(rounds(fmd, make_parts()), resident)


def figures(algorithm, parts, **client):
    return turn(algorithm, parts, planned(algorithm, parts), "a", **client)[0].measured


def test_with_room_for_all_each_expert_is_read_once_in_a_step_and_used_twice():
    told = figures(Fmd(), make_parts(), num_steps=3)
    # 48 tokens choose 2 of 6 experts in each of two layers: all are used, forward and backward.
    assert told["cache_misses"] == told["cache_hits"] == 3 * 12
    assert told["cache_hit_rate"] == 0.5
    assert told["expert_bytes_in"] == told["expert_bytes_out"] == 3 * 12 * ONE


def test_with_room_for_none_each_use_is_a_read():
    told = figures(Fmd(cache_gb=1e-9), make_parts(), num_steps=3)
    assert (told["cache_misses"], told["cache_hits"]) == (3 * 24, 0)
    assert told["expert_bytes_in"] == 2 * told["expert_bytes_out"] == 3 * 24 * ONE


def test_with_room_for_one_layer_the_last_layer_is_still_there_in_the_backward_pass():
    told = figures(Fmd(cache_gb=6 * ONE / 1e9), make_parts(), num_steps=1)
    assert (told["cache_misses"], told["cache_hits"]) == (12 + 6, 6)


def test_prefetched_experts_are_few_bits_and_come_before_they_are_needed():
    algorithm, parts = Fmd(form="prefetched"), make_parts()
    with undone(parts.model, parts.layers):
        algorithm.prepare(parts)
        one = cache_of(parts).stores[0].bytes_each
        assert cache_of(parts).limit == 12 * one
    # 1,536 values in 4 bits, and for each group of 32 or 16 a scale and a zero point of 3 bytes.
    assert one == 1536 // 2 + 3 * (32 * 1 + 32 * 1)
    told = figures(algorithm, parts, num_steps=2)
    # Frozen experts stay valid: all are read once, layer 1 ahead of its first use.
    assert told["expert_bytes_in"] == 12 * one
    assert told["expert_bytes_out"] == 0
    assert (told["cache_misses"], told["cache_reads_ahead"]) == (6, 6)
    assert told["cache_hits"] == 2 * 24 - 6


def test_the_clock_waits_for_reads_unless_they_are_ahead():
    algorithm, parts = Fmd(form="prefetched", store="disk"), make_parts()
    meter, device = WorkMeter(), replace(DEVICES["laptop"], disk_gb_per_s=1e-9)
    with counting(meter):
        told = figures(algorithm, parts, num_steps=2)
    work, moved = meter.work(device)["train"], told["expert_bytes_in"]
    assert (work.host_bytes, work.disk_bytes) == (moved, moved)
    # A byte a second: computing is nothing beside, and half of the bytes came ahead.
    assert work.seconds == pytest.approx(moved, rel=1e-3)
    synchronous = WorkMeter()
    with counting(synchronous):
        told = figures(Fmd(store="disk"), parts, num_steps=2)
    work = synchronous.work(device)["train"]
    assert work.host_bytes == told["expert_bytes_in"] + told["expert_bytes_out"]
    # Each step of the optimizer reads and writes all weights.
    assert work.disk_bytes == told["expert_bytes_in"] + 2 * 2 * 12 * ONE


def test_reads_ahead_overlap_with_computing():
    meter, device = WorkMeter(), replace(DEVICES["laptop"], host_gb_per_s=1e-9, memory_gb_per_s=1e-9)
    with counting(meter):
        torch.zeros(4) + 1.0  # 16 bytes read, 16 written: 32 seconds
        meter.move("host", 20, ahead=True)
        meter.move("host", 5)
    assert meter.work(device)["train"].seconds == pytest.approx(max(32 + 16, 20) + 5)
    with counting(meter):
        meter.move("host", 80, ahead=True)
    assert meter.work(device)["train"].seconds == pytest.approx(100 + 5)


# Memory


@pytest.mark.slow
def test_a_cache_has_the_size_that_memory_leaves():
    parts, algorithm = make_parts(), Fmd()
    with pytest.raises(UserError, match=r"client a has 1e-06 GB .* takes .* GB") as error:
        algorithm.init(parts, (replace(CLIENTS[0], memory_bytes=1000), *CLIENTS[1:]))
    least = float(str(error.value).split(" takes ")[1].split()[0]) * 1e9
    facts = (replace(CLIENTS[0], memory_bytes=round(least) + 2 * ONE), *CLIENTS[1:])
    state = algorithm.init(parts, facts)
    # The sentence gives four digits of the least memory, which has room for one expert.
    assert state.beside[CACHE_BYTES].tolist() == [pytest.approx(3 * ONE, abs=least / 1e3), 0, 0]
    for client_id, limit in (("a", int(state.beside[CACHE_BYTES][0])), ("b", 12 * ONE)):
        with undone(parts.model, parts.layers):
            algorithm.install_shared(parts, algorithm.download(state, client_id))
            assert cache_of(parts).limit == limit


def test_experts_off_the_device_are_not_in_its_memory(make_config):
    whole = check_experiment(make_config("fmd")).memory
    small = check_experiment(make_config("fmd", "algorithm.cache_gb=0.00001")).memory
    fedavg = check_experiment(make_config("fedavg_experts")).memory
    # Weights, gradients and two numbers of Adam's; AdamW also counts its steps.
    assert whole.offloaded == pytest.approx(4 * 12 * ONE, rel=1e-3)
    # The look-up of each layer's slots is a number for each expert.
    assert whole.weights == fedavg.weights - 12 * ONE + 12 * 8
    assert whole.gradients == 0
    assert whole.copies == 12 * ONE
    assert small.copies == 10_000
    assert small.total < fedavg.total - 40 * ONE


def test_stored_experts_lie_in_main_memory_whatever_device_the_model_moves_to():
    parts, algorithm = make_parts(), Fmd()
    with undone(parts.model, parts.layers):
        algorithm.prepare(parts)
        stored = offloaded(parts.model)
        assert num_bytes(stored) == 12 * ONE
        parts.layers[0].experts.to("meta")
        assert {tensor.device.type for tensor in offloaded(parts.model).values()} == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "bits is 8, but has no effect"),
        ({"lora_rank": 4}, "lora_rank is 4, but has no effect"),
        ({"cache_gb": -1.0}, "cache_gb must be at least 0"),
        ({"form": "prefetched", "bits": 5}, "bits is 5"),
        ({"store": "tape"}, 'store is "tape"'),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Fmd(**settings)


def test_what_moved_is_in_the_log_and_in_simulated_time(make_config, tmp_path, quiet):
    clock = {"clock": {"device": ["l20"]}}
    config = make_config("fmd", *SHORT, "algorithm.cache_gb=0.00001", **clock)
    predicted = check_experiment(config).clock
    run(config, tmp_path / "run", quiet)
    for line in read_lines(tmp_path / "run" / "clients.jsonl"):
        told = line["algorithm"]
        assert told["expert_bytes_in"] > told["expert_bytes_out"] > 0
        moved = told["expert_bytes_in"] + told["expert_bytes_out"]
        assert line["work"]["train"]["host_bytes"] == moved
    assert predicted.round_seconds > 0


@pytest.mark.slow
def test_a_plan_counts_it_from_headers_alone():
    memory = {
        method: Counter(tiny_model("qwen2_moe").config, PlanSettings(batch=2, seq=48, method=method)).memory
        for method in ("fmd", "fmq")
    }
    # In bfloat16 weights of 2 bytes leave the device, and come back as float32 with three more numbers.
    assert memory["fmd"].offloaded == pytest.approx(4 * 12 * ONE, rel=1e-3)
    assert memory["fmd"].copies == 12 * ONE / 2
    assert memory["fmq"].gradients == memory["fmq"].offloaded + 12 * ONE
