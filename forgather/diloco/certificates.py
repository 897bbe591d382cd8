"""Certificates for servers and workers of one's own network: a private authority signs them, and TLS asks for them.

A folder holds the authority (`ca.pem`, `ca-key.pem`), the server's certificate (`server.pem`, `server-key.pem`) and
those of clients (`NAME.pem`, `NAME-key.pem`). Workers need `ca.pem` alone, to know the server; a worker with a
certificate of its own needs no token. `ca-key.pem` leaves the machine where it was made never.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from forgather.diloco.security import SecurityError, write_secret
from forgather.distributed.network import interfaces
from forgather.durable import sync

AUTHORITY_DAYS = 3650
_EARLY = timedelta(hours=1)  # clocks of machines differ, and a certificate of the next minute is none
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")
_RESERVED = {"ca", "server"}


@dataclass(frozen=True)
class Made:
    """What was written, and what the server's certificate is for."""

    files: list[Path] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)


def make_certificates(
    folder: Path, hosts: Sequence[str] = (), clients: Sequence[str] = (), *, valid_days: int = 825
) -> Made:
    """Make what is missing in `folder`: the authority; the server's certificate, for `hosts`; those of `clients`.

    Without `hosts` the server's is for all names and addresses of this machine, and one that is there stays. With them,
    and for a client that is named again, a new one takes the old one's place; the authority is never replaced.
    """
    for name in clients:
        if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith("-key"):
            raise SecurityError(f"{name!r} is no name for a client's certificate", fix="letters, digits, - and _")
    names = [_subject_name(host) for host in hosts]
    made = Made(hosts=list(hosts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(folder.stat().st_mode & ~0o022)  # nobody else may put an authority of theirs in place
        authority = _authority(folder, made)
        if names or not (folder / "server.pem").exists():
            if not names:
                made.hosts.extend(own_names())
                names = [_subject_name(host) for host in made.hosts]
            _issue(folder, "server", authority, names, ExtendedKeyUsageOID.SERVER_AUTH, valid_days, made)
        for name in clients:
            _issue(folder, name, authority, [], ExtendedKeyUsageOID.CLIENT_AUTH, valid_days, made)
        sync(folder)
    except OSError as error:
        raise SecurityError(
            f"certificates cannot be written to {folder}: {error.strerror}", fix="name a folder that can be written"
        ) from error
    return made


def own_names() -> list[str]:
    """Names and addresses by which this machine may be reached."""
    addresses = [str(each.address) for each in interfaces()] or ["127.0.0.1"]
    host = socket.gethostname()
    return list(dict.fromkeys([*([host] if _HOST.fullmatch(host) else []), "localhost", *addresses]))


def is_for(certificate: Path, host: str) -> bool:
    """Whether a client that connects to `host` accepts the server's certificate as that host's."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    known = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return host.lower() in known or f"*.{host.lower().partition('.')[2]}" in known


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _authority(folder: Path, made: Made) -> _Authority:
    certificate_file, key_file = folder / "ca.pem", folder / "ca-key.pem"
    if certificate_file.exists() and not key_file.exists():
        raise SecurityError(
            f"{folder} has ca.pem and not its key, so that nothing can be signed",
            fix="bring back ca-key.pem, or make all certificates anew in another folder",
        )
    if certificate_file.exists():
        try:
            found = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            found_key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise SecurityError(
                f"ca.pem and ca-key.pem of {folder} cannot be read: {error}", fix="make all anew in another folder"
            ) from error
        fits = isinstance(found_key, ec.EllipticCurvePrivateKey) and found.public_key() == found_key.public_key()
        if not fits or not isinstance(found_key, ec.EllipticCurvePrivateKey):
            raise SecurityError(
                f"ca-key.pem of {folder} is not the key of its ca.pem", fix="make all anew in another folder"
            )
        return _Authority(found, found_key)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(f"Forgather DiLoCo of {socket.gethostname()}"[:64])
    certificate = (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(folder, "ca", certificate, key, made)
    return _Authority(certificate, key)


def _issue(
    folder: Path,
    name: str,
    authority: _Authority,
    names: Sequence[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    valid_days: int,
    made: Made,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    builder = (
        _builder(_named(name), issuer.subject, key, valid_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    _write_pair(folder, name, builder.sign(authority.key, hashes.SHA256()), key, made)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _subject_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise SecurityError(f"{host!r} is neither the name nor the address of a host", fix="--host 10.0.0.1, say")
    return x509.DNSName(host)


def _write_pair(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, made: Made
) -> None:
    """The key first: a certificate whose key is there is a pair that can be used."""
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for file, content in (
        (folder / f"{name}-key.pem", secret),
        (folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
    ):
        aside = file.with_name(f".{file.name}.partial")
        aside.unlink(missing_ok=True)
        write_secret(aside, content)
        if content is not secret:
            aside.chmod(0o644)
        aside.replace(file)
        made.files.append(file)
