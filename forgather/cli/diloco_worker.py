"""`forgather diloco worker --server HOST:PORT -p P -t C train ...`: the same as `train --diloco-server`.

It is another way to say it, and nothing else: the command line is rewritten before anything of it is read. What proves
who this worker is goes into the environment, where the ranks find it, and stands in no config.
"""

import os
from collections.abc import MutableMapping, Sequence

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError, split

# How a flag of this verb is said to `train`.
_WORDS = {"--server": "--diloco-server", "--worker": "--diloco-worker", "--sync-every": "--diloco-sync-every"}
_VARIABLES = {
    "--token-file": "FORGATHER_DILOCO_TOKEN_FILE",
    "--tls-ca": "FORGATHER_DILOCO_TLS_CA",
    "--tls-cert": "FORGATHER_DILOCO_TLS_CERT",
    "--tls-key": "FORGATHER_DILOCO_TLS_KEY",
}
_SELECTION = ("--project", "--config")
USAGE = "forgather diloco worker --server HOST:PORT -p PROJECT -t CONFIG train [flags of train]"


def add_worker(parser: CommandParser) -> None:
    """The verb, for `--help`: a line with `train` in it never comes this far."""
    worker = parser.add_verb("worker", "Train as a worker of a server: a `train` command follows")
    worker.add_argument("--server", metavar="HOST:PORT", help="the server")
    worker.add_argument("--worker", metavar="NAME", help="this run's name among the workers (default: host and run)")
    worker.add_argument("--sync-every", metavar="H", help="the H that is expected; the server's is in force")
    worker.add_argument("--token-file", metavar="FILE", help="the server's token")
    worker.add_argument("--tls-ca", metavar="FILE", help="the authority that signed its certificate")
    worker.add_argument("--tls-cert", metavar="FILE", help="a certificate of this worker")
    worker.add_argument("--tls-key", metavar="FILE", help="its key")
    worker.epilog = f"{USAGE}\nis `forgather train --diloco-server`, with all flags of `train` after that word."


def run_without_train(options: Options) -> int:  # noqa: ARG001  as every verb has it
    """What is left to say where no `train` follows."""
    raise UsageError("`forgather diloco worker` needs the command that it is to run", fix=USAGE)


def as_train(arguments: Sequence[str], environ: MutableMapping[str, str] | None = None) -> list[str] | None:
    """The line of `train` that a line of `diloco worker ... train ...` stands for; None where it is no such line."""
    environ = os.environ if environ is None else environ
    words = list(arguments)
    if "diloco" not in words or "train" not in words:
        return None
    command = words.index("diloco")
    train = words.index("train", command)
    before, own, after = words[:command], words[command + 1 : train], words[train + 1 :]
    if not own or "worker" not in own or any(word in ("-h", "--help") for word in own):
        return None
    flags = dict.fromkeys([*_WORDS, *_VARIABLES, *_SELECTION, "-p", "-t"], True)
    line = split(own, flags, {"-p": "--project", "-t": "--config"}, words=False)
    if line.positionals != ["worker"]:
        return None
    if line.unknown:
        raise UsageError(
            f"{line.unknown[0]} is no flag of `forgather diloco worker`", fix="put flags of train behind that word"
        )
    if line.value("--server") is None:
        raise UsageError("`forgather diloco worker` needs a server", fix="--server HOST:PORT, as the server printed it")
    rewritten = [*before, "train"]
    for name, value in line.flags:
        assert value is not None, "each of these flags has a value"
        if name in _VARIABLES:
            environ[_VARIABLES[name]] = os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111  pathlib is slow to import
        elif name in _SELECTION:
            rewritten += [name, value]
        else:
            rewritten += [_WORDS[name], value]
    return [*rewritten, *after]
