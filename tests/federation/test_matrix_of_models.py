"""The matrix of models by test splits, whose time grows with the square of the number of clients."""

import pytest

from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.running.workbench import open_workbench, personal_store


@pytest.mark.parametrize(("largest", "is_made"), [(2, False), (3, True)])
def test_a_larger_federation_has_no_matrix(largest, is_made, make_config, tmp_path):
    config = make_config("fedavg", "evaluation.matrix=true", f"evaluation.matrix_clients={largest}")
    with open_workbench(config, Stopwatch()) as bench:
        expected = bench.scorer(personal_store(tmp_path)).expected("evaluate_fully")
    assert ("matrix_loss" in expected) == is_made
