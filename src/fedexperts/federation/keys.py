"""Make certificates and keys of a trial federation: authority, server's certificate, keys of nodes."""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedexperts.data.settings import CLIENT_NAME
from fedexperts.errors import UserError
from fedexperts.run_directory import refuse_used

AUTHORITY, SERVER = "authority", "server"
"""Folders of the authority's key, which only signs, and of what the server needs."""

CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY = "ca.crt", "server.crt", "server.key"
NODE_KEY = "node.key"
SITES = "sites"
"""Folder, among the server's, of the sites' public keys, ``NAME.pub``."""

MOST_DAYS = 36_500
"""Days that a certificate is valid at most: its dates have years of four digits."""

_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$)(\*\.)?({_LABEL}\.)*(?!\d+$){_LABEL}")
"""A host name. Its last part is no number, so that a mistyped address is none."""

LOOPBACK = ("localhost", "127.0.0.1")
"""Always in the server's certificate: its own programs reach it so."""


def make_keys(folder: Path, sites: Sequence[str], *, hosts: Sequence[str] = (), days: int = 365) -> None:
    """Write one folder for the server, one for each site, and one with the authority's key.

    Files are for their owner alone. The server gets the public keys of the sites alone.

    Raises:
        UserError: the folder is in use, or a site's name is none, or is taken.
    """
    _check(sites, days)
    refuse_used(folder)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = _authority(authority_key, days)
    server_key = ec.generate_private_key(ec.SECP384R1())
    server = _server_certificate(server_key, authority_key, (*LOOPBACK, *hosts), days)
    _write(folder / AUTHORITY / "ca.key", _private(authority_key, serialization.PrivateFormat.PKCS8))
    for name in (AUTHORITY, SERVER, *sites):
        _write(folder / name / CA_CERTIFICATE, authority.public_bytes(serialization.Encoding.PEM))
    _write(folder / SERVER / SERVER_CERTIFICATE, server.public_bytes(serialization.Encoding.PEM))
    _write(folder / SERVER / SERVER_KEY, _private(server_key, serialization.PrivateFormat.PKCS8))
    for name in sites:
        key = ec.generate_private_key(ec.SECP384R1())
        _write(folder / name / NODE_KEY, _private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write(folder / SERVER / SITES / f"{name}.pub", public + b"\n")


def _check(sites: Sequence[str], days: int) -> None:
    for place, name in enumerate(sites):
        if not CLIENT_NAME.fullmatch(name) or name in (AUTHORITY, SERVER, *sites[:place]):
            raise UserError(
                f'--sites names "{name}"; names are of letters, digits, ".", "_" and "-", each once, and not '
                f'"{AUTHORITY}" or "{SERVER}"'
            )
    if not sites:
        raise UserError("--sites is empty; it must name the sites, as in --sites north,south")
    if not 1 <= days <= MOST_DAYS:
        raise UserError(f"--days is {days}; it must be from 1 to {MOST_DAYS}")


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes) -> None:
    """Write a new file that its owner alone may read, in folders that its owner alone may enter."""
    for folder in (*reversed(path.parent.parents), path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of machines differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


_AUTHORITY_NAME = "FedExperts trial authority"


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    return (
        _builder(_AUTHORITY_NAME, _AUTHORITY_NAME, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    authority_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    names = x509.SubjectAlternativeName([_host(name) for name in dict.fromkeys(hosts)])
    return (
        _builder("FedExperts server", _AUTHORITY_NAME, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not HOST_NAME.fullmatch(name):
        raise UserError(
            f'--hosts names "{name}"; it must be host names and addresses without a port, as in '
            "fed.example.org,10.0.0.5"
        )
    return x509.DNSName(name)
