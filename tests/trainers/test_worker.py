"""A whole run from its project: what it prints, where it goes on, and its exit code."""

import random
import re
from pathlib import Path

import pytest

from forgather import Project
from forgather.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, DataError, ModelError, TrainingError
from forgather.metrics.sinks import read_rows
from forgather.trainers.worker import run_worker

CONFIG = """
extends: lib:train/causal_lm.yaml
args:
  steps: 4
  lr: 1e-2
  warmup: 1
  block_length: 16
  rows_per_step: 4
  log_every: 1
  eval_rows: 4
tokenizer_project: !project
  dir: lib:tokenizers/char
  set:
    sources: !replace
      text: !singleton:forgather.data.sources:TextFiles
        path: ${join(project.dir, 'text')}
        include:
          - "*.txt"
model_project:
  config: 1M.yaml
  args:
    hidden_size: 16
    num_attention_heads: 2
    num_key_value_heads: 1
    intermediate_size: 24
    num_hidden_layers: 1
  with:
    tokenizer: !ref tokenizer_project.main
dataset_project: !project
  dir: lib:datasets/local_text
  args:
    text_path: ${join(project.dir, 'text')}
    validation_fraction: 0.2
    processes: 1
  with:
    tokenizer: !ref model_project.tokenizer
main:
  hooks:
    samples:
      max_new_tokens: 3
    stopper: !singleton:stopper.py:Stopper {}
"""

STOPPER = """
class Stopper:
    def __init__(self, at=None):
        self.at, self.step = at, 0
    def on_step_end(self, event):
        self.step = event.step
    def wants_stop(self):
        return self.step == self.at
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "configs").mkdir()
    (folder / "text").mkdir()
    (folder / "project.yaml").write_text("name: small\ndefault: train\n")
    (folder / "configs" / "train.yaml").write_text(CONFIG)
    (folder / "configs" / "stopper.py").write_text(STOPPER)
    words = random.Random(0)
    for number in range(20):
        text = " ".join(words.choice(("red", "green", "tree", "house")) for _ in range(60))
        (folder / "text" / f"{number}.txt").write_text(text)
    return folder


def rows_of(folder: Path, run: str):
    return read_rows(folder / "runs" / run / "logs" / "metrics.jsonl", "train")


def test_a_run_is_trained_found_finished_and_continued(folder, capsys):
    name = {"run_name": "whole"}
    assert run_worker(Project(folder, args=name)) == EXIT_OK
    printed = capsys.readouterr().out
    for words in (
        "parameters  2,448",
        "tokens      64 a step x 4 steps",
        "not sharded, fp32",
        "linear cross-entropy",
        "runs/whole",
    ):
        assert words in printed
    assert "step 4/4 | sample" in printed

    assert run_worker(Project(folder, args=name)) == EXIT_OK
    again = capsys.readouterr()
    assert "nothing to do" in again.err
    assert again.out == ""

    assert run_worker(Project(folder, args=name | {"steps": 6, "lr": 5e-3})) == EXIT_OK
    more = capsys.readouterr()
    assert "going on from" in more.err
    assert re.search(r"changed since then: args\.lr(, [\w.]+)*: 0\.01 -> 0\.005", more.err)
    rows = rows_of(folder, "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["lr"] == 1e-2
    assert rows[-1]["lr"] == pytest.approx(5e-4)  # a tenth of today's peak
    saved = folder / "runs" / "whole" / "checkpoints" / "step-00000006"
    assert (saved / "config.yaml").is_file()
    assert (saved / "package" / "config.json").is_file()


def test_fresh_opens_another_folder(folder):
    name = {"run_name": "twice"}
    for fresh in (False, True):
        assert run_worker(Project(folder, args=name), fresh=fresh) == EXIT_OK
    first, second = (rows_of(folder, run) for run in ("twice", "twice-2"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_a_dry_run_does_all_but_train(folder, capsys):
    assert run_worker(Project(folder, args={"run_name": "dry", "precision": "bf16"}), dry_run=True) == EXIT_OK
    printed = capsys.readouterr().out
    assert "not sharded, bf16" in printed
    assert "nothing was trained" in printed
    assert not (folder / "runs" / "dry").exists()

    # A run that is there stays, and another one beside it leaves no folder.
    name = {"run_name": "tried"}
    assert run_worker(Project(folder, args=name | {"steps": 1})) == EXIT_OK
    kept = sorted((folder / "runs" / "tried").rglob("*"))
    for fresh in (False, True):
        assert run_worker(Project(folder, args=name), dry_run=True, fresh=fresh) == EXIT_OK
    assert [path.name for path in (folder / "runs").glob("tried*")] == ["tried"]
    assert set(kept) <= set((folder / "runs" / "tried").rglob("*"))


def test_a_warm_up_longer_than_the_run_is_told_before_anything_is_said_or_made(folder, capsys):
    with pytest.raises(ConfigError, match="the schedule has warmup 9, but its length is 4"):
        run_worker(Project(folder, args={"run_name": "warm", "warmup": 9}))
    assert capsys.readouterr().out == ""
    assert not (folder / "runs" / "warm").exists()


def test_a_stale_package_stops_a_run_until_it_is_refreshed(folder):
    project = Project(folder, args={"run_name": "reshaped"}, set={"model_project.args.model_name": "reshaped"})
    assert run_worker(project, dry_run=True) == EXIT_OK
    project = project.replaced(set={"model_project.args.num_hidden_layers": 2})
    with pytest.raises(ModelError, match=r"is stale: config\.json says num_hidden_layers: 1, the configuration 2"):
        run_worker(project, dry_run=True)
    assert run_worker(project, dry_run=True, refresh_model=True) == EXIT_OK
    assert run_worker(project, dry_run=True) == EXIT_OK


def test_a_stopped_run_is_resumable(folder):
    stop = {"main.hooks.stopper.at": 2}
    assert run_worker(Project(folder, args={"run_name": "stopped"}, set=stop)) == EXIT_RESUMABLE
    assert run_worker(Project(folder, args={"run_name": "stopped"})) == EXIT_OK
    assert run_worker(Project(folder, args={"run_name": "straight"})) == EXIT_OK
    first, second = (rows_of(folder, run) for run in ("stopped", "straight"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


DECAYING = """
extends: train.yaml
schedule: !singleton:forgather.optim.schedules:warmup_stable_decay
  length: null
  decay: 2
