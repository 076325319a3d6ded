"""Start Flower's programs for sites: a SuperLink with TLS and registered keys, and a SuperNode."""

import errno
import ipaddress
import json
import logging
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import tomli_w

from fedexperts.errors import UserError, needs_extra
from fedexperts.federation.flower_launch import (
    PROGRAMS,
    FlowerLink,
    flower_environment,
    free_port,
    wait_until_up,
)
from fedexperts.federation.keys import CA_CERTIFICATE, NODE_KEY, SERVER_CERTIFICATE, SERVER_KEY, SITES
from fedexperts.federation.warm import SERVER

logger = logging.getLogger(__name__)

CONNECTION = "sites"
"""Name of the connection to the SuperLink that :func:`open_link` starts."""

NODE = "flower-supernode"
"""Flower's program of a site."""

_LINK = """
("$1/flower-superlink" --isolation process --enable-supernode-auth --host "$2" --port "$3" \
    --ssl-ca-certfile "$5/ca.crt" --ssl-certfile "$5/server.crt" --ssl-keyfile "$5/server.key" \
    --superexec-auth-secret-file "$6/secret"; kill -KILL 0) &
("$1/flower-superexec" --root-certificates "$5/ca.crt" --runtime-api-address "$4" \
    --superexec-auth-secret-file "$6/secret"; kill -KILL 0) &
cat >/dev/null
rm -rf -- "$6"
kill -KILL 0
"""
# They live until their standard input ends, which it does however this process ends; or until one of them
# ends. The server app that Flower has started, which is one of their group, ends with them.

_NODE = """
exec 3<&0
"$@" &
node=$!
(cat <&3 >/dev/null; kill "$node" 2>/dev/null) &
exec 3<&-
wait "$node"
kill -KILL 0
"""
# It lives until its standard input ends, too. What Flower has started for it ends with it.

RESTART_SECONDS = 5.0


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f'{option} is "{text}"; it must be HOST:PORT, as in 127.0.0.1:9092')
    return host.strip("[]"), int(port)


@contextmanager
def open_link(keys: Path, host: str, port: int, port_seconds: float = 0.0) -> Iterator[FlowerLink]:
    """Start a SuperLink at ``host``, and register the public keys of the sites in ``keys``.

    Raises:
        UserError: a file of ``keys`` is missing, or Flower is; the port is taken, and still is after
            ``port_seconds``, or the SuperLink does not start.
    """
    _require_program("flower-superlink", "fedexperts server")
    public = _public_keys(keys)
    _refuse_taken(host, port, port_seconds)
    if not _is_loopback(host):
        logger.warning(
            "whoever reaches %s:%d can submit code to the sites: let a proxy pass /v1/fleet/ alone (deploy/)",
            host,
            port,
        )
    near = f"{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    with tempfile.TemporaryDirectory(prefix="fedexperts-link-", ignore_cleanup_errors=True) as made:
        folder, log = Path(made), Path(made) / "superlink.log"
        environment = _environment(keys, folder, near)
        arguments = [str(PROGRAMS), host, str(port), near, str(keys.absolute()), made]
        with (
            log.open("w") as output,
            subprocess.Popen(
                ["sh", "-c", _LINK, "link", *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            wait_until_up(port, log, host=near.rpartition(":")[0])
            sites = {name: _register(path, environment) for name, path in public.items()}
            yield FlowerLink(environment=environment, sites=sites, is_up=lambda: process.poll() is None)


def _public_keys(keys: Path) -> dict[str, Path]:
    for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY):
        _require(keys / name)
    public = {path.stem: path for path in sorted((keys / SITES).glob("*.pub"))}
    if not public:
        raise UserError(f"{keys / SITES} has no public key of a site (NAME.pub)")
    return public


def _require_program(name: str, command: str) -> None:
    if not (PROGRAMS / name).exists():
        raise needs_extra(command, "flwr", "flower")


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist; fedexperts keys makes it")


def _refuse_taken(host: str, port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= until:
                    raise UserError(
                        f"--listen {host}:{port} cannot be used: {error.strerror or error}"
                    ) from None
        time.sleep(0.2)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _environment(keys: Path, folder: Path, address: str) -> dict[str, str]:
    """Return an environment in which Flower's command line knows the link, and write what it reads."""
    (folder / "secret").touch(mode=0o600)
    (folder / "secret").write_text(secrets.token_hex(32))
    (folder / "home").mkdir()
    connection = {"address": address, "root-certificates": str((keys / CA_CERTIFICATE).absolute())}
    table = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    (folder / "home" / "config.toml").write_text(tomli_w.dumps(table))
    return flower_environment({"FLWR_HOME": str(folder / "home")})


def _register(public_key: Path, environment: Mapping[str, str]) -> int:
    """Return the node id that belongs to a key from now on."""
    command = [str(PROGRAMS / "flwr"), "supernode", "register", str(public_key), CONNECTION]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, env=environment)
    try:
        return int(json.loads(done.stdout[done.stdout.index("{") :])["node-id"])
    except (ValueError, LookupError):
        told = " ".join((done.stdout + done.stderr).split())
        raise UserError(f"Flower does not take the key {public_key}: {told[-500:]}") from None


def check_node(server: str, keys: Path) -> None:
    """Check that the SuperNode of a site can be started.

    Raises:
        UserError: ``server`` is no address, a file of ``keys`` is missing, or Flower is.
    """
    parse_address(server, "--server")
    for name in (CA_CERTIFICATE, NODE_KEY):
        _require(keys / name)
    _require_program(NODE, "fedexperts site")


def run_node(site_file: Path, server: str, keys: Path) -> NoReturn:
    """Run the SuperNode of a site until this process is stopped; start it anew whenever it ends.

    :func:`check_node` has said that it can be started.

    It ends where the server does not know its key yet, and where the server has ended and forgotten it. All
    that it and the site's turns say is in ``site.log`` beside the site's settings.
    """
    program, home = PROGRAMS / NODE, site_file.parent / "flower"
    home.mkdir(mode=0o700, exist_ok=True)
    log = site_file.with_name("site.log")
    log.touch(mode=0o600)
    arguments = [str(program), "--superlink", server, "--root-certificates", str(keys / CA_CERTIFICATE)]
    arguments += ["--auth-supernode-private-key", str(keys / NODE_KEY)]
    arguments += ["--node-config", f'site="{site_file.absolute()}"', "--host", "127.0.0.1", "--port"]
    environment = flower_environment({"FLWR_HOME": str(home.absolute()), SERVER: server})
    while True:
        command = ["sh", "-c", _NODE, "node", *arguments, str(free_port())]
        with (
            log.open("a") as output,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            process.wait()
        logger.info("not connected to %s (%s says why); again in %g s", server, log, RESTART_SECONDS)
        time.sleep(RESTART_SECONDS)
