"""Replay: public texts in every step's batch, the same for every method."""

import json

import pytest

from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.calibration import first_texts
from fedexperts.federation.personal import PersonalStore
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.workbench import open_workbench

REPLAY = ("training.replay=tinyworld", "training.replay_size=3", "training.replay_texts=5")


def rows(batch):
    pairs = zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
    return [tuple(ids[is_token].tolist()) for ids, is_token in pairs]


def test_every_step_has_some_in_turn_on_top_of_the_client_s_own(make_config, tmp_path):
    drawn = []
    for overrides in ((), REPLAY):
        with open_workbench(make_config("fedavg", *overrides), Stopwatch()) as bench:
            runtime = bench.scorer(PersonalStore(tmp_path)).runtime
            client = bench.data.client_ids[0]
            drawn.append([batch for number in (1, 2) for batch in runtime.draw(client, number)])
            texts = first_texts(bench.format, "tinyworld", 5, "key")
    replayed = [row for batch in drawn[1] for row in rows(batch)[4:]]
    assert [rows(batch)[:4] for batch in drawn[1]] == [rows(batch) for batch in drawn[0]]
    assert replayed == [texts[place % 5].input_ids for place in range(3 * 4)]
    assert {len(batch.input_ids) for batch in drawn[1]} == {7}


def test_it_trains_and_is_counted(make_config, tmp_path, quiet):
    results = [
        run_experiment(make_config("fedavg", *more, "rounds=1"), tmp_path / str(len(more)), progress=quiet)
        for more in ((), REPLAY)
    ]
    assert len({result["server_state_sha256"] for result in results}) == 2
    lines = (tmp_path / "3" / "clients.jsonl").read_text().splitlines()
    assert {json.loads(line)["num_examples"] for line in lines} == {2 * 7}


def test_check_counts_the_larger_batch(make_config):
    plain, mixed = (check_experiment(make_config("fedavg", *more)) for more in ((), REPLAY))
    for one, other in zip(plain.clients, mixed.clients, strict=True):
        assert other.fullest_batch.examples == one.fullest_batch.examples + 3 == 7
        assert other.fullest_batch.labels > one.fullest_batch.labels
    assert mixed.memory.activations > plain.memory.activations


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("training.replay=missing.jsonl",), r'^training\.replay: missing file "missing.jsonl"'),
        (("training.replay_size=3",), "replay_size is 3, but has no effect without replay"),
        (("training.replay_size=-1", REPLAY[0]), r"replay_size must be 0 \(batch_size\) or more, not -1"),
        (("training.replay_texts=0", REPLAY[0]), "replay_texts must be at least 1, not 0"),
    ],
)
def test_mistakes_are_told_by_check(make_config, overrides, reason):
    with pytest.raises(UserError, match=reason):
        check_experiment(make_config("fedavg", *overrides))
