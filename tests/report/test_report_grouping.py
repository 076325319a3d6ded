"""Runs to methods."""

from synthetic_runs import make_result

from fedexperts.report.grouping import methods_of, short_names
from fedexperts.report.reading import Run
from fedexperts.report.summary import at_a_glance


def runs_of(*results):
    return [Run(name=result["name"], result=result) for result in results]


def with_settings(result, section, **values):
    result["settings"][section] = result["settings"][section] | values
    return result


def with_new(result, **asynchronous):
    result["settings"]["asynchronous"] = asynchronous
    return result


def test_runs_that_differ_in_seeds_alone_are_one_method():
    (method,) = methods_of(runs_of(*(make_result("flex", seed) for seed in (2, 0, 1))))
    assert method.label == "flex"
    assert [run.seed for run in method.runs] == [0, 1, 2]


def test_a_key_that_varies_within_an_algorithm_is_in_the_label():
    results = [make_result("flex", gate_init=-4.0), make_result("flex", gate_init=0.0), make_result("fedavg")]
    assert {method.label for method in methods_of(runs_of(*results))} == {
        "flex gate_init=-4",
        "flex gate_init=0",
        "fedavg",
    }


def test_a_key_that_varies_between_algorithms_only_is_not_in_the_label():
    flex, fedavg = make_result("flex"), make_result("fedavg")
    assert flex["settings"]["training"]["lr"] != fedavg["settings"]["training"]["lr"]
    assert {method.label for method in methods_of(runs_of(flex, fedavg))} == {"flex", "fedavg"}


def test_of_a_section_that_some_runs_lack_only_what_tells_them_apart_is_in_the_label():
    ours = {"buffer": 2, "concurrency": 0, "max_staleness": 0}
    results = [make_result("fedavg"), with_new(make_result("fedavg"), **ours)]
    labels = [method.label for method in methods_of(runs_of(*results))]
    assert sorted(labels) == ["fedavg", "fedavg buffer=2"]
    results.append(with_new(make_result("fedavg"), **ours | {"max_staleness": 4}))
    labels = [method.label for method in methods_of(runs_of(*results))]
    assert sorted(labels) == ["fedavg", "fedavg max_staleness=0", "fedavg max_staleness=4"]


def test_how_often_a_run_is_evaluated_makes_no_task():
    results = [with_settings(make_result("flex"), "evaluation", every=number) for number in (2, 4)]
    methods = methods_of(runs_of(*results))
    assert [(method.task, method.name) for method in methods] == [("", "flex every=2"), ("", "flex every=4")]


def test_an_unusual_adapter_is_in_the_label():
    results = [
        with_settings(make_result(name), "adapter", rank=rank)
        for name, rank in (("flex", 8), ("fedavg", 8), ("local_only", 44))
    ]
    assert {method.label for method in methods_of(runs_of(*results))} == {
        "flex",
        "fedavg",
        "local_only rank=44",
    }


def test_what_varies_in_the_data_is_the_task_and_not_the_method():
    results = [
        with_settings(make_result(name), "data", partition={"kind": kind})
        for kind in ("iid", "dirichlet")
        for name in ("flex", "fedavg")
    ]
    methods = methods_of(runs_of(*results))
    assert [(method.task, method.name) for method in methods] == [
        ("partition.kind=iid", "flex"),
        ("partition.kind=iid", "fedavg"),
        ("partition.kind=dirichlet", "flex"),
        ("partition.kind=dirichlet", "fedavg"),
    ]


def test_the_best_method_comes_first():
    names = [method.name for method in methods_of(runs_of(make_result("fedavg"), make_result("flex")))]
    assert names == ["flex", "fedavg"]


def test_a_short_name_is_the_shortest_ending_that_tells_keys_apart():
    names = short_names(["training.lr", "algorithm.lr", "rounds", "data.partition.alpha", "model.name"])
    assert names == {
        "training.lr": "training.lr",
        "algorithm.lr": "algorithm.lr",
        "rounds": "rounds",
        "data.partition.alpha": "alpha",
        "model.name": "model.name",
    }


def named(variant, result):
    return Run(name=f"{variant}-seed-{result['settings']['seed']}", result=result)


def rank_and_rate(method, seed, rank, rate, task=0.0):
    result = with_settings(make_result(method, seed), "adapter", rank=rank, alpha=2.0 * rank)
    result = with_settings(result, "training", lr=rate)
    return with_settings(result, "data", disagreement=task)


def test_long_labels_give_way_to_the_names_of_variants():
    runs = [named("plain", rank_and_rate("fedavg", seed, 8, 0.01)) for seed in (0, 1)] + [
        named("wide", rank_and_rate("fedavg", seed, 44, 0.03)) for seed in (0, 1)
    ]
    methods = methods_of(runs)
    assert {(method.name, method.algorithm) for method in methods} == {
        ("plain", "fedavg"),
        ("wide", "fedavg"),
    }
    assert [len(method.runs) for method in methods] == [2, 2]


def test_the_task_s_part_of_a_variant_is_left_out():
    runs = [
        named(f"{world}-{name}", rank_and_rate("fedavg", 0, rank, rate, task))
        for world, task in (("agree", 0.0), ("disagree", 1.0))
        for name, rank, rate in (("plain", 8, 0.01), ("wide", 44, 0.03))
    ]
    methods = methods_of(runs)
    assert {(method.task, method.name) for method in methods} == {
        (f"data.disagreement={task}", name) for task in (0, 1) for name in ("plain", "wide")
    }


def test_names_that_do_not_tell_methods_apart_are_not_taken():
    by_settings = {"fedavg rank=44 alpha=88 lr=0.03", "fedavg rank=8 alpha=16 lr=0.01"}
    one, two = (rank_and_rate("fedavg", 0, *how) for how in ((8, 0.01), (44, 0.03)))
    assert {method.name for method in methods_of([named("x", one), named("x", two)])} == by_settings
    again = rank_and_rate("fedavg", 1, 8, 0.01)
    runs = [named("x", one), named("y", again), named("z", two)]
    assert {method.name for method in methods_of(runs)} == by_settings


def test_short_labels_stay():
    runs = [named("a", make_result("flex", gate_init=-4.0)), named("b", make_result("flex", gate_init=0.0))]
    assert {method.name for method in methods_of(runs)} == {"flex gate_init=-4", "flex gate_init=0"}


def test_methods_with_the_same_guarantee_are_named_together():
    privacy = {"epsilon": 355.2, "delta": 1e-5, "noise": "server", "noise_is_secret": True, "clip_norm": 1.0}
    own = {"flex": privacy, "fedavg": privacy, "local_only": privacy | {"epsilon": None}}
    results = [make_result(name, seed) | {"privacy": one} for name, one in own.items() for seed in (0, 1)]
    said = [one for one in at_a_glance(methods_of(runs_of(*results))) if "differential privacy" in one]
    assert sorted(said) == [
        "flex, fedavg: differential privacy of clients with epsilon 355 at delta 1e-05 for the shared "
        "tensors, not for scores and losses (noise by the server).",
        "local_only: changes are clipped to a norm of 1.0, without noise: no differential privacy.",
    ]
