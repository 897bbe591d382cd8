"""`forgather diloco server`: its flags, and what is checked before anything is bound or written."""

import asyncio
import math
import socket
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import ssl

    from forgather.checkpoint.run_folder import RunFolder
    from forgather.cli.diloco_model import ServedModel
    from forgather.diloco.outer import Outer
    from forgather.diloco.settings import Settings

CODECS = ("fp32", "bf16", "int8", "int4")
DEFAULT_FOLDER = "runs/diloco"


def add_server(parser: CommandParser) -> None:
    """`server`."""
    verb = parser.add_verb("server", "Serve a model that workers train together")
    add = verb.add_argument
    add(
        "-m",
        "--model",
        metavar="PATH",
        help="a package, a run, a checkpoint or a Hugging Face folder (default: what -p and -t train)",
    )
    add("overrides", nargs="*", metavar="key.path=value", help="of the config of -p and -t, as the workers have them")
    add("-n", "--num-workers", type=_count(1), metavar="N", help="workers that the first round waits for")
    add("-o", "--output-dir", default=DEFAULT_FOLDER, metavar="DIR", help=f"its folder (default: {DEFAULT_FOLDER})")
    add("--seed", type=int, metavar="N", help="draws the weights of a package without any (default: 0)")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0 everywhere (default: 127.0.0.1)",
    )
    add("--port", type=_port, default=8512, metavar="N", help="0 for any that is free (default: 8512)")

    add("--sync-every", type=_count(1), default=500, metavar="H", help="inner steps to an exchange (default: 500)")
    add("--fragments", type=_count(1), default=1, metavar="N", help="parts that take turns in them (default: 1)")
    add(
        "--assignment",
        choices=("strided", "sequential"),
        default="strided",
        help="of blocks to them (default: strided)",
    )
    add("--upload", choices=CODECS, default="bf16", help="what workers send (default: bf16)")
    add("--download", choices=CODECS, default="bf16", help="what comes back (default: bf16)")
    add("--delay", type=_count(0), default=0, metavar="STEPS", help="inner steps beside an exchange (default: 0)")
    add("--alpha", type=_part, default=1.0, metavar="X", help="of the progress made in them, what is kept (default: 1)")

    add("--async", dest="asynchronous", action="store_true", help="each contribution makes a version of its own")
    add("--delayed-nesterov", type=_count(1), metavar="N", help="with --async: momentum after every N contributions")
    add("--outer-lr", type=_rate, default=0.7, metavar="X", help="outer learning rate (default: 0.7)")
    add("--outer-momentum", type=_rate, metavar="X", help="outer momentum (default: 0.9)")
    add("--no-nesterov", action="store_true", help="plain momentum")
    add("--outer", metavar="SPEC", help="another optimizer of torch.optim: 'AdamW {betas: [0.9, 0.95]}'")

    add("--min-workers", type=_count(1), default=1, metavar="N", help="fewest workers of a round (default: 1)")
    add(
        "--round-timeout", type=_seconds(0), metavar="S", help="a round waits so long for the others (default: for all)"
    )
    add(
        "--lease",
        type=_seconds(0),
        default=30.0,
        metavar="S",
        help="silence after which a worker is dead (default: 30)",
    )
    add("--dylu", action="store_true", help="slower workers make fewer inner steps to an exchange")
    add("--round-seconds", type=_seconds(1e-3), metavar="S", help="rounds of fixed time instead of --sync-every steps")
    add(
        "--norm-guard", choices=("off", "clip", "refuse"), default="off", help="what becomes of outliers (default: off)"
    )
    add("--save-every", type=_count(1), default=1, metavar="K", help="versions between two saves (default: 1)")
    add(
        "--work-units",
        type=_count(0),
        default=1024,
        metavar="N",
        help="lease the order of samples in N units an epoch (default: 1024; 0: each worker has its own order)",
    )

    add("--no-auth", action="store_true", help="ask for no token; on loopback alone")
    add("--token-file", metavar="FILE", help="the token, which is made if it is not there (default: DIR/token)")
    add("--tls-cert", metavar="FILE", help="the server's certificate: TLS is then spoken")
    add("--tls-key", metavar="FILE", help="its key")
    add("--client-ca", metavar="FILE", help="an authority: a certificate of it stands for the token")
    verb.epilog = (
        "SIGTERM and Ctrl-C let it save and end with exit code 75; the same command goes on, as after a crash.\n"
        "`forgather diloco control drain` ends a training: workers save and stop, then the server ends with 0."
    )


