"""Every mesh trains alike: losses, gradients, norms and parameters of 20 steps, by the tool that users have.

The meshes are those of the tiny experiments, so what is compared is composed by `lib:train/causal_lm.yaml` as any run.
"""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from forgather.cli.main import main
from forgather.config.project import Project
from forgather.data.batch import NO_TARGET
from forgather.distributed.local_ranks import LocalRanks
from forgather.errors import ConfigError, DistributedError, ForgatherError
from forgather.trainers.comparison import Comparison, StepComparison
from forgather.trainers.parity import Plan, build_parts, record_plan
from forgather.trainers.recording import Reading, Recorder
from tests.docs.pages import ROOT, WRITTEN_BY_RUNS
from tests.ranks import RankPool

STEPS = 20
SETTINGS = {"steps": 40, "lr": 3e-3, "precision": "fp32", "threads": 1}

# Each with the variant that it has in every test run, if it is in one: `make soak` makes all meshes in all variants.
MESHES = {
    "shard=2": {"rows_per_forward": 2},
    "replicate=2": {"tied": True},
    "shard=4": {},
    "replicate=2,shard=2": {"tied": True, "rows_per_forward": 1},
    "tensor=2": {"rows_per_forward": 4},
    "tensor=2,shard=2": {"tied": True},
    "pipeline=2,pipeline.schedule=gpipe": {},
    "pipeline=2,pipeline.schedule=1f1b": {"tied": True, "rows_per_forward": 4},
    "pipeline=2,pipeline.schedule=interleaved_1f1b": {"rows_per_forward": 4},
    "pipeline=2,pipeline.schedule=looped_bfs": {"tied": True},
    "pipeline=2,pipeline.schedule=interleaved_zero_bubble": {"tied": True, "rows_per_forward": 4},
    "pipeline=2,pipeline.schedule=zbv": {"tied": True},
    "pipeline=2,shard=2": {"tied": True, "rows_per_forward": 2},
    "pipeline=2,tensor=2,shard=2": {"tied": True, "rows_per_forward": 2},
}
# The others have tests in every run beside what makes them: test_meshes.py, test_pipeline.py, test_pipeline_meshes.py.
IN_EVERY_RUN = ["pipeline=2,pipeline.schedule=zbv"]
VARIANTS = [
    pytest.param({}, id="untied"),
    pytest.param({"tied": True}, id="tied"),
    pytest.param({"rows_per_forward": 1}, id="accumulated"),
    pytest.param({"tied": True, "rows_per_forward": 2}, id="tied, accumulated"),
]


@pytest.fixture(scope="module")
def project_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "tiny_experiments"
    shutil.copytree(ROOT / "configs" / "tiny_experiments", folder, ignore=shutil.ignore_patterns(*WRITTEN_BY_RUNS))
    for tied in (False, True):
        Project(folder, "meshes", args={"tied": tied}).build(["package", "train_blocks"])  # once, not on every rank
    return folder


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], RankPool]]:
    with ExitStack() as stack:
        pools: dict[int, RankPool] = {}

        def of_size(size: int) -> RankPool:
            if size not in pools:
                pools[size] = stack.enter_context(RankPool(size, timeout_s=300.0))
            return pools[size]

        yield of_size


def project(folder: Path, plan: str, **args: Any) -> Project:
    return Plan.parse(plan).apply(Project(folder, "meshes", args=SETTINGS | args))


def record(planned: Project, steps: int = STEPS) -> list[Reading]:
    """The readings of all steps, on rank 0."""
    sent: list[Any] = []
    record_plan(sent.append, planned, steps)
    return [reading for readings in sent[1:] for reading in readings]


@pytest.fixture(scope="module")
def single(project_dir) -> Callable[..., list[Reading]]:
    """The readings of one process, made once for each variant."""
    made: dict[str, list[Reading]] = {}

    def of_variant(**args: Any) -> list[Reading]:
        key = str(sorted(args.items()))
        if key not in made:
            made[key] = record(project(project_dir, "single", **args))
        return made[key]

    return of_variant


def assert_equal(a: list[Reading], b: list[Reading]) -> None:
    compared = list(Comparison(tolerance=1e-5, tensor_tolerance=1e-5).compare(a, b))
    assert len(compared) == STEPS + 1
    assert [step.beyond for step in compared if step.beyond] == []
    assert all(set(step.worst) == {"targets", "loss", "gradient", "grad_norm", "parameter"} for step in compared[1:])


