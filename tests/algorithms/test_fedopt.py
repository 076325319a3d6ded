"""Server optimizers: the published updates to the digit, the release's, and their equality with FedAvg."""

from math import sqrt

import pytest
import torch

from fedexperts.algorithms.api import ServerState
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedexperts.errors import UserError
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.messages import Upload
from fedexperts.run_directory import RunDirectory
from fedexperts.running.experiment import run_experiment
from fedexperts.tensors import equal_bits, sha256_of

CHANGES = (1.0, -2.0, 0.25)
"""Mean change Δ of three rounds, weighted by examples."""
HALF = {"server_lr": 2.0, "beta1": 0.5, "beta2": 0.5, "tau": 2.0}


def upload(value: torch.Tensor, num_examples: float) -> tuple[str, Upload]:
    return "client", Upload(tensors={"w": value}, weights={"w": num_examples})


def three_rounds(algorithm) -> list[float]:
    """Two clients, of 1 and 3 examples: the first moves by Δ + 3, the second by Δ - 1."""
    state = ServerState(round_number=0, tensors={"w": torch.ones(1, dtype=torch.float64)})
    reached = []
    for change in CHANGES:
        start = state.tensors["w"]
        state = algorithm.server_update(
            state, [upload(start + change + 3, 1.0), upload(start + change - 1, 3.0)]
        )
        reached.append(state.tensors["w"].item())
    assert state.round_number == len(CHANGES)
    return reached


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        # m = Δ; 0.5·1 - 2; 0.5·(-1.5) + 0.25
        (FedAvgM(server_lr=2.0, momentum=0.5), (1, -1.5, -0.5)),
        # m = Δ; 0.5·1 - 0.5·2; 0.5·(-0.5) + 0.5·0.25
        (FedAvgM(server_lr=2.0, momentum=0.5, release_rule=True), (1, -0.5, -0.125)),
        # v = τ² = 4, then 4 + 1; 5 + 4; 9 + 0.0625; the step is Δ / (√v + 2)
        (
            FedAdagrad(server_lr=2.0, tau=2.0),
            (1 / (sqrt(5) + 2), -2 / (sqrt(9) + 2), 0.25 / (sqrt(9.0625) + 2)),
        ),
        # m = 0.5·0 + 0.5·1; 0.25 - 1; -0.375 + 0.125; v = 0.5·4 + 0.5·1; 1.25 + 0.5·4; 1.625 + 0.5·0.0625
        (
            FedAdam(**HALF),
            (0.5 / (sqrt(2.5) + 2), -0.75 / (sqrt(3.25) + 2), -0.25 / (sqrt(1.65625) + 2)),
        ),
        # m as above; v = 4 - 0.5·1 (v > Δ²); 3.5 + 0.5·4 (v < Δ²); 5.5 - 0.5·0.0625 (v > Δ²)
        (
            FedYogi(**HALF),
            (0.5 / (sqrt(3.5) + 2), -0.75 / (sqrt(5.5) + 2), -0.25 / (sqrt(5.46875) + 2)),
        ),
        # m = 0.5·1 + 0.5·1; 0.5 - 1; -0.25 + 0.125; m² = 1, 0.25, 1/64
        # v = 0.5·4 + 0.5·1; 1.25 + 0.5·0.25; 0.6875 + 0.5/64
        (
            FedAdam(**HALF, release_rule=True),
            (1 / (sqrt(2.5) + 2), -0.5 / (sqrt(1.375) + 2), -0.125 / (sqrt(0.6953125) + 2)),
        ),
        # m as above; v = 4 - 0.5·1; 3.5 - 0.5·0.25; 3.375 - 0.5/64
        (
            FedYogi(**HALF, release_rule=True),
            (1 / (sqrt(3.5) + 2), -0.5 / (sqrt(3.375) + 2), -0.125 / (sqrt(3.3671875) + 2)),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_three_rounds_are_those_computed_by_hand(algorithm, steps):
    """From w = 1 at rate 2; the tolerance is float64's, in which the sums are made."""
    expected = [1 + 2 * sum(steps[: number + 1]) for number in range(3)]
    assert three_rounds(algorithm) == pytest.approx(expected, rel=1e-14)


def test_equal_weights_are_those_of_algorithm_2():
    """The unweighted mean of Δ + 3 and Δ - 1 is Δ + 1."""
    reached = three_rounds(FedAvgM(momentum=0.0, weighting="equal"))
    assert reached == pytest.approx([1 + 2, 3 - 1, 2 + 1.25], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_server_sgd_at_rate_1_is_fedavg_bit_for_bit(dtype):
    """Also where the mean is far smaller than the tensors that it is a change of."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> torch.Tensor:
        return (scale * torch.randn(10_000, generator=generator)).to(dtype)

    states = [ServerState(round_number=0, tensors={"w": draw(1e3)})] * 2
    for scale in (1e-9, 1.0, 1e-9):
        uploads = [upload(draw(scale), 7.0), upload(draw(scale), 3.0), upload(draw(scale), 11.0)]
        both = zip((FedAvg(), FedAvgM(momentum=0.0)), states, strict=True)
        states = [algorithm.server_update(state, uploads) for algorithm, state in both]
        assert equal_bits(states[0].tensors["w"], states[1].tensors["w"])


@pytest.mark.parametrize("experts", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_run_of_server_sgd_at_rate_1_is_fedavg(experts, make_config, tmp_path, quiet):
    ends = {}
    for name, settings in (("fedavg", ()), ("fedavgm", ("algorithm.momentum=0",))):
        config = make_config(name, f"algorithm.experts={experts}", *settings)
        result = run_experiment(config, tmp_path / name, progress=quiet)
        checkpoint = load_checkpoint(RunDirectory(tmp_path / name))
        ends[name] = sha256_of(checkpoint.state.tensors), result["mean"], result["exam"]
    assert ends["fedavg"] == ends["fedavgm"]


@pytest.mark.parametrize("cls", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_a_round_without_uploads_moves_nothing(cls):
    state = ServerState(round_number=0, tensors={"w": torch.ones(3)})
    algorithm = cls(server_lr=0.1)
    moved = algorithm.server_update(state, [upload(torch.full((3,), 2.0), 1.0)])
    assert not torch.equal(moved.tensors["w"], state.tensors["w"])
    still = algorithm.server_update(moved, [])
    assert (still.tensors, still.beside, still.round_number) == (moved.tensors, moved.beside, 2)


@pytest.mark.parametrize("cls", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_a_server_that_forgets_its_moments_goes_elsewhere(cls):
    algorithm = cls(server_lr=0.1)
    first = algorithm.server_update(
        ServerState(round_number=0, tensors={"w": torch.zeros(1)}), [upload(torch.ones(1), 1.0)]
    )
    forgetful = ServerState(round_number=1, tensors=first.tensors)
    after = [algorithm.server_update(state, [upload(torch.ones(1), 1.0)]) for state in (first, forgetful)]
    assert not torch.equal(after[0].tensors["w"], after[1].tensors["w"])


def test_moments_are_float32_at_least():
    state = ServerState(round_number=0, tensors={"w": torch.zeros(3, dtype=torch.bfloat16)})
    after = FedAdam(server_lr=0.1).server_update(state, [upload(torch.ones(3, dtype=torch.bfloat16), 1.0)])
    assert after.tensors["w"].dtype == torch.bfloat16
    assert {moment.dtype for moment in after.beside.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FedAvgM(server_lr=0.0), "^server_lr must be above 0"),
        (lambda: FedAvgM(momentum=1.0), "^momentum must be from 0 to below 1, not 1.0"),
        (lambda: FedAdam(server_lr=0.1, beta2=-0.1), "^beta2 must be from 0 to below 1"),
        (lambda: FedAdagrad(server_lr=0.1, tau=0.0), "^tau must be above 0"),
        (lambda: FedYogi(server_lr=0.1, tau=0.0), "^tau must be above 0"),
        (lambda: FedYogi(server_lr=0.1, beta1=0.0, release_rule=True), "no effect with beta1 = 0"),
        (lambda: FedAvgM(momentum=0.0, release_rule=True), "no effect with momentum = 0"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_the_server_rate_must_be_chosen(name, make_config):
    with pytest.raises(UserError, match=r"algorithm\.server_lr is missing"):
        make_config(name)