def run(options: Options) -> int:
    """Check everything, then bind, then load values and serve until told to end."""
    _check_flags(options)
    from forgather.diloco.security import require_protection

    require_protection(options.host, without_token=options.no_auth)
    tls = _tls(options)
    _require_free(options.host, options.port)
    token_file = _token_file(options)
    goes_on = any((Path(options.output_dir) / "checkpoints").glob("step-*"))
    model = _model(options, goes_on=goes_on)
    settings = _settings(options, model)
    outer = _outer(options)
    outer.require_parameters(settings.parameters)
    from forgather.cli.diloco_serving import Serving

    with _opened(Path(options.output_dir)) as run_folder:
        token = None if token_file is None else _token(token_file, run_folder)
        serving = Serving(options, model, goes_on, settings, outer, run_folder, tls, token, token_file)
        return asyncio.run(serving.serve())


def _token_file(options: Options) -> Path | None:
    """The token's file, None without one; SecurityError where it is there and holds no token."""
    from forgather.diloco.security import read_token

    if options.no_auth:
        return None
    file = Path(options.token_file) if options.token_file else Path(options.output_dir).absolute() / "token"
    if file.exists():
        read_token(file)
    return file


def _token(file: Path, run_folder: "RunFolder") -> str:
    from forgather.diloco.security import SecurityError, token_of_server

    try:
        return token_of_server(file)
    except SecurityError:
        run_folder.discard_unused()
        raise


def _opened(path: Path) -> "RunFolder":
    from forgather.checkpoint.run_folder import RunFolder

    try:
        return RunFolder(path)
    except CheckpointError as error:
        if not isinstance(error.__context__, BlockingIOError):  # by which the lock says that another has it
            raise
        raise CheckpointError(
            error.message,
            fix="-o another folder; or end what runs there: `forgather diloco control shutdown`, if it is a server",
        ) from error


def _check_flags(options: Options) -> None:
    """What is wrong with the flags alone."""
    if options.num_workers is None:
        raise UsageError("the server does not know how many workers to wait for", fix="-n 2, say")
    if options.num_workers < options.min_workers:
        raise UsageError(
            f"--min-workers {options.min_workers} is more than -n {options.num_workers}",
            fix=f"-n {options.min_workers}, or a lower --min-workers",
        )
    for given, needed, is_wrong in (
        ("--delayed-nesterov", "--async", options.delayed_nesterov and not options.asynchronous),
        ("--tls-key", "--tls-cert", options.tls_key and not options.tls_cert),
        ("--tls-cert", "--tls-key", options.tls_cert and not options.tls_key),
        ("--client-ca", "--tls-cert and --tls-key", options.client_ca and not options.tls_cert),
    ):
        if is_wrong:
            raise UsageError(f"{given} needs {needed}", fix=f"add {needed}, or leave out {given}")
    for one, other in (
        (("--dylu", options.dylu), ("--round-seconds", options.round_seconds is not None)),
        (("--no-auth", options.no_auth), ("--token-file", options.token_file is not None)),
        (("--outer", options.outer is not None), ("--outer-momentum", options.outer_momentum is not None)),
        (("--outer", options.outer is not None), ("--no-nesterov", options.no_nesterov)),
        (("--outer", options.outer is not None), ("--delayed-nesterov", options.delayed_nesterov is not None)),
        (("--delayed-nesterov", options.delayed_nesterov is not None), ("--no-nesterov", options.no_nesterov)),
        (("--async", options.asynchronous), ("--round-timeout", bool(options.round_timeout))),
        # A round of one has no quorum, and no median that a norm could be judged by.
        (("--async", options.asynchronous), ("--min-workers", options.min_workers > 1)),
        (("--async", options.asynchronous), ("--norm-guard", options.norm_guard != "off")),
    ):
        if one[1] and other[1]:
            raise UsageError(f"{one[0]} and {other[0]} exclude each other", fix=f"leave out {other[0]}")
    if options.alpha != 1.0 and not options.delay:
        raise UsageError(
            f"--alpha {options.alpha:g} is a part of the progress made in the steps of --delay, and there are none",
            fix="--delay 10, say; or leave out --alpha",
        )
    from forgather.diloco.fragments import require_schedule

    require_schedule(options.sync_every, options.fragments)
    interval = options.sync_every // options.fragments
    if options.delay >= interval:
        raise ConfigError(
            f"--delay {options.delay} is as long as the {interval} steps from one exchange to the next",
            fix=f"--delay {max(0, interval - 1)} or less; or a larger --sync-every",
        )


