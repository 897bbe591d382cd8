"""`forgather train`: one rank in this process, or as many as there are devices, started with torchrun.

The same command is the body of a rank when torchrun has started it.
"""

import os
import signal
from argparse import ArgumentTypeError

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
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
        "Exit codes: 0 done, 2 something to mend, 1 a defect of ours."
    )


def run(options: Options) -> int:
    """Train as one rank, or start the ranks and wait for them."""
    if "RANK" in os.environ:
        die_with_parent()
        # A rank that waits in a collective never comes back to Python to see an interrupt: let the signal end it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _train(options)
    # Mistakes in the config are found here, once, before any rank starts.
    project = options.project
    device = project.argument("device") if "device" in project.parameters else None
    processes = options.nproc or (device != "cpu" and count_cuda_devices()) or 1
    if processes == 1 and not options.rest:
        return _train(options)
    from forgather.distributed.launcher import launch

    words = options.argv[: options.argv.index("--")] if "--" in options.argv else options.argv
    return launch("forgather", words, processes, options.rest)


def _train(options: Options) -> int:
    from forgather.trainers.worker import run_worker

    return run_worker(
        options.project, fresh=options.fresh, dry_run=options.dry_run, refresh_model=options.refresh_model
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number of processes; write 1 or more")
    return int(text)