main:
  hooks:
    decayer: !singleton:decayer.py:Decayer
      schedule: !ref schedule
"""

DECAYER = """
class Decayer:
    def __init__(self, schedule):
        self.schedule = schedule
    def on_logged(self, event):
        if event.step == 1:
            self.schedule.on_command("decay")
"""


def test_a_run_that_has_decayed_on_command_is_over_whatever_its_steps(folder, capsys):
    (folder / "configs" / "decaying.yaml").write_text(DECAYING)
    (folder / "configs" / "decayer.py").write_text(DECAYER)
    assert run_worker(Project(folder, "decaying", args={"run_name": "decayed"})) == EXIT_OK
    assert [row["lr"] for row in rows_of(folder, "decayed")] == [1e-2, 5e-3, 0.0]
    capsys.readouterr()
    assert run_worker(Project(folder, "decaying", args={"run_name": "decayed", "steps": 9})) == EXIT_OK
    assert "has made 3 steps of 3 (its learning rate has decayed, --fresh" in capsys.readouterr().err


def test_a_run_that_diverges_ends_with_its_last_checkpoint_whole(folder):
    options = {"run_name": "diverged", "lr": 1e30, "max_grad_norm": None, "save_every": 1}
    with pytest.raises(TrainingError, match=r"step 2: loss .* the step was not applied"):
        run_worker(Project(folder, args=options))
    kept = [path.name for path in (folder / "runs" / "diverged" / "checkpoints").iterdir()]
    assert kept == ["step-00000001"]


def test_a_main_of_another_kind_is_refused(folder):
    environment = "environment: !singleton:forgather.distributed.environment:Environment {device: cpu}\n"
    (folder / "configs" / "other.yaml").write_text(f"{environment}main: !singleton:builtins:dict {{}}\n")
    with pytest.raises(ConfigError, match="is a dict, not a Trainer"):
        run_worker(Project(folder, "other"))
    with pytest.raises(ConfigError, match="has no target `fresh`"):
        run_worker(Project(folder, "other"), fresh=True)
    with pytest.raises(ConfigError, match="has no target `package`, which --refresh-model needs"):
        run_worker(Project(folder, "other"), refresh_model=True)
    (folder / "configs" / "homeless.yaml").write_text("environment: null\nmain: !singleton:builtins:dict {}\n")
    with pytest.raises(ConfigError, match=r"`environment` .* is a NoneType, not an Environment"):
        run_worker(Project(folder, "homeless"))


def test_data_made_by_another_tokenizer_are_refused(folder):
    (folder / "configs" / "mismatch.yaml").write_text(
        "extends: train.yaml\ndataset_project: {with: !replace {tokenizer: !ref other.main }}\n"
        "other: !project\n  dir: lib:tokenizers/char\n  args: {vocab_size: 8}\n  set: {sources: !replace {text: "
        "!singleton:forgather.data.sources:TextFiles {path: '${join(project.dir, ''text'')}', include: ['0.txt']}}}\n"
    )
    with pytest.raises(DataError, match=r"was made by tokenizer .* but the tokenizer in use is"):
        run_worker(Project(folder, "mismatch"))


def test_rows_longer_than_the_positions_of_the_model_are_remarked_on(folder, capsys):
    project = Project(
        folder,
        args={"run_name": "long", "block_length": 32},
        set={"model_project.args.max_position_embeddings": 16, "model_project.args.model_name": "short"},
    )
    assert run_worker(project, dry_run=True) == EXIT_OK
    assert "rows of 32 tokens, but the model's max_position_embeddings is 16" in capsys.readouterr().out
