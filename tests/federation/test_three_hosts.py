"""A server and two sites on hosts with addresses of their own; one is cut off in a round, and healed.

Hosts are network namespaces behind a switch, which need root. The machine's own network is not touched.
"""

import os
import shutil
import subprocess
import time

import pytest
from deployment import SITES, committed, deployed
from test_kill_matrix import config_of

ADDRESSES = {"server": "10.77.0.1", **{site: f"10.77.0.{place}" for place, site in enumerate(SITES, 2)}}
SWITCH = f"fedexperts-{os.getpid()}"


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def host(name):
    return f"{SWITCH}-{name}"


@pytest.fixture
def hosts():
    """Hosts behind a switch; the words with which a program is started on each."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and ip of iproute2")
    try:
        ip("netns", "add", SWITCH)
    except subprocess.CalledProcessError as error:
        if not any(words in error.stderr for words in ("not permitted", "denied", "Read-only")):
            raise
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("-n", SWITCH, "link", "add", "switch", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "switch", "up")
        for name, address in ADDRESSES.items():
            ip("netns", "add", host(name))
            ip("-n", SWITCH, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host(name))
            ip("-n", SWITCH, "link", "set", name, "master", "switch", "up")
            ip("-n", host(name), "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host(name), "link", "set", device, "up")
        yield {name: ("ip", "netns", "exec", host(name)) for name in ADDRESSES}
    finally:
        for name in (*map(host, ADDRESSES), SWITCH):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def cut(name):
    """Let the switch pass nothing more to or from a host; nobody is told."""
    ip("-n", SWITCH, "link", "set", name, "nomaster")


def heal(name):
    ip("-n", SWITCH, "link", "set", name, "master", "switch")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_site_that_is_cut_off_in_a_round_is_waited_for_and_the_run_ends_in_the_same_bits(
    hosts, make_config, tmp_path
):
    config = config_of(make_config)
    with deployed(config, tmp_path / "whole") as federation:
        federation.go_on({}, 300)
        whole = federation.identity()
    _, birch = SITES
    with deployed(config, tmp_path / "cut", ADDRESSES["server"], hosts) as federation:
        federation.wait_for((federation.folder / committed(1)).exists, 300)

        def is_asked_again():
            asked = [*federation.folder.glob(f"site-{birch}/runs/*/clients/{birch}/received")]
            made = (federation.folder / committed(1)).stat().st_mtime_ns
            return asked and asked[0].stat().st_mtime_ns > made

        federation.wait_for(is_asked_again, 60)
        cut(birch)
        time.sleep(75)  # longer than Flower waits for a sign of life
        assert federation.programs["server"].poll() is None
        assert not (federation.folder / committed(2)).exists(), "the round waits"
        heal(birch)
        federation.go_on({}, 600)
        said = (federation.folder / "server.log").read_text()
        assert f"waiting for client {birch}: its node is no longer connected" in said
        assert federation.num_starts == dict.fromkeys(ADDRESSES, 1), "nobody had to start anything again"
        assert federation.identity() == whole
