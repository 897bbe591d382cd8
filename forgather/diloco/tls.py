"""TLS between a server and its clients: who must show which certificate, from files of `forgather diloco cert`."""

import ssl
from pathlib import Path

from forgather.diloco.security import SecurityError


def server_context(certificate: Path, key: Path, client_authority: Path | None = None) -> ssl.SSLContext:
    """TLS of a server. With `client_authority` a client may show a certificate, which must then be one of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, certificate, key)
    if client_authority is not None:
        _load_authority(context, client_authority)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(
    authority: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """TLS of a worker: trusts `authority`, or the system's without one, and may show a certificate of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authority is None:
        context.load_default_certs()
    else:
        _load_authority(context, authority)
    if (certificate is None) != (key is None):
        raise SecurityError(
            "a certificate and its key are given together, or neither",
            fix="name both: diloco_address.tls_cert and .tls_key of `train`, --tls-cert and --tls-key of `diloco ...`",
        )
    if certificate is not None and key is not None:
        _load_pair(context, certificate, key)
    return context


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _require_files(certificate, key)
    try:
        # A key that wants a password would stop a service at its start, and ask nobody.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise SecurityError(
            f"{certificate} and {key} are no certificate and its key: {_reason(error)}",
            fix="`forgather diloco cert DIR` makes server.pem and server-key.pem; a key must have no password",
        ) from error


def _load_authority(context: ssl.SSLContext, authority: Path) -> None:
    _require_files(authority)
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise SecurityError(
            f"{authority} holds no certificate of an authority: {_reason(error)}",
            fix="`forgather diloco cert DIR` makes ca.pem",
        ) from error


def _require_files(*files: Path) -> None:
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise SecurityError(
                f"{file} cannot be read: {error.strerror}", fix="`forgather diloco cert DIR` makes certificates"
            ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
