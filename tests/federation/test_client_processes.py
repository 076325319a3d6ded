"""Clients in processes of their own: the bits of resident ones, without the whole model, within a memory."""

import multiprocessing
import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fedexperts.config.load import config_sha256, difference
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.client_processes import PEAK, ClientProcesses, take_measured_turn
from fedexperts.federation.rounds import PLANNED
from fedexperts.federation.workers import take_turn
from fedexperts.messages import Download, decode_upload, encode_download
from fedexperts.models.tiny import tiny_model
from fedexperts.process_memory import MemoryGuard
from fedexperts.run_directory import SEAL, read_json, read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.running.workbench import open_workbench, personal_store
from fedexperts.tensors import sha256_of

FLUX = (
    "algorithm.num_tuned=4",
    "algorithm.merged_per_layer=2",
    "evaluation.exam.source=none",
    "evaluation.matrix=false",
)
PROCESS = "transport.clients=process"
BOTH_FAMILIES = pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", ()),
        pytest.param(
            "granitemoe",
            ("algorithm.merge.refit_down=true", "algorithm.upload=int8", "model.dtype=bfloat16"),
            marks=pytest.mark.slow,
        ),
    ],
)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """Make a checkpoint of a family, with the tokenizer of the tiny one."""
    return partial(save_model, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "model")