@pytest.mark.parametrize("mesh", IN_EVERY_RUN)
def test_a_mesh_trains_as_one_process(mesh, project_dir, single, pools):
    variant = MESHES[mesh]
    readings = pools(Plan.parse(mesh).num_ranks).run(record, project(project_dir, mesh, **variant))
    assert_equal(single(tied=variant.get("tied", False)), readings[0])


@pytest.mark.soak
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_process_however_it_is_cut(mesh, variant, project_dir, single, pools):
    readings = pools(Plan.parse(mesh).num_ranks).run(record, project(project_dir, mesh, **variant))
    assert_equal(single(tied=variant.get("tied", False)), readings[0])


def test_the_experiment_has_rows_with_unequal_targets_and_several_documents(project_dir):
    blocks = Project(project_dir, "meshes").build("train_blocks")
    rows = blocks.gather(np.arange(100))
    assert ((rows.position_ids[:, 1:] == 0).sum(axis=1) > 1).any()
    assert len(set((rows.targets == NO_TARGET).sum(axis=1).tolist())) > 2


# A fault that only the tensor's own name tells


def record_with_fault(planned: Project, name: str, at_step: int, on_rank: int, factor: float) -> list[Reading]:
    """As `record`, but one rank's part of one gradient is multiplied by `factor` in one step."""
    step, model, optimizer, data = build_parts(planned)
    sent: list[Reading] = []
    made = 0

    def spoil(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == at_step and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == on_rank):
            gradient = dict(model.named_parameters())[name].grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)

    optimizer.register_step_pre_hook(spoil)
    Recorder(step, model, optimizer, sent.extend).record(data.take() for _ in range(5))
    data.close()
    return sent


NAME = "model.layers.2.mlp.up_proj.weight"


def first_difference(a: list[Reading], b: list[Reading]) -> StepComparison:
    return next(step for step in Comparison().compare(a, b) if step.beyond)


def test_the_first_step_and_the_tensor_of_a_fault_are_named(project_dir, pools):
    sound = record(project(project_dir, "single"), 5)
    faulty = pools(2).run(record_with_fault, project(project_dir, "shard=2"), NAME, 3, 1, 1.5)[0]
    found = first_difference(sound, faulty)
    first = found.beyond[0]
    assert (first.step, first.kind, first.name) == (3, "gradient", NAME)
    assert 0.1 < first.size < 0.5  # half of one of two halves
    assert {(each.kind, each.name) for each in found.beyond} == {("gradient", NAME), ("parameter", NAME)}


def test_replicas_that_have_drifted_apart_are_named(project_dir, pools):
    faulty = pools(2).run(record_with_fault, project(project_dir, "replicate=2"), NAME, 2, 1, 1.5)[0]
    found = first_difference(record(project(project_dir, "single"), 5), faulty)
    assert (found.beyond[0].step, found.beyond[0].name) == (2, NAME)
    assert found.beyond[0].note == "ranks of plan B hold different copies"


def test_another_start_differs_before_the_first_step(project_dir):
    found = first_difference(
        record(project(project_dir, "single"), 1), record(project(project_dir, "single,seed=1"), 1)
    )
    assert found.step == 0
    assert {each.kind for each in found.beyond} == {"parameter"}


# What a comparison says of tensors


def readings_of(step: int, kind: Any, **tensors: Any) -> list[Reading]:
    values = {name: None if value is None else torch.tensor(value).numpy() for name, value in tensors.items()}
    return [Reading(step, kind, name, value) for name, value in values.items()]


def test_a_gradient_that_one_plan_lacks_differs_wholly_unless_it_is_zero():
    a = readings_of(1, "gradient", x=[1.0], y=[0.0], z=[2.0])
    b = readings_of(1, "gradient", x=None, y=None, z=[2.0])
    [step] = Comparison().compare(a, b)
    assert [(each.name, each.size, each.note) for each in step.beyond] == [("x", float("inf"), "plan B has none")]


def test_a_value_that_is_not_a_number_differs():
    [step] = Comparison().compare(readings_of(1, "gradient", x=[1.0]), readings_of(1, "gradient", x=[float("nan")]))
    assert [each.name for each in step.beyond] == ["x"]


