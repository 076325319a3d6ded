"""Submitting a run to Flower's command line: programs in the place of Flower's play its part."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from fedexperts import __version__
from fedexperts.config.load import resolved_toml
from fedexperts.errors import UserError
from fedexperts.federation import flower_launch
from fedexperts.federation.flower_events import FAILED, MARK, WARNED, heard, say
from fedexperts.federation.flower_launch import FlowerLink, ServerLostError, run_with_flower
from fedexperts.run_directory import SEAL, RunDirectory, as_json
from fedexperts.running.progress import QuietProgress
from fedexperts.seals import hash_of, write_sealed

FLWR = f"""#!{sys.executable} -S
import json, os, sys, tomllib
from pathlib import Path
task, *given = sys.argv[1:]
shown = ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "no_proxy", "PATH")
call = {{"task": task, "given": given, "environment": {{name: os.environ.get(name, "") for name in shown}}}}
if task == "run":
    call["app"] = tomllib.loads(Path(given[0], "pyproject.toml").read_text())
    home = Path(os.environ.get("FLWR_HOME", "none"), "config.toml")
    call["home"] = tomllib.loads(home.read_text()) if home.exists() else {{}}
    run = Path(call["app"]["tool"]["flwr"]["app"]["config"]["run-directory"])
with (Path(__file__).parent / "calls.jsonl").open("a") as file:
    file.write(json.dumps(call) + "\\n")
def say(*event):
    print({MARK!r} + json.dumps(event), flush=True)
def finish():
    (run / "result.json").write_text({json.dumps({"rounds": 7, SEAL: hash_of(as_json({"rounds": 7}))})!r})
"""
"""Writes down how it was called; what it then does follows."""

SUPERLINK = f"""#!{sys.executable} -S
import signal, socket, sys
with socket.create_server((sys.argv[-3], int(sys.argv[-1]))):
    signal.pause()
