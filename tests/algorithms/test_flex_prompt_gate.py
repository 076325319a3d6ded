"""A client's own part that is closed off its task: in a run, in what it keeps, and what is refused."""

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.federation.personal import read_tensors
from fedexperts.models.prompt_gate import NAMES
from fedexperts.run_directory import read_json
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, load_personalised, opened_model

GATED = ("algorithm.prompt_gate=tinyworld", "algorithm.prompt_gate_examples=8")
RECEIVED = "algorithm.own_model=received"


@pytest.fixture
def run(make_config, tmp_path, quiet):
    def run(name, algorithm, *settings):
        run_experiment(make_config(algorithm, *settings), tmp_path / name, progress=quiet)
        return tmp_path / name

    return run


def logits(folder, who, prompt):
    with opened_model(folder, who, "after") as (bench, _, _), torch.no_grad():
        return bench.parts.model.eval()(input_ids=torch.tensor([prompt])).logits


def prompts_of(folder, client):
    """A prompt that its gate opens for and one that it closes for, looked for among tokens."""
    with opened_model(folder, client, "after") as (bench, _, _):
        gate = bench.parts.model.prompt_gate
        some = [(token, token + 1, token + 2) for token in range(3, 60)]
        is_open = gate.numbers_of(bench.parts.model, some).bool().tolist()
    return some[is_open.index(True)], some[is_open.index(False)]


@pytest.mark.parametrize(
    ("algorithm", "settings"), [("flex", (RECEIVED,)), ("local_graft", ()), ("flex_plus", ())]
)
def test_off_its_task_a_client_s_model_is_the_one_it_received(algorithm, settings, run, tmp_path):
    plain = run("plain", algorithm, *settings)
    folder = run("gated", algorithm, *settings, *GATED)
    server = [read_json(one / "result.json")["server_state_sha256"] for one in (plain, folder)]
    assert server[0] == server[1], "training is as without it"
    opened, closed = prompts_of(folder, "client-000")
    received = "base" if algorithm == "local_graft" else "server"
    assert torch.equal(logits(folder, "client-000", opened), logits(plain, "client-000", opened))
    assert not torch.equal(logits(folder, "client-000", closed), logits(plain, "client-000", closed))
    assert torch.equal(logits(folder, "client-000", closed), logits(folder, received, closed))
    exported = load_personalised(export_client(folder, "client-000", tmp_path / "exported")).model.eval()
    for prompt in (opened, closed):
        with torch.no_grad():
            said = exported(input_ids=torch.tensor([prompt])).logits
        assert torch.equal(said, logits(folder, "client-000", prompt)), "an export closes as the run does"


@pytest.mark.parametrize(("algorithm", "settings"), [("flex", (RECEIVED,)), ("flex_plus", ())])
def test_the_gate_is_fitted_once_and_kept_unless_experts_move(algorithm, settings, run):
    folder = run("gated", algorithm, *settings, *GATED, "rounds=3")
    kept = sorted((folder / "clients/client-000").glob("personal-round-*.safetensors"))
    first, *_, last = [read_tensors(path) for path in kept]
    same = {name for name in first if torch.equal(first[name], last[name])}
    of_the_gate = {name for name in first if name.endswith(NAMES)}
    assert len(of_the_gate) == 2
    assert all(first[name].abs().sum() > 0 for name in of_the_gate)
    assert same < first.keys()
    assert (of_the_gate <= same) == (algorithm == "flex")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("algorithm.prompt_gate_examples=4",), "has no effect without prompt_gate"),
        (GATED, 'own_model must be "received", not "trained"'),
        ((*GATED, RECEIVED, "algorithm.num_grafts=0"), "there is no private graft to close"),
        ((*GATED, "algorithm.placement=in_place"), "there is no private graft to close"),
    ],
)
def test_settings_that_cannot_close_anything_are_refused(settings, sentence, make_config):
    with pytest.raises(UserError, match=sentence):
        make_config("flex", *settings)
