"""The files in deploy/ call FedExperts by commands that it has."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from fedexperts.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def commands():
    for unit in sorted(DEPLOY.glob("*.service")):
        (line,) = re.findall(r"^ExecStart=\S*/fedexperts (.*)$", unit.read_text(), re.MULTILINE)
        yield unit.name, line.split()
    for file in sorted(DEPLOY.glob("compose.*.yaml")):
        for name, service in yaml.safe_load(file.read_text())["services"].items():
            if service["image"] == "fedexperts":
                yield f"{file.name} {name}", [str(word) for word in service["command"]]


@pytest.mark.parametrize(("where", "words"), list(commands()))
def test_every_command_is_one(where, words):
    given = build_parser().parse_args(words)
    assert given.command.__name__ == words[0], where


def test_the_proxy_passes_what_sites_need_and_refuses_the_rest():
    text = (DEPLOY / "nginx.conf").read_text()
    rules = dict(re.findall(r"location (.+?) +\{ (.+?); \}", text))
    to_link = "proxy_pass https://127.0.0.1:9093"
    assert rules == {"/v1/fleet/": to_link, "= /health": to_link, "/": "return 403"}
    for name in ("compose.server.yaml", "fedexperts-server.service"):
        assert "127.0.0.1:9093" in (DEPLOY / name).read_text()


def test_the_image_gets_what_the_package_is_built_from_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "constraints.txt", "src", project["readme"], *project["license-files"]}
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == needed