def _tls(options: Options) -> "ssl.SSLContext | None":
    if options.tls_cert is None:
        return None
    from forgather.diloco.tls import server_context

    authority = None if options.client_ca is None else Path(options.client_ca)
    return server_context(Path(options.tls_cert), Path(options.tls_key), authority)


def _require_free(host: str, port: int) -> None:
    """ConfigError where nothing can listen there: before a model is loaded, which takes a while."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host} is not known here: {error.strerror}", fix="--host 0.0.0.0, say") from error
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                tried.bind(place)
                # As listening does, and binding alone does not, this tells of somebody who listens already.
                tried.listen(1)
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {host}:{port}: {error.strerror}",
                    fix="end what listens there, or choose another --port; --host must be an address of this machine",
                ) from error


def _model(options: Options, *, goes_on: bool) -> "ServedModel":
    """That of -m; without it, the one that was served from this folder before, or that of the config of -p and -t."""
    from forgather.cli.diloco_model import model_of_config, model_of_folder, served_model

    if wrong := [word for word in options.overrides if "=" not in word]:
        raise UsageError(f"the server takes no word {wrong[0]!r}", fix="-m PATH for a model; key.path=value overrides")
    if options.overrides and options.model is not None:
        raise UsageError(
            f"{options.overrides[0]} overrides a config, and the model is that of -m", fix="leave out one of the two"
        )
    options.words = list(options.overrides)
    if goes_on:
        return model_of_folder(Path(options.output_dir), options)
    return model_of_config(options) if options.model is None else served_model(Path(options.model))


def _settings(options: Options, model: "ServedModel") -> "Settings":
    from forgather.diloco.fragments import divide
    from forgather.diloco.settings import Settings

    return Settings(
        parameters=model.shapes,
        fragments=divide(model.shapes, options.fragments, options.assignment),
        mode="async" if options.asynchronous else "sync",
        sync_every=options.sync_every,
        upload=options.upload,
        download=options.download,
        delay=options.delay,
        alpha=options.alpha,
        dylu=options.dylu,
        round_seconds=options.round_seconds,
        # Several within a lease, so that one that is lost kills nobody.
        heartbeat_s=min(5.0, options.lease / 6) if options.lease else 5.0,
        lease_s=options.lease,
        package=model.package_digest,
        tokenizer=model.tokenizer_digest,
        work_units=options.work_units,
    )


def _outer(options: Options) -> "Outer":
    from forgather.diloco.outer import DelayedNesterov, Nesterov, TorchOuter

    momentum = 0.9 if options.outer_momentum is None else options.outer_momentum
    if options.outer is not None:
        name, arguments = _spec(options.outer)
        return TorchOuter(name, **{"lr": options.outer_lr, **arguments})
    if options.delayed_nesterov is not None:
        return DelayedNesterov(options.outer_lr, momentum, every=options.delayed_nesterov)
    return Nesterov(options.outer_lr, momentum, nesterov=not options.no_nesterov)


def _spec(text: str) -> tuple[str, Mapping[str, Any]]:
    """`AdamW {betas: [0.9, 0.95]}` as a name and arguments; the mapping is read as in a config."""
    import yaml

    name, _, rest = text.strip().partition(" ")
    try:
        arguments = yaml.safe_load(rest) if rest.strip() else {}
    except yaml.YAMLError:
        arguments = None
    if not name or not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise UsageError(f"--outer {text!r} is no optimizer", fix="--outer 'AdamW {betas: [0.9, 0.95]}'")
    return name, arguments


def _number(text: str, meaning: str, *, least: float = 0.0, most: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (least <= value <= most and math.isfinite(value)):
        raise ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return count


def _seconds(least: float) -> Callable[[str], float]:
    return lambda text: _number(text, "a number of seconds", least=least)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _rate(text: str) -> float:
    return _number(text, "a number of 0 or more")


def _part(text: str) -> float:
    return _number(text, "a number from 0 to 1", most=1.0)
