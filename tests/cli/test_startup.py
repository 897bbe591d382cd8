"""Help and listings are instant: no torch, and a small fraction of the time that importing it takes."""

import json
import resource
import statistics
import subprocess
import sys

from forgather.cli.commands import COMMANDS
from forgather.config.files import shipped_configs

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "tokenizers",
    "rich",
    "pandas",
    "pyarrow",
    "aiohttp",
    "cryptography",
}
ROUNDS = 5

# Runs each command line of its first argument in turn; says for each the exit code and what heavy has been imported.
_REPORT = """
import contextlib, io, json, sys
from forgather.cli.main import main
heavy, lines = map(json.loads, sys.argv[1:])
report = []
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(line)
    report.append([code, sorted(set(heavy) & {name.partition(".")[0] for name in sys.modules})])
print(json.dumps(report))
"""


def _cpu_seconds(*command: str) -> float:
    # Processor time, not wall time: a busy machine stretches the second and hardly the first.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_help_and_ls_cost_a_small_part_of_importing_torch(project):
    commands = {
        "torch": ["-c", "import torch"],
        "help": ["-m", "forgather", "--help"],
        "ls": ["-m", "forgather", "-p", str(project), "ls"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):  # interleaved, so that what else the machine does falls on all three
        for name, command in commands.items():
            seconds[name].append(_cpu_seconds(*command))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    assert medians["help"] < 0.12 * medians["torch"], medians
    assert medians["ls"] < 0.25 * medians["torch"], medians


def test_commands_that_only_read_import_nothing_heavy(project):
    shipped = str(shipped_configs() / "tiny_llama")
    words = [["--recompute", "foo"], ["--recompute", "0"], ["--run-name", "../x"], ["--run-name", ""], ["--lr", "-1"]]
    refused = [["-p", shipped, "train", *pair] for pair in words]
    lines = [
        ["--help"],
        ["--version"],
        ["ls"],
        ["ls", "-r"],
        ["show"],
        ["show", "--origin", "main"],
        ["targets", "--lr", "1"],
        ["graph"],
        ["graph", "--format", "dot"],
        ["code"],
        ["project", "new", "fresh"],
        *([command, "--help"] for command in COMMANDS),
        *refused,
    ]
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, json.dumps(sorted(HEAVY)), json.dumps(lines)],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert dict(zip(map(" ".join, lines), json.loads(done.stdout), strict=True)) == {
        " ".join(line): [2 if line in refused else 0, []] for line in lines
    }
