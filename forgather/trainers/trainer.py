"""The loop: take the batches of a step, make the step, and log, evaluate and save when it is time."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from forgather.checkpoint.loading import Checkpoint
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.data.batch import Batch
from forgather.data.loader import Loader
from forgather.distributed.mesh import Mesh
from forgather.errors import ForgatherError
from forgather.metrics.budget import Coverage, describe
from forgather.metrics.meter import Meter
from forgather.metrics.step_result import StepResult
from forgather.trainers.commands import Orders
from forgather.trainers.control import Control
from forgather.trainers.evaluation import Evaluation
from forgather.trainers.events import Ending, Evaluated, Finished, Hooks, Logged, Outcome, Saved, Started, StepEnded
from forgather.trainers.interval import Every, Interval
from forgather.trainers.reports import Reports
from forgather.trainers.update import Update

# How long a run that ends with an error waits for the checkpoint that is being written: one of ours all ranks have
# together, and their parts will come; after any other a rank may be gone, and a restart may be waiting.
_ORDERLY_S, _CRASHED_S = 600.0, 1.0


class Step(Protocol):
    """One optimizer step over this rank's microbatches: `trainers.step.LocalStep` is one."""

    update: Update

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult: ...

    def settle(self) -> None: ...

    def rehearse(self, batches: Sequence[Batch]) -> float: ...

    def describe(self) -> Sequence[str]: ...


class Start(Protocol):
    """Weights for a run that has none yet: `conversion.starting_weights.StartingWeights` is one."""

    def load(self, weights: Mapping[str, Tensor], tied: Mapping[str, str]) -> str | None: ...


