"""kill -9 on `forgather train` itself: the same command, given again, ends with the undisturbed run's very bytes."""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from forgather.checkpoint.folder import saved_steps, step_name
from forgather.checkpoint.layout import read_layout
from forgather.cli.main import main
from tests.checkpoint.training import damage_in
from tests.ranks import FORKSERVER

CONFIG = """
extends: lib:train/causal_lm.yaml
args:
  lr: 3e-3
  warmup: 2
  block_length: 32
  rows_per_step: 4
  rows_per_forward: 2
  log_every: 1
  eval_every: null
  eval_rows: 4
  save_every: 2
  sample_every: null

sources:
  text: !singleton:forgather.data.sources:TextFiles
    path: ${join(project.dir, 'text')}
    include: ["*.txt"]
letters: !project
  dir: lib:tokenizers/char
  with:
    sources: !ref sources
model_project:
  config: 1M.yaml
  args:
    attention_dropout: 0.1
  with:
    tokenizer: !ref letters.main
dataset_project:
  with:
    sources: !ref sources
"""


class Training:
    """The command `forgather train` on `project`, in a process of its own; several ranks are its children.

    The process is forked from a server that has imported torch, so that a start costs a third.
    """

    def __init__(self, project: Path, name: str, steps: int, ranks: int, extra: Sequence[str] = ()) -> None:
        self.run = project / "runs" / name
        self.log = project / f"{name}.log"
        self.log.touch()
        self._said = self.log.stat().st_size
        words = ["-p", str(project), "train", "--device", "cpu", "--run-name", name, "--steps", str(steps)]
        self.process = FORKSERVER.Process(
            target=_forgather, args=([*words, "--nproc", str(ranks), *extra], str(self.log))
        )
        self.process.start()

    def said(self) -> str:
        """What this process has printed."""
        return self.log.read_text()[self._said :]

    def ranks(self) -> list[int]:
        """The process ids of the ranks."""
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [pid]

    def wait_until_training(self) -> None:
        while "step " not in self.said() and self.process.is_alive():
            time.sleep(0.01)

    def wait_until_saving(self) -> None:
        """Return when a save is under way."""
        while not any(self.run.glob("checkpoints/.step-*.partial")) and self.process.is_alive():
            time.sleep(0.0005)

    def end(self) -> int | None:
        self.process.join(600)  # hundreds of steps and saves, beside whatever else the machine does
        return self.process.exitcode


def _forgather(words: list[str], log: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(words))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "configs").mkdir()
    (folder / "project.yaml").write_text("name: crashing\ndescription: A run that is killed\ndefault: tiny\n")
    (folder / "configs" / "tiny.yaml").write_text(CONFIG)
    (folder / "text").mkdir()
    chance = random.Random(0)
    for number in range(40):
        pairs = [(chance.randint(0, 99), chance.randint(0, 99)) for _ in range(80)]
        (folder / "text" / f"{number}.txt").write_text(" ".join(f"{a} plus {b} is {a + b}." for a, b in pairs))
    return folder


def newest_tensors(run: Path) -> tuple[int, dict[str, list[str]]]:
    """The highest step and the digests of its tensors, after each checkpoint there was found whole."""
    steps = saved_steps(run / "checkpoints")
    for step in steps:
        assert damage_in(run / "checkpoints" / step_name(step)) == []
    if not steps:
        return 0, {}
    digests: dict[str, list[str]] = {}
    for name, tensor in read_layout(run / "checkpoints" / step_name(steps[-1])).items():
        digests[name] = [chunk.xxh3 for chunk in tensor.chunks]
    return steps[-1], digests


def kill_and_continue(project: Path, *, name: str, steps: int, kills: int, ranks: int, seed: int) -> int:
    """Train undisturbed and killed `kills` times, every other time in a save; return how many saves were hit."""
    chance = random.Random(seed)
    calm = Training(project, f"{name}-calm", steps, ranks)
    assert calm.end() == 0, calm.said()
    hits = 0
    for number in range(kills):
        before, _ = newest_tensors(project / "runs" / name)
        training = Training(project, name, steps, ranks)
        training.wait_until_training()
        if before and training.process.is_alive():
            assert f"going on from {project / 'runs' / name / 'checkpoints' / step_name(before)}" in training.said()
        if number % 2 == 0:
            training.wait_until_saving()
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, 0.5))
        # A rank, what started the ranks, or a rank's writer: the others must not go on without it. Or all at once.
        alive = training.process.is_alive()
        victims = [training.process.pid, *training.ranks()] if alive else []
        for victim in victims if chance.random() < 0.3 else victims and [chance.choice(victims)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        training.end()
        hits += any(training.run.glob("checkpoints/.step-*"))
    last = Training(project, name, steps, ranks)
    assert last.end() == 0, last.said()
    assert newest_tensors(last.run) == newest_tensors(calm.run)
    assert newest_tensors(last.run)[0] == steps
    assert not list(last.run.glob("checkpoints/.step-*"))
    return hits


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.training_case(35, 38)
def test_killed_twice(project: Path) -> None:
    kill_and_continue(project, name="twice", steps=12, kills=2, ranks=1, seed=0)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_fifty_random_moments(project: Path, ranks: int) -> None:
    assert kill_and_continue(project, name=f"on-{ranks}", steps=300, kills=50, ranks=ranks, seed=ranks) >= 10
