"""Each tiny experiment runs from its config in seconds, and shows what its description says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather.cli.main import main
from forgather.config.project import Project
from forgather.trainers.comparison import Comparison
from forgather.trainers.parity import Plan, build_parts, compare_plans
from tests.docs.pages import ROOT, WRITTEN_BY_RUNS

# Short, and each process of them on one thread.
QUICK = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def project_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments") / "tiny_experiments"
    shutil.copytree(ROOT / "configs" / "tiny_experiments", folder, ignore=shutil.ignore_patterns(*WRITTEN_BY_RUNS))
    return folder


def train(folder: Path, config: str, *words: str, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of the run's record, after `forgather train`."""
    name = name or config.replace("/", "-")
    command = [
        "-p",
        str(folder),
        "-t",
        config,
        "train",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--run-name",
        name,
        *words,
    ]
    assert main(command) == 0
    lines = (folder / "runs" / name / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize(
    "config",
    [
        "baseline",
        "optimizers/muon",
        "optimizers/bf16",
        *(
            pytest.param(config, marks=pytest.mark.soak)
            for config in ("schedules/stable_decay", "optimizers/adafactor", "optimizers/sgd")
        ),
    ],
)
def test_the_loss_falls(config, project_dir):
    of_step = losses(train(project_dir, config))
    assert of_step[40] < of_step[1] - 1.0


def test_accumulation_is_not_seen_in_the_losses(project_dir):
    whole = losses(train(project_dir, "meshes"))
    parts = losses(train(project_dir, "accumulation"))
    assert list(parts) == list(range(1, 21))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-5)


def test_an_interruption_is_not_seen_in_the_losses(project_dir):
    undisturbed = losses(train(project_dir, "checkpointing", name="undisturbed"))
    train(project_dir, "checkpointing", "main.steps=15")
    assert losses(train(project_dir, "checkpointing")) == undisturbed


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.soak), "zbv"])
def test_a_pipeline_is_not_seen_in_the_losses(schedule, project_dir):
    project = Project(project_dir, "schedules/pipelines", args=QUICK | {"pipeline_schedule": schedule})
    plans = [Plan.parse("single"), Plan.parse("pipeline=2")]
    compared = list(compare_plans(project, *plans, steps=3, comparison=Comparison()))
    assert len(compared) == 4
    assert not any(step.beyond for step in compared)


def bytes_kept(project_dir: Path, recompute: str) -> int:
    """What the forwards of a step keep for the backward, parameters and inputs aside."""
    step, model, _, data = build_parts(Project(project_dir, "peak_memory", args=QUICK | {"recompute": recompute}))
    given = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(0, data.take())
    data.close()
    return sum(kept.values())


@pytest.mark.soak  # several runs, measured
def test_recomputing_keeps_less(project_dir):
    everything, blocks = bytes_kept(project_dir, "none"), bytes_kept(project_dir, "full")
    assert blocks < everything / 2
    assert losses(train(project_dir, "peak_memory"))
