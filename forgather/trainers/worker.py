"""One rank of a run, from its project to its exit code."""

import os
import sys
import traceback
from typing import Any, TypeVar

from forgather.checkpoint.resume import changes
from forgather.config.project import Project
from forgather.distributed.collectives import require_equal
from forgather.distributed.environment import Environment
from forgather.distributed.rank_log import RankLog, append
from forgather.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_RESUMABLE, ConfigError
from forgather.trainers.events import Outcome
from forgather.trainers.trainer import Trainer

Kind = TypeVar("Kind")


def run_worker(project: Project, *, fresh: bool = False, dry_run: bool = False, refresh_model: bool = False) -> int:
    """Build the target `main` of `project` and run it; returns the exit code.

    With `fresh` the run gets another folder instead of going on; `dry_run` does all but train; `refresh_model` rebuilds
    a model package that the configuration has outgrown. Needs the targets `environment` and, for the two flags, `fresh`
    and `package`, which `lib:train/causal_lm.yaml` has. A target `preflight` is built before all that takes long.
    """
    session = project.session()
    environment = _of_kind(project, "environment", session.build("environment"), Environment)
    require_equal("the resolved configuration", project.digest)
    log = RankLog(environment.rank)
    try:
        if project.has("preflight"):
            session.build("preflight", given=_given(project, fresh))
        if refresh_model:
            _require_target(project, "package", "--refresh-model", "package: !ref model_project.package")
            # Whoever comes first rebuilds it, under the package's lock; the others find it equal.
            session.build("package").write(refresh=True)
        return _work(project, session, environment, log, fresh=fresh, dry_run=dry_run)
    except Exception as error:
        append("".join(traceback.format_exception(error)))
        raise
    finally:
        if sys.exc_info()[0] is None or "RANK" not in os.environ:
            log.close()  # else it takes the error with which the process ends


def _work(project: Project, session: Any, environment: Environment, log: RankLog, *, fresh: bool, dry_run: bool) -> int:
    trainer = _build(project, session, fresh)
    run = trainer.checkpoints.run
    if not dry_run:
        log.open(run.logs)
    try:
        # A corpus is each machine's own, and two machines may well differ.
        require_equal(
            "the training data",
            trainer.data.fingerprint,
            fix="copy the prepared folder from one machine to the others, or let all read the same text",
        )
        run.describe("config.yaml", project.show())
        checkpoint = trainer.resume()
        if trainer.steps_done >= trainer.steps:
            # A decay that was begun by a command has the last word on where a run ends.
            more = "more steps continue it" if trainer.steps == trainer.asked_steps else "its learning rate has decayed"
            run.say(
                f"nothing to do: {run.dir} has made {trainer.steps_done} steps of {trainer.steps}"
                f" ({more}, --fresh begins another run)"
            )
            return EXIT_OK
        if checkpoint is not None:
            run.say(f"going on from {checkpoint.path}")
            mesh = trainer.state.mesh
            for line in changes(checkpoint, config=project.show(), world_size=environment.world_size, mesh=mesh):
                run.say(f"  changed since then: {line}")
        if environment.is_main:
            print(trainer.describe(), flush=True)
        if dry_run:
            loss = trainer.rehearse()
            if environment.is_main:
                print(f"dry run: the next batch has loss {loss:.4f}; nothing was trained")
            return EXIT_OK
        environment.bound_collectives()  # of all groups, now that each part has made its own
        trainer.meter.ledger.count_from_birth()  # imports and set-up are start-up
        return _end(trainer, trainer.run())
    finally:
        if dry_run:
            run.discard_unused()
        run.close()
        # Leaving the group waits for nobody, unless this rank fails alone: then the process ends with its error.
        if sys.exc_info()[0] is None:
            environment.close()


def _end(trainer: Trainer, outcome: Outcome) -> int:
    """Say how a run ended that did not make all its steps; the exit code."""
    run = trainer.checkpoints.run
    if outcome is Outcome.STOPPED:
        run.say(f"stopped and saved after step {trainer.steps_done}; the same command goes on from there")
        return EXIT_RESUMABLE
    if outcome is Outcome.ABORTED:
        kept = "step 0" if trainer.saved_at is None else f"the checkpoint of step {trainer.saved_at}"
        run.say(f"aborted after step {trainer.steps_done}, not saved; the same command goes on from {kept}")
        return EXIT_INTERRUPTED
    return EXIT_OK


def _build(project: Project, session: Any, fresh: bool) -> Trainer:
    return _of_kind(project, "main", session.build("main", given=_given(project, fresh)), Trainer)


def _given(project: Project, fresh: bool) -> dict[str, Any]:
    if not fresh:
        return {}
    _require_target(project, "fresh", "--fresh", "fresh: false, and use it in its run folder")
    return {"fresh": True}


def _of_kind(project: Project, target: str, built: object, kind: type[Kind]) -> Kind:
    if not isinstance(built, kind):
        raise ConfigError(
            f"the target `{target}` of config {project.config_name!r} is a {type(built).__name__}, not a"
            f"{'n' if kind.__name__[0] in 'AEIOU' else ''} {kind.__name__}",
            fix=f"let {target} be a !singleton:{kind.__module__}:{kind.__name__}, or extend lib:train/causal_lm.yaml",
        )
    return built


def _require_target(project: Project, target: str, flag: str, written: str) -> None:
    if not project.has(target):
        raise ConfigError(
            f"config {project.config_name!r} has no target `{target}`, which {flag} needs",
            fix=f"extend lib:train/causal_lm.yaml, or write {written}",
        )
