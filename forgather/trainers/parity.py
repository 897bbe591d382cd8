"""Two plans of one config, step by step beside each other: where do they first differ, in what, by how much?

Both plans run at once, each on ranks of its own, and send what `trainers.recording` reads off them; one tensor of each
is looked at and dropped at a time, so no record is kept.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

from forgather.config.blame import user_error
from forgather.config.names import did_you_mean, nearest
from forgather.config.project import Project
from forgather.distributed.collectives import rank
from forgather.distributed.devices import count_cores
from forgather.distributed.local_ranks import LocalRanks, preload
from forgather.distributed.mesh import AXES
from forgather.errors import ConfigError, ForgatherError
from forgather.trainers.comparison import Comparison, StepComparison
from forgather.trainers.recording import Reading, Recorder


@dataclass(frozen=True)
class Plan:
    """A mesh, and what else of the config is different: `shard=2,pipeline=2,lr=1e-4`, or `single,lr=1e-4`."""

    text: str
    axes: Mapping[str, int]
    settings: tuple[str, ...]  # key=value, as written

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read `key=value` pairs with commas between them; axes of the mesh that are not named have size 1."""
        axes = dict.fromkeys(AXES, 1)
        settings = []
        # A comma within a value, as in a list, is followed by no key.
        pairs = re.split(r",(?=[\w.]+=)", text)
        for pair in pairs[1:] if pairs[0] == "single" else pairs:
            key, equals, value = pair.partition("=")
            if not pair or pair.endswith(","):
                raise ConfigError(
                    f"the plan {text!r} has nothing between two commas, or beside one at its end",
                    fix="write one comma between two settings, as in shard=2,lr=1e-4",
                )
            if not equals:
                raise ConfigError(
                    f"the plan {text!r} has no value for {key!r}",
                    fix="write a plan as single, or as shard=2,tensor=2; any other key=value of the config may follow",
                )
            if key not in AXES:
                settings.append(pair)
            elif not value.isdecimal() or int(value) < 1:
                why = "; a plan's sizes say how many processes it has" if value == "auto" else ""
                raise ConfigError(
                    f"the plan {text!r}: {key} is {value!r}{why}", fix=f"use a whole number, as in {key}=2"
                )
            else:
                axes[key] = int(value)
        return cls(text, axes, tuple(settings))

    @property
    def num_ranks(self) -> int:
        return prod(self.axes.values())

    def apply(self, project: Project) -> Project:
        """`project` with the plan's mesh and settings. Raises ConfigError for a setting that it does not have."""
        parameters = project.parameters
        args: dict[str, Any] = {}
        words = [f"mesh.{axis}={size}" for axis, size in self.axes.items()]
        for pair in self.settings:
            key, _, value = pair.partition("=")
            root = re.split(r"[.\[]", key, maxsplit=1)[0]
            if root not in parameters and not project.has(root):
                raise ConfigError(
                    f"the plan {self.text!r}: nothing is called {root!r}",
                    fix=_meant(root, [*parameters, *project.targets()]),
                )
            if key in parameters:
                args[key] = parameters[key].parse(value, f"{key}={value} of the plan {self.text}")
            else:
                words.append(pair)
        return project.replaced(args=args, words=words)


def compare_plans(
    project: Project, a: Plan, b: Plan, *, steps: int, comparison: Comparison, timeout_s: float = 1800.0
) -> Iterator[StepComparison]:
    """Run both plans of `project` at once, `steps` steps each, and compare them step by step, the start first.

    What is wrong with a plan's words is raised now; the error of a plan that cannot run, with its words and the rank,
    when the iterator is asked.
    """
    projects = [plan.apply(project) for plan in (a, b)]
    for planned in projects:
        _ = planned.digest  # everything resolves, or this says what does not, before any rank starts
    return _compare((a, b), projects, steps, comparison, timeout_s)


def record_plan(send: Callable[[Any], None], project: Project, steps: int) -> None:
    """What one rank of a plan does: rank 0 sends the names of the parameters, then lists of readings."""
    step, model, optimizer, data = build_parts(project)
    recorder = Recorder(step, model, optimizer, send)
    if rank() == 0:
        send(recorder.names)
    try:
        recorder.record(data.take() for _ in range(steps))
    finally:
        data.close()


def build_parts(project: Project) -> tuple[Any, Any, Any, Any]:
    """Step, model, optimizer and data of a run, without the run: no folder is opened, so there are no reports."""
    session = project.session({"reports": None} if project.has("reports") else {})
    try:
        return tuple(session.build(target) for target in ("step", "model", "optimizer", "data"))
    except ForgatherError:
        raise
    except Exception as error:
        mendable = user_error(error)
        if mendable is None:
            raise
        raise mendable from error


def _compare(
    plans: Sequence[Plan], projects: Sequence[Project], steps: int, comparison: Comparison, timeout_s: float
) -> Iterator[StepComparison]:
    threads = max(1, count_cores() // sum(plan.num_ranks for plan in plans))
    preload([__name__, "forgather.trainers.assemble", "torch.distributed.fsdp"])
    with ExitStack() as stack:
        streams = []
        for plan, project in zip(plans, projects, strict=True):
            world = LocalRanks(plan.num_ranks, record_plan, (project, steps), threads=threads, timeout_s=timeout_s)
            streams.append(_Stream(plan, stack.enter_context(world)))
        names = [stream.receive() for stream in streams]
        if names[0] != names[1]:
            raise _other_parameters(plans, names)
        yield from comparison.compare(*streams)


class _Stream:
    """The readings that a plan's rank 0 sends, one by one."""

    def __init__(self, plan: Plan, ranks: LocalRanks) -> None:
        self.plan = plan
        self.ranks = ranks

    def receive(self) -> Any:
        try:
            return self.ranks.receive()
        except ForgatherError as error:
            error.message = f"plan {self.plan.text}: {error.message}"
            raise

    def __iter__(self) -> Iterator[Reading]:
        while True:
            try:
                readings = self.receive()
            except EOFError:
                return
            yield from readings


def _meant(name: str, others: Sequence[str]) -> str:
    axis = nearest(name, AXES)
    near = f"did you mean {axis!r}?" if axis is not None else did_you_mean(name, others, what="the config has")
    return f"{near} The axes of a mesh are {', '.join(AXES)}"


def _other_parameters(plans: Sequence[Plan], names: Sequence[Sequence[str]]) -> ConfigError:
    only = [sorted(set(names[0]) - set(names[1])), sorted(set(names[1]) - set(names[0]))]
    told = [f"only {plan.text} has {', '.join(own[:3])}" for plan, own in zip(plans, only, strict=True) if own]
    return ConfigError(
        f"the plans train models with different parameters: {'; '.join(told)}",
        fix="compare plans that share the model's settings",
    )