def save_model(tokenizer, folder: Path, family: str, **sizes) -> str:
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(family, vocab_size=len(tokenizer), **special, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Client:
    """One client that takes turns here, on the resident model or on one whose experts stay on disk."""

    def __init__(self, stack, config, folder, *, on_disk):
        self.bench = stack.enter_context(open_workbench(config, Stopwatch(), on_disk=on_disk))
        self.folder = folder / f"on_disk_{on_disk}"
        self.runtime = self.bench.scorer(personal_store(self.folder)).runtime
        self.runtime.guard = MemoryGuard(0, {})
        self.message = folder / "message"
        self.on_disk, self.state, self.round_number = on_disk, None, 0

    def start(self):
        state = self.bench.algorithm.init(self.runtime.parts, self.runtime.facts())
        return replace(state, seed=3, num_rounds=2)

    def turn(self, client_id="client-000"):
        """The upload of a round; the server goes on from it."""
        algorithm, kept_round = self.bench.algorithm, self.round_number
        self.round_number += 1
        self.state = algorithm.plan_round(self.state or self.start(), [client_id], self.round_number)
        message = encode_download(
            Download(
                round_number=self.round_number,
                task="train",
                sent=algorithm.download(self.state, client_id),
                kept_round=kept_round,
                config_sha256=config_sha256(self.bench.config),
            )
        )
        self.message.write_bytes(message)
        if self.on_disk:
            answer, measured = take_measured_turn(self.runtime, client_id, str(self.message))
            assert measured[PEAK] > 0
        else:
            answer = take_turn(self.runtime, client_id, message)
        upload = decode_upload(answer)
        if not upload.failure:
            self.state = algorithm.server_update(self.state, [(client_id, upload)])
        return upload

    def kept(self):
        return {path.name: path.read_bytes() for path in self.folder.glob("clients/*/*.safetensors")}


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@BOTH_FAMILIES
def test_experts_on_disk_give_the_uploads_of_resident_ones(
    family, options, checkpoint, make_config, tmp_path, stack
):
    config = make_config("flux", *FLUX, *options, model={"name": checkpoint(family)})
    resident, on_disk = (Client(stack, config, tmp_path, on_disk=where) for where in (False, True))
    before = on_disk.runtime.model_sha256()
    for _ in range(2):
        wanted, found = resident.turn(), on_disk.turn()
        assert not wanted.failure
        for part in ("tensors", "beside", "tables"):
            assert sha256_of(getattr(found, part)) == sha256_of(getattr(wanted, part)), part
        assert (found.weights, found.metrics, found.measured) == (
            wanted.weights,
            wanted.metrics,
            wanted.measured,
        )
        assert on_disk.runtime.model_sha256() == before, "the turn is undone"
    assert on_disk.kept() == resident.kept() != {}


def test_a_turn_above_its_limit_is_refused_and_nothing_is_lost(make_config, tmp_path, stack):
    client = Client(stack, make_config("flux", *FLUX), tmp_path, on_disk=True)
    before = client.runtime.model_sha256()
    client.runtime.guard = MemoryGuard(0, {"client-000": 1})
    refused = client.turn()
    # A process with room in freed memory is found out at the end of the turn, any other within it.
    assert re.match(r"its process (was refused more memory at|took) ", refused.failure)
    assert "but its limit is 0.0 MB" in refused.failure
    assert client.runtime.model_sha256() == before
    assert client.kept() == {}
    client.runtime.guard, client.state, client.round_number = MemoryGuard(0, {}), None, 0
    assert not client.turn().failure


def test_processes_are_refused_where_they_cannot_be(make_config, tmp_path, quiet):
    with pytest.raises(
        UserError, match=r'transport\.clients is "process", but clients of this algorithm need'
    ):
        make_config("flex", PROCESS)
    with pytest.raises(
        UserError, match=r'transport\.clients is "process", but with transport\.name = "flower"'
    ):
        make_config("flux", PROCESS, "transport.name=flower")
    with pytest.raises(UserError, match=r"transport\.clients must be .resident. or .process., not .thread."):
        make_config("flux", "transport.clients=thread")
    in_memory = make_config("flux", PROCESS, model={"name": "tiny/qwen2_moe"})
    for start in (check_experiment, partial(run_experiment, run_directory=tmp_path, progress=quiet)):
        with pytest.raises(UserError, match=r"tiny/qwen2_moe\" cannot be read one by one"):
            start(in_memory)


class Here(ClientProcesses):
    """Calls that end in this process, with what a worker would read."""

    def __init__(self):
        pass

    def call(self, function, client_id, path, *, on_event):
        return function, client_id, Path(path).read_bytes(), on_event


def test_a_process_reads_the_download_from_a_file_and_is_heard_meanwhile():
    asked = Here().ask("client-000", b"download", print)
    assert asked == (take_measured_turn, "client-000", b"download", print)


def test_where_clients_run_is_no_part_of_what_ran(make_config):
    resident, process = make_config("flux"), make_config("flux", PROCESS)
    assert config_sha256(resident) == config_sha256(process)
    assert difference(resident, process) == []


@pytest.mark.slow
def test_check_predicts_the_memory_of_a_process(make_config):
    report = check_experiment(make_config("flux", *FLUX, PROCESS))
    assert report.memory.copies == 0
    # Both count a turn on the same slots, for the examples that there are and for the largest allowed.
    assert report.memory.weights < report.process_bytes < 2 * report.memory.total
    assert report.as_json()["process_memory_bytes"] == report.process_bytes
    assert check_experiment(make_config("flux", *FLUX)).process_bytes is None


def without_times(value):
    if isinstance(value, dict):
        gone = ("seconds", "name", SEAL, PEAK, PLANNED)
        return {key: without_times(one) for key, one in value.items() if key not in gone}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def facts_of(run):
    """Everything that a run leaves, without times, memory, and where clients run."""
    result = without_times(read_json(run / "result.json"))
    del result["settings"]["transport"]
    files = [*run.glob("clients/*/*.safetensors"), *run.glob("state/*.safetensors")]
    lines = [without_times(read_lines(run / f"{name}.jsonl")) for name in ("rounds", "clients")]
    return (
        result,
        {str(path.relative_to(run)): path.read_bytes() for path in files},
        lines,
        read_json(run / "base.json"),
    )


class Interrupting(QuietProgress):
    """Interrupts the run after its first round."""

    def round_finished(self, round_number, summary):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_processes_take_over_a_run_with_the_same_bits_and_leave_no_process(make_config, tmp_path, quiet):
    run_experiment(make_config("flux", *FLUX), tmp_path / "resident" / "run", progress=quiet)
    process, run = make_config("flux", *FLUX, PROCESS), tmp_path / "process" / "run"
    with pytest.raises(KeyboardInterrupt):
        run_experiment(process, run, progress=Interrupting())
    assert multiprocessing.active_children() == []
    run_experiment(process, run, progress=quiet, resume=True)
    assert multiprocessing.active_children() == []
    assert facts_of(run) == facts_of(tmp_path / "resident" / "run")
    lines = read_lines(run / "clients.jsonl")
    assert all(line["algorithm"][PEAK] > 0 < line["algorithm"][PLANNED] for line in lines)
    own = read_json(run / "result.json")["clients"]["client-001"]["algorithm"]
    peaks = [line["algorithm"][PEAK] for line in lines if line["client"] == "client-001"]
    assert own[PEAK] == max(peaks)


@pytest.mark.slow
def test_a_round_goes_on_without_a_client_whose_process_is_too_large(make_config, tmp_path, quiet):
    # Libraries alone take more than the megabytes of this tiny model's plan.
    limits = (
        "cohort.memory_gb=[0.002, 1, 1]",
        "training.batch_size=1",
        "cohort.on_failure=continue",
        "rounds=1",
    )
    config = make_config("flux", "algorithm.merged_per_layer=1", *FLUX[2:], PROCESS, *limits)
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert {(one["round"], one["client"]) for one in result["failures"]} == {(1, "client-000")}
    assert "but its limit is 2.2 MB" in result["failures"][0]["reason"]
