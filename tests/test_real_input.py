"""A model and data of the user's own: the whole path from files, and back out of it in a fresh process."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from fedexperts.config.load import build_config, load_config
from fedexperts.errors import UserError
from fedexperts.models.tiny import tiny_model
from fedexperts.run_directory import read_json
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, opened_model
from fedexperts.running.progress import QuietProgress

DATA = os.environ.get("FEDEXPERTS_DATA", "")
DOLLY = Path(__file__).parents[1] / "experiments" / "dolly" / "flex.toml"
METHODS = ("flex", "fedavg", "fedavg_experts")
IDS = torch.arange(40).reshape(2, 20)

LOAD_ALL = """
import json, sys, torch
import fedexperts
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
base, to, exports = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load = {
    "personalised": lambda folder: fedexperts.load_personalised(folder).model,
    "peft": lambda folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    "checkpoint": AutoModelForCausalLM.from_pretrained,
}
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    logits = {
        name: load[how](folder).eval()(input_ids=ids).logits.clone()
        for name, (how, folder) in exports.items()
    }
save_file(logits, to)
"""


def records():
    """48 records of two kinds, with the field names of Alpaca."""
    return [
        {
            "instruction": f"What is the colour of thing {number}?" if number % 2 else f"Count to {number}.",
            "input": f"Thing {number} is blue." if number % 2 else "",
            "output": "blue" if number % 2 else " ".join(map(str, range(number % 7 + 1))),
            "kind": "colour" if number % 2 else "count",
        }
        for number in range(48)
    ]


def lines(part):
    return "".join(json.dumps(record) + "\n" for record in part).encode()


def write_file(folder):
    path = folder / "data.jsonl"
    path.write_bytes(lines(records()))
    return path


def write_packed(folder):
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress(lines(records())))
    return path


def write_folder(folder):
    path = folder / "data"
    (path / "b").mkdir(parents=True)
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records()[:20])))
    (path / "b" / "c.json").write_bytes(lines(records()[20:]))
    return path


def config_of(model, source, method, **sections):
    """One round of two clients with one kind each."""
    table = {
        "rounds": 1,
        "threads": 1,
        "model": {"name": str(model)},
        "adapter": {"rank": 2},
        "data": {
            "source": str(source),
            "fields": {"label": "kind"},
            "partition": {"kind": "pathological", "num_clients": 2},
        },
        "training": {"num_local_steps": 2, "batch_size": 4, "lr": 1e-2},
        "algorithm": {"name": method},
        "evaluation": {
            "max_new_tokens": 4,
            "max_test_examples": 3,
            "matrix": False,
            "exam": {"num_questions": 2},
            "retention": {"num_free_questions": 1, "num_neutral": 1},
        },
    }
    return build_config(table | sections, "test.toml")


def test_the_same_records_in_a_file_packed_or_in_a_folder_give_the_same_run(tiny_checkpoint, tmp_path, quiet):
    found = []
    for number, write in enumerate((write_file, write_packed, write_folder)):
        config = config_of(tiny_checkpoint, write(tmp_path), "flex")
        result = run_experiment(config, tmp_path / f"run-{number}", progress=quiet)
        found.append([result[key] for key in ("server_state_sha256", "personal_sha256", "mean")])
    assert found[0] == found[1] == found[2]


def test_each_client_gets_the_kind_it_was_dealt_and_keeps_its_counts(tiny_checkpoint, tmp_path, quiet):
    config = config_of(tiny_checkpoint, write_packed(tmp_path), "fedavg")
    clients = run_experiment(config, tmp_path / "run", progress=quiet)["clients"]
    assert [client["labels"] for client in clients.values()] == [{"colour": 24}, {"count": 24}]
    assert all(client["num_train"] == 15 for client in clients.values())
    assert all(client["loss_after"] < client["loss_base"] for client in clients.values())


def test_a_natural_partition_goes_by_the_client_field(tiny_checkpoint, tmp_path, quiet):
    data = {
        "source": str(write_file(tmp_path)),
        "fields": {"client": "kind"},
        "partition": {"kind": "natural"},
    }
    result = run_experiment(
        config_of(tiny_checkpoint, "", "local_only", data=data), tmp_path / "run", progress=quiet
    )
    assert sorted(result["clients"]) == ["client-000", "client-001"]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """One run of each method, its exports, and their logits as a fresh process computes them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exported")
    source, exports = write_file(folder), {}
    for method in METHODS:
        config = config_of(tiny_checkpoint, source, method)
        run_experiment(config, folder / method, progress=QuietProgress())
        for when in ("before", "after"):
            to = folder / f"{method}-{when}"
            export_client(folder / method, "client-001", to, when=when)
            exports[to.name] = ("personalised", str(to))
        if method != "flex":
            to = folder / f"{method}-checkpoint"
            export_client(folder / method, "client-001", to, as_checkpoint=True)
            exports[to.name] = ("checkpoint", str(to))
    exports["fedavg-peft"] = ("peft", str(folder / "fedavg-after" / "adapter"))
    command = [
        sys.executable,
        "-c",
        LOAD_ALL,
        str(tiny_checkpoint),
        str(folder / "logits"),
        json.dumps(exports),
    ]
    subprocess.run(command, check=True, timeout=200)
    return SimpleNamespace(folder=folder, logits=load_file(folder / "logits"), base=tiny_checkpoint)


