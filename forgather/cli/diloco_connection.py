"""The flags by which a command finds a DiLoCo server and proves who it is."""

from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser

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
    from forgather.diloco.address import server_named

    return server_named(
        options.server,
        token_file=options.token_file,
        tls_ca=options.tls_ca,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
    )
