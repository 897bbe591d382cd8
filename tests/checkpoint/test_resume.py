"""What a resume prints about what changed."""

from pathlib import Path

from forgather.checkpoint.loading import Checkpoint
from forgather.checkpoint.manifest import Manifest, versions
from forgather.checkpoint.resume import changed_keys, changes

OLD = """
optimizer: !singleton:torch.optim:AdamW
  lr: 0.001
  betas: [0.9, 0.95]
  weight_decay: 0.1
main: !singleton:forgather.trainers.trainer:Trainer
  steps: 100
  step: !ref optimizer
"""
NEW = """
optimizer: !singleton:torch.optim:AdamW
  lr: 0.0005
  betas: [0.9, 0.98]
  eps: 1.0e-8
main: !partial:forgather.trainers.trainer:Trainer
  steps: 100
  step: !ref optimizer
"""


def test_changed_added_and_removed_keys() -> None:
    assert changed_keys(OLD, NEW) == [
        "optimizer.lr: 0.001 -> 0.0005",
        "optimizer.betas[1]: 0.95 -> 0.98",
        "optimizer.eps: added, 1.0e-08",
        "main: '!singleton:forgather.trainers.trainer:Trainer' -> '!partial:forgather.trainers.trainer:Trainer'",
        "optimizer.weight_decay: removed, was 0.1",
    ]


def test_keys_that_changed_in_the_same_way_share_a_line() -> None:
    old = "args: {steps: 100}\nschedule: {steps: 100}\nmain: {steps: 100, every: 10}\n"
    assert changed_keys(old, old.replace("100", "200")) == ["args.steps, schedule.steps, main.steps: 100 -> 200"]


def test_nothing_changed() -> None:
    assert changed_keys(OLD, OLD) == []


def test_ranks_mesh_and_versions(tmp_path: Path) -> None:
    saved = Manifest(step=5, world_size=2, mesh={"pipeline": 1, "shard": 2}, versions=versions() | {"torch": "2.12.0"})
    (tmp_path / "config.yaml").write_text(OLD)
    lines = changes(Checkpoint(tmp_path, saved), config=OLD, world_size=1, mesh={})
    assert lines == [
        "ranks: 2 -> 1",
        "mesh: shard 2 -> one device",
        f"version of torch: 2.12.0 -> {versions()['torch']}",
    ]
