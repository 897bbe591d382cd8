"""What a checkpoint holds, and what is refused when it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.loading import Checkpoint, visible_checkpoint
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.errors import CheckpointError
from tests.checkpoint.training import Position, Run


def saved(tmp_path: Path, state: TrainState, step: int = 1) -> CheckpointStore:
    store = CheckpointStore(RunFolder(tmp_path / "run"), asynchronous=False)
    store.save(state, step)
    return store


def load(store: CheckpointStore, state: TrainState) -> None:
    checkpoint = store.resume(state)
    assert checkpoint is not None


def stepped(**options: Any) -> Run:
    run = Run(**options)
    run.step()
    return run


@pytest.mark.training_case(36)
def test_tied_weights_are_stored_once_under_the_name_that_transformers_keeps() -> None:
    weights = Run(tied=True).state.weights()
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    assert "lm_head.weight" in Run(tied=False).state.weights()


def test_names_do_not_tell_of_compile_and_recompute(tmp_path: Path) -> None:
    run = stepped()
    store = saved(tmp_path, run.state)
    other = Run(seed=5)
    layers = other.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    assert any("_orig_mod" in name for name in other.model.state_dict())
    load(store, other.state)
    assert all(torch.equal(value, run.values()[name]) for name, value in other.values().items())


def test_other_shapes_and_names_are_listed_on_both_sides_and_nothing_changes(tmp_path: Path) -> None:
    store = saved(tmp_path, stepped(tied=False).state)
    other = Run(seed=5, hidden=32)
    before = other.values()
    with pytest.raises(CheckpointError) as raised:
        load(store, other.state)
    message = str(raised.value)
    assert "only in the checkpoint:\n    model/lm_head.weight [15, 16] float32" in message
    assert "model/model.embed_tokens.weight [15, 16] float32, [15, 32] float32" in message
    assert "holds other parameters than this run" in message
    after = other.values()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_parameter_that_was_not_saved_is_an_error(tmp_path: Path) -> None:
    store = saved(tmp_path, stepped(tied=True).state)
    with pytest.raises(CheckpointError, match=r"only in this run:\n    model/lm_head.weight \[15, 16\] float32"):
        load(store, Run(tied=False).state)


def test_state_of_another_optimizer_is_an_error(tmp_path: Path) -> None:
    store = saved(tmp_path, stepped().state)
    other = Run()
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1, momentum=0.9)
    other.state.optimizer = other.optimizer
    with pytest.raises(CheckpointError, match=r"(?s)exp_avg.*only in this run:.*momentum_buffer"):
        load(store, other.state)


def test_a_new_learning_rate_wins_over_the_saved_one(tmp_path: Path) -> None:
    store = saved(tmp_path, stepped(lr=1e-3).state)
    other = Run(lr=5e-4)
    load(store, other.state)
    assert [group["lr"] for group in other.optimizer.param_groups] == [5e-4]


def test_preparing_the_optimizer_takes_no_step_and_calls_no_hook(tmp_path: Path) -> None:
    """Also under a schedule, which replaces the optimizer's `step` by one that is bound to the real optimizer."""
    run = stepped()
    store = saved(tmp_path, run.state)
    other = Run(seed=5)
    calls: list[object] = []
    other.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    other.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    torch.optim.lr_scheduler.LambdaLR(other.optimizer, lambda step: 1.0)
    checkpoint = visible_checkpoint(store.run.checkpoints / "step-00000001")
    assert isinstance(checkpoint, Checkpoint)
    before = other.values()
    other.state.targets(checkpoint.layout, {"optimizer": {}, "extras": {}, "random": [None]})
    assert calls == []
    assert all(torch.equal(value, before[name]) for name, value in other.values().items() if "/" not in name)
    assert len(other.optimizer.state) == len(run.optimizer.state)
    assert all(parameter.grad is None for parameter in other.model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True, amsgrad=True),
        lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
        lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    ],
)
def test_optimizers_of_all_kinds_resume_exactly(tmp_path: Path, make: Any) -> None:
    def start(seed: int) -> TrainState:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return TrainState(model, make(model.parameters()))

    def step(state: TrainState) -> None:
        state.model(torch.ones(2, 4)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    undisturbed = start(0)
    for _ in range(4):
        step(undisturbed)
    first = start(0)
    for _ in range(2):
        step(first)
    store = saved(tmp_path, first)
    resumed = start(1)
    load(store, resumed)
    for _ in range(2):
        step(resumed)
    for name, weight in undisturbed.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


def test_a_parameter_without_optimizer_state_stays_without(tmp_path: Path) -> None:
    run = Run()
    run.model.model.norm.weight.requires_grad_(False)
    run.step()
    store = saved(tmp_path, run.state)
    other = stepped(seed=5)
    load(store, other.state)
    assert other.model.model.norm.weight not in other.optimizer.state


class Best:
    """A hook whose state grows, and holds a tensor, a tuple, an infinity and keys that are numbers."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {"best": [], "mean": torch.zeros(2), "low": float("inf"), 3: (1, None)}

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = state


def test_a_hook_whose_state_has_another_shape_today(tmp_path: Path) -> None:
    run = stepped()
    hook = Best()
    hook.state["best"] = [("step-1", torch.ones(3)), ("step-2", torch.arange(4))]
    hook.state["mean"] = torch.tensor([1.5, -1.0])
    store = saved(tmp_path, TrainState(run.model, run.optimizer, {"best": hook}))
    other = Best()
    load(store, TrainState(run.model, run.optimizer, {"best": other}))
    assert other.state["low"] == float("inf")
    assert other.state[3] == (1, None)
    assert torch.equal(other.state["mean"], hook.state["mean"])
    assert [name for name, _ in other.state["best"]] == ["step-1", "step-2"]
    assert torch.equal(other.state["best"][1][1], torch.arange(4))


def test_hooks_that_come_and_go_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stepped()
    store = saved(tmp_path, TrainState(run.model, run.optimizer, {"old": Position()}))
    load(store, TrainState(run.model, run.optimizer, {"new": Position()}))
    said = capsys.readouterr().err
    assert "has a state of 'old', which this run lacks; it is not used" in said
    assert "has no state of 'new', which starts anew" in said


@pytest.mark.training_case(30)
def test_a_state_that_no_checkpoint_can_carry_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    run = stepped()
    hook = Best()
    hook.state["set"] = {1, 2}
    with pytest.raises(CheckpointError, match="extras/best/set holds a set"):
        saved(tmp_path, TrainState(run.model, run.optimizer, {"best": hook}))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_only_the_newest_whole_ones_are_kept(tmp_path: Path) -> None:
    run = stepped()
    store = CheckpointStore(RunFolder(tmp_path / "run"), Keep(last=2), asynchronous=False)
    for step in (1, 2, 3):
        store.save(run.state, step)
    (store.run.checkpoints / "step-00000003" / "state.json").unlink()
    store.save(run.state, 4)
    names = sorted(path.name for path in store.run.checkpoints.iterdir())
    assert names == ["step-00000002", "step-00000003", "step-00000004"]  # 3 is damaged: neither counted nor removed


def test_a_step_is_not_written_twice(tmp_path: Path) -> None:
    run = stepped()
    store = saved(tmp_path, run.state)
    manifest = store.run.checkpoints / "step-00000001" / "manifest.json"
    before = manifest.stat().st_ino
    store.save(run.state, 1)
    load(store, run.state)
    store.save(run.state, 1)
    assert manifest.stat().st_ino == before
    with pytest.raises(CheckpointError, match="already there, and nothing is overwritten"):
        CheckpointStore(store.run, asynchronous=False).save(run.state, 1)


def test_keep_last_of_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"keep\.last is 0"):
        CheckpointStore(RunFolder(tmp_path / "run"), Keep(last=0))


def test_a_name_of_an_extra_that_would_be_a_path_is_refused() -> None:
    run = Run()
    with pytest.raises(CheckpointError, match=r"'hooks/mean' cannot be saved(.|\n)*fix: name it 'hooks_mean'"):
        TrainState(run.model, run.optimizer, {"hooks/mean": Position()})
