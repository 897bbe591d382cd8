"""The record of a run: complete after a kill, single-valued after a resume, written by rank 0 alone."""

import json
import os

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forgather.errors import TrainingError
from forgather.metrics.sinks import JsonLines, TensorBoard, read_rows
from tests.ranks import run_ranks


def record(path, steps, *, resumed_at=0, note=""):
    sink = JsonLines(path)
    sink.start(resumed_at)
    for step in steps:
        sink.write(step, {"loss": step / 10, "note": note})
        if step % 50 == 0:
            sink.write(step, {"loss": step / 10}, kind="evaluation")
    return sink


def test_a_record_begins_with_units_and_has_a_row_for_each_write(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    record(path, [10, 50]).close()
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["kind"] == "header"
    assert header["units"]["tokens_per_s"] == "tokens/s"
    assert [(row["kind"], row["step"], row["loss"]) for row in rows] == [
        ("train", 10, 1.0),
        ("train", 50, 5.0),
        ("evaluation", 50, 5.0),
    ]
    assert all(row["time"] > 1.6e9 for row in rows)


def test_a_row_is_in_the_file_before_the_run_ends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = record(path, [10])
    assert [row["step"] for row in read_rows(path)] == [10]
    sink.close()


def test_a_resume_takes_out_the_rows_that_will_be_made_again_and_keeps_them_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, range(10, 160, 10), note="first").close()
    record(path, range(110, 210, 10), resumed_at=100, note="second").close()
    train = read_rows(path, "train")
    assert [row["step"] for row in train] == list(range(10, 210, 10))
    assert [row["note"] for row in train] == ["first"] * 10 + ["second"] * 10
    assert [row["step"] for row in read_rows(path, "evaluation")] == [50, 100, 150, 200]
    aside = read_rows(tmp_path / "metrics.superseded.jsonl")
    assert [(row["kind"], row["step"]) for row in aside] == [
        ("train", 110),
        ("train", 120),
        ("train", 130),
        ("train", 140),
        ("train", 150),
        ("evaluation", 150),
    ]
    assert sum(json.loads(line)["kind"] == "header" for line in path.read_text().splitlines()) == 1


def test_a_row_cut_short_by_a_kill_is_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, [10, 20]).close()
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 3')
    assert [row["step"] for row in read_rows(path)] == [10, 20]
    record(path, [30], resumed_at=20).close()
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 10, 20, 30]
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"kind": "train", "step": 3\n'


@pytest.mark.training_case(40)
@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}', [1, 2]),
        ('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr', [1, 2]),
        ("", []),
        ("[", []),
        ("no JSON\n\x00\x00", []),
        ('{"kind": "train"}\n', []),
    ],
)
def test_what_a_kill_has_left_is_read_as_far_as_it_goes(tmp_path, text, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert [row["step"] for row in read_rows(path)] == steps


@pytest.mark.training_case(41)
def test_a_resume_at_20_keeps_10_and_20(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, [10, 20, 30, 40]).close()
    record(path, [21], resumed_at=20).close()
    assert [row["step"] for row in read_rows(path, "train")] == [10, 20, 21]


@pytest.mark.training_case(42)
def test_tensorboard_goes_on_in_a_folder_that_is_gone(tmp_path):
    sink = TensorBoard(tmp_path / "gone")
    sink.start(500)
    sink.write(510, {"loss": 1.0})
    sink.close()
    assert scalars(tmp_path / "gone", "train/loss") == [(510, 1.0)]


def test_a_run_that_starts_again_from_nothing_keeps_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, [0, 10], note="first").close()
    record(path, [0, 10], note="second").close()
    assert [(row["step"], row["note"]) for row in read_rows(path, "train")] == [(0, "second"), (10, "second")]


def test_a_resume_with_nothing_to_take_out_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, [10, 100]).close()
    before = path.stat().st_ino
    record(path, [], resumed_at=100).close()
    assert path.stat().st_ino == before
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


@pytest.mark.training_case(43)
def test_zero_is_written_and_a_number_that_is_none_is_spelt(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.start(0)
    sink.write(1, {"loss": 0.0, "grad_norm": float("nan"), "a": float("inf"), "b": -float("inf")})
    sink.close()
    (row,) = read_rows(path)
    assert (row["loss"], row["grad_norm"], row["a"], row["b"]) == (0.0, "NaN", "Infinity", "-Infinity")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl.*\n.*fix"):
        JsonLines(blocked / "metrics.jsonl").start(0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
def test_a_full_disk_is_an_error_that_names_the_file():
    sink = JsonLines("/dev/full")
    with pytest.raises(TrainingError, match=r"/dev/full: No space left"):
        sink.start(1)


def scalars(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, round(event.value, 4)) for event in accumulator.Scalars(tag)]


@pytest.mark.training_case(42, 43)
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    for steps, resumed_at, value in (([50, 100, 150], 0, 1.0), ([150, 200], 100, 2.0)):
        sink = TensorBoard(tmp_path)
        sink.start(resumed_at)
        for step in steps:
            sink.write(step, {"loss": value, "grad_norm": 0.0})
        sink.write(steps[-1], {"text": "once upon"}, kind="sample")
        sink.close()
    assert scalars(tmp_path, "train/loss") == [(50, 1.0), (100, 1.0), (150, 2.0), (200, 2.0)]
    assert len(scalars(tmp_path, "train/grad_norm")) == 4  # an exact zero is a value


def write_on_a_rank(folder: str) -> None:
    for sink in (JsonLines(f"{folder}/metrics.jsonl"), TensorBoard(f"{folder}/events")):
        sink.start(0)
        sink.write(1, {"loss": float(dist.get_rank())})
        sink.close()


def test_only_rank_0_writes(tmp_path):
    run_ranks(2, write_on_a_rank, str(tmp_path))
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.0]
    assert scalars(tmp_path / "events", "train/loss") == [(1, 0.0)]
