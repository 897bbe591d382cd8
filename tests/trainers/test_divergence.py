"""When a run is taken to have diverged, and how it then ends."""

from pathlib import Path

import pytest

from forgather.checkpoint.folder import saved_steps
from forgather.errors import ConfigError, TrainingError
from forgather.trainers.divergence import DivergenceStop, MovingMeans, WindowMeans
from forgather.trainers.events import Evaluated, Finished, Logged, Outcome
from tests.trainers.small_run import make_trainer, write_corpus


@pytest.mark.training_case(46)
def test_weights_and_windows_that_mean_nothing_are_refused():
    for weights in ({"short": 0}, {"long": 1.5}, {"short": -0.1}):
        with pytest.raises(ConfigError, match="the weight"):
            MovingMeans(**weights)
    for windows in ({"short": 0}, {"long": 0}, {"short": 5, "long": 5}):
        with pytest.raises(ConfigError, match="windows"):
            WindowMeans(**windows)
    with pytest.raises(ConfigError, match="threshold"):
        DivergenceStop(threshold=0)
    with pytest.raises(ConfigError, match="action of a divergence stop is 'halt'"):
        DivergenceStop(action="halt")


def feed(hook: DivergenceStop, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        hook.on_logged(Logged(step, {"loss": loss}))


@pytest.mark.training_case(47)
@pytest.mark.parametrize("action", ["stop", "abort"])
def test_two_spikes_are_too_many(action):
    hook = DivergenceStop(threshold=1.5, action=action, means=MovingMeans(0.2, 0.01))
    feed(hook, [2.8] * 50)
    assert hook.metrics() == {"gap": pytest.approx(0, abs=1e-12)}
    hook.judge(51, 8.0)
    assert hook.gap == pytest.approx(0.988)
    assert not hook.wants_stop()
    assert not hook.wants_abort()
    hook.judge(52, 8.0)
    assert hook.gap == pytest.approx(1.7685, abs=1e-4)
    assert (hook.wants_stop(), hook.wants_abort()) == (action == "stop", action == "abort")
    with pytest.raises(TrainingError, match=r"diverged and ended after step 52: at step 52 .* 1\.769 nats above"):
        hook.on_finish(Finished(52, Outcome.STOPPED))


@pytest.mark.training_case(48)
def test_windows_say_nothing_before_they_are_full():
    means = WindowMeans(short=3, long=5)
    assert [means.add(loss) for loss in (1.0, 9.0, 9.0, 9.0)] == [None] * 4
    assert means.add(9.0) == pytest.approx(9.0 - 37 / 5)
    hook = DivergenceStop(threshold=1.0, means=WindowMeans(3, 5))
    feed(hook, [1.0, 9.0, 9.0, 9.0])
    assert not hook.wants_stop()
    hook.judge(5, 9.0)
    assert hook.wants_stop()


@pytest.mark.training_case(49)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_no_number_ends_at_once(loss):
    hook = DivergenceStop(loss="evaluation")
    hook.on_logged(Logged(1, {"loss": loss}))  # another one is watched
    assert not hook.wants_stop()
    hook.on_evaluated(Evaluated(1, {"loss": loss}))
    assert hook.wants_stop()


@pytest.mark.parametrize("make", [MovingMeans, lambda: WindowMeans(2, 4)])
def test_a_resume_goes_on_with_the_same_means(make):
    losses = [3.0, 2.5, 2.7, 2.4, 2.2, 4.0]
    whole, first, second = (DivergenceStop(means=make()) for _ in range(3))
    feed(whole, losses)
    feed(first, losses[:3])
    second.load_state_dict(first.state_dict())
    feed(second, losses[3:])
    assert second.gap == whole.gap
    whole.found = "it diverged"
    assert not any(whole.state_dict().values())  # who continues in spite of it is judged anew


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


@pytest.mark.training_case(13)
@pytest.mark.parametrize(("action", "saved"), [("stop", [2]), ("abort", [])])
def test_a_stop_saves_and_an_abort_does_not(tmp_path, corpus, action, saved):
    # A short mean of the newest loss alone: the first rise of the loss is enough.
    hook = DivergenceStop(threshold=0.5, action=action, means=MovingMeans(1.0, 0.001))
    trainer = make_trainer(tmp_path, corpus, steps=9, lr=30.0, hooks={"divergence": hook})
    with pytest.raises(TrainingError, match="diverged and ended after step 2"):
        trainer.run()
    assert saved_steps(trainer.checkpoints.run.checkpoints) == saved
    trainer.checkpoints.run.close()