def test_a_parameter_whose_gradient_is_rounding_alone_is_not_judged():
    a = readings_of(1, "gradient", x=[1.0], bias=[1e-9]) + readings_of(1, "parameter", x=[1.0], bias=[1e-3])
    b = readings_of(1, "gradient", x=[1.0], bias=[-1e-9]) + readings_of(1, "parameter", x=[1.0], bias=[-1e-3])
    [step] = Comparison().compare(a, b)
    assert step.beyond == []
    assert step.noise == ["bias"]


def test_other_shapes_differ():
    [step] = Comparison().compare(readings_of(1, "parameter", x=[1.0]), readings_of(1, "parameter", x=[1.0, 1.0]))
    assert step.beyond[0].note == "shapes [1] and [2]"


# Plans


def test_a_plan_has_axes_and_settings():
    plan = Plan.parse("shard=2,pipeline=2,pipeline.cuts=[1,2],lr=1e-3")
    assert plan.num_ranks == 4
    assert plan.axes == {"pipeline": 2, "replicate": 1, "shard": 2, "tensor": 1}
    assert plan.settings == ("pipeline.cuts=[1,2]", "lr=1e-3")
    assert Plan.parse("single").num_ranks == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shard", "no value for 'shard'"),
        ("tensor=0", "tensor is '0'"),
        ("shard=auto", "sizes say how many processes"),
        ("shard=2,,lr=1", "nothing between two commas"),
        ("single,,lr=1", "nothing between two commas"),
        ("shard=2,", "beside one at its end"),
        (",shard=2", "nothing between"),
    ],
)
def test_a_plan_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        Plan.parse(text)


# The command


def parity(folder: Path, *words: str) -> int:
    return main(["-p", str(folder), "-t", "meshes", "parity", *words])


def test_equal_plans_end_with_0(project_dir, capsys):
    assert parity(project_dir, "single", "shard=2,rows_per_forward=4", "--first", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  A  single                      1 rank", "  B  shard=2,rows_per_forward=4  2 ranks"]
    assert [line.split()[0] for line in lines[4:8]] == ["0", "1", "2", "3"]
    assert lines[-1].startswith("equal: losses within ")
    assert not (project_dir / "runs").exists()


@pytest.mark.soak  # in every run, what it is made of
def test_different_plans_end_with_1(project_dir, capsys):
    assert parity(project_dir, "single", "lr=1e-4", "--first", "9", "--keep-going") == 1
    out = capsys.readouterr().out
    assert "different: first at step 1, in parameter lm_head.weight, by " in out
    assert len([line for line in out.splitlines() if re.match(r" +[0-9]+ ", line[:5])]) == 10


def test_a_plan_that_cannot_run_says_which_and_which_rank(project_dir, capsys):
    assert parity(project_dir, "single", "shard=3") == 2
    error = capsys.readouterr().err
    assert "plan shard=3: rank " in error
    assert "16 rows a step cannot be divided among 3 data ranks" in error


def test_a_setting_that_does_not_exist_is_refused_before_anything_starts(project_dir, capsys):
    assert parity(project_dir, "single", "shar=2") == 2
    captured = capsys.readouterr()
    assert "nothing is called 'shar'\n  fix: did you mean 'shard'? The axes of a mesh are pipeline," in captured.err
    assert captured.out == ""


def test_a_value_that_a_constructor_refuses_is_told_without_a_traceback(project_dir, capsys):
    assert parity(project_dir, "single", "single,optimizer.optimizer=nope", "--first", "1") == 2
    error = capsys.readouterr().err
    assert "plan single,optimizer.optimizer=nope: rank 0 of 1: TypeError: 'str' object is not callable" in error
    assert ", given optimizer.optimizer=nope\n" in error
    assert "Traceback" not in error


# Ranks of this host


def die(send: Callable[[Any], None], rank: int) -> None:
    send("here")
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def refuse(send: Callable[[Any], None]) -> None:
    if torch.distributed.get_rank() == 1:
        raise DistributedError("not today", fix="come tomorrow")
    torch.distributed.all_reduce(torch.ones(1))


def take_all(ranks: LocalRanks) -> list[Any]:
    return list(iter(partial(ranks.receive), None))


def test_a_rank_that_is_killed_is_named():
    with LocalRanks(2, die, (1,)) as ranks, pytest.raises(ForgatherError, match="rank 1 of 2: the process was killed"):
        take_all(ranks)


def test_a_refusal_comes_before_the_connections_that_it_breaks():
    with LocalRanks(2, refuse) as ranks, pytest.raises(ForgatherError, match="rank 1 of 2: not today") as error:
        take_all(ranks)
    assert error.value.fix == "come tomorrow"
