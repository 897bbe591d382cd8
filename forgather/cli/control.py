"""`forgather control`: ask a live run how far it is, let it save, stop it, or let its learning rate decay."""

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK, ForgatherError

SUMMARY = "Ask, save, stop or steer a live run"
NEEDS_CONFIG = False

_VERBS = {
    "status": "Print how far a run is, as JSON",
    "save": "Let a run write a checkpoint now, and go on",
    "stop": "Let a run save and end after its step; the same `forgather train` goes on",
    "save-stop": "The same, and return when the checkpoint is on the disk",
    "abort": "Let a run end after its step without saving",
    "decay": "Let the learning rate begin its decay (schedules warmup_stable_decay and infinite)",
}
_SKIPPED = {"checkpoints", "logs", "prepared", "output_models"}  # hold no runs, and much else


def configure(parser: CommandParser) -> None:
    """What is asked, and of which run."""
    listing = parser.add_verb("list", "List the live runs below a folder")
    listing.add_argument("run", nargs="?", metavar="DIR", default=".", help="where to look (default: here)")
    for verb, summary in _VERBS.items():
        own = parser.add_verb(verb, summary)
        own.add_argument("run", metavar="RUN", help="the run folder")
        own.add_argument("--timeout", type=_seconds, metavar="S", help="give up waiting after so many seconds")
    parser.epilog = (
        "A run obeys at the end of its step, all ranks together; the command returns when it has.\n"
        "Only the user who started a run may command it, on the host of its rank 0."
    )


def run(options: Options) -> int:
    """Ask, and print what is answered."""
    folder = Path(options.run)
    if options.verb == "list":
        if not folder.is_dir():
            raise ForgatherError(f"there is no folder {folder}", fix="name a folder that holds runs, such as runs")
        for line in _table(folder):
            print(line)
        return EXIT_OK
    from forgather.trainers.control_socket import ask

    assert options.verb is not None, "the parser requires one"
    answer = ask(folder, options.verb, timeout_s=options.timeout)
    print(json.dumps(answer, indent=1) if options.verb == "status" else _obeyed(answer))
    return EXIT_OK


def _obeyed(answer: dict[str, Any]) -> str:
    step = answer["step"]
    return {
        "save": f"saved {answer.get('path')}",
        "stop": f"the run ends after step {step}, and saves",
        "save-stop": f"the run ends after step {step}; saved {answer.get('path')}",
        "abort": f"the run ends after step {step}, and saves nothing",
        "decay": f"the learning rate decays from step {step + 1} on",
    }[answer["command"]]


def _table(folder: Path) -> Iterator[str]:
    from forgather.trainers.control_socket import ask

    rows = []
    for run in _live_runs(folder):
        try:
            status = ask(run, "status", timeout_s=5.0)
        except ForgatherError as error:
            rows.append([os.path.relpath(run), error.message])
            continue
        loss, pace = status["loss"], status["steps_per_s"]
        rows.append(
            [
                os.path.relpath(run),
                f"{status['state']} {status['step']}/{status['steps']}",
                "" if loss is None else f"loss {loss:.4f}",
                "" if pace is None else f"{pace:.3g} steps/s",
                f"{status['ranks']} rank{'s' if status['ranks'] != 1 else ''}",
                f"process {status['pid']}",
            ]
        )
    if not rows:
        yield f"no live run below {folder}"
    widths = [max((len(row[place]) for row in rows if place < len(row) - 1), default=0) for place in range(6)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()


def _live_runs(folder: Path) -> Iterator[Path]:
    from forgather.trainers.control_socket import FOLDER, is_live

    for place, below, _ in os.walk(folder):
        if FOLDER in below and is_live(Path(place)):
            yield Path(place)
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in _SKIPPED)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
