"""`forgather checkpoint` on a run that was saved, damaged and left in the middle of a save."""

from pathlib import Path

import pytest

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.cli.main import main
from tests.checkpoint.training import Run

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, each evaluated."""
    training = Run()
    with RunFolder(tmp_path / "run") as folder:
        store = CheckpointStore(folder, Keep(last=9), asynchronous=False)
        for step, loss in LOSSES.items():
            training.step()
            folder.describe("config.yaml", f"lr: {step}\nsteps: 4\n")
            store.save(training.state, step, {"loss": loss})
    return tmp_path / "run"


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip_a_byte(run: Path, step: int) -> None:
    file = checkpoint(run, step) / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_ls_shows_steps_metrics_and_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint(run, 3) / "state.json").unlink()
    (run / "checkpoints" / ".step-00000005.partial").mkdir()
    assert main(["checkpoint", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "3", "4"]
    assert "loss 1" in lines[2]
    assert "damaged: state.json: missing" in lines[3]
    assert lines[5].startswith(".step-00000005.partial is left")


def test_inspect_shows_the_newest_and_its_tensors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run), "--tensors", "q_proj.weight$"]) == 0
    said = capsys.readouterr().out
    assert str(checkpoint(run, 4)) in said
    assert "state of loader" in said
    assert '"consumed": 16' in said
    assert "model/model.layers.0.self_attn.q_proj.weight" in said
    assert "2 of " in said
    assert main(["checkpoint", "inspect", str(run), "--tensors", "("]) == 2
    assert "is no regular expression" in capsys.readouterr().err


def test_verify_reads_all_and_names_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == 4
    flip_a_byte(run, 2)
    assert main(["checkpoint", "verify", str(checkpoint(run, 3))]) == 0
    assert main(["checkpoint", "verify", str(run)]) == 2
    said = capsys.readouterr()
    assert "rank-00000.bin: other bytes than were saved" in said.out
    assert "damaged: step-00000002" in said.err


def test_diff_tells_config_and_tensors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(checkpoint(run, 3)), str(run)]) == 1
    said = capsys.readouterr().out
    assert "lr: 3 -> 4" in said
    assert "steps" not in said
    assert "optimizer/model.norm.weight/exp_avg" in said or "and " in said
    assert main(["checkpoint", "diff", str(run), str(run)]) == 0
    assert "0 have other values" in capsys.readouterr().out


def test_prune_keeps_what_its_rules_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / ".step-00000005.partial").mkdir()
    assert main(["checkpoint", "prune", str(run), "--best", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would remove") == 3
    assert steps(run) == [1, 2, 3, 4]
    assert main(["checkpoint", "prune", str(run), "--best", "1", "--every", "3"]) == 0
    assert steps(run) == [2, 3, 4]
    assert not (run / "checkpoints" / ".step-00000005.partial").exists()
    assert main(["checkpoint", "prune", str(run), "--last", "1"]) == 0
    assert steps(run) == [4]


def test_prune_says_of_damaged_ones_that_they_stay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in LOSSES:
        (checkpoint(run, step) / "state.json").unlink()
    assert main(["checkpoint", "prune", str(run), "--last", "1"]) == 0
    assert capsys.readouterr().out == "kept: none; damaged, which no rule counts or removes: 1, 2, 3, 4\n"
    assert steps(run) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "is not a manifest: it has no digest of its own"),
        ('{"digest": "0", "format": 1}', "was altered: it does not match its own digest"),
        ('{"digest": "0", "format": 99}', "has format 99, and this version of Forgather reads format 1"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(
    run: Path, capsys: pytest.CaptureFixture[str], content: str, why: str
) -> None:
    folder = checkpoint(run, 4)
    (folder / "manifest.json").write_text(content)
    assert main(["checkpoint", "ls", str(run)]) == 0
    is_damage = "99" not in content
    assert capsys.readouterr().out.rstrip().endswith(f"{'damaged: ' if is_damage else '  '}manifest.json {why}")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert f"{folder}: manifest.json {why}\n" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"error: {folder / 'manifest.json'} {why}\n  fix: " in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "not told what to keep"),
        (["--last", "0"], "--last is 0"),
        (["--best", "1", "--metric", "bleu"], "has the metric 'bleu'"),
    ],
)
def test_prune_refuses(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["checkpoint", "prune", str(run), *words]) == 2
    assert said in capsys.readouterr().err
    assert steps(run) == [1, 2, 3, 4]


def test_a_live_run_is_not_pruned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(run):
        assert main(["checkpoint", "prune", str(run), "--last", "1"]) == 2
    assert "is used by a live run" in capsys.readouterr().err


def test_what_is_no_run_is_told_with_the_runs_in_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run.parent)]) == 2
    assert f"name one of the runs in it: {run}" in capsys.readouterr().err
