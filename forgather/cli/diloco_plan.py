"""`forgather diloco plan`: what DDP, FSDP and DiLoCo would make of machines and a network that it has measured."""

import json
import math
import statistics
import sys
from argparse import ArgumentTypeError
from itertools import islice
from typing import TYPE_CHECKING

from forgather.cli.diloco_connection import add_connection_flags, server_address
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from forgather.diloco.forecast import Link

_TRIED_STEPS = 4  # of which the first is left out: it is slower than all others


def add_plan(parser: CommandParser) -> None:
    """`plan`."""
    verb = parser.add_verb("plan", "Measure machines and network, and choose how often to exchange what")
    add = verb.add_argument
    add_connection_flags(verb, default=None)
    add("--probe-seconds", type=_above_zero, default=6.0, metavar="S", help="measure the network so long (default: 6)")
    add("--mbit", type=_above_zero, metavar="X", help="do not measure: a network of X Mbit/s each way")
    add("--latency-ms", type=_above_zero, default=1.0, metavar="X", help="with --mbit: there and back (default: 1)")
    add(
        "--step-seconds",
        action="append",
        type=_above_zero,
        metavar="S",
        help="an inner step of a worker; again for each other one (default: measured here, by -p and -t)",
    )
    add("-n", "--num-workers", type=_workers, metavar="N", help="workers as fast as this one (default: 2)")
    add("--device", default="cpu", help="where to measure a step (default: cpu)")
    add("--parameters", type=_parameters, metavar="N", help="of the model (default: counted, by -p and -t)")
    add("--wished", type=_share, default=0.95, metavar="X", help="of what machines can reach (default: 0.95)")
    add("--json", action="store_true", help="all numbers as JSON")
    verb.epilog = (
        "Run it on each kind of machine; give the seconds that it prints to the last of them, with --step-seconds.\n"
        "The server must be running, on any model: it answers with bytes that mean nothing."
    )


def run(options: Options) -> int:
    """Measure what is not given, and print the table and the choice."""
    steps_s: list[float] = options.step_seconds or []
    if len(steps_s) > 1 and options.num_workers is not None:
        raise UsageError("-n multiplies one --step-seconds, and there are several", fix="leave out -n")
    if (options.server is None) == (options.mbit is None):
        raise UsageError(
            "the network is either measured or given", fix="--server HOST:PORT, which measures it, or --mbit 1000"
        )
    link = _link(options)
    parameters, num_blocks = options.parameters, 1
    if parameters is None or not steps_s:
        model = _model(options, "meta" if steps_s else options.device)
        parameters = model.num_parameters() if parameters is None else parameters
        num_blocks = getattr(model.config, "num_hidden_layers", 1)
        steps_s = steps_s or [_measured_step_s(options, model)]
    if len(steps_s) == 1:
        steps_s = steps_s * (options.num_workers or 2)
    from forgather.diloco.forecast import Machine
    from forgather.diloco.plan import Plan

    # The server's link is taken to be as fast as this machine's, which is all that can be seen from here.
    machines = [Machine(step_s, link) for step_s in steps_s]
    plan = Plan.make(machines, link, parameters, num_blocks=num_blocks, wished=options.wished)
    print(json.dumps(plan.to_json(), indent=1) if options.json else plan.text())
    return EXIT_OK


def _link(options: Options) -> "Link":
    from forgather.diloco.forecast import Link

    if options.mbit is not None:
        rate = options.mbit * 1e6 / 8
        return Link(rate, rate, options.latency_ms / 1e3)
    from forgather.diloco.probe import measure

    address = server_address(options)
    print(f"measuring the network to {address}, for {options.probe_seconds:g} s", file=sys.stderr)
    return measure(address, seconds=options.probe_seconds)


def _model(options: Options, device: str) -> "PreTrainedModel":
    """The model of the config, constructed on `device`."""
    project = options.project
    if not project.has("package"):
        raise ConfigError(
            f"config {project.config_name!r} of {project.dir} describes no model package",
            fix="give --parameters and --step-seconds, or another config with -t",
        )
    from forgather.cli.devices import device_named

    model: PreTrainedModel = project.build("package").construct(device_named(device))
    return model


def _measured_step_s(options: Options, model: "PreTrainedModel") -> float:
    """Seconds of a whole step of the config, forward, backward and update, on one device."""
    from forgather.trainers.trial import try_training
    from forgather.trainers.trial_batches import random_batches

    project = options.project
    names = ("rows_per_step", "rows_per_forward", "block_length")
    known = {name: project.argument(name) for name in names if name in project.parameters}
    if len(known) < len(names):
        raise ConfigError(
            f"config {project.config_name!r} of {project.dir} does not say how large a step is",
            fix="--step-seconds S, or a config that extends lib:train/causal_lm.yaml",
        )
    rows, length = min(known["rows_per_forward"], known["rows_per_step"]), known["block_length"]
    print(f"measuring {_TRIED_STEPS} steps of {rows} rows of {length} tokens on {options.device}", file=sys.stderr)
    batches = random_batches(model.config.vocab_size, rows=rows, length=length, packed=False)
    rates = [step.tokens_per_s for step in try_training(model, islice(batches, _TRIED_STEPS), lr=1e-4)]
    measured = [rate for rate in rates[1:] if rate is not None]
    if not measured:
        raise ConfigError("the model cannot be trained here", fix="`forgather model test` says why")
    step_s = float(known["rows_per_step"] * length / statistics.median(measured))
    print(f"a step takes {step_s:.3g} s here (--step-seconds {step_s:.3g})", file=sys.stderr)
    return step_s


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text!r} is not a number of workers from 2")
    return int(text)


def _parameters(text: str) -> int:
    """`30000000`, `30M` or `1.5B`."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    unit = units.get(text[-1:].upper())
    value = _number(text[:-1] if unit else text) * (unit or 1)
    if not 1 <= value < 1e13:
        raise ArgumentTypeError(f"{text!r} is not a number of parameters, as 30M is")
    return round(value)
