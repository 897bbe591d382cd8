"""`forgather diloco status`, `control`, `cert` and `package`: what is asked of a server, and what its clients need."""

import json
import math
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgather.cli.diloco_connection import add_connection_flags, server_address
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError, unknown
from forgather.errors import EXIT_OK, DistributedError

ACTIONS = {
    "save": "save now",
    "drain": "take no new workers, let all save and stop, and end when they have",
    "kick": "remove a worker: NAME",
    "shutdown": "save and end; the same command goes on",
    "set": "change NAME=VALUE ...: outer_lr, outer_momentum, min_workers, num_workers, round_timeout_s",
    "command": "tell a worker, or all: save|stop|abort [NAME]",
}


def add_status(parser: CommandParser) -> None:
    """`status`."""
    verb = parser.add_verb("status", "Show how a server and its workers are doing")
    add_connection_flags(verb)
    verb.add_argument("-w", "--watch", action="store_true", help="show it again and again, until Ctrl-C")
    verb.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="seconds between two (default: 2)")
    verb.add_argument("--json", action="store_true", help="as JSON; with --watch one object a line")


def add_control(parser: CommandParser) -> None:
    """`control`."""
    verb = parser.add_verb("control", "Tell a server what to do")
    add_connection_flags(verb)
    verb.add_argument("action", metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    verb.add_argument("about", nargs="*", metavar="[ARGUMENTS]", help="what the action is about")
    verb.epilog = "actions:\n" + "\n".join(f"  {name:<9} {meaning}" for name, meaning in ACTIONS.items())


def add_cert(parser: CommandParser) -> None:
    """`cert`."""
    verb = parser.add_verb("cert", "Make an authority of your own, and certificates for a server and for clients")
    verb.add_argument("folder", metavar="DIR", help="where they are kept")
    verb.add_argument(
        "--host",
        action="append",
        metavar="NAME",
        help="a name or address of the server; again for more (default: all that this machine has)",
    )
    verb.add_argument("--client", action="append", metavar="NAME", help="make a certificate for this client, too")
    verb.add_argument("--days", type=_days, default=825, metavar="N", help="how long they are valid (default: 825)")


def add_package(parser: CommandParser) -> None:
    """`package`."""
    verb = parser.add_verb("package", "Fetch the model package and tokenizer that a server has")
    verb.add_argument("folder", metavar="DIR", help="where a folder of the package is made")
    add_connection_flags(verb)
    verb.add_argument(
        "--trust-server-code",
        action="store_true",
        help="take a package with Python in it, which loading its model runs with your rights",
    )


def status(options: Options) -> int:
    """Print it once, or until Ctrl-C."""
    from forgather.diloco.status import table

    address = server_address(options)
    while True:
        try:
            found = address.ask("GET", "/v1/status")
        except DistributedError as error:
            if not options.watch:
                raise
            print(f"{error.message}; trying again", file=sys.stderr)
        else:
            if options.json:
                print(json.dumps(found, indent=None if options.watch else 1), flush=True)
            else:
                if options.watch and sys.stdout.isatty():
                    print("\033[H\033[2J", end="")
                print("\n".join(table(found)), flush=True)
        if not options.watch:
            return EXIT_OK
        try:
            time.sleep(options.interval)
        except KeyboardInterrupt:
            return EXIT_OK


def control(options: Options) -> int:
    """Tell the server, and say what came of it."""
    action: str = options.action
    if action not in ACTIONS:
        raise unknown("action", action, ACTIONS, of="`forgather diloco control`")
    content = _content(action, options.about)
    address = server_address(options)
    # A save may wait for an outer step and a disk.
    answer = address.ask("POST", f"/v1/control/{action}", content, timeout_s=600.0)
    print(_obeyed(action, content, answer))
    return EXIT_OK


def cert(options: Options) -> int:
    """Make certificates, and say what each file is for."""
    from forgather.diloco.address import naming
    from forgather.diloco.certificates import make_certificates

    folder = Path(options.folder)
    made = make_certificates(folder, options.host or [], options.client or [], valid_days=options.days)
    for file in made.files:
        print(f"wrote {file}")
    if made.hosts:
        print(f"the server's is for {', '.join(made.hosts)}")
    if not made.files:
        print(f"{folder} has an authority and a server's certificate; --host and --client make more")
    print(f"server: --tls-cert {folder / 'server.pem'} --tls-key {folder / 'server-key.pem'}")
    print(f"clients: {naming('tls_ca', 'COPY')}, of {folder / 'ca.pem'}; {folder / 'ca-key.pem'} stays here")
    return EXIT_OK


def package(options: Options) -> int:
    """Fetch it, and print its folder."""
    from forgather.diloco.package_service import fetch

    print(fetch(server_address(options), Path(options.folder), trust_code=options.trust_server_code))
    return EXIT_OK


def _content(action: str, arguments: Sequence[str]) -> dict[str, Any]:
    match action, list(arguments):
        case (("save" | "drain" | "shutdown"), []):
            return {}
        case "kick", [worker]:
            return {"worker": worker}
        case "command", ["save" | "stop" | "abort" as command, *names] if len(names) <= 1:
            return {"command": command, "worker": names[0] if names else None}
        case "set", [_, *_]:
            return dict(_setting(word) for word in arguments)
    raise UsageError(
        f"`forgather diloco control {action}` cannot make anything of {' '.join(arguments) or 'no argument'}",
        fix=f"{action}: {ACTIONS[action]}",
    )


def _setting(word: str) -> tuple[str, float]:
    name, equals, text = word.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not equals or not math.isfinite(value):
        raise UsageError(f"{word!r} is not NAME=NUMBER", fix="forgather diloco control set outer_lr=0.5")
    return name, int(value) if text.lstrip("+-").isdecimal() else value


def _obeyed(action: str, content: dict[str, Any], answer: dict[str, Any]) -> str:
    match action:
        case "save":
            return f"saved step {answer['step']}"
        case "drain":
            return "the server takes no new workers, and ends when those that are there have left"
        case "kick":
            return f"{content['worker']} is removed"
        case "shutdown":
            return "the server saves and ends; the same command goes on"
        case "set":
            return "from the next round on: " + ", ".join(f"{name} {value}" for name, value in answer.items())
        case _:
            return f"told with their next heartbeats: {', '.join(answer['workers']) or 'nobody, as nobody is there'}"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise ArgumentTypeError(f"{text!r} is not a number of days from 1 to 3650")
    return int(text)
