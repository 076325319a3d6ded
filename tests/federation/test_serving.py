"""The server's command goes on after its processes were killed: programs play the part of Flower's."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from test_flower_launch import FLWR

from fedexperts.algorithms.api import ServerState
from fedexperts.errors import UserError
from fedexperts.federation import flower_launch, flower_link
from fedexperts.federation.checkpoint import Checkpoint, save_checkpoint
from fedexperts.federation.flower_launch import ServerLostError, free_port
from fedexperts.federation.keys import make_keys
from fedexperts.run_directory import RunDirectory
from fedexperts.running import serving
from fedexperts.running.serving import run_server
from fedexperts.seals import write_sealed

SUPERLINK = f"""#!{sys.executable} -S
import os, signal, socket, sys
from pathlib import Path
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
with socket.create_server((host, int(port))):
    (Path(__file__).parent / "superlink").write_text(str(os.getpid()))
    signal.pause()
"""
STAYS = "#!/bin/sh\nexec sleep 1000\n"
LISTED = json.dumps({"runs": [{"status": "finished:failed"}]})
DIES = f"""
if task == "list": print({LISTED!r})
if task == "supernode": print(json.dumps({{"node-id": 7}}))
if task == "run":
    print("INFO: Successfully started run 41", flush=True)
    superlink = Path(__file__).parent / "superlink"
    turn = len([line for line in open(Path(__file__).parent / "calls.jsonl") if '"task": "run"' in line])
"""
"""Lists a run as ended, registers keys, and counts in ``turn`` how often a run was submitted."""


@pytest.fixture
def serve(tmp_path, monkeypatch, make_config, quiet):
    """Run the server's command where ``flwr run`` does what statements say."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for module in (flower_launch, flower_link):
        monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(serving, "MOST_LOSSES", 3)
    make_keys(tmp_path / "keys", ["north"])
    data = {"source": "site", "partition": {"kind": "site", "num_clients": 1}}
    config = make_config("fedavg", "transport.name=flower", "transport.connection=sites", data=data)

    def served(*statements):
        body = FLWR + DIES + "".join(f"    {statement}\n" for statement in statements)
        for name, text in {"flower-superlink": SUPERLINK, "flower-superexec": STAYS, "flwr": body}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        listen = f"127.0.0.1:{free_port()}"
        return run_server(
            config, tmp_path / "run", keys=tmp_path / "keys" / "server", listen=listen, progress=quiet
        )

    return served


def test_a_run_goes_on_after_its_server_app_was_killed(serve, caplog):
    assert serve("if turn == 3: finish()") == {"rounds": 7}
    assert caplog.messages == ["the server's process in Flower was killed; going on after round 0"] * 2


def test_a_run_goes_on_after_its_superlink_was_killed(serve, caplog):
    kill = "os.kill(int(superlink.read_text()), 9) if turn == 1 else finish()"
    assert serve(kill) == {"rounds": 7}
    assert caplog.messages == ["the server's SuperLink was killed; going on after round 0"]


def test_a_server_that_is_killed_again_and_again_without_a_round_gives_up(serve, caplog):
    with pytest.raises(ServerLostError, match=r"Finished rounds are kept: --resume"):
        serve("pass")
    assert len(caplog.messages) == 2


def test_a_superlink_that_ends_as_soon_as_it_has_started_is_given_up(serve, tmp_path, monkeypatch, caplog):
    @contextmanager
    def link_that_ended(*_):
        yield SimpleNamespace(sites={"north": "7"}, is_up=lambda: False)

    monkeypatch.setattr(serving, "open_link", link_that_ended)
    with pytest.raises(
        ServerLostError, match=r"^the SuperLink at 127.0.0.1:\d+ ends as soon as it has started$"
    ):
        serve("pass")
    assert caplog.messages == ["the server's SuperLink was killed; going on after round 0"] * 2
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_the_superlink_that_stays(serve, monkeypatch, caplog):
    opened, stays = [], serving.open_link

    @contextmanager
    def first_ends_at_once(*given):
        with stays(*given) as link:
            opened.append(link)
            is_first = len(opened) == 1
            yield SimpleNamespace(sites=link.sites, is_up=lambda: False) if is_first else link

    monkeypatch.setattr(serving, "open_link", first_ends_at_once)
    assert serve("finish()") == {"rounds": 7}, "there was nothing to resume"
    assert len(caplog.messages) == 1


def test_as_long_as_rounds_are_finished_the_server_goes_on(serve, tmp_path, caplog):
    made = RunDirectory(tmp_path / "made")
    write_sealed(made.base, {})
    save_checkpoint(made, Checkpoint(state=ServerState(round_number=1, tensors={})))
    finishes_a_round = f"import shutil; shutil.copytree({str(made.path)!r}, run, dirs_exist_ok=True)"
    assert serve(f"if turn == 2: {finishes_a_round}", "if turn == 4: finish()") == {"rounds": 7}
    assert [text[-1] for text in caplog.messages] == ["0", "1", "1"]


def test_a_reason_of_the_server_app_ends_the_command(serve):
    with pytest.raises(UserError, match=r"^the disk is full$"):
        serve('say("failed", "the disk is full")')