"""
STARTED = 'print("INFO: Successfully started run 41", flush=True)\n'


class Flower:
    """The folder of the programs, and what was asked of them."""

    def __init__(self, folder):
        self.folder = folder
        self.program("flower-superlink", SUPERLINK)
        self.program("flower-superexec", "#!/bin/sh\n")

    def program(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def flwr(self, *, run, list_="pass"):
        """``flwr run`` and ``flwr list`` do as they are told, by statements one a line."""
        cases = {"run": run, "list": list_}
        bodies = [f"if task == {task!r}: {'; '.join(text.splitlines())}" for task, text in cases.items()]
        self.program("flwr", FLWR + "\n".join(bodies) + "\n")

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def flower(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(flower_launch, "PROGRAMS", folder)
    monkeypatch.setenv("no_proxy", "example.org")
    return Flower(folder)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return RunDirectory(folder)


class Told(QuietProgress):
    """Remembers what it was told; interrupts where the run is told to."""

    def __init__(self, interrupts=False):
        self.messages, self.interrupts = [], interrupts

    def message(self, text):
        self.messages.append(text)
        if self.interrupts:
            raise KeyboardInterrupt


@pytest.fixture
def deployed(make_config):
    return make_config("flex", "transport.name=flower", "transport.connection=lab")


def test_a_simulation_gets_a_superlink_of_its_own_that_ends_with_it(make_config, flower, run):
    config, progress = make_config("flex", "transport.name=flower", "threads=2"), Told()
    flower.flwr(run=STARTED + 'say("message", "3 clients")\nprint("INFO: bye", flush=True)\nfinish()')
    assert run_with_flower(config, run, progress=progress) == {"rounds": 7}
    (call,) = flower.calls()
    app, connection, option, settings, stream = call["given"]
    assert (connection, option, stream) == ("local", "--federation-config", "--stream")
    assert settings.split() == [
        "num-supernodes=3",
        "client-resources-num-cpus=2",
        "init-args-num-cpus=2",
        "client-resources-num-gpus=0.0",
        "init-args-num-gpus=0",
    ]
    assert call["app"]["project"]["version"] == __version__
    sent = call["app"]["tool"]["flwr"]["app"]["config"]
    assert sent["experiment"] == resolved_toml(config)
    assert sent["personal-folder"] == str(run.client_folders.absolute())
    assert sent["run-token"] == run.flower_token.read_text() != ""
    link = call["home"]["superlink"]
    assert link["default"] == "local"
    assert link["local"].keys() == {"address", "insecure"}
    assert link["local"]["address"].startswith("127.0.0.1:")
    assert link["local"]["insecure"] is True
    environment = call["environment"]
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["no_proxy"] == "example.org,127.0.0.1"
    assert environment["PATH"].split(os.pathsep)[0] == str(flower.folder)
    assert progress.messages == ["3 clients"]
    log = (run.path / "flower.log").read_text()
    assert log == "INFO: Successfully started run 41\nINFO: bye\n"
    assert not Path(app).exists()


def test_a_deployment_is_submitted_to_its_connection_and_keeps_its_token(deployed, flower, run):
    flower.flwr(run=STARTED + "finish()")
    for _ in range(2):
        assert run_with_flower(deployed, run, progress=Told()) == {"rounds": 7}
        run.result.unlink()
    first, second = flower.calls()
    assert first["given"][1:] == ["lab", "--stream"]
    configs = [call["app"]["tool"]["flwr"]["app"]["config"] for call in (first, second)]
    assert configs[0] == configs[1]
    assert configs[0]["personal-folder"] == ""
    assert configs[0]["run-directory"] == str(run.path)


def test_warnings_and_failures_of_the_server_app_come_through(deployed, flower, run, caplog):
    flower.flwr(run=STARTED + f'say({WARNED!r}, "client a is slow")\nsay({FAILED!r}, "the disk is full")')
    with pytest.raises(UserError, match=r"^the disk is full$"):
        run_with_flower(deployed, run, progress=Told())
    assert caplog.messages == ["client a is slow"]
    assert [call["task"] for call in flower.calls()] == ["run"]


def test_a_server_app_that_is_lost_is_told_in_a_sentence_with_the_way_on(deployed, flower, run):
    finished = json.dumps({"runs": [{"status": "finished:failed"}]})
    flower.flwr(run=f'{STARTED}print("\\x1b[91mERROR\\x1b[0m: Traceback")', list_=f"print({finished!r})")
    with pytest.raises(UserError) as lost:
        run_with_flower(deployed, run, progress=Told())
    assert str(lost.value) == (
        f"the server's process in Flower ended before the run had finished; {run.path / 'flower.log'} has "
        f"what Flower logged. Finished rounds are kept: --resume {run.path} goes on after them"
    )
    assert flower.calls()[1]["given"] == ["lab", "--run-id", "41", "--format", "json"]


def test_a_run_that_never_began_is_not_asked_for(deployed, flower, run):
    lines = "\n".join(f'print("line {number}")' for number in range(9))
    flower.flwr(run=f'{lines}\nprint("\\x1b[91mno such connection\\x1b[0m")')
    with pytest.raises(
        UserError, match=r"^Flower did not take the run: line 5 line 6 line 7 line 8 no such connection$"
    ):
        run_with_flower(deployed, run, progress=Told())
    assert [call["task"] for call in flower.calls()] == ["run"]


def test_a_run_whose_log_broke_off_is_waited_for(deployed, flower, run, monkeypatch):
    """The stream ends early; while the SuperLink says that the run goes on, its result is waited for."""
    going_on = json.dumps({"runs": [{"status": "running"}]})
    flower.flwr(run=STARTED, list_=f"print({going_on!r})")
    monkeypatch.setattr(flower_launch.time, "sleep", lambda seconds: write_sealed(run.result, {"rounds": 7}))
    assert run_with_flower(deployed, run, progress=Told()) == {"rounds": 7}
    assert [call["task"] for call in flower.calls()] == ["run", "list"]


def test_an_interruption_stops_the_run_at_the_superlink(deployed, flower, run):
    flower.flwr(run=STARTED + 'say("message", "hello")')
    with pytest.raises(KeyboardInterrupt):
        run_with_flower(deployed, run, progress=Told(interrupts=True))
    asked = [(call["task"], call["given"]) for call in flower.calls()[1:]]
    assert asked == [("stop", ["41", "lab"])]


def test_a_superlink_that_does_not_start_shows_its_log(tmp_path):
    log = tmp_path / "superlink.log"
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    with pytest.raises(UserError, match=r"did not start within 0 s: line 4 line 5 line 6 line 7 line 8$"):
        flower_launch.wait_until_up(1, log, seconds=0.0)


@pytest.fixture
def here(flower, monkeypatch):
    """A SuperLink of this machine, whose server app is missed at once."""
    monkeypatch.setattr(flower_launch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(flower_launch, "LOST_SECONDS", 0.05)
    return FlowerLink(environment=flower_launch.flower_environment({}), sites={}, is_up=lambda: True)


def test_a_server_app_that_was_killed_is_missed_by_the_lock_of_its_run(deployed, flower, run, here):
    """Flower says for a minute that the run goes on."""
    flower.flwr(run=f'{STARTED}say("message", "hello")\nimport time\ntime.sleep(60)')
    with pytest.raises(ServerLostError, match="ended before the run had finished"):
        run_with_flower(deployed, run, progress=Told(), link=here)
    assert [call["task"] for call in flower.calls()] == ["run", "stop"]


def test_a_server_app_that_writes_its_run_is_left_alone(deployed, flower, run, here):
    flower.flwr(run=f'{STARTED}say("message", "hello")\nimport time\ntime.sleep(0.3)\nfinish()')
    with run.lock():
        assert run.is_locked()
        assert run_with_flower(deployed, run, progress=Told(), link=here) == {"rounds": 7}
    assert not run.is_locked()
    assert [call["task"] for call in flower.calls()] == ["run"]


def test_an_event_is_in_the_log_as_soon_as_it_is_said(monkeypatch):
    log = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log, "utf-8"))
    say(FAILED, "the disk is full")
    assert heard(log.getvalue().decode()) == (FAILED, ["the disk is full"])
