"""`forgather train`: one rank in this process, or as many as there are devices, started with torchrun.

The same command is the body of a rank when torchrun has started it.
"""

import os
import signal
from argparse import ArgumentTypeError

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.distributed.devices import count_cuda_devices
from forgather.distributed.failure import die_with_parent

SUMMARY = "Train a model, or continue the run that is there"
NEEDS_CONFIG = True
TARGETS = ("main", "environment")
REST = "torchrun arguments"


def configure(parser: CommandParser) -> None:
    """How many ranks, and whether to begin anew."""
    parser.add_argument(
        "--nproc", type=_count, metavar="N", help="ranks on this host (default: one a CUDA device, or 1 on CPU)"
    )
    parser.add_argument(
        "--nnodes", type=_nodes, metavar="N or MIN:MAX", help="hosts that train together; of MIN:MAX some may be lost"
    )
    parser.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet: one of them, the same words on all"
    )
    parser.add_argument(
        "--max-restarts",
        type=_restarts,
        metavar="N",
        help="how often to start again from the newest checkpoint after a rank or host is lost (default: 0)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="open another run folder, such as train-2, instead of continuing; go on with that by --run-name train-2",
    )
    parser.add_argument("--dry-run", action="store_true", help="do all but train: build, print the budget, stop")
    parser.add_argument(
        "-r",
        "--refresh-model",
        action="store_true",
        help="rebuild the model package from its sources if it is stale; weights and runs are left alone",
    )
    parser.epilog = (
        "Words after `--` are handed to torchrun, which then starts the ranks even when there is one.\n"
        "Started by torchrun, this command is a rank: torchrun --nproc-per-node 8 -m forgather train\n"
        "SIGTERM and Ctrl-C let a run save and end after its step; a second Ctrl-C ends it at once.\n"
        "Exit codes: 0 done, 75 stopped and saved (the same command goes on), 2 something to mend,\n"
        "1 a rank was killed or lost its peers, or a defect of ours, which has its traceback."
    )


def run(options: Options) -> int:
    """Train as one rank, or start the ranks and wait for them."""
    if "RANK" in os.environ:
        die_with_parent()
        # A rank that waits in a collective never comes back to Python to see an interrupt: let the signal end it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _train(options)
    # Mistakes in the config are found here, once, before any rank starts; those in its values before torch is imported.
    project = options.project
    for name, parameter in project.parameters.items():
        if not parameter.is_required:  # whether it is used, only building shows
            project.argument(name)
    device = project.argument("device") if "device" in project.parameters else None
    processes = options.nproc or (device != "cpu" and count_cuda_devices()) or 1
    extra = _of_torchrun(options)
    if processes == 1 and not extra:
        return _train(options)
    from forgather.distributed.launcher import launch

    words = options.argv[: options.argv.index("--")] if "--" in options.argv else options.argv
    timeout_s = project.argument("collective_timeout_s") if "collective_timeout_s" in project.parameters else 0.0
    return launch("forgather", words, processes, extra, timeout_s=timeout_s)


def _train(options: Options) -> int:
    from forgather.trainers.worker import run_worker

    return run_worker(
        options.project, fresh=options.fresh, dry_run=options.dry_run, refresh_model=options.refresh_model
    )


def _of_torchrun(options: Options) -> list[str]:
    """The arguments of torchrun that our flags and the words after `--` come to."""
    meets_elsewhere = any(word.startswith(("--rdzv", "--master")) for word in options.rest)
    most = int(options.nnodes.rpartition(":")[2]) if options.nnodes else 1
    if most > 1 and not (options.rdzv_endpoint or meets_elsewhere):
        raise UsageError(
            f"--nnodes {options.nnodes} needs a place to meet",
            fix="--rdzv-endpoint HOST:29500 on every host, where HOST is one of them",
        )
    words = [f"--nnodes={options.nnodes}"] if options.nnodes else []
    if options.rdzv_endpoint:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.rdzv_endpoint}"]
    if options.max_restarts:
        words.append(f"--max-restarts={options.max_restarts}")
    return [*words, *options.rest]


def _nodes(text: str) -> str:
    least, colon, most = text.partition(":")
    numbers = [least, most] if colon else [least]
    if not all(number.isdecimal() for number in numbers) or not 1 <= int(least) <= int(most or least):
        raise ArgumentTypeError(f"{text!r} is not a number of hosts; write 4, or 2:4 for two to four")
    return text


def _restarts(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a number of restarts; write 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number of processes; write 1 or more")
    return int(text)
