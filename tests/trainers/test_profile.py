"""The profiler records the steps that it is told to, and only those."""

import gzip
import io
import json
from pathlib import Path

import pytest

from forgather.errors import ConfigError
from forgather.metrics.console import Console
from forgather.trainers.profile import ProfileWindow
from forgather.trainers.reports import Reports
from tests.trainers.small_run import make_trainer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


def profiled(folder: Path, corpus: Path, total: int, **options) -> tuple[list[str], str]:
    trainer = make_trainer(folder, corpus, steps=total)
    said = io.StringIO()
    window = ProfileWindow(folder / "profile", trainer.meter, Reports(Console(total, said), {}), **options)
    trainer.hooks = type(trainer.hooks)({"profile": window})
    trainer.run()
    trainer.checkpoints.run.close()
    return sorted(path.name for path in (folder / "profile").glob("*")), said.getvalue()


def test_a_window_of_two_steps(tmp_path, corpus):
    files, said = profiled(tmp_path, corpus, 6, first=3, steps=2)
    assert files == ["rank-0.step-00000004.json.gz", "rank-0.step-00000004.txt"]
    assert "profile of steps 3 to 4" in said
    trace = json.loads(gzip.decompress((tmp_path / "profile" / files[0]).read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert len(steps) == 2
    assert "aten::mm" in (tmp_path / "profile" / files[1]).read_text()


def test_a_run_that_ends_within_the_window_leaves_what_it_saw(tmp_path, corpus):
    files, _ = profiled(tmp_path, corpus, 3, first=2, steps=5)
    assert "rank-0.step-00000003.txt" in files


def test_other_ranks_and_windows_that_are_never_reached_leave_nothing(tmp_path, corpus):
    assert profiled(tmp_path / "a", corpus, 3, first=2, ranks=[1])[0] == []
    assert profiled(tmp_path / "b", corpus, 3, first=4)[0] == []


def test_a_window_needs_a_step_before_it(tmp_path, corpus):
    with pytest.raises(ConfigError, match="from step 1 on is not possible"):
        profiled(tmp_path, corpus, 2, first=1)
