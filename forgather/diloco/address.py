"""Where a server is, and how it is spoken to: host and port, its token, and TLS where it has that."""

import http.client
import json
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgather.diloco.security import TOKEN_FILE_VARIABLE, SecurityError, token_of_client
from forgather.diloco.tls import client_context
from forgather.errors import DistributedError, ForgatherError

DEFAULT_PORT = 8512
_MAX_ANSWER_BYTES = 64 << 20  # of JSON
ENDED = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)  # by the other side
_ADDRESS = re.compile(r"(?:(https?)://)?(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:/\[\]@]+))(?::(\d{1,5}))?/?")
_CERTIFICATE_FIX = (
    "see whether the server still runs, whether its --client-ca is the ca.pem that made this certificate (`forgather "
    "diloco cert DIR --client NAME`), and whether it is still valid; or leave the certificate out, and give the token"
)


@dataclass(frozen=True)
class ServerAddress:
    """A server as its clients know it. The token is not shown where this is printed."""

    host: str
    port: int = DEFAULT_PORT
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    has_certificate: bool = False  # of this client, which `tls` shows

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def connection(self, timeout_s: float, source_address: str | None = None) -> http.client.HTTPConnection:
        """A connection that is opened by its first request, from `source_address` where several lead there."""
        source = None if source_address is None else (source_address, 0)
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s, source_address=source)
        return http.client.HTTPSConnection(
            self.host, self.port, timeout=timeout_s, source_address=source, context=self.tls
        )

    def ask(self, method: str, path: str, content: Any = None, *, timeout_s: float = 30.0) -> Any:
        """The JSON (or the text, where it is no JSON) that answers a small request; an error says what to do."""
        body = None if content is None else json.dumps(content).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection = self.connection(timeout_s)
        try:
            connection.request(method, path, body, self.headers | kind)
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self.unreachable(error) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise self.refused(answer.status, data)
        is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(data) if is_json else data.decode(errors="replace")

    def unreachable(self, error: Exception) -> ForgatherError:
        """What it means for the user that the server could not be asked."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return SecurityError(
                f"the certificate of {self} is not one to trust: {error.verify_message}",
                fix="name the ca.pem of `forgather diloco cert`, which was made with this --host: "
                + naming("tls_ca", "CA.pem"),
            )
        if isinstance(error, http.client.HTTPException | ConnectionResetError) and self.tls is None:
            return DistributedError(
                f"{self} does not answer as a DiLoCo server without TLS does: {error or type(error).__name__}",
                fix=f"if it was started with --tls-cert, {naming('tls_ca', 'CA.pem')}; look at the port otherwise",
            )
        if isinstance(error, ENDED) and self.tls is not None:
            return self._ended()
        if isinstance(error, ssl.SSLError):
            if self.has_certificate and "ALERT" in (error.reason or ""):
                return SecurityError(f"{self} does not accept this certificate: {error.reason}", fix=_CERTIFICATE_FIX)
            return SecurityError(
                f"{self} and this command do not agree about TLS: {error.reason or error}",
                fix=f"{naming('tls_ca', 'CA.pem')}, exactly if the server was started with --tls-cert",
            )
        if isinstance(error, TimeoutError | socket.timeout):
            return DistributedError(
                f"{self} does not answer", fix="see that the server runs, and that no wall is between"
            )
        return DistributedError(
            f"no DiLoCo server at {self}: {getattr(error, 'strerror', None) or error}",
            fix="see that `forgather diloco server` runs there, and that address and port are those that it printed",
        )

    def _ended(self) -> DistributedError:
        """What it means that the server has ended a connection with TLS, and has not answered.

        One that refuses a certificate, which it sees after the client's part is done, may do so without a word.
        """
        shown = "this certificate" if self.has_certificate else "a client without a certificate"
        return DistributedError(
            f"{self} ended the connection without an answer: it may not accept {shown}",
            fix=_CERTIFICATE_FIX
            if self.has_certificate
            else "see whether it still runs, and whether it wants a certificate: "
            f"{naming('tls_cert', 'CLIENT.pem')}, and its key by tls_key",
        )

    def refused(self, status: int, data: bytes) -> ForgatherError:
        """The server's own words where it has said why."""
        if status == 401:
            return SecurityError(
                f"{self} asks for its token" if self.token is None else f"{self} has another token",
                fix=f"copy the server's token file: {naming('token_file', 'COPY')}; or {TOKEN_FILE_VARIABLE}=COPY",
            )
        try:
            said = json.loads(data)
            message, fix = str(said["error"]), said.get("fix")
        except (ValueError, LookupError, TypeError, AttributeError):
            message = f"it answered with HTTP status {status}, and not as a DiLoCo server does"
            fix = "see that address and port are those that `forgather diloco server` printed"
        return DistributedError(f"{self}: {message}", fix=fix)


def server_named(
    text: str,
    *,
    token_file: str | Path | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServerAddress:
    """The server at `text`, and what proves who asks: the files that are given, or those that the environment names.

    FORGATHER_DILOCO_TOKEN_FILE, FORGATHER_DILOCO_TOKEN, and for TLS FORGATHER_DILOCO_TLS_CA, _TLS_CERT and _TLS_KEY.
    """
    environ = os.environ if environ is None else environ

    def chosen(given: str | Path | None, name: str) -> Path | None:
        found = given or environ.get(f"FORGATHER_DILOCO_{name}")
        return Path(found).expanduser() if found else None

    authority, certificate, key = chosen(tls_ca, "TLS_CA"), chosen(tls_cert, "TLS_CERT"), chosen(tls_key, "TLS_KEY")
    tls = (
        None
        if authority is None and certificate is None and key is None
        else client_context(authority, certificate, key)
    )
    address = parse_address(text, tls=tls, token=token_of_client(chosen(token_file, "TOKEN_FILE"), environ))
    return replace(address, has_certificate=certificate is not None)


def naming(name: str, file: str) -> str:
    """How a file is named to the commands that ask a server; which of them reads this is not known here."""
    return f"diloco_address.{name}={file} of `train`, --{name.replace('_', '-')} {file} of `diloco ...`"


def parse_address(
    text: str, *, tls: ssl.SSLContext | None = None, token: str | None = None, default_port: int = DEFAULT_PORT
) -> ServerAddress:
    """HOST, HOST:PORT, [IPv6]:PORT, with or without `http://` or `https://` before it, which must fit `tls`."""
    match = _ADDRESS.fullmatch(text.strip())
    port = int(match[4]) if match and match[4] else default_port
    if match is None or not 0 < port < 65536:
        raise DistributedError(
            f"{text!r} is no address of a server", fix=f"write HOST:PORT, as 10.0.0.1:{DEFAULT_PORT}"
        )
    if match[1] == "https" and tls is None:
        tls = ssl.create_default_context()
    if match[1] == "http" and tls is not None:
        raise SecurityError(f"{text} is spoken to without TLS, and certificates are given", fix="write https://")
    return ServerAddress(match[2] or match[3], port, tls, token)
