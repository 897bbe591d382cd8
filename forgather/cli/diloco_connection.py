"""The flags by which a command finds a DiLoCo server and proves who it is."""

from pathlib import Path
from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError

if TYPE_CHECKING:
    from forgather.diloco.address import ServerAddress

DEFAULT_SERVER = "127.0.0.1:8512"


def add_connection_flags(parser: CommandParser, *, default: str | None = DEFAULT_SERVER) -> None:
    """`--server`, `--token-file`, and what TLS needs."""
    suffix = f" (default: {default})" if default else ""
    parser.add_argument("--server", default=default, metavar="HOST:PORT", help=f"the server{suffix}")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="its token (default: the file FORGATHER_DILOCO_TOKEN_FILE names, or what FORGATHER_DILOCO_TOKEN holds)",
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="the authority that signed its certificate: TLS is then spoken"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="a client's certificate, which stands for the token")
    parser.add_argument("--tls-key", metavar="FILE", help="its key")


def server_address(options: Options) -> "ServerAddress":
    """The server that the flags name."""
    from forgather.diloco.address import parse_address
    from forgather.diloco.security import token_of_client

    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key are given together, or neither", fix="give both")
    tls = None
    if options.tls_ca is not None or options.tls_cert is not None:
        from forgather.diloco.certificates import client_context

        tls = client_context(_path(options.tls_ca), _path(options.tls_cert), _path(options.tls_key))
    return parse_address(options.server, tls=tls, token=token_of_client(_path(options.token_file)))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
