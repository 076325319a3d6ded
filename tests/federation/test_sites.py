"""Sites with data of their own, over a Grid in memory: the bits of a trial on files, and little told."""

import itertools
import json
import os
import shutil
import stat
from functools import lru_cache

import pytest
from flower_grid import Clock, InMemoryGrid, app_node

from fedexperts.cli.program import main
from fedexperts.config.load import config_sha256, resolved_toml
from fedexperts.config.toml import render_toml
from fedexperts.data.tinyworld import CATEGORIES, make_example
from fedexperts.errors import UserError
from fedexperts.federation import flower_client, flower_site
from fedexperts.federation.flower_nodes import Sites
from fedexperts.federation.flower_sent import Patience
from fedexperts.federation.flower_server import serve
from fedexperts.federation.flower_transport import FlowerTransport
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.federation.wire import pack, unpack
from fedexperts.messages import Download, Upload, decode_upload, encode_download, encode_upload
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running import site_record
from fedexperts.running.experiment import run_experiment
from fedexperts.running.site_record import SiteRecord

NAMES = ("alder", "birch", "cedar")
SIZES = {"alder": 24, "birch": 16, "cedar": 20}
OVER_FLOWER = ("transport.name=flower", "transport.connection=lab", "rounds=1", "evaluation.matrix=false")


@pytest.fixture(scope="module", autouse=True)
def one_process_for_three_sites():
    """Sites keep their models apart as they would in processes of their own; files get the usual rights."""
    before, once = os.umask(0o022), flower_site._site
    flower_site._site = lru_cache(maxsize=3)(once.__wrapped__)
    yield
    flower_site._site = once
    os.umask(before)


def examples(name):
    category = CATEGORIES[NAMES.index(name)]
    return [make_example(seed=0, category=category, index=index) for index in range(SIZES[name])]