class Trainer:
    """Trains `model` for `steps` steps, going on from the newest whole checkpoint there is.

    Counts are in optimizer steps; `log_every`, `eval_every` and `save_every` are also done after the last one, a null
    one is not done before that, and `epoch` is the end of each pass over the data. `carried` are files or folders that
    every checkpoint takes along, such as the model's package; `num_parameters` those of the whole model, where this
    rank has a part of it. A run whose steps are all made does nothing.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        step: Step,
        data: Loader,
        mesh: Mesh,
        meter: Meter,
        reports: Reports,
        checkpoints: CheckpointStore,
        steps: int,
        init_from: Start | None = None,
        evaluation: Evaluation | None = None,
        control: Control | None = None,
        hooks: Mapping[str, Any] | None = None,
        log_every: Every = 10,
        eval_every: Every = None,
        save_every: Every = None,
        carried: Mapping[str, str | Path] | None = None,
        num_parameters: int | None = None,
    ) -> None:
        self.model = model
        self.step = step
        self.data = data
        self.mesh = mesh
        self.meter = meter
        self.reports = reports
        self.checkpoints = checkpoints
        self.asked_steps = steps
        self.init_from = init_from
        self.evaluation = evaluation
        self.control = control or Control(signals=False)
        self.hooks = Hooks({"of control": self.control, **(hooks or {})})
        steps_per_epoch = len(data.blocks) / data.rows_per_step
        self.log_every = Interval("log_every", log_every, steps_per_epoch=steps_per_epoch)
        self.eval_every = Interval("eval_every", eval_every, steps_per_epoch=steps_per_epoch)
        self.save_every = Interval("save_every", save_every, steps_per_epoch=steps_per_epoch)
        extras = {"data": data, "update": step.update, "goodput": meter.ledger, **self.hooks.with_state()}
        self.state = TrainState(model, optimizer, extras, mesh.sizes)
        # Of the whole model; a rank that holds a few of its layers cannot count them.
        self.num_parameters = num_parameters or sum(parameter.numel() for parameter in model.parameters())
        self.steps_done = 0
        self.saved_at: int | None = None  # the step of the newest checkpoint
        self.evaluated: tuple[int, Mapping[str, float]] | None = None  # the last evaluation's step, and what it gave
        for name, path in (carried or {}).items():
            checkpoints.run.describe(name, Path(path))

    def run(self) -> Outcome:
        """Make the steps that are left. All ranks call it; after an error the newest checkpoint is as it was."""
        if self.steps_done >= self.steps:
            return Outcome.NOTHING_TO_DO
        outcome = None
        with self._running():
            while outcome is None and (outcome := self.wait_for_rows()) is None:
                self.control.begin_step()
                with self.meter.doing("data_wait"):
                    batches = self.data.take()
                with self.meter.watching():
                    result = self.step(self.steps_done, batches)
                self.meter.add(result)
                self.steps_done += 1
                orders = self.control.end_step()
                if orders.decay:
                    self.begin_decay()
                self.reports.tick(self.steps_done, self.steps)
                self.hooks.tell(StepEnded(self.steps_done, result, orders.stop or orders.abort))
                if self.steps_done == self.steps and not orders.abort:
                    self.hooks.tell(Ending(self.steps_done, is_finished=True, is_stopping=orders.stop))
                self.tell_saved()
                if not orders.abort and (self.is_due(self.log_every) or self.steps_done == 1):
                    self.log()
                if self.is_due(self.eval_every) and self.has_time(orders):
                    self.evaluate()
                outcome = self.obey(orders, is_save_due=self.is_due(self.save_every))
            with self.meter.doing("checkpoint"):
                self.checkpoints.finish()
            self.tell_saved()
            self.hooks.tell(Finished(self.steps_done, outcome))
            self.close_ledger()
        return outcome

    def resume(self) -> Checkpoint | None:
        """Load the newest whole checkpoint and return it; without one, the weights to begin with, if there are any.

        All ranks call it, before `run`.
        """
        checkpoint = self.checkpoints.resume(self.state)
        if checkpoint is not None:
            self.steps_done = self.saved_at = checkpoint.step
        elif self.init_from is not None:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            if (said := self.init_from.load(self.state.weights(), tied)) is not None:
                self.checkpoints.run.say(said)
        return checkpoint

    @property
    def steps(self) -> int:
        """How many steps the run has in all: those asked for, or up to the end of a decay that a command has begun."""
        last = self.step.update.last_step
        return self.asked_steps if last is None else last

    def begin_decay(self) -> None:
        """Let the learning rate fall from the next step on; the run ends where the decay does."""
        if (said := self.step.update.begin_decay()) is not None:
            self.reports.note(f"{said}; step {self.steps} is the last")

    def has_time(self, orders: Orders) -> bool:
        """Whether there is time to evaluate: a run that was told to stop may have seconds left, for its save."""
        return not orders.abort and (not orders.stop or self.steps_done == self.steps)

    def wait_for_rows(self) -> Outcome | None:
        """Return when the next step has its rows, as nearly always at once; or how the run ends, if it is told to."""
        outcome = None
        while outcome is None and not self._has_rows():
            self.control.begin_step()
            orders = self.control.end_step()
            if orders.decay:
                self.begin_decay()
            outcome = self.obey(orders)
        return outcome

    def obey(self, orders: Orders, *, is_save_due: bool = False) -> Outcome | None:
        """Save, where that is due or asked for; how the run ends with the last step by orders and hooks, if it does."""
        wish = self.hooks.wish()
        outcome = self.outcome(orders, None if wish == "save" else wish)
        if outcome is Outcome.STOPPED and self.saved_at != self.steps_done:
            self.hooks.tell(Ending(self.steps_done, is_finished=False, is_stopping=orders.stop))
        if outcome is not Outcome.ABORTED and (outcome or orders.save or wish == "save" or is_save_due):
            self.save()
        return outcome

    def outcome(self, orders: Orders, wish: Outcome | None) -> Outcome | None:
        """How the run ends with this step, at a hook's `wish` or by orders; None where it goes on."""
        wanted = Outcome.ABORTED if orders.abort else wish
        if wanted is not Outcome.ABORTED and self.steps_done == self.steps:
            return Outcome.FINISHED  # also where it was told to stop
        return Outcome.STOPPED if orders.stop and wanted is None else wanted

    def log(self) -> None:
        """Report the steps since the last log. The one place where numbers leave the device."""
        self.step.settle()
        metrics = self.meter.flush(self.steps_done) | {"epoch": self.data.epoch} | self.step.update.metrics()
        metrics |= self.hooks.metrics()
        self.reports.write(self.steps_done, metrics)
        self.hooks.tell(Logged(self.steps_done, metrics))

    def evaluate(self) -> None:
        if self.evaluation is None:
            return
        self.step.settle()
        with self.meter.doing("evaluation"):
            metrics = self.evaluation()
            self.evaluated = (self.steps_done, metrics)
            self.reports.write(self.steps_done, metrics, kind="evaluation")
            self.hooks.tell(Evaluated(self.steps_done, metrics))

    def save(self) -> None:
        """Save, unless this step is saved already: the end of a run saves what its last step may have saved."""
        if self.saved_at == self.steps_done:
            return
        self.step.settle()
        with self.meter.doing("checkpoint"):
            step, metrics = self.evaluated or (None, {})
            self.checkpoints.save(self.state, self.steps_done, metrics if step == self.steps_done else {})
            self.saved_at = self.steps_done
        self.tell_saved()  # the one before; or this one, where nothing is written beside the run

    def tell_saved(self) -> None:
        """Say which save, written meanwhile by a process of its own, has become a whole checkpoint."""
        if (saved := self.checkpoints.committed()) is not None:
            self.reports.note(f"saved {saved.path}")
            self.hooks.tell(Saved(saved.step, saved.path))

    def close_ledger(self) -> None:
        """Say where the time of the run went; what comes until it is continued is no loss."""
        ledger = self.meter.ledger
        ledger.write(is_orderly_end=True)
        self.reports.record(self.steps_done, ledger.summary(), kind="goodput")
        self.reports.note(ledger.describe())

    def rehearse(self) -> float:
        """The loss of the next step's batch, which is not trained on and not consumed; for a dry run."""
        consumed = self.data.state_dict()
        loss = self.step.rehearse(self.data.take())
        self.data.load_state_dict(consumed)
        return loss

    def _has_rows(self) -> bool:
        with self.meter.doing("data_wait"):
            return self.data.has_rows(self.steps - self.steps_done)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.model.train()
        self.control.steer(self)
        self.reports.start(self.steps_done, self.steps)
        try:
            with self.hooks:
                self.hooks.tell(Started(self.steps_done, self.steps))
                self.meter.start()
                yield
        finally:
            # After an error too: what was saved before it, and is being written, is not to be lost with it.
            self.checkpoints.wait_alone(_ORDERLY_S if isinstance(sys.exception(), ForgatherError) else _CRASHED_S)
            self.tell_saved()
            self.checkpoints.close()
            self.data.close()
            self.reports.close()

    def is_due(self, interval: Interval) -> bool:
        """Whether something is done now; everything is, after the last step."""
        return self.steps_done == self.steps or interval.is_due(self.steps_done)

    def describe(self) -> str:
        """What the run is about to do, in lines for the person who starts it."""
        coverage = Coverage(self.steps, self.data.tokens_per_step, self.data.blocks.shards.num_tokens)
        return describe(
            mesh=self.mesh.describe(),
            parameters=self.num_parameters,
            coverage=coverage,
            output=str(self.checkpoints.run.dir),
            steps_done=self.steps_done,
            notes=[f"batch: {self.data.describe()}", *self.step.describe(), *self._describe_length()],
        )

    def _describe_length(self) -> list[str]:
        """A remark when rows are longer than the positions that the model was made for, as far as it says so."""
        longest = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        length = self.data.blocks.block_length
        if longest is None or length <= longest:
            return []
        return [f"length: rows of {length} tokens, but the model's max_position_embeddings is {longest}"]
