"""Every command line that the documentation of models promises runs in a model project, as it was written.

Names in capitals stand for files of the project here. Lines for CUDA run as written where there is a GPU, and
everywhere with the CPU in its place.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from forgather.cli.main import main
from tests.models.example import tokenizer

LINES = [
    "forgather -t CONFIG_NAME model construct",
    "forgather -t CONFIG_NAME model --device cpu construct",
    "forgather -t CONFIG_NAME model --device cuda construct",
    "forgather -t CONFIG_NAME model --device cpu --dtype bfloat16 construct",
    "forgather -t CONFIG_NAME model --device cpu --no-init-weights construct",
    "forgather -t CONFIG_NAME model -r construct",
    "forgather -t CONFIG_NAME model --device cpu --save-checkpoint construct",
    "forgather -t CONFIG_NAME model --device cpu --save-checkpoint --safetensors construct",
    "forgather -t CONFIG_NAME model --device cpu --load-from-checkpoint CHECKPOINT_PATH construct",
    "forgather -t CONFIG_NAME model -r --device cpu --save-checkpoint --safetensors"
    " --load-from-checkpoint CHECKPOINT_PATH construct",
    "forgather -t CONFIG_NAME model -r --device cpu --save-checkpoint --safetensors"
    " --no-init-weights --output-dir path/to/save --load-from-checkpoint CHECKPOINT_PATH construct",
    "forgather -t CONFIG_NAME model construct -o model_info.txt",
    "forgather -t CONFIG_NAME model construct -e",
    "forgather -t CONFIG_NAME model --device cuda test",
    "forgather -t CONFIG_NAME model --device cuda test --batch-size 2 --sequence-length 512 --steps 5",
    "forgather -t CONFIG_NAME model --device cuda --load-from-checkpoint CHECKPOINT_PATH"
    " test --batch-size 4 --sequence-length 4096 --steps 10"
    " --dataset-project DATASET_PROJECT --dataset-config DATASET_CONFIG",
    "forgather model --help",
    "forgather model test --help",
]
CONFIG = """
extends: lib:models/llama/configs/default.yaml
tokenizer: !singleton:tests.models.example:tokenizer {}
args: {model_name: small, hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48}
"""
DATASET = """
extends: lib:datasets/local_text/configs/default.yaml
args: {text_path: "${join(project.dir, 'texts')}", validation_fraction: 0.2, processes: 1}
"""
NAMES = {
    "CONFIG_NAME": "small",
    "CHECKPOINT_PATH": "trained",
    "DATASET_PROJECT": "dataset",
    "DATASET_CONFIG": "texts",
}


def other_tokenizer() -> PreTrainedTokenizerFast:
    other = tokenizer()
    other.add_tokens(["another"])
    return other


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model project that is the working directory, with a dataset project and trained weights in it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "project.yaml").write_text("name: mine\ndefault: small\n")
    (tmp_path / "configs" / "small.yaml").write_text(CONFIG)
    texts = tmp_path / "dataset" / "texts"
    texts.mkdir(parents=True)
    for number in range(5):
        (texts / f"{number}.txt").write_text(f"the hat number {number} was there then. " * 20)
    (tmp_path / "dataset" / "configs").mkdir()
    (tmp_path / "dataset" / "project.yaml").write_text("name: dataset\ndefault: texts\n")
    (tmp_path / "dataset" / "configs" / "texts.yaml").write_text(DATASET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], SimpleNamespace]:
    """Runs a line of words in the project; its code, out and err."""

    def run(line: str) -> SimpleNamespace:
        for name, value in NAMES.items():
            line = line.replace(name, value)
        if "trained" in line and not (project / "trained").exists():
            assert main(["model", "--output-dir", "trained", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
            capsys.readouterr()
        program, *words = shlex.split(line)
        assert program == "forgather"
        code = main(words)
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run


def use_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have a terminal, and an editor that copies what it is given to a file, which is returned.

    Not a fixture: pytest gives each phase of a test streams of its own.
    """
    seen = tmp_path / "seen.txt"
    editor = tmp_path / "editor"
    editor.write_text(f'#!/bin/sh\ncp "$1" "{seen}"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    return seen


@pytest.mark.parametrize("line", LINES)
def test_a_line_runs_as_written(
    line: str, run: Callable[[str], SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = use_terminal(monkeypatch, tmp_path)
    if "cuda" in line and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    done = run(line)
    assert done.code == 0, done.err
    if line.endswith(" -e"):
        assert edited.read_text().startswith("Configuration")
    if line.endswith("-o model_info.txt"):
        assert Path("model_info.txt").read_text().startswith("Configuration")
        assert done.out == ""


@pytest.mark.parametrize("line", [line for line in LINES if "cuda" in line])
def test_a_line_for_cuda_runs_on_a_cpu(line: str, run: Callable[[str], SimpleNamespace]) -> None:
    done = run(line.replace("cuda", "cpu").replace("4096", "128"))
    assert done.code == 0, done.err
    if " test" in line:
        steps = re.findall(r"^step (\d+)  loss \d+\.\d+  grad norm \d", done.out, flags=re.MULTILINE)
        assert [int(step) for step in steps] == list(range(1, 1 + int((re.search(r"--steps (\d+)", line) or "11")[1])))
        assert "test completed: forward and backward work" in done.out


@pytest.mark.parametrize(
    "flag",
    ["--packed", "--lr 0.1", "--attn-implementation eager", "--gradient-checkpointing", "--fuse-optim-with-backward"],
)
@pytest.mark.parametrize("data", ["", "--dataset-project DATASET_PROJECT"])
def test_options_of_the_test(flag: str, data: str, run: Callable[[str], SimpleNamespace]) -> None:
    shape = "--batch-size 2 --sequence-length 32 --steps 2"
    before = run(f"forgather model --device cpu {flag} test {shape} {data}")
    after = run(f"forgather model --device cpu test {shape} {data} {flag}")
    assert (before.code, after.code) == (0, 0), before.err + after.err
    assert re.findall(r"loss \S+", before.out) == re.findall(r"loss \S+", after.out)
    assert before.out.count("logits [2, 32, 277]") == 2


@pytest.mark.parametrize(
    ("words", "given", "inputs"),
    [
        ("", {"lr": 0.01, "fuse": False}, {"input_ids", "labels"}),
        ("--packed --lr 0.3", {"lr": 0.3, "fuse": False}, {"input_ids", "labels", "position_ids"}),
        (
            "--fuse-optim-with-backward --dataset-project dataset",
            {"lr": 0.01, "fuse": True},
            {"input_ids", "labels", "attention_mask"},
        ),
        (
            "--packed --dataset-project dataset",
            {"lr": 0.01, "fuse": False},
            {"input_ids", "labels", "position_ids"},
        ),
    ],
)
def test_what_the_flags_of_the_test_mean(
    words: str,
    given: dict[str, float | bool],
    inputs: set[str],
    run: Callable[[str], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def train(model: object, batches: Iterable[dict[str, torch.Tensor]], **settings: float | bool) -> list[object]:
        seen.append((settings, [{name: tensor.shape for name, tensor in batch.items()} for batch in batches]))
        return []

    monkeypatch.setattr("forgather.trainers.trial.try_training", train)
    assert run(f"forgather model test --batch-size 3 --sequence-length 20 --steps 4 {words}").code == 0
    assert seen == [(given, [dict.fromkeys(inputs, torch.Size([3, 20]))] * 4)]


@pytest.mark.case(11)
def test_the_first_loss_is_that_of_guessing(run: Callable[[str], SimpleNamespace]) -> None:
    done = run("forgather model --device cpu test --steps 3 --batch-size 2 --sequence-length 64")
    lines = done.out.splitlines()
    assert len(lines) == 4
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.out)]
    assert all("logits [2, 64, 277]" in line for line in lines[:3])
    assert abs(losses[0] - (torch.log(torch.tensor(277.0)).item() + 0.5)) < 0.2  # the head's logits have variance 1
    assert lines[3] == "test completed: forward and backward work (3 steps on cpu, float32, sdpa attention)"


@pytest.mark.case(12)
def test_on_meta_a_model_of_any_size_is_tested(run: Callable[[str], SimpleNamespace]) -> None:
    done = run(
        "forgather model --hidden-size 16384 --intermediate-size 65536 --num-hidden-layers 40 test --packed --steps 2"
    )
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "step 1  logits [2, 512, 277]",
        "step 2  logits [2, 512, 277]",
        "test completed: shapes of forward and backward fit (2 steps on meta, float32, sdpa attention)",
    ]


def test_numbers_that_are_not_finite_are_exit_code_1(run: Callable[[str], SimpleNamespace]) -> None:
    for words in ("", "--fuse-optim-with-backward"):
        done = run(f"forgather model --device cpu test --lr 1e30 --steps 4 --sequence-length 8 --json {words}")
        assert done.code == 1
        assert "test failed: loss nan: the first output that is not finite is that of model.layers.0" in done.err
        steps = [json.loads(line) for line in done.out.splitlines()]
        assert len(steps) < 4
        assert steps[-1]["loss"] is None
        assert steps[-1]["problem"].startswith("loss nan")
        assert steps[0]["loss"] > 5


def test_the_weights_that_were_loaded_are_tested(run: Callable[[str], SimpleNamespace], project: Path) -> None:
    plain = run("forgather model --device cpu test --json --sequence-length 16")
    loaded = run("forgather model --device cpu --load-from-checkpoint CHECKPOINT_PATH test --json --sequence-length 16")
    assert json.loads(plain.out)["loss"] == json.loads(loaded.out)["loss"]  # they were drawn from the same seed
    assert "warning" not in loaded.err
    assert not list((project / "output_models" / "small").glob("*.safetensors"))


def test_a_longer_row_than_the_model_has_positions_for_is_said(run: Callable[[str], SimpleNamespace]) -> None:
    done = run("forgather model --max-position-embeddings 16 test --sequence-length 17")
    assert done.code == 0
    assert "--sequence-length 17 is more than the model's max_position_embeddings 16" in done.err


def test_output_of_a_test_goes_to_a_file(run: Callable[[str], SimpleNamespace]) -> None:
    assert run("forgather model -o steps.txt test --steps 2").out == ""
    assert Path("steps.txt").read_text().startswith("step 1  logits [2, 512, 277]\nstep 2")


@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("--device cpu --no-init-weights test", "undefined weights test nothing", "--load-from-checkpoint"),
        ("test --dataset-config texts", "--dataset-config names a config of no project", "--dataset-project"),
        ("test --dataset-project nowhere", "--dataset-project: no folder nowhere", "forgather ls -r"),
        ("test --dataset-project .", "has no target `train`", "forgather ls -r"),
        ("test --dataset-project dataset --dataset-config text", "--dataset-project: ", ""),
        ("test --sequence-length 1", "'1' is not a number of 2 or more", "--help"),
        ("test --steps 0", "'0' is not a number of 1 or more", "--help"),
        ("test --batch-size many", "'many' is not a number of 1 or more", "--help"),
        ("test --lr inf", "'inf' is not a learning rate", "--help"),
        ("test --explain-init", "--explain-init is a flag of `forgather model construct`", ""),
        ("--attn-implementation flex_attention test", "the meta device computes nothing", "--device cuda"),
        ("--device cpu --attn-implementation flex_attention test", "has no backward on a CPU", "sdpa"),
    ],
)
def test_bad_input(line: str, message: str, fix: str, run: Callable[[str], SimpleNamespace], project: Path) -> None:
    done = run(f"forgather model {line}")
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert fix in done.err.partition("fix:")[2]
    assert not (project / "output_models").exists()


def test_a_stale_package_is_not_tested(run: Callable[[str], SimpleNamespace]) -> None:
    assert run("forgather model construct").code == 0
    done = run("forgather model --hidden-size 64 test")
    assert done.code == 2
    assert "config.json says hidden_size: 32, the configuration 64" in done.err
    assert run("forgather model --hidden-size 64 -r test").code == 0


def test_a_dataset_of_another_tokenizer_is_refused(run: Callable[[str], SimpleNamespace], project: Path) -> None:
    config = project / "dataset" / "configs" / "texts.yaml"
    other = "!singleton:tests.models.test_command_lines:other_tokenizer {}"
    config.write_text(f"{config.read_text()}prepared: {{tokenizer: {other}}}\n")
    done = run("forgather model --device cpu test --dataset-project dataset")
    assert done.code == 2
    assert "tokenizer" in done.err
    assert "Traceback" not in done.err


def test_an_editor_opens_the_file_of_o(
    run: Callable[[str], SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = use_terminal(monkeypatch, tmp_path)
    done = run("forgather model -e -o steps.txt test")
    assert done.code == 0, done.err
    assert edited.read_text() == Path("steps.txt").read_text()
    assert "output: steps.txt" in done.err