def write_lines(path, name, instruction="instruction", response="response"):
    rows = [{instruction: e.instruction, "context": e.context, response: e.response} for e in examples(name)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_chats(path, name):
    chats = [
        [
            {"role": "user", "content": f"{e.instruction}\n\n{e.context}" if e.context else e.instruction},
            {"role": "assistant", "content": e.response},
        ]
        for e in examples(name)
    ]
    path.write_text(json.dumps([{"messages": turns} for turns in chats]))


def start_sites(config, folder, tell):
    """Write three sites' data and settings, each in a form of its own; return the nodes by their id."""
    write_lines(folder / "alder.jsonl", "alder")
    write_chats(folder / "birch.json", "birch")
    write_lines(folder / "cedar.jsonl", "cedar", "question", "answer")
    run_config = {
        "experiment": resolved_toml(config),
        "run-directory": str(folder / "server"),
        "run-token": "0123456789ab",
    }
    nodes = {}
    for place, name in enumerate(NAMES):
        source = folder / (f"{name}.json" if name == "birch" else f"{name}.jsonl")
        settings = {"name": name, "source": str(source), "folder": str(folder / f"home-{name}"), "tell": tell}
        if name == "cedar":
            settings["fields"] = {"instruction": "question", "response": "answer"}
        path = folder / f"{name}.toml"
        path.write_text(render_toml(settings))
        nodes[70 - place] = app_node(flower_client.app, run_config, {"site": str(path)})
    return nodes


EMPTY_ROUTING = {"base": [], "global": [], "personalised": []}
KEYS = {70: "alder", 69: "birch", 68: "cedar"}


def sites(num_clients=3):
    return {"source": "site", "max_tokens": 192, "partition": {"kind": "site", "num_clients": num_clients}}


def site_config(make_config, algorithm="flex", *overrides, num_clients=3):
    return make_config(algorithm, *OVER_FLOWER, *overrides, data=sites(num_clients))


def run_over(nodes, config, folder, keys=None):
    folder.mkdir()
    run = RunDirectory(folder)
    run.config.write_text(resolved_toml(config))
    serve(InMemoryGrid(nodes), config, run, keys)
    return read_json(run.result)


def at_home(folder, name):
    return folder / f"home-{name}" / "runs" / "server-01234567"


@pytest.fixture(scope="module")
def told(make_config, tmp_path_factory):
    """The folder of a run of FLEx whose sites tell all that sites can tell of their data."""
    folder, config = tmp_path_factory.mktemp("told"), site_config(make_config)
    tell = ["counts", "routing", "experts", "exam"]
    run_over(start_sites(config, folder, tell), config, folder / "server", KEYS)
    return folder


@pytest.fixture(scope="module")
def untold(make_config, tmp_path_factory):
    """The folder of a run of FedAvg whose sites tell nothing, and all uploads that reached the server."""
    folder, config, uploads = tmp_path_factory.mktemp("untold"), site_config(make_config, "fedavg"), []

    def overheard(node):
        def answer(message):
            content = node(message)
            uploads.append(decode_upload(unpack(content)))
            return content

        return answer

    nodes = {node_id: overheard(node) for node_id, node in start_sites(config, folder, []).items()}
    run_over(nodes, config, folder / "server")
    return folder, uploads


def test_sites_end_with_the_bits_of_a_trial_on_their_files(told, make_config, tmp_path, quiet):
    """Cedar's fields have other names; in the trial its file has the usual ones."""
    write_lines(tmp_path / "alder.jsonl", "alder")
    write_chats(tmp_path / "birch.json", "birch")
    write_lines(tmp_path / "cedar.jsonl", "cedar")
    trial = {"source": str(tmp_path), "max_tokens": 192, "partition": {"kind": "file"}}
    config = make_config("flex", "rounds=1", "evaluation.matrix=false", data=trial)
    expected = run_experiment(config, tmp_path / "trial", progress=quiet)
    result = read_json(told / "server" / "result.json")
    for name in ("server_state_sha256", "personal_sha256", "mean", "routing"):
        assert result[name] == expected[name], name
    assert list(result["clients"]) == list(NAMES)
    assert not (told / "server" / "clients").exists()


def test_a_site_has_its_report_with_its_own_figures_alone(told, capsys):
    server = read_json(told / "server" / "result.json")
    for name in NAMES:
        own = read_json(at_home(told, name) / "result.json")
        assert own["personal_sha256"] == {name: server["personal_sha256"][name]}
        assert list(own["clients"]) == [name]
        assert own["clients"][name]["num_train"] == server["clients"][name]["num_train"] > 0
        assert own["frozen_unchanged"] is True
        assert own["bytes"]["upload_counted"] == own["bytes"]["upload_predicted"] > 0
    assert main(["report", str(at_home(told, "birch"))]) == 0
    assert "flex" in capsys.readouterr().out


def test_a_site_uses_and_exports_its_model_and_the_server_what_is_shared(told, tmp_path, capsys):
    run, server = str(at_home(told, "birch")), str(told / "server")
    for when in ("before", "after"):
        assert main(["export", run, "--when", when, "--to", str(tmp_path / when)]) == 0
        assert (tmp_path / when / "experts.safetensors").exists(), "the graft is personal"
    assert main(["generate", run, "Who?"]) == 0
    assert main(["export", server, "--model", "server", "--to", str(tmp_path / "shared")]) == 0
    assert not (tmp_path / "shared" / "experts.safetensors").exists()
    assert main(["export", run, "--model", "server", "--to", str(tmp_path / "here")]) == 0
    capsys.readouterr()


def test_doctor_verifies_what_a_site_keeps(told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    assert main(["doctor", str(run)]) == 0
    damaged = run / "clients" / "alder" / "adapted.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["doctor", str(run)]) == 1
    assert f"wrong: {damaged} is damaged" in capsys.readouterr().out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


AT_A_SITE = (
    "base.json",
    "clients.jsonl",
    "clients/alder/kept.json",
    "clients/alder/personal-round-00001.safetensors",
    "clients/alder/received",
    "config.toml",
    "environment.json",
    "result.json",
    "rounds.jsonl",
    "site.json",
)


@pytest.mark.parametrize("change", [flip, shorten, empty, delete])
@pytest.mark.parametrize("name", AT_A_SITE)
def test_doctor_names_whatever_is_wrong_at_a_site(name, change, told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    change(run / name)
    assert main(["doctor", str(run)]) == 1
    told_wrong = capsys.readouterr().out
    assert f"wrong: {run / name} " in told_wrong
    assert "\nto do: put the files back from a copy" in told_wrong


@pytest.mark.parametrize("change", [flip, shorten, empty, delete])
@pytest.mark.parametrize("what", [("--model", "server"), ("--when", "before")])
def test_no_model_is_made_of_a_damaged_message(change, what, told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    change(run / "clients/alder/received")
    assert main(["export", str(run), *what, "--to", str(tmp_path / "out")]) == 2
    assert str(run / "clients/alder/received") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_site_without_seals_is_told_as_such(told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    delete(run / "site.json")
    for command in ("doctor", "export"):
        more = ["--to", str(tmp_path / "out")] if command == "export" else []
        assert main([command, str(run), *more]) == (1 if command == "doctor" else 2)
        shown = "".join(capsys.readouterr())
        assert (
            f"{run / 'site.json'} is missing: it was lost, or an earlier version has begun the run" in shown
        )


def test_the_report_of_a_site_is_not_made_of_damaged_logs(told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    delete(run / "clients.jsonl")
    assert main(["report", str(run)]) == 2
    assert f"{run / 'clients.jsonl'} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [("run", "--resume"), ("rewind", "--to-round", "1"), ("server", "--resume")],
    ids=lambda command: command[0],
)
def test_a_run_is_gone_on_with_at_its_server_alone(command, told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    options = ["--keys", str(tmp_path), "--listen", "127.0.0.1:1"] if command[0] == "server" else []
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first, *rest = command
    arguments = [first, *rest, str(run)] if "--resume" in rest else [first, str(run), *rest]
    assert main([*arguments, *options]) == 2
    what = "rewind" if first == "rewind" else "resume"
    assert (
        f"cannot {what} {run}: it is a site's folder; {what} the run at its server" in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_site_forgets_where_its_client_is(told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    assert main(["forget", str(run), "--all"]) == 0
    assert "on their own machines" not in capsys.readouterr().out
    assert list((run / "clients").iterdir()) == []
    assert main(["doctor", str(run)]) == 0


def test_a_site_forgets_nothing_that_would_hide_damage(told, tmp_path, capsys):
    run = shutil.copytree(at_home(told, "alder"), tmp_path / "alder")
    shorten(run / "clients.jsonl")
    assert main(["forget", str(run), "--all"]) == 2
    assert f"{run / 'clients.jsonl'} is damaged" in capsys.readouterr().err
    assert (run / "clients/alder/received").exists()


@pytest.fixture
def turns(make_config, tmp_path):
    """Return the site alder, and what asks it for each turn of a run of two rounds, the second twice."""
    config = site_config(make_config, "fedavg", "rounds=2")
    start_sites(config, tmp_path, [])
    shared = {"config_sha256": config_sha256(config)}
    asked = [
        Download(round_number=number, task=task, **shared)
        for number, task in (
            (1, "evaluate_base"),
            (1, "train"),
            (2, "train"),
            (2, "train"),
            (3, "evaluate_fully"),
        )
    ]
    run_config = {"experiment": resolved_toml(config), "run-directory": "server", "run-token": "0" * 8}
    return asked, (str(tmp_path / "alder.toml"), run_config), tmp_path / "home-alder/runs/server-00000000"


def test_nobody_else_changes_the_folder_of_a_site_before_its_run_ends(turns, tmp_path, capsys):
    asked, site, run = turns
    for download in asked:
        assert flower_site.answer_as_site(encode_download(download), *site).failure == ""
        if download.task != "evaluate_fully":
            assert main(["forget", str(run), "--all"]) == 2
            assert f"run directory {run} is in use by another process" in capsys.readouterr().err
            assert main(["generate", str(run), "Who?", "--model", "server"]) == 0
    assert main(["forget", str(run), "--all"]) == 0
    assert main(["doctor", str(run)]) == 0
    upload = flower_site.answer_as_site(encode_download(asked[2]), *site)
    assert upload.failure == flower_site.UNTOLD, "a forgotten client is not gone on with"
    capsys.readouterr()


def test_a_worker_does_not_share_its_folder_with_another(turns, monkeypatch):
    asked, site, run = turns
    monkeypatch.setattr(site_record, "LOCK_SECONDS", 0.0)
    run.mkdir(parents=True)
    with RunDirectory(run).lock():
        assert flower_site.answer_as_site(encode_download(asked[0]), *site).failure == flower_site.UNTOLD
    assert flower_site.answer_as_site(encode_download(asked[0]), *site).failure == ""


class _Killed(BaseException):
    pass


def killed_at(patch, place):
    """Raise at the ``place``-th time that something is about to be made to last."""
    sync, places = os.fsync, itertools.count()

    def dies(descriptor):
        if next(places) == place:
            raise _Killed
        sync(descriptor)

    patch.setattr(os, "fsync", dies)


def taken(record, download, upload):
    """Let a new process of the site take a turn, in which ``upload`` is made; return whether it lived."""
    try:
        record.hold()
        record.received(download, encode_download(download))
        record.add(download, upload, 7)
    except _Killed:
        return False
    finally:
        record._held.close()
    return True


def test_a_site_that_is_killed_anywhere_in_a_turn_is_whole_and_goes_on(turns, capsys):
    """Every write is made to last before and after it gets its name: the site is killed before each."""
    asked, (site_file, run_config), run = turns
    site = flower_site._site(run_config["experiment"], site_file, run.name)
    for download in asked:
        upload = site.scorer.runtime.handle("alder", download)
        assert upload.failure == ""
        for place in itertools.count():
            record = SiteRecord(RunDirectory(run), site.record._config, "alder", site.scorer)
            with pytest.MonkeyPatch.context() as patch:
                killed_at(patch, place)
                is_done = taken(record, download, upload)
            if (run / "config.toml").exists():
                assert main(["doctor", str(run)]) == 0, capsys.readouterr().out
            if is_done:
                break
        assert place > 5
    assert [line["round"] for line in read_lines(run / "clients.jsonl")] == [1, 2]
    assert [line["round"] for line in read_lines(run / "rounds.jsonl")] == [1, 2]
    assert read_json(run / "result.json")["clients"].keys() == {"alder"}
    capsys.readouterr()


def test_what_a_site_keeps_is_for_its_owner_alone(told):
    found = list((told / "home-alder").rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {0o700}


def test_a_site_that_tells_no_counts_weighs_as_one_and_tells_none(untold, capsys):
    folder, uploads = untold
    assert {weight for upload in uploads for weight in upload.weights.values()} == {1.0}
    counts = {name for upload in uploads for name in upload.metrics if name.startswith("num_")}
    assert counts == {"num_examples", "num_labels", "num_tokens", "num_untrained"}
    reports = [upload.report for upload in uploads if upload.report]
    assert [sorted(report.items()) for report in reports] == [
        [("client_id", name), ("memory_bytes", 0), ("num_train", 0), ("tells_counts", False)]
        for name in reversed(NAMES)
    ]
    assert "num_truncated" in read_lines(at_home(folder, "alder") / "clients.jsonl")[0]
    assert main(["report", str(folder / "server")]) == 0
    capsys.readouterr()


def test_a_private_site_weighs_as_one_whatever_its_number_of_examples(make_config, tmp_path):
    private = ("privacy.clip_norm=1", "privacy.noise_multiplier=1", "privacy.noise=client")
    config = site_config(make_config, "fedavg", *private)
    start_sites(config, tmp_path, [])
    download = Download(round_number=1, task="train", config_sha256=config_sha256(config))
    run_config = {"experiment": resolved_toml(config), "run-directory": "server", "run-token": "0123456789ab"}
    upload = flower_site.answer_as_site(encode_download(download), str(tmp_path / "alder.toml"), run_config)
    assert upload.failure == ""
    assert set(upload.weights.values()) == {1.0}


def test_a_site_that_tells_nothing_keeps_routing_experts_and_exam_to_itself(untold, capsys):
    folder, uploads = untold
    beside = {name for upload in uploads for name in upload.beside}
    assert beside == {"personal_sha256"}
    assert all(upload.tables == {} for upload in uploads)
    result = read_json(folder / "server" / "result.json")
    assert result["routing"] == {"layers": 0, "experts": 0, "tokens_per_expert": EMPTY_ROUTING}
    assert result["expert_balance_std"] == result["routing_entropy"] == {}
    at_alder = read_json(at_home(folder, "alder") / "result.json")
    assert sum(at_alder["routing"]["tokens_per_expert"]["personalised"][0]) > 0
    assert main(["report", str(folder / "server")]) == 0
    capsys.readouterr()


def test_the_shared_model_at_a_site_is_the_one_that_the_server_exports(untold, tmp_path, capsys):
    folder, exported = untold[0], []
    for place, run in enumerate((folder / "server", at_home(folder, "cedar"))):
        assert main(["export", str(run), "--model", "server", "--to", str(tmp_path / f"{place}")]) == 0
        exported.append((tmp_path / f"{place}" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert exported[0] == exported[1]
    capsys.readouterr()


def test_what_is_wrong_with_the_data_is_told_at_the_site_alone(make_config, tmp_path, caplog):
    config = site_config(make_config)
    nodes = start_sites(config, tmp_path, [])
    (tmp_path / "birch.json").write_text('[{"instruction": "secret", "answer": "x"}]')
    with pytest.raises(UserError) as refusal:
        run_over(nodes, config, tmp_path / "server", KEYS)
    assert str(refusal.value) == (
        "site birch (Flower node 69): it could not take its turn; the site's own log says why"
    )
    assert 'birch.json:1: field "response"' in caplog.text


# Who is who


def claims(name, **facts):
    report = {"client_id": name, "num_train": 0, "memory_bytes": 0, "tells_counts": False, **facts}
    return lambda message: pack(encode_upload(Upload(report=report)))


def gather(nodes, number=2, keys=None):
    grid = InMemoryGrid(nodes, clock=Clock())
    transport = FlowerTransport(
        grid,
        config_sha256="",
        patience=Patience(answer_seconds=5.0),
        clock=grid.clock,
        pause=grid.clock.pause,
        sites=Sites(number=number, keys=keys or {}),
    )
    joined = [facts.client_id for facts in transport.clients]
    return joined, [message.metadata.dst_node_id for message in grid.pushed]


def test_sites_are_in_the_order_of_their_names_whoever_came_first():
    assert gather({5: claims("b"), 6: claims("a"), 7: claims("c")})[0] == ["a", "b"]


def test_a_node_that_claims_a_name_that_is_taken_is_refused_by_name(caplog):
    with pytest.raises(UserError, match=r"1 of 2 sites joined .* \(joined: a; not connected: 1 more\)"):
        gather({5: claims("a"), 6: claims("a")})
    assert caplog.messages == ["Flower node 6 is refused: it says that it is a, which is node 5"]


def test_a_name_belongs_to_its_key_whatever_a_node_says(caplog):
    joined, _ = gather({5: claims("a"), 6: claims("a"), 7: claims("b")}, keys={6: "a", 7: "b"})
    assert joined == ["a", "b"]
    with pytest.raises(UserError, match="1 of 2 sites joined"):
        gather({6: claims("b"), 7: claims("b")}, keys={6: "a", 7: "b"})
    assert caplog.messages == ["Flower node 6 is refused: it says that it is b, but its key is that of a"]


def test_a_node_without_a_registered_key_is_never_asked():
    _, asked = gather({5: claims("a"), 6: claims("a"), 7: claims("b")}, keys={6: "a", 7: "b"})
    assert asked == [6, 7]


def test_sites_that_weigh_by_examples_do_not_meet_others():
    with pytest.raises(UserError, match="sites b tell their number of training examples and a do not"):
        gather({5: claims("a"), 6: claims("b", tells_counts=True, num_train=7)})


def test_a_client_that_does_not_come_back_is_named():
    grid = InMemoryGrid({5: claims("a")})
    transport = FlowerTransport(
        grid, config_sha256="", patience=Patience(answer_seconds=5.0), sites=Sites(number=1)
    )
    with pytest.raises(UserError, match="client b took part before, but only a have joined"):
        list(transport.exchange([("b", None)]))


# Settings


@pytest.mark.parametrize(
    ("overrides", "data", "sentence"),
    [
        ((), sites(), "start the run with fedexperts server and fedexperts site, or try it here on files"),
        (("transport.name=flower",), sites(), "no process here has the data of the sites"),
        (OVER_FLOWER, {**sites(), "source": "a.jsonl"}, 'each site names its own data: it must be "site"'),
        ((*OVER_FLOWER, "cohort.memory_gb=[8]"), sites(), r"cohort\.memory_gb is set but has no effect"),
    ],
)
def test_an_experiment_of_sites_is_refused_where_nobody_has_their_data(
    make_config, overrides, data, sentence
):
    with pytest.raises(UserError, match=sentence):
        make_config("flex", *overrides, data=data)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "../a"}, r'name "\.\./a" must be of letters'),
        ({"source": "site"}, 'source is "site"; it must name the data of this site'),
        ({"folder": ""}, "folder is empty"),
        ({"memory_gb": 8.0}, 'either set memory_gb and "memory" in tell, or neither'),
        ({"tell": ("memory",)}, 'either set memory_gb and "memory" in tell, or neither'),
        ({"memory_gb": -1.0}, "memory_gb is -1"),
        ({"routing_noise": 2.0}, 'routing_noise is 2, but has no effect: "routing" is not in tell'),
        ({"routing_noise": -1.0, "tell": ("routing",)}, "routing_noise is -1"),
    ],
)
def test_settings_of_a_site_that_cannot_be_are_refused(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        SiteSettings(**{"name": "a", "source": "a.jsonl", "folder": "f", **wrong})


def test_a_node_without_data_of_its_own_is_told_how_to_start(make_config, tmp_path):
    config = site_config(make_config, num_clients=1)
    run_config = {"experiment": resolved_toml(config), "run-token": "t", "personal-folder": ""}
    node = app_node(flower_client.app, run_config, {"partition-id": 0})
    with pytest.raises(UserError, match="this node has no data of its own: start it with fedexperts site"):
        run_over({1: node}, config, tmp_path / "server")


def test_a_site_is_no_part_of_data_that_are_divided(make_config, tmp_path):
    config = make_config("flex", *OVER_FLOWER)
    nodes = start_sites(config, tmp_path, [])
    with pytest.raises(
        UserError, match=r'is a site with its own data, but data\.partition\.kind is "natural"'
    ):
        run_over(nodes, config, tmp_path / "server")


@pytest.mark.parametrize("name", ["..", "a b", "x" * 200])
def test_the_server_cannot_name_a_folder_outside(make_config, tmp_path, name):
    config = site_config(make_config, num_clients=1)
    start_sites(config, tmp_path, [])
    run_config = {"experiment": resolved_toml(config), "run-directory": f"/x/{name}", "run-token": "0" * 8}
    node = app_node(flower_client.app, run_config, {"site": str(tmp_path / "alder.toml")})
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        run_over({1: node}, config, tmp_path / "server")
