"""Runs to methods."""

from synthetic_runs import make_result

from fedexperts.report.grouping import methods_of, short_names
from fedexperts.report.reading import Run


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
