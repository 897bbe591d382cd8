"""What becomes of the microbatches of a run: how many there are, and that nothing of one step is left for another."""

from pathlib import Path

import pytest

from forgather.trainers.events import StepEnded
from tests.data.corpora import write_shards
from tests.trainers.small_run import make_trainer, write_corpus

STEPS = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


class LooksAtGradients:
    """Notes after each step which parameters have a gradient."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.trainer = None

    def on_step_end(self, event: StepEnded) -> None:
        named = self.trainer.model.named_parameters()
        self.left += [f"step {event.step}: {name}" for name, parameter in named if parameter.grad is not None]


@pytest.mark.training_case(6)
def test_four_microbatches_a_step_and_ten_steps(tmp_path, corpus):
    trainer = make_trainer(tmp_path, corpus, steps=10, rows_per_step=8)  # two rows at once
    calls = {"loss": 0, "optimizer": 0}
    asked: list[int] = []
    loss, schedule = trainer.step.loss, trainer.step.update.schedule

    def count_loss(batch):
        calls["loss"] += 1
        return loss(batch)

    def count_schedule(step):
        asked.append(step)
        return schedule(step)

    trainer.step.loss, trainer.step.update.schedule = count_loss, count_schedule
    trainer.state.optimizer.register_step_post_hook(lambda *_: calls.update(optimizer=calls["optimizer"] + 1))
    trainer.run()
    assert calls == {"loss": 40, "optimizer": 10}
    assert asked == list(range(10))
    assert trainer.data.consumed == 80


@pytest.mark.training_case(7)
def test_nothing_of_a_step_is_left_when_an_epoch_ends_within_it(tmp_path, corpus):
    look = LooksAtGradients()
    few = write_shards(tmp_path / "few", [list(range(1, 18)) for _ in range(30)], shard_tokens=1000).folder
    trainer = look.trainer = make_trainer(tmp_path, few, steps=STEPS, rows_per_step=8, hooks={"look": look})
    blocks = len(trainer.data.blocks)
    assert blocks % 8 != 0  # the last step of the first epoch takes rows of the second
    trainer.run()
    assert look.left == []
    assert trainer.data.consumed == 8 * STEPS  # every step is whole, none is cut short by the end of an epoch
    assert trainer.data.epoch == 8 * STEPS / blocks > 1
