"""Certificates and keys of a trial federation: what TLS and Flower take, and nobody else may read."""

import contextlib
import datetime
import ssl
import stat
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedexperts.cli.program import main
from fedexperts.errors import UserError
from fedexperts.federation.keys import make_keys


@pytest.fixture
def made(tmp_path):
    make_keys(tmp_path / "keys", ["north", "south"], hosts=["fed.example.org", "10.0.0.5"], days=3)
    return tmp_path / "keys"


def handshake(keys, host, authority):
    """A TLS handshake in memory of a client that asks for ``host`` with the server's certificate."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(keys / "server" / "server.crt", keys / "server" / "server.key")
    client_side = ssl.create_default_context(cafile=authority)
    client_side.verify_flags |= ssl.VERIFY_X509_STRICT
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(one, other, server_hostname=host)
    server = server_side.wrap_bio(other, one, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fed.example.org", "10.0.0.5"])
def test_a_site_accepts_the_server_under_each_of_its_names(made, host):
    assert handshake(made, host, made / "north" / "ca.crt")


@pytest.mark.parametrize("name", ["fed", "fed-1.example.org", "fed_server", "*.example.org", "::1"])
def test_a_host_may_have_any_name_that_is_one(tmp_path, name):
    make_keys(tmp_path / "keys", ["north"], hosts=[name])
    certificate = x509.load_pem_x509_certificate((tmp_path / "keys" / "server" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name in [str(one.value) for one in names]


def test_a_site_refuses_another_host_and_another_authority(made, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, "elsewhere.example.org", made / "north" / "ca.crt")
    make_keys(tmp_path / "others", ["north"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, "localhost", tmp_path / "others" / "north" / "ca.crt")


def test_each_site_has_a_key_of_its_own_whose_public_half_the_server_has(made):
    seen = set()
    for name in ("north", "south"):
        own = load_ssh_private_key((made / name / "node.key").read_bytes(), None)
        assert isinstance(own, ec.EllipticCurvePrivateKey)
        assert own.curve.name == "secp384r1"
        known = load_ssh_public_key((made / "server" / "sites" / f"{name}.pub").read_bytes())
        form = (Encoding.OpenSSH, PublicFormat.OpenSSH)
        assert own.public_key().public_bytes(*form) == known.public_bytes(*form)
        seen.add(known.public_bytes(*form))
    assert len(seen) == 2


def test_no_key_is_where_it_is_not_needed_and_all_are_for_their_owner_alone(made):
    found = {path.relative_to(made).as_posix() for path in made.rglob("*.key")}
    assert found == {"authority/ca.key", "server/server.key", "north/node.key", "south/node.key"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in (made, *made.rglob("*")) if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})


def test_certificates_end_when_they_are_told_to(made):
    for path in made.rglob("*.crt"):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert datetime.timedelta(days=2, hours=23) < left <= datetime.timedelta(days=3)


@pytest.mark.parametrize(
    ("sites", "options", "sentence"),
    [
        (["server"], {}, '--sites names "server"'),
        (["a", "a"], {}, '--sites names "a"'),
        (["../a"], {}, '--sites names "../a"'),
        ([], {}, "--sites is empty"),
        (["a"], {"days": 0}, "--days is 0"),
        (["a"], {"days": 99_999_999}, r"--days is 99999999; it must be from 1 to 36500"),
        (["a"], {"hosts": ["hôte"]}, '--hosts names "hôte"'),
        (["a"], {"hosts": ["bad host!"]}, '--hosts names "bad host!"; it must be host names and addresses'),
        (["a"], {"hosts": ["fed.example.org:9092"]}, "without a port"),
        (["a"], {"hosts": ["10.0.0.300"]}, '--hosts names "10.0.0.300"'),
        (["a"], {"hosts": ["-x.org"]}, '--hosts names "-x.org"'),
        (["a"], {"hosts": ["x..y"]}, '--hosts names "x..y"'),
        (["a"], {"hosts": ["x" * 64]}, "--hosts names"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(tmp_path, sites, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_keys(tmp_path / "keys", sites, **options)
    assert not (tmp_path / "keys").exists()


def test_the_command_writes_them_and_overwrites_nothing(tmp_path, capsys):
    command = ["keys", str(tmp_path / "keys"), "--sites", "north,south"]
    assert main(command) == 0
    assert f"  {tmp_path / 'keys' / 'south'}\n" in capsys.readouterr().out
    before = (tmp_path / "keys" / "authority" / "ca.key").read_bytes()
    assert main(command) == 2
    assert "is already in use" in capsys.readouterr().err
    assert (tmp_path / "keys" / "authority" / "ca.key").read_bytes() == before


def test_without_flower_s_extra_the_command_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fedexperts.federation.keys", None)
    assert main(["keys", str(tmp_path / "keys"), "--sites", "north"]) == 2
    assert "needs the package cryptography: run pip install -e '.[flower]'" in capsys.readouterr().err
