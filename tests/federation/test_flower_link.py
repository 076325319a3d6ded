"""The commands of server and site, as far as they go without Flower's programs."""

import socket
import stat
import tomllib

import pytest

from fedexperts.cli.program import main
from fedexperts.config.load import build_config
from fedexperts.errors import UserError
from fedexperts.federation import flower_link
from fedexperts.federation.flower_link import check_node, open_link, parse_address
from fedexperts.federation.keys import make_keys
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.running import serving
from fedexperts.running.serving import SERVER_OVERRIDES, prepare_site, run_server

RECORDS = "".join(f'{{"question": "q{number}", "answer": "a{number}"}}\n' for number in range(20))
SITES = {"source": "site", "partition": {"kind": "site", "num_clients": 1}}
FIELDS = ("fields.instruction=question", "fields.response=answer", 'tell=["counts"]')


@pytest.fixture
def keys(tmp_path):
    make_keys(tmp_path / "keys", ["north", "south"])
    return tmp_path / "keys"


def test_a_site_reads_its_data_and_writes_its_settings_for_itself_alone(tmp_path):
    (tmp_path / "own.jsonl").write_text(RECORDS)
    path, data = prepare_site("north", str(tmp_path / "own.jsonl"), tmp_path / "home", FIELDS)
    assert data.client_ids == ("north",)
    assert sum(data.client("north").sizes.values()) == 20
    table = tomllib.loads(path.read_text())
    assert table["fields"]["response"] == "answer"
    assert SiteSettings(**{**table, "fields": None, "tell": tuple(table["tell"])}).source == str(
        tmp_path / "own.jsonl"
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "none.jsonl"], 'missing file "none.jsonl"'),
        (["--data", "own.jsonl"], r'own.jsonl:1: field "instruction" (data.fields.instruction) is missing'),
        (["--data", "own.jsonl", "name=../up"], 'name "../up" must be of letters'),
        (["--data", "own.jsonl", "colour=red"], "colour is not a setting"),
        (["--data", "none.jsonl", "--server", "here"], '--server is "here"; it must be HOST:PORT'),
        (["--data", "none.jsonl", "--keys", "keys/west"], "keys/west/ca.crt does not exist; fedexperts keys"),
        (["--data", "none.jsonl", "--keys", "keys/server"], "keys/server/node.key does not exist"),
    ],
)
def test_a_site_that_cannot_take_part_is_told_before_it_joins(
    tmp_path, monkeypatch, capsys, keys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text(RECORDS)
    assert main(["site", "--server", "127.0.0.1:9", "--keys", "keys/north", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("site-*"))


@pytest.mark.parametrize("text", ["host", ":80", "host:", "host:x", "host:0", "host:65536"])
def test_an_address_is_a_host_and_a_port(text):
    with pytest.raises(UserError, match=f'^--listen is "{text}"; it must be HOST:PORT'):
        parse_address(text, "--listen")


def test_addresses_of_both_kinds_are_read():
    assert parse_address("fed.example.org:9092", "--listen") == ("fed.example.org", 9092)
    assert parse_address("[::1]:80", "--listen") == ("::1", 80)


def test_a_link_without_its_files_or_with_a_taken_port_is_refused(keys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--listen 127.0.0.1:{port} cannot be used"):
            open_link(keys / "server", "127.0.0.1", port).__enter__()
    for path in (keys / "server" / "sites").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="sites has no public key of a site"):
        open_link(keys / "server", "127.0.0.1", 1).__enter__()
    with pytest.raises(UserError, match=r"ca\.crt does not exist; fedexperts keys makes it"):
        open_link(keys / "nowhere", "127.0.0.1", 1).__enter__()


def test_a_port_that_becomes_free_is_waited_for(keys, monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    monkeypatch.setattr(flower_link.time, "sleep", lambda _: taken.close())
    monkeypatch.setattr(flower_link.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(pytest.fail.Exception, match="started"):
        open_link(keys / "server", "127.0.0.1", port, 5.0).__enter__()


def test_without_flower_server_and_site_name_the_extra(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(flower_link, "PROGRAMS", tmp_path)
    sentence = r"^fedexperts {} needs the package flwr: run pip install -e '\.\[flower\]'"
    with pytest.raises(UserError, match=sentence.format("server")):
        open_link(keys / "server", "127.0.0.1", 1).__enter__()
    with pytest.raises(UserError, match=sentence.format("site")):
        check_node("127.0.0.1:1", keys / "north")


def test_the_server_serves_sites_alone(make_config, keys, tmp_path, quiet):
    with pytest.raises(
        UserError, match=r'data\.partition\.kind is "natural"; for fedexperts server it must be "site"'
    ):
        run_server(make_config("flex"), tmp_path / "run", keys=keys, listen="127.0.0.1:1", progress=quiet)


def test_a_folder_that_the_server_cannot_have_is_refused_before_its_superlink_starts(
    make_config, keys, tmp_path, quiet, monkeypatch
):
    monkeypatch.setattr(serving, "open_link", lambda *given: pytest.fail("the SuperLink was started"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    config = make_config("fedavg", *SERVER_OVERRIDES, data=SITES)
    for folder, sentence in {
        "/proc/sv": "folder /proc/sv cannot be made",
        "used": "is already in use",
    }.items():
        with pytest.raises(UserError, match=sentence):
            run_server(config, tmp_path / folder, keys=keys, listen="127.0.0.1:1", progress=quiet)


def test_a_server_that_cannot_start_leaves_no_folder(make_config, keys, tmp_path, quiet):
    config = make_config("fedavg", *SERVER_OVERRIDES, data=SITES)
    with pytest.raises(UserError, match=r"ca\.crt does not exist"):
        run_server(config, tmp_path / "run", keys=keys / "no", listen="127.0.0.1:1", progress=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["my run", ".run", "r" * 92])
def test_a_folder_that_sites_could_not_name_theirs_after_is_refused_at_once(
    make_config, keys, tmp_path, quiet, name
):
    at_server = {"name": "flower", "connection": "trial"}
    config = make_config("fedavg", data=SITES, transport=at_server)
    with pytest.raises(UserError, match=r"the run's folder is named .* and sites name theirs after it"):
        run_server(config, tmp_path / name, keys=keys, listen="127.0.0.1:1", progress=quiet)


def test_the_server_command_puts_in_how_its_sites_are_reached():
    table = {
        "data": {"source": "site", "partition": {"kind": "site", "num_clients": 2}},
        "algorithm": {"name": "flex"},
    }
    transport = build_config(table, "test.toml", SERVER_OVERRIDES).transport
    assert (transport.name, transport.connection) == ("flower", "sites")
