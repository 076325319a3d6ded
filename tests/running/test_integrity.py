"""A damaged run directory is never gone on from: the file is named, and what can be saved is told."""

import shutil

import pytest

from fedexperts import cli
from fedexperts.errors import UserError
from fedexperts.integrity import rewind
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import generate_text
from fedexperts.running.progress import QuietProgress


def resume(short_config, folder):
    return run_experiment(short_config, folder, progress=QuietProgress(), resume=True)


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:10])


def delete(path):
    path.unlink()


NEWEST = "clients/client-000/personal-round-00002.safetensors"
DAMAGE = [
    (change, name)
    for name in (
        NEWEST,
        "clients/client-001/kept.json",
        "clients.jsonl",
        "rounds.jsonl",
        "base.json",
        "config.toml",
        "checkpoint.json",
        "state/state-round-00002.safetensors",
        "state/beside-round-00002.safetensors",
    )
    for change in (flip, shorten, delete)
    if (change, name) != (delete, "config.toml")
]


@pytest.mark.parametrize(("change", "name"), DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_lost(change, name, short_config, cut):
    change(cut / name)
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        resume(short_config, cut)
    assert str(cut / name) in str(caught.value)
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_a_lost_folder_of_a_client_is_named(short_config, cut):
    shutil.rmtree(cut / "clients/client-000")
    with pytest.raises(UserError, match="clients/client-000"):
        resume(short_config, cut)


def test_what_a_crash_left_of_the_next_round_is_no_damage(short_config, cut, runs):
    assert read_json(cut / "checkpoint.json")["round"] == 2
    assert (cut / "rounds.jsonl").read_bytes().count(b"\n") == 3
    assert outcome(resume(short_config, cut)) == outcome(read_json(runs / "whole" / "result.json"))


def outcome(result):
    return {
        name: result[name] for name in ("server_state_sha256", "personal_sha256", "mean", "bytes", "failures")
    }


def test_a_flipped_bit_in_a_result_is_told(short_config, whole):
    flip(whole / "result.json", place=0.6)
    with pytest.raises(UserError, match=r"run/result\.json is (damaged|not readable)"):
        resume(short_config, whole)


def test_a_line_that_is_no_json_is_told_by_file_and_number(whole):
    flip(whole / "rounds.jsonl", place=0)
    with pytest.raises(UserError, match=r"run/rounds\.jsonl line 1 is not JSON"):
        read_lines(whole / "rounds.jsonl")


def test_a_damaged_model_is_not_exported(whole):
    flip(whole / "clients/client-000/adapted.safetensors", place=0.9)
    with pytest.raises(UserError, match=r"client-000/adapted\.safetensors is damaged"):
        generate_text(whole, "client-000", "Who?")


def test_no_model_is_made_with_a_changed_configuration(whole):
    config = whole / "config.toml"
    config.write_text(config.read_text().replace("alpha = ", "alpha = 1"))
    with pytest.raises(UserError, match=r"run/config\.toml is damaged"):
        generate_text(whole, "client-000", "Who?")


def test_damage_is_told_with_what_can_be_saved(short_config, cut, runs):
    delete(cut / NEWEST)
    with pytest.raises(
        UserError, match=r"the state of round 1 is whole, .*fedexperts rewind \S+/run --to-round 1$"
    ):
        resume(short_config, cut)
    rewind(RunDirectory(cut), 1)
    assert outcome(resume(short_config, cut)) == outcome(read_json(runs / "whole" / "result.json"))


@pytest.mark.parametrize("change", [flip, delete])
def test_a_damaged_checkpoint_is_put_back_from_its_copy(change, short_config, cut, runs):
    change(cut / "checkpoint.json")
    with pytest.raises(UserError, match=r"rewind .* --to-round 2$"):
        resume(short_config, cut)
    rewind(RunDirectory(cut), 2)
    assert outcome(resume(short_config, cut)) == outcome(read_json(runs / "whole" / "result.json"))


def test_a_finished_run_that_is_rewound_ends_as_it_did(short_config, whole, runs):
    rewind(RunDirectory(whole), 2)
    assert not (whole / "result.json").exists()
    assert outcome(resume(short_config, whole)) == outcome(read_json(runs / "whole" / "result.json"))
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert without_seconds(whole / name) == without_seconds(runs / "whole" / name)


def without_seconds(path):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]


