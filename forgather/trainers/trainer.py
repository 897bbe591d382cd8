"""The loop: take the batches of a step, make the step, and log, evaluate and save when it is time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import Checkpoint, CheckpointStore
from forgather.data.batch import Batch
from forgather.data.loader import Loader
from forgather.distributed.mesh import Mesh
from forgather.metrics.budget import Coverage, describe
from forgather.metrics.meter import Meter
from forgather.metrics.step_result import StepResult
from forgather.trainers.control import Control
from forgather.trainers.evaluation import Evaluation
from forgather.trainers.events import Evaluated, Finished, Hooks, Logged, Outcome, Saved, Started, StepEnded
from forgather.trainers.reports import Reports
from forgather.trainers.update import Update


class Step(Protocol):
    """One optimizer step over this rank's microbatches: `trainers.step.LocalStep` is one."""

    update: Update

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult: ...

    def settle(self) -> None: ...

    def rehearse(self, batches: Sequence[Batch]) -> float: ...

    def describe(self) -> Sequence[str]: ...


class Trainer:
    """Trains `model` for `steps` steps, going on from the newest whole checkpoint there is.

    Counts are in optimizer steps; `log_every`, `eval_every` and `save_every` are also done after the last one, and a
    null one is not done before that. `carried` are files or folders that every checkpoint takes along, such as the
    model's package. A run whose steps are all made does nothing.
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
        evaluation: Evaluation | None = None,
        control: Control | None = None,
        hooks: Mapping[str, Any] | None = None,
        log_every: int | None = 10,
        eval_every: int | None = None,
        save_every: int | None = None,
        carried: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.model = model
        self.step = step
        self.data = data
        self.mesh = mesh
        self.meter = meter
        self.reports = reports
        self.checkpoints = checkpoints
        self.steps = steps
        self.evaluation = evaluation
        self.control = control or Control(signals=False)
        self.hooks = Hooks({"of control": self.control, **(hooks or {})})
        self.log_every = log_every
        self.eval_every = eval_every
        self.save_every = save_every
        extras = {"data": data, "update": step.update, "goodput": meter.ledger, **self.hooks.with_state()}
        self.state = TrainState(model, optimizer, extras)
        self.steps_done = 0
        self.saved_at: int | None = None  # the step of the newest checkpoint
        for name, path in (carried or {}).items():
            checkpoints.run.describe(name, Path(path))

    def run(self) -> Outcome:
        """Make the steps that are left. All ranks call it; after an error the newest checkpoint is as it was."""
        if self.steps_done >= self.steps:
            return Outcome.NOTHING_TO_DO
        outcome = Outcome.FINISHED
        with self._running():
            while self.steps_done < self.steps:
                number = self.steps_done
                self.control.begin_step()
                with self.meter.doing("data_wait"):
                    batches = self.data.take()
                with self.meter.watching():
                    result = self.step(number, batches)
                self.meter.add(result)
                self.steps_done = number + 1
                self.reports.tick(self.steps_done)
                self.hooks.tell(StepEnded(self.steps_done, result))
                orders = self.control.end_step()
                if orders.abort:
                    outcome = Outcome.ABORTED
                    break
                if orders.decay:
                    self.begin_decay()
                if self.is_due(self.log_every) or self.steps_done == 1:
                    self.log()
                # A run that was told to stop may have seconds left; what it has to lose is not an evaluation.
                if self.is_due(self.eval_every) and (not orders.stop or self.steps_done == self.steps):
                    self.evaluate()
                stopping = self.hooks.want_stop() or orders.stop
                if stopping or orders.save or self.is_due(self.save_every):
                    self.save()
                if stopping and self.steps_done < self.steps:
                    outcome = Outcome.STOPPED
                    break
            self.hooks.tell(Finished(self.steps_done, outcome))
            self.close_ledger()
        return outcome

    def resume(self) -> Checkpoint | None:
        """Load the newest whole checkpoint, if there is one, and return it; all ranks call it, before `run`."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            self.checkpoints.load(self.state, checkpoint)
            self.steps_done = self.saved_at = checkpoint.step
            self.steps = self._last_step()
        return checkpoint

    def begin_decay(self) -> None:
        """Let the learning rate fall from the next step on; the run ends where the decay does."""
        obey = getattr(self.step.update.schedule, "on_command", None)
        if obey is not None and (said := obey("decay")) is not None:
            self.reports.note(said)
        self.steps = self._last_step()

    def _last_step(self) -> int:
        """How many steps the run has: a decay that was begun by a command ends it."""
        end: int | None = getattr(self.step.update.schedule, "end", None)
        return self.steps if end is None else end

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
            self.reports.write(self.steps_done, metrics, kind="evaluation")
            self.hooks.tell(Evaluated(self.steps_done, metrics))

    def save(self) -> None:
        """Save, unless this step is saved already: the end of a run saves what its last step may have saved."""
        if self.saved_at == self.steps_done:
            return
        self.step.settle()
        with self.meter.doing("checkpoint"):
            path = self.checkpoints.save(self.state, self.steps_done)
            self.saved_at = self.steps_done
            self.reports.note(f"saved {path}")
            self.hooks.tell(Saved(self.steps_done, path))

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

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.model.train()
        self.control.steer(self)
        self.reports.start(self.steps_done)
        try:
            with self.hooks:
                self.hooks.tell(Started(self.steps_done))
                self.meter.start()
                yield
        finally:
            self.data.close()
            self.reports.close()

    def is_due(self, every: int | None) -> bool:
        """Whether something that is done `every` so many steps is done now; everything is, after the last step."""
        return self.steps_done == self.steps or (every is not None and self.steps_done % every == 0)

    def describe(self) -> str:
        """What the run is about to do, in lines for the person who starts it."""
        coverage = Coverage(self.steps, self.data.tokens_per_step, self.data.blocks.shards.num_tokens)
        return describe(
            mesh=self.mesh.describe(),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
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
