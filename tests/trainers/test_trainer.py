"""A run goes on where it stopped, bit for bit, and does what it says at the steps that it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forgather.checkpoint.resume import changes
from forgather.errors import ConfigError
from forgather.metrics.sinks import read_rows
from forgather.trainers.events import Evaluated, Finished, Hooks, Outcome, Saved, Started, StepEnded
from tests.ranks import RankPool
from tests.trainers.small_run import hash_of, make_trainer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


class Recorder:
    """Hears everything, counts steps across resumes, and asks for a stop after step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.heard: list[tuple[str, int]] = []
        self.steps_seen = 0
        self.samples: list[str] = []

    def on_start(self, event: Started) -> None:
        self.heard.append(("start", event.step))

    def on_step_end(self, event: StepEnded) -> None:
        self.heard.append(("step", event.step))
        self.steps_seen += 1

    def on_evaluated(self, event: Evaluated) -> None:
        self.heard.append(("evaluated", event.step))

    def on_saved(self, event: Saved) -> None:
        self.heard.append((f"saved {event.path.name}", event.step))

    def on_finish(self, event: Finished) -> None:
        self.heard.append((event.outcome.value, event.step))

    def metrics(self) -> dict[str, float]:
        return {"steps_seen": self.steps_seen}

    def wants_stop(self) -> bool:
        return self.steps_seen == self.stop_at

    def state_dict(self) -> dict[str, int]:
        return {"steps_seen": self.steps_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps_seen = state["steps_seen"]


def train(folder: Path, corpus: Path, steps: int, *, stop_at: int | None = None, **kwargs) -> tuple[str, list[float]]:
    """A process of a run: its hash at the end, and all losses that the run has recorded."""
    torch.manual_seed(torch.seed())  # what a new process begins with must not matter
    trainer = make_trainer(folder, corpus, steps=steps, hooks={"recorder": Recorder(stop_at)}, **kwargs)
    trainer.resume()
    trainer.run()
    trainer.checkpoints.run.close()
    rows = read_rows(trainer.checkpoints.run.logs / "metrics.jsonl", "train")
    return hash_of(trainer), [row["loss"] for row in rows]


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, corpus):
    expected = train(tmp_path, corpus, 6, name="whole", dropout=0.3)
    train(tmp_path, corpus, 6, name="parts", dropout=0.3, stop_at=3)
    assert train(tmp_path, corpus, 6, name="parts", dropout=0.3) == expected
    assert len(expected[1]) == 6


def test_resumed_on_two_ranks_equals_uninterrupted(tmp_path, corpus, two_ranks):
    expected = two_ranks.run(train, tmp_path, corpus, 6, name="whole", dropout=0.3, tied=True)
    two_ranks.run(train, tmp_path, corpus, 6, name="parts", dropout=0.3, tied=True, stop_at=3)
    assert two_ranks.run(train, tmp_path, corpus, 6, name="parts", dropout=0.3, tied=True) == expected


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, corpus, two_ranks):
    _, expected = train(tmp_path, corpus, 6, name="whole")
    two_ranks.run(train, tmp_path, corpus, 6, name="parts", stop_at=3)
    _, losses = train(tmp_path, corpus, 6, name="parts")
    assert losses == pytest.approx(expected, rel=2e-6)
    train(tmp_path, corpus, 6, name="other way", stop_at=3)
    for _, losses in two_ranks.run(train, tmp_path, corpus, 6, name="other way"):
        assert losses == pytest.approx(expected, rel=2e-6)


def test_a_checkpoint_says_over_which_mesh_it_was_saved(tmp_path, corpus, two_ranks):
    two_ranks.run(train, tmp_path, corpus, 2)
    trainer = make_trainer(tmp_path, corpus, steps=4)
    checkpoint = trainer.resume()
    assert checkpoint is not None
    assert checkpoint.manifest.mesh == {"pipeline": 1, "replicate": 1, "shard": 2, "tensor": 1}
    told = changes(checkpoint, config="", world_size=1, mesh=trainer.state.mesh)
    assert "mesh: shard 2 -> one device" in told
    trainer.checkpoints.run.close()


def test_hooks_hear_what_happens(tmp_path, corpus):
    first = Recorder(stop_at=3)
    trainer = make_trainer(tmp_path, corpus, steps=4, save_every=2, hooks={"recorder": first, "none": None})
    assert trainer.resume() is None
    assert trainer.run() is Outcome.STOPPED
    trainer.checkpoints.run.close()
    saved = [("saved step-00000002", 2), ("saved step-00000003", 3)]
    assert first.heard == [("start", 0), ("step", 1), ("step", 2), saved[0], ("step", 3), saved[1], ("stopped", 3)]

    second = Recorder()
    trainer = make_trainer(tmp_path, corpus, steps=4, save_every=2, hooks={"recorder": second})
    assert trainer.resume().step == 3
    assert trainer.run() is Outcome.FINISHED
    assert second.heard == [
        ("start", 3),
        ("step", 4),
        ("evaluated", 4),
        ("saved step-00000004", 4),
        ("finished", 4),
    ]
    rows = read_rows(trainer.checkpoints.run.logs / "metrics.jsonl", "train")
    assert [row["recorder/steps_seen"] for row in rows] == [1, 2, 3, 4]
    assert trainer.run() is Outcome.NOTHING_TO_DO


def test_a_misspelt_event_is_refused():
    class Misspelt:
        def on_step_ended(self, event: StepEnded) -> None: ...

    with pytest.raises(ConfigError, match=r"hook 'mine': there is no event for Misspelt.on_step_ended") as error:
        Hooks({"mine": Misspelt()})
    assert error.value.fix == "did you mean on_step_end?"


def test_the_learning_rate_of_the_config_wins_over_the_saved_one(tmp_path, corpus):
    train(tmp_path, corpus, 2, schedule_steps=4)
    trainer = make_trainer(tmp_path, corpus, steps=4, lr=5e-3)
    trainer.resume()
    assert trainer.steps_done == 2
    trainer.run()
    rates = [row["lr"] for row in read_rows(trainer.checkpoints.run.logs / "metrics.jsonl", "train")]
    assert rates[1] == pytest.approx(1e-2)
    assert rates[2:] == pytest.approx([5e-3 * 0.55, 5e-3 * 0.1])
    assert [group["lr"] for group in trainer.state.optimizer.param_groups] == pytest.approx([5e-3 * 0.1] * 2)


def test_evaluation_is_the_same_on_any_number_of_ranks(tmp_path, corpus, two_ranks):
    one = evaluate(tmp_path / "one", corpus)
    for two in two_ranks.run(evaluate, tmp_path / "two", corpus):
        assert two == pytest.approx(one, rel=1e-6)
    assert one["targets"] == 7 * 12 - 6  # seven blocks of twelve, less the last tokens of documents


def evaluate(folder: Path, corpus: Path) -> dict[str, float]:
    trainer = make_trainer(folder, corpus, steps=2)
    before = hash_of(trainer)
    metrics = trainer.evaluation()
    assert trainer.model.training
    assert hash_of(trainer) == before
    return metrics


def test_a_dry_run_consumes_and_changes_nothing(tmp_path, corpus):
    trainer = make_trainer(tmp_path, corpus, steps=2)
    before = hash_of(trainer, with_random=False)
    loss = trainer.rehearse()
    assert hash_of(trainer, with_random=False) == before
    trainer.run()
    rows = read_rows(trainer.checkpoints.run.logs / "metrics.jsonl", "train")
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_run_learns(tmp_path, corpus):
    _, losses = train(tmp_path, corpus, 40, rows_per_step=16)
    assert losses[-1] < losses[0] - 1.5