def test_a_round_is_gone_back_to_only_if_its_state_is_there_and_whole(whole):
    before = sorted(whole.rglob("*"))
    with pytest.raises(UserError, match=r"go back to round 1: the states that .* keeps are of rounds 2, 3 "):
        rewind(RunDirectory(whole), 1)
    flip(whole / "state/state-round-00002.safetensors")
    with pytest.raises(UserError, match=r"go back to round 2: .*state-round-00002\.safetensors is damaged"):
        rewind(RunDirectory(whole), 2)
    assert sorted(whole.rglob("*")) == before


def test_as_many_states_stay_as_are_asked_for(whole, cut):
    assert RunDirectory(whole).kept_rounds() == [3, 2]
    names = sorted(path.name for path in (whole / "state").iterdir())
    assert names == [
        f"{kind}-round-0000{number}.{ending}"
        for kind, ending in (("beside", "safetensors"), ("checkpoint", "json"), ("state", "safetensors"))
        for number in (2, 3)
    ]
    assert [p.name for p in sorted((whole / "clients/client-000").glob("personal*"))] == [
        f"personal-round-0000{number}.safetensors" for number in (1, 2, 3)
    ]


def test_doctor_finds_nothing_wrong_with_a_run_that_is_whole(whole, cut, capsys):
    for folder in (whole, cut):
        assert cli.main(["doctor", str(folder)]) == cli.OK
        assert "all well" in capsys.readouterr().out


def test_doctor_takes_no_state_that_never_counted_for_damage(whole, capsys):
    """The copy is written before checkpoint.json; a kill between the two leaves it."""
    rewind(RunDirectory(whole), 2)
    (whole / "clients.jsonl").write_bytes((whole / "clients.jsonl").read_bytes()[:-1])
    assert cli.main(["doctor", str(whole)]) == cli.OK, capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        NEWEST,
        "clients.jsonl",
        "base.json",
        "config.toml",
        "environment.json",
        "result.json",
        "checkpoint.json",
        "state/checkpoint-round-00002.json",
        "clients/client-001/adapted.safetensors",
        "clients/client-001/predictions.json",
        "clients/client-001/personal-round-00001.safetensors",
    ],
)
def test_doctor_names_what_is_wrong_and_what_to_do(name, whole, capsys):
    flip(whole / name)
    assert cli.main(["doctor", str(whole)]) == cli.SOME_FAILED
    told = capsys.readouterr().out
    assert str(whole / name) in told
    assert "\nto do: " in told


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "environment.json",
        "state/checkpoint-round-00002.json",
        "state/checkpoint-round-00003.json",
        "clients/client-001/personal-round-00001.safetensors",
    ],
)
def test_doctor_notices_what_was_deleted(name, whole, capsys):
    delete(whole / name)
    assert cli.main(["doctor", str(whole)]) == cli.SOME_FAILED
    assert str(whole / name) in capsys.readouterr().out


def test_states_half_dropped_by_a_kill_are_no_damage(runs, whole):
    """Of a state that is dropped the record goes first."""
    for name in ("beside", "state"):
        shutil.copy(
            whole / f"state/{name}-round-00002.safetensors", whole / f"state/{name}-round-00001.safetensors"
        )
    assert cli.main(["doctor", str(whole)]) == cli.OK


@pytest.mark.parametrize("change", [flip, shorten, delete])
@pytest.mark.parametrize("name", ["clients.jsonl", "rounds.jsonl"])
def test_no_report_is_made_of_damaged_logs(name, change, whole, capsys):
    change(whole / name)
    assert cli.main(["report", str(whole)]) == cli.MISTAKE
    assert str(whole / name) in capsys.readouterr().err
