"""Who is kept out of a real SuperLink that is started as ``fedexperts server`` does it: TLS, registered keys.

Sites are Flower's own program, started as ``fedexperts site`` does it; each stranger differs in one thing.
The proxy has the rules of deploy/nginx.conf, and not its code.
"""

import http.client
import json
import posixpath
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization

from fedexperts.federation import keys as key_files
from fedexperts.federation.flower_launch import PROGRAMS, flower_environment, free_port
from fedexperts.federation.flower_link import CONNECTION, open_link
from fedexperts.federation.keys import make_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NGINX = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
PASSED = re.findall(r"location (= )?(\S+) +\{ proxy_pass ", NGINX)
"""Paths that the proxy passes; the mark = says that the path has to be the whole."""
WITHIN_SECONDS = 200


def passes(path):
    """Whether nginx would pass a path, which it compares decoded and without dots."""
    plain = posixpath.normpath(unquote(path.partition("?")[0]))
    return any(plain == allowed if exact else plain.startswith(allowed) for exact, allowed in PASSED)


@contextmanager
def proxy(keys, certificate, link_port):
    """Pass what nginx would pass to a SuperLink; give the port."""
    trusted = ssl.create_default_context(cafile=keys / "server" / "ca.crt")

    class Passing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not passes(self.path):
                self.reply(403, b"", {})
                return
            one = http.client.HTTPSConnection("127.0.0.1", link_port, context=trusted, timeout=60)
            with closing(one) as link:
                link.request(self.command, self.path, body, dict(self.headers))
                with link.getresponse() as answer:
                    self.reply(answer.status, answer.read(), dict(answer.getheaders()))

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def reply(self, status, body, headers):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request, client_address):
            with own.wrap_socket(request, server_side=True) as over_tls:
                super().finish_request(over_tls, client_address)

        def handle_error(self, request, client_address):
            """Say nothing of strangers who end the handshake."""

    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate, keys / "server" / "server.key")
    with Server(("127.0.0.1", 0), Passing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def expired(keys, folder):
    """Write a certificate of the server's key that was valid for half an hour, until half an hour ago."""
    authority, server = (
        serialization.load_pem_private_key((keys / name).read_bytes(), None)
        for name in ("authority/ca.key", "server/server.key")
    )
    certificate = key_files._server_certificate(server, authority, key_files.LOOPBACK, days=-0.5 / 24)
    path = folder / "expired.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


@dataclass
class Federation:
    """A SuperLink, proxies before it, and all who want to take part."""

    folder: Path
    keys: Path
    port: int
    proxy_port: int
    environment: dict
    node_id: int
    programs: dict

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def wait_for_end(self, name):
        """Wait until a site has given up; return what it says."""
        assert self.programs[name].wait(timeout=WITHIN_SECONDS) == 1, self.log(name)
        return self.log(name)

    def online(self):
        return {node["node-id"] for node in self.flwr("supernode", "list", CONNECTION)["nodes"]}

    def flwr(self, *words, home=None):
        environment = self.environment | ({"FLWR_HOME": str(home)} if home else {})
        command = [str(PROGRAMS / "flwr"), *words, "--format", "json"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=WITHIN_SECONDS
        )
        return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """All start together, so that the module takes as long as the slowest."""
    folder = tmp_path_factory.mktemp("strangers")
    keys, others, port = folder / "keys", folder / "others", free_port()
    for made in (keys, others):
        make_keys(made, ["north"])
    environment, programs = flower_environment({"FLWR_HOME": str(folder / "home")}), {}
    with ExitStack() as stack:
        link = stack.enter_context(open_link(keys / "server", "127.0.0.1", port))
        proxy_port = stack.enter_context(proxy(keys, keys / "server" / "server.crt", port))
        expired_port = stack.enter_context(proxy(keys, expired(keys, folder), port))

        def start(name, at, *given):
            command = [str(PROGRAMS / "flower-supernode"), "--superlink", f"127.0.0.1:{at}", *given]
            command += ["--host", "127.0.0.1", "--port", str(free_port())]
            log = stack.enter_context((folder / f"{name}.log").open("w"))
            programs[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            stack.callback(programs[name].wait, 30)
            stack.callback(programs[name].terminate)

        def with_files(authority, key):
            files = ["--root-certificates", str(authority / "north" / "ca.crt")]
            return [*files, "--auth-supernode-private-key", str(key / "north" / "node.key")]

        start("site", proxy_port, *with_files(keys, keys))
        start("foreign authority", port, *with_files(others, keys))
        start("foreign key", port, *with_files(keys, others))
        start("no key", port, "--root-certificates", str(keys / "north" / "ca.crt"))
        start("plaintext", port, "--insecure")
        start("expired", expired_port, *with_files(keys, keys))
        yield Federation(
            folder, keys, port, proxy_port, dict(link.environment), link.sites["north"], programs
        )


def wait_until(condition, what):
    deadline = time.monotonic() + WITHIN_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_site_with_the_right_files_joins_through_the_proxy(federation):
    wait_until(
        lambda: f"SuperNode ID: {federation.node_id}" in federation.log("site"), federation.log("site")
    )
    assert federation.programs["site"].poll() is None


def test_a_site_that_trusts_another_authority_refuses_the_server(federation):
    assert "CERTIFICATE_VERIFY_FAILED" in federation.wait_for_end("foreign authority")


def test_a_site_refuses_a_server_whose_certificate_has_expired(federation):
    assert "certificate has expired" in federation.wait_for_end("expired")


def test_a_node_whose_key_is_not_registered_is_refused(federation):
    assert "[code: 2004] Failed to activate SuperNode" in federation.wait_for_end("foreign key")


def test_a_node_without_a_key_is_refused(federation):
    assert "[code: 2001] SuperNode authentication is enabled" in federation.wait_for_end("no key")


def test_a_node_without_tls_gets_no_connection(federation):
    """Flower's program tries again for ever."""
    log = "plaintext"
    wait_until(lambda: federation.log(log).count("Connection attempt failed") > 1, federation.log(log))
    assert "SuperNode ID" not in federation.log(log)
    with socket.create_connection(("127.0.0.1", federation.port), timeout=WITHIN_SECONDS) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP"), "nothing is answered in plain text"


def asked(federation, port, path, method="POST"):
    """Return the status with which a stranger who has the authority's certificate is answered."""
    trusted = ssl.create_default_context(cafile=federation.keys / "north" / "ca.crt")
    one = http.client.HTTPSConnection("127.0.0.1", port, context=trusted, timeout=WITHIN_SECONDS)
    with closing(one) as link:
        link.request(method, path, b"" if method == "POST" else None)
        with link.getresponse() as answer:
            return answer.status


def test_the_proxy_passes_no_path_of_flower_but_those_of_sites(federation):
    trusted = ssl.create_default_context(cafile=federation.keys / "north" / "ca.crt")
    with urllib.request.urlopen(
        f"https://127.0.0.1:{federation.port}/openapi.json", context=trusted, timeout=WITHIN_SECONDS
    ) as answer:
        paths = list(json.load(answer)["paths"])
    closed = [path for path in paths if not path.startswith("/v1/fleet/") and path != "/health"]
    assert {path.split("/")[2] for path in closed if path.startswith("/v1/")} >= {"control", "runtime"}
    tricks = [f"/v1/fleet/{dots}/control/start-run" for dots in ("..", "%2e%2e", "x/../..")]
    for path in (*closed, *tricks, "/", "/openapi.json", "/docs"):
        assert asked(federation, federation.proxy_port, path) == 403, path
    assert asked(federation, federation.proxy_port, "/health", "GET") == 200


def test_flower_s_command_line_is_let_in_on_the_loopback_and_not_through_the_proxy(federation):
    """Flower's open-source control interface asks for no credentials: the port alone keeps strangers out."""
    assert federation.online() == {str(federation.node_id)}, "nobody else has become a node"
    home = federation.folder / "stranger"
    home.mkdir()
    ca = str(federation.keys / "north" / "ca.crt")
    connection = {"address": f"127.0.0.1:{federation.proxy_port}", "root-certificates": ca}
    table = {"superlink": {"default": "proxy", "proxy": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(table))
    assert federation.flwr("supernode", "list", "proxy", home=home)["success"] is False


def test_the_superlink_listens_on_the_loopback_alone(federation):
    listening = [
        line.split()[1].split(":")
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    assert [address for address, port in listening if int(port, 16) == federation.port] == ["0100007F"]
