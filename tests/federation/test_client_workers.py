"""Workers for clients within a run: the same bits as one process, one copy of the frozen weights."""

import multiprocessing
import os
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from fedexperts.algorithms.api import ClientFacts
from fedexperts.config.load import config_sha256, difference, settings_sha256, to_table
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.workers import WorkerPool, _reason, take_turn
from fedexperts.messages import Download, Upload, decode_upload, encode_download, encode_upload
from fedexperts.models.frozen_weights import map_frozen, write_frozen
from fedexperts.models.load import ModelSettings, load_model
from fedexperts.processes import WorkerEnded
from fedexperts.run_directory import SEAL, read_json, read_lines
from fedexperts.running import workbench
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.tensors import sha256_of

sys.path.insert(0, str(Path(__file__).parent))
from deadly_worker import VICTIM, open_deadly_runtime, outside_of, outside_of_in_worker


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in ("seconds", "name", SEAL)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def facts_of(run):
    """Everything that a run leaves, without times and the number of workers."""
    result = without_times(read_json(run / "result.json"))
    assert result["settings"]["transport"].pop("workers") in (1, 2)
    kept = {str(path.relative_to(run)): path.read_bytes() for path in run.glob("clients/*/*.safetensors")}
    lines = [without_times(read_lines(run / f"{name}.jsonl")) for name in ("rounds", "clients")]
    return result, kept, lines, read_json(run / "base.json")


class Interrupting(QuietProgress):
    """Interrupts the run after its first round."""

    def round_finished(self, round_number, summary):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one_also_when_they_take_over_its_run(make_config, tmp_path, quiet):
    one = make_config("flex", "cohort.size=2")
    two = make_config("flex", "cohort.size=2", "transport.workers=2")
    run_experiment(one, tmp_path / "one" / "run", progress=quiet)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(one, tmp_path / "two" / "run", progress=Interrupting())
    result = run_experiment(two, tmp_path / "two" / "run", progress=quiet, resume=True)
    assert result["seconds"]["workers"] > 0
    assert result["frozen_unchanged"]
    assert facts_of(tmp_path / "two" / "run") == facts_of(tmp_path / "one" / "run")
    rounds, clients = (
        read_lines(tmp_path / "two" / "run" / f"{name}.jsonl") for name in ("rounds", "clients")
    )
    for line in clients[-2:]:
        assert sum(line["seconds"].values()) <= rounds[-1]["seconds"]["total"], "a turn lies within its round"


def test_an_answer_that_cannot_be_written_is_the_client_s_failure():
    class Runtime:
        def handle(self, client_id, download):
            return Upload(report={"client": client_id, "round": download.round_number})

    def turn(client_id):
        message = encode_download(Download(round_number=7, task="train"))
        return decode_upload(take_turn(Runtime(), client_id, message))

    assert turn("a").report == {"client": "a", "round": 7}
    assert turn("a" * 9000).failure.startswith("the plain data of a message take")


def test_turns_that_have_ended_are_not_looked_at_again(monkeypatch):
    """Each turn is looked at a few times, however many there were before it."""

    class Here(WorkerPool):
        def ask(self, client_id, message, on_event):
            return encode_upload(Upload(report={"client": client_id})), {}

    number, looks, done = 100, [], Future.done
    monkeypatch.setattr(Future, "done", lambda self: looks.append(self) or done(self))
    downloads = [(f"client-{place:03d}", Download(round_number=1, task="train")) for place in range(number)]
    facts = tuple(ClientFacts(client_id=client_id, num_train=1) for client_id, _ in downloads)
    with Here(2, None, facts) as pool:
        found = [delivery.upload.report["client"] for delivery in pool.exchange(downloads)]
    assert found == [client_id for client_id, _ in downloads]
    assert len(looks) <= 12 * number


@pytest.mark.parametrize(("exit_code", "is_hint"), [(-9, True), (-15, False), (1, False)])
def test_a_killed_worker_may_have_lacked_memory(exit_code, is_hint):
    reason = _reason(WorkerEnded(exit_code))
    assert reason.startswith("worker ended with")
    assert ("if memory ran out, fewer workers need less of it" in reason) == is_hint


def test_the_number_of_workers_is_no_part_of_what_ran(make_config):
    one, two = make_config("flex"), make_config("flex", "transport.workers=2")
    assert config_sha256(one) == config_sha256(two) == settings_sha256(to_table(two))
    assert difference(one, two) == []
    assert to_table(two)["transport"]["workers"] == 2


def test_workers_are_refused_over_flower_and_below_one(make_config):
    with pytest.raises(UserError, match=r"transport\.workers must be at least 1, not 0"):
        make_config("flex", "transport.workers=0")
    with pytest.raises(UserError, match=r'transport\.workers is 2, but with transport\.name = "flower"'):
        make_config("flex", "transport.workers=2", "transport.name=flower")


def test_mapped_weights_lie_in_the_file_and_are_private(tiny_checkpoint):
    one, two = (load_model(ModelSettings(name=str(tiny_checkpoint)), 0).model for _ in range(2))
    before, first = sha256_of(dict(one.named_parameters())), next(name for name, _ in one.named_parameters())
    shared = write_frozen(one, [first])
    for model in (one, two):
        map_frozen(model, shared)
    assert sha256_of(dict(one.named_parameters())) == before
    inode = os.fstat(shared.descriptor).st_ino
    assert outside_of(inode, one, [first]) == outside_of(inode, two, [first]) == []
    assert outside_of(inode, one, []) == [first]
    for parameter in two.parameters():
        parameter.data.fill_(1.0)
    assert sha256_of(dict(one.named_parameters())) == before


@pytest.mark.slow
def test_workers_hold_the_frozen_weights_in_the_mapped_file(make_config, tmp_path, monkeypatch):
    config = make_config("flex", "transport.workers=9")
    written, write = [], workbench.write_frozen
    monkeypatch.setattr(workbench, "write_frozen", lambda *given: written.append(write(*given)) or written[0])
    with workbench.open_workbench(config, Stopwatch()) as bench:
        clients = bench.scorer(workbench.personal_store(tmp_path)).runtime.facts()
        with workbench.open_worker_pool(bench, tmp_path, clients) as pool:
            assert len(list(pool.start())) == pool.num_workers == 3
            inode = os.fstat(written[0].descriptor).st_ino
            assert pool.call_all(partial(outside_of_in_worker, inode=inode)) == [[]] * 3
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_killed_worker_is_a_failure_of_its_client_and_is_replaced(
    make_config, tmp_path, quiet, monkeypatch
):
    monkeypatch.setattr(workbench, "_open_runtime", open_deadly_runtime)
    two = ("transport.workers=2", "cohort.on_failure=continue")
    result = run_experiment(make_config("flex", *two), tmp_path / "goes_on", progress=quiet)
    assert [(one["round"], one["client"]) for one in result["failures"]] == [(1, VICTIM)]
    assert result["failures"][0]["reason"].startswith("worker ended with signal 9")
    assert [line["num_failed"] for line in read_lines(tmp_path / "goes_on" / "rounds.jsonl")] == [1, 0]
    with pytest.raises(UserError, match=f"client {VICTIM}: worker ended with signal 9"):
        run_experiment(make_config("flex", two[0]), tmp_path / "stops", progress=quiet)
    assert multiprocessing.active_children() == []
