"""`forgather model construct`: the flags of the brief, what they print and write, and how they fail."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forgather.cli.main import main
from forgather.models.construct import construct

CONFIG = """
extends: lib:models/llama/configs/default.yaml
tokenizer: !singleton:tests.models.example:tokenizer {}
args: {model_name: small, hidden_size: 64, num_hidden_layers: 2, intermediate_size: 96}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "project.yaml").write_text("name: mine\ndefault: small\n")
    (tmp_path / "configs" / "small.yaml").write_text(CONFIG)
    (tmp_path / "configs" / "other.yaml").write_text("main: 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_construct_reports_and_writes_no_weights(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-t", "small", "model", "construct"]) == 0
    printed = capsys.readouterr()
    for expected in ('"hidden_size": 64', "277 tokens", "Model on meta, float32", "2 x PreNormLayer", "total      "):
        assert expected in printed.out
    folder = project / "output_models" / "small"
    assert str(folder) in printed.err
    assert (folder / "modeling.py").exists()
    assert not list(folder.glob("*.safetensors"))


def test_the_flags_of_the_brief_in_its_order(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "-t small model -r --device cpu --dtype bfloat16 --save-checkpoint --safetensors construct -o info.txt"
    assert main(line.split()) == 0
    assert capsys.readouterr().out == ""
    assert "Model on cpu, bfloat16" in (project / "info.txt").read_text()
    folder = project / "output_models" / "small"
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    construct(folder)  # makes the package known, so that the next line needs no trust flag
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_can_be_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "model --device cpu --no-init-weights --attn-implementation eager --output-dir elsewhere construct"
    assert main(line.split()) == 0
    assert "Model on cpu" in capsys.readouterr().out
    assert (project / "elsewhere" / "config.json").exists()


def test_a_stale_package_is_a_note_and_refreshed_by_r(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct"]) == 0
    capsys.readouterr()
    assert main(["model", "construct", "--hidden-size", "128"]) == 0
    printed = capsys.readouterr()
    assert "config.json says hidden_size: 64, the configuration 128" in printed.err
    assert "constructing what is there" in printed.err
    assert printed.out.startswith("Stale: ")
    assert "with -r (--refresh-model)" in printed.err
    assert "Embedding(277, 64)" in printed.out
    assert main(["model", "-r", "construct", "--hidden-size", "128"]) == 0
    assert "Embedding(277, 128)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("model --save-checkpoint construct", "the meta device has no weights", "--device cpu"),
        ("model --save-checkpoint --no-init-weights --device cpu construct", "undefined weights", "--no-init-weights"),
        ("model --dtype float7 construct", "unknown dtype 'float7'", "bfloat16"),
        ("model --device floppy construct", "unknown device 'floppy'", "cpu"),
        (
            "model construct --num-attention-heads 3",
            "hidden_size 64 is not a multiple of num_attention_heads 3: a hidden_size of 60 or 66 would be",
            "",
        ),
        ("model construct --hidden-size many", "hidden", ""),
        ("model construct --attn-implementation guess", "invalid choice: 'guess'", ""),
        ("-t other model construct", "another kind", "-t"),
    ],
)
def test_bad_input(project: Path, capsys: pytest.CaptureFixture[str], line: str, message: str, fix: str) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in re.sub(r"\s+", " ", printed.err)
    assert fix in printed.err.partition("fix:")[2]
    assert not (project / "output_models" / "small").exists()


def test_a_report_that_cannot_be_written(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct", "-o", "nowhere/x"]) == 2
    assert "nowhere/x cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "available", "message", "fix"),
    [
        ("mps", 0, "no MPS device that torch can use", "--device cpu"),
        ("hpu", 0, "no HPU device that torch can use", "--device cpu"),
        ("cuda:7", 2, "there is no cuda:7; cuda devices here: 2", "--device cuda"),
    ],
)
def test_a_device_that_this_machine_lacks(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    available: int,
    message: str,
    fix: str,
) -> None:
    for kind in (torch.mps, torch.cuda):
        monkeypatch.setattr(kind, "is_available", lambda: available > 0)
        monkeypatch.setattr(kind, "device_count", lambda: available)
    assert main(["model", "--device", device, "construct"]) == 2
    printed = capsys.readouterr()
    assert message in re.sub(r"\s+", " ", printed.err)
    assert fix in printed.err.partition("fix:")[2]
