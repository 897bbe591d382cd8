"""Who may speak to a server: whoever has its token, or a certificate that its own authority has signed.

The token is made at the first start and lives in a file that only its owner may read. It stands in no command line,
where `ps` would show it, and in no message or log: what is printed is the path of its file.
"""

import base64
import contextlib
import hmac
import ipaddress
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from forgather.durable import sync
from forgather.errors import ForgatherError

TOKEN_NAME = "token"  # beside the server's checkpoints, unless another file is named
TOKEN_VARIABLE = "FORGATHER_DILOCO_TOKEN"
TOKEN_FILE_VARIABLE = "FORGATHER_DILOCO_TOKEN_FILE"
_TOKEN = re.compile(r"[A-Za-z0-9_.~+/=-]{16,512}")  # what a header carries unchanged, and long enough not to be guessed


class SecurityError(ForgatherError):
    """A token, a certificate or an address that would leave a server open, or that cannot be used."""


def token_of_server(file: Path) -> str:
    """The token in `file`, which is made, with 256 random bits and for its owner alone, where it is not there yet."""
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # with mode 0600
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                    opened.write(f"{secrets.token_urlsafe(32)}\n")
                    opened.flush()
                    os.fsync(descriptor)
                # Whole or not there; where another that starts at once has made it, that one is taken.
                with contextlib.suppress(FileExistsError):
                    file.hardlink_to(aside)
            finally:
                Path(aside).unlink(missing_ok=True)
            sync(file.parent)
        except OSError as error:
            raise SecurityError(
                f"the token cannot be written to {file}: {error.strerror}", fix="--token-file FILE, at a writable place"
            ) from error
    return read_token(file)


def token_of_client(file: Path | None, environ: Mapping[str, str] | None = None) -> str | None:
    """The token in `file`, or else in the file or the words that the environment names; None where nothing is said."""
    environ = os.environ if environ is None else environ
    if file is None and environ.get(TOKEN_FILE_VARIABLE):
        file = Path(environ[TOKEN_FILE_VARIABLE])
    if file is not None:
        return read_token(file)
    token = environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise SecurityError(f"{TOKEN_VARIABLE} holds no token", fix="copy the server's token file, whole")
    return token


def read_token(file: Path) -> str:
    """The token in `file`; SecurityError when it is not there, is none, or others may read it."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise SecurityError(f"others than its owner may read the token in {file}", fix=f"chmod 600 {file}")
        token = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise SecurityError(
            f"the token file {file} cannot be read: {error.strerror}",
            fix="copy it from the server, which prints the path of its own",
        ) from error
    if not _TOKEN.fullmatch(token):
        raise SecurityError(f"{file} holds no token", fix="copy it from the server again, whole")
    return token


def write_secret(file: Path, content: bytes) -> None:
    """Write a new file that nobody but its owner may read, at no moment; FileExistsError where it is."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)


def require_protection(host: str, *, without_token: bool) -> None:
    """SecurityError unless a server bound to `host` asks for a token, or is reached from this machine alone."""
    if without_token and not is_loopback(host):
        raise SecurityError(
            f"--no-auth, and bound to {host}: whoever reaches this machine could change the model",
            fix="leave out --no-auth; or --host 127.0.0.1, which only this machine reaches",
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine and is reached from nowhere else. A name is not looked up: it could change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_authorized(
    authorization: str | None,
    token: str | None,
    *,
    method: str,
    origin: str | None = None,
    has_certificate: bool = False,
) -> bool:
    """Whether a request may be answered, by its Authorization header; takes the same time for any wrong token.

    With no `token` everyone is welcome; a client certificate that TLS has verified stands for one. A browser, which
    asks for a password, sends the token as that. It then sends it by itself, also for a foreign page (whose `origin` it
    names), as it reaches servers on loopback for one. So what a browser sends may read, and change nothing.
    """
    only_reads = method in ("GET", "HEAD")
    if origin is not None and not only_reads:
        return False
    if token is None or has_certificate:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() == "basic" and only_reads:
        try:
            given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    # As bytes: a header may hold what is no ASCII, which the comparison of texts refuses.
    return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())


# With a 401: what lets a browser ask its user, and says nothing about why.
CHALLENGE = 'Basic realm="forgather diloco: any name, and the token as password", charset="UTF-8"'