def logits_in_the_run(exported, method, when):
    with opened_model(exported.folder / method, "client-001", when) as (bench, _, _), torch.no_grad():
        return bench.parts.model(input_ids=IDS).logits


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_fresh_process_loads_the_export_to_the_same_bits(method, when, exported):
    assert torch.equal(exported.logits[f"{method}-{when}"], logits_in_the_run(exported, method, when))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_local_steps_show_in_the_export(method, exported):
    assert not torch.equal(exported.logits[f"{method}-before"], exported.logits[f"{method}-after"])


@pytest.mark.slow
def test_plain_peft_loads_the_adapter_folder_to_the_same_bits(exported):
    assert torch.equal(exported.logits["fedavg-peft"], logits_in_the_run(exported, "fedavg", "after"))


@pytest.mark.parametrize("method", ["fedavg", "fedavg_experts"])
@pytest.mark.slow
def test_plain_transformers_loads_the_checkpoint(method, exported):
    """LoRA is folded in: W x + B A x is summed in another order, some float32 roundings of logits near 10."""
    expected = logits_in_the_run(exported, method, "after")
    torch.testing.assert_close(exported.logits[f"{method}-checkpoint"], expected, rtol=1e-5, atol=1e-5)
    assert not (exported.folder / f"{method}-checkpoint" / "fedexperts.json").exists()


@pytest.mark.slow
def test_grafts_cannot_be_a_plain_checkpoint(exported, tmp_path):
    with pytest.raises(UserError, match="client-001 has grafted experts, which a plain checkpoint"):
        export_client(exported.folder / "flex", "client-001", tmp_path / "to", as_checkpoint=True)
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_the_export_says_what_it_is(exported):
    record = read_json(exported.folder / "flex-after" / "fedexperts.json")
    assert record["client"] == "client-001"
    assert record["model"]["name"] == str(exported.base)
    assert [one["layer"] for one in record["grafts"]] == [0, 1]


needs_data = pytest.mark.skipif(
    not (Path(DATA) / "dolly" / "dolly.jsonl.gz").is_file() or not DATA,
    reason="the environment variable FEDEXPERTS_DATA names no folder with dolly/dolly.jsonl.gz",
)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    """A random OLMoE with the real tokenizer of 4,096 entries."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(DATA) / "tokenizers" / "bpe_4096_tokenizer.json"),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
    )
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_data
def test_four_clients_of_dolly_run_by_the_experiment_file(olmoe, tmp_path, quiet):
    overrides = [
        f"model.name={olmoe}",
        f"data.source={Path(DATA) / 'dolly' / 'dolly.jsonl.gz'}",
        "data.partition.max_examples_per_client=24",
        "training.num_local_steps=2",
        "training.batch_size=4",
        "evaluation.max_new_tokens=4",
        "rounds=1",
        "threads=1",
    ]
    result = run_experiment(load_config(DOLLY, overrides), tmp_path / "run", progress=quiet)
    labels = ["closed_qa", "information_extraction", "classification", "summarization"]
    assert [client["labels"] for client in result["clients"].values()] == [{label: 24} for label in labels]
    assert all(client["num_train"] == 15 for client in result["clients"].values())
    assert result["mean"]["loss_after"] < result["mean"]["loss_base"]
    assert result["bytes"]["upload_counted"] == result["bytes"]["upload_predicted"]
    assert result["failures"] == []
