"""What was saved on any mesh is what any mesh loads, bit for bit, and what comes next is the same.

Each mesh trains two steps from one seed and saves. Each mesh then loads each of these, saves that again at once, and
makes five more steps: the two checkpoints are equal tensor by tensor, the samples are the same, and so are the losses,
as far as losses on two meshes are.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather.checkpoint.comparison import compare
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.config.project import Project
from forgather.distributed.collectives import gather_objects, sum_ranks
from tests.checkpoint.test_train_crash import CONFIG
from tests.ranks import RankPool

Axes = Mapping[str, int]

MESHES: dict[str, Axes] = {
    "single": {},
    "shard 2": {"shard": 2},
    "replicate 2": {"replicate": 2},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "shard 4": {"shard": 4},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
    "tensor 2 x shard 2": {"tensor": 2, "shard": 2},
    "pipeline 2 x shard 2": {"pipeline": 2, "shard": 2},
    "pipeline 2 x tensor 2 x shard 2": {"pipeline": 2, "tensor": 2, "shard": 2},
}
# Each kind of cut, and two that cut the same dimension.
QUICK = ["single", "shard 2", "tensor 2", "pipeline 2", "tensor 2 x shard 2"]
STEPS_BEFORE, STEPS_AFTER = 2, 5


@dataclass(frozen=True)
class After:
    """What came after a load: losses and samples of each step, over all ranks."""

    losses: list[float]
    samples: list[list[int]]


def ranks_of(axes: Axes) -> int:
    return torch.Size(axes.values()).numel()


def build(project: str, axes: Axes, tied: bool) -> tuple[Any, Any, TrainState]:
    """Step, data and state on a mesh, from the configuration as `forgather train` has it."""
    sizes = {"replicate": 1, "shard": 1, "pipeline": 1, "tensor": 1, **axes}
    words = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    args = {"device": "cpu", "rows_per_step": 8, "rows_per_forward": 2}
    config = "tied" if tied else "tiny"
    session = Project(project, config, args=args, words=words).session({"reports": None})
    model, optimizer, data, step = (session.build(target) for target in ("model", "optimizer", "data", "step"))
    extras = {"data": data, "update": step.update}
    return step, data, TrainState(model, optimizer, extras, session.build("mesh").sizes)


def train(step: Any, data: Any, first: int, count: int) -> After:
    losses, samples = [], []
    for number in range(first, first + count):
        batches = data.take()
        result = step(number, batches)
        losses.append(float(sum_ranks(result.loss_sum.double())))
        everywhere = gather_objects([sample for batch in batches for sample in batch.samples])
        samples.append(sorted({sample for part in everywhere for sample in part}))
    return After(losses, samples)


def save_once(project: str, axes: Axes, tied: bool, folder: str) -> None:
    step, data, state = build(project, axes, tied)
    train(step, data, 0, STEPS_BEFORE)
    with RunFolder(Path(folder)) as run, CheckpointStore(run) as store:
        store.save(state, STEPS_BEFORE)
    data.close()


def load_each(project: str, axes: Axes, tied: bool, sources: list[str], folder: str) -> list[After]:
    """What comes after each of `sources` was loaded on a mesh, and saved again into `folder`."""
    step, data, state = build(project, axes, tied)
    found = []
    for number, source in enumerate(sources):
        with RunFolder(Path(source)) as run, CheckpointStore(run) as store:
            assert store.resume(state) is not None
        with RunFolder(Path(folder) / str(number)) as run, CheckpointStore(run) as store:
            store.save(state, STEPS_BEFORE)
            found.append(train(step, data, STEPS_BEFORE, STEPS_AFTER))
    data.close()
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "configs").mkdir()
    (folder / "project.yaml").write_text("name: matrix\ndescription: A run on many meshes\ndefault: tiny\n")
    small = CONFIG.replace(
        "    attention_dropout: 0.1\n",
        "    hidden_size: 32\n    num_attention_heads: 4\n    num_key_value_heads: 2\n    num_hidden_layers: 4\n"
        "    tie_word_embeddings: {tied}\n    model_name: {name}\n",
    )
    for name, tied in (("tiny", "false"), ("tied", "true")):
        (folder / "configs" / f"{name}.yaml").write_text(small.replace("{tied}", tied).replace("{name}", name))
    (folder / "text").mkdir()
    chance = random.Random(0)
    for number in range(20):
        words = " ".join(f"{chance.randint(0, 99)} plus {chance.randint(0, 99)}." for _ in range(80))
        (folder / "text" / f"{number}.txt").write_text(words)
    return str(folder)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    with ExitStack() as stack:
        yield {size: stack.enter_context(RankPool(size)) for size in (1, 2, 4)}


def require_matrix(
    project: str, pools: dict[int, RankPool], names: list[str], loaders: list[str], tied: bool, folder: Path
) -> None:
    sources = []
    for name in names:
        sources.append(str(folder / "saved" / name))
        pools[ranks_of(MESHES[name])].run(save_once, project, MESHES[name], tied, sources[-1])
    expected: After | None = None
    for name in loaders:
        again = folder / "again" / name
        results = pools[ranks_of(MESHES[name])].run(load_each, project, MESHES[name], tied, sources, str(again))
        for number, source in enumerate(sources):
            step = f"checkpoints/step-{STEPS_BEFORE:08d}"
            found = compare(Path(source) / step, again / str(number) / step)
            # Of random numbers each rank has its own; on another number of ranks there are others.
            differing = [d.name for d in found.differing if not d.name.startswith("random/")]
            where = f"saved on {names[number]}, loaded on {name}"
            assert not differing, (where, differing)
            assert not found.kinds, where
            lost = [n for n in (*found.only_left, *found.only_right) if not n.startswith("random/")]
            assert not lost, (where, lost)
            for result in results:
                after = result[number]
                expected = expected or after
                assert after.samples == expected.samples, where
                assert after.losses == pytest.approx(expected.losses, rel=1e-5), where


@pytest.mark.soak  # half a minute; in every run, test_round_trip.py and test_storage.py
@pytest.mark.training_case(36, 37, 39)
def test_any_mesh_goes_on_with_what_any_mesh_saved(project: str, pools: dict[int, RankPool], tmp_path: Path) -> None:
    require_matrix(project, pools, QUICK, ["single", "pipeline 2", "tensor 2 x shard 2"], True, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("tied", [False, True])
def test_every_mesh_goes_on_with_what_every_mesh_saved(
    project: str, pools: dict[int, RankPool], tmp_path: Path, tied: bool
) -> None:
    with RankPool(8) as eight:
        require_matrix(project, {**pools, 8: eight}, list(MESHES), list(MESHES), tied, tmp_path)
