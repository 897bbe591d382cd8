"""`forgather model construct`: the flags of the brief, what they print and write, and how they fail."""

import json
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


@pytest.fixture
def package(project: Path) -> Path:
    return project / "output_models" / "small"


@pytest.mark.case(1)
def test_construct_reports_and_writes_no_weights(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-t", "small", "model", "construct"]) == 0
    printed = capsys.readouterr()
    for expected in (
        '"hidden_size": 64',
        "277 tokens",
        "Model on meta, float32, sdpa attention",
        "2 x PreNormLayer",
        "total      105.41K (105,408)",
        "trainable  105.41K (105,408)",
        "embedding  17.73K (17,728)",
        "2 x 34,944  PreNormLayer",
        "Memory for training, without activations",
    ):
        assert expected in printed.out
    assert f"model package: {package}\n" in printed.err
    written = {path.name for path in package.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "modeling.py",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= written
    assert not list(package.glob("*.safetensors"))


@pytest.mark.case(2)
def test_a_real_device_draws_values_and_writes_no_weights(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--device", "cpu", "construct"]) == 0
    assert "Model on cpu, float32" in capsys.readouterr().out
    assert not list(package.glob("*.safetensors"))
    model = construct(package, "cpu")
    assert all(parameter.isfinite().all() and parameter.any() for parameter in model.parameters())


@pytest.mark.case(3, 9)
def test_the_flags_of_the_brief_in_its_order(project: Path, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "-t small model -r --device cpu --dtype bfloat16 --save-checkpoint --safetensors construct -o info.txt"
    assert main(line.split()) == 0
    assert capsys.readouterr().out == ""
    assert "Model on cpu, bfloat16" in (project / "info.txt").read_text()
    weights = load_file(package / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    drawn = construct(package, "cpu", dtype=torch.bfloat16)  # makes the package known: no trust flag is needed below
    model = AutoModelForCausalLM.from_pretrained(package)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(model(ids).logits, drawn.eval()(ids).logits)


@pytest.mark.case(10)
def test_weights_are_loaded_in_the_dtype_asked_for(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
    line = "model --output-dir other --device cpu --dtype bfloat16 --save-checkpoint construct --load-from-checkpoint"
    assert main([*line.split(), str(package)]) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    before, after = load_file(package / "model.safetensors"), load_file("other/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.bfloat16(), after[name])


def test_weights_are_carried_into_a_rebuilt_model(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
    line = "model -r --device cpu --save-checkpoint --safetensors --no-init-weights --output-dir to/save construct"
    assert main([*line.split(), "--load-from-checkpoint", str(package)]) == 0
    assert (package / "model.safetensors").read_bytes() == Path("to/save/model.safetensors").read_bytes()


def test_what_a_checkpoint_lacks_is_named_and_drawn(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
    wider = "model --device cpu --output-dir other --num-hidden-layers 3 construct --load-from-checkpoint"
    capsys.readouterr()
    assert main([*wider.split(), str(package)]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "model.layers.2.mlp.up_proj.weight" in warning
    assert "model.layers.1.mlp.up_proj.weight" not in warning
    wider = wider.replace("-layers 3", "-layers 9")
    assert main([*wider.split(), str(package), "-r", "--no-init-weights"]) == 2
    message = capsys.readouterr().err.partition("--no-init-weights leaves undefined")[2]
    assert message.count("model.layers.") == 20
    assert re.search(r"\n +and \d+ more\n", message)


def test_a_checkpoint_of_another_shape_is_refused_with_both(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
    line = "model --device cpu --output-dir other --hidden-size 32 construct --load-from-checkpoint"
    assert main([*line.split(), str(package)]) == 2
    assert "model.embed_tokens.weight [277, 64], [277, 32]" in capsys.readouterr().err


def test_weights_can_be_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "model --device cpu --no-init-weights --attn-implementation eager --output-dir elsewhere construct"
    assert main(line.split()) == 0
    assert "Model on cpu, float32, eager attention" in capsys.readouterr().out
    assert (project / "elsewhere" / "config.json").exists()


@pytest.mark.case(5)
def test_a_package_is_kept_with_a_hint_and_rebuilt_by_r(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct"]) == 0
    before = {path: path.stat().st_mtime_ns for path in package.iterdir()}
    capsys.readouterr()
    assert main(["model", "construct"]) == 0
    assert "(as it was; -r regenerates it)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in package.iterdir()} == before
    (package / "mlp.py").write_text((package / "mlp.py").read_text() + "# mine\n")
    assert main(["model", "construct"]) == 0
    printed = capsys.readouterr()
    assert "mlp.py was edited; constructing what is there" in printed.err
    assert main(["model", "-r", "construct"]) == 0
    assert "# mine" not in (package / "mlp.py").read_text()
    assert "(as it was" not in capsys.readouterr().err


def test_a_package_that_was_just_written_is_not_said_to_be_as_it_was(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "made").mkdir()
    assert main(["model", "--output-dir", "made", "construct"]) == 0
    assert f"model package: {project / 'made'}\n" in capsys.readouterr().err
    assert main(["model", "--output-dir", "made", "construct"]) == 0
    assert "(as it was; -r regenerates it)" in capsys.readouterr().err


def test_rules_that_draw_nothing_are_enough_to_load_weights(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("model construct init_rules=null", "model --device cpu construct init_rules=null"):
        assert main(line.split()) == 2
        assert "init_rules is None, not a mapping" in capsys.readouterr().err
    assert main(["model", "--no-init-weights", "construct", "init_rules=null"]) == 0
    capsys.readouterr()
    assert main(["model", "--no-init-weights", "construct", "--explain-init", "init_rules=null"]) == 2
    assert "init_rules is None, not a mapping" in capsys.readouterr().err


def test_a_stale_package_is_told_with_the_difference(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct"]) == 0
    capsys.readouterr()
    assert main(["model", "construct", "--hidden-size", "128"]) == 0
    printed = capsys.readouterr()
    difference = "config.json says hidden_size: 64, the configuration 128"
    assert difference in printed.err
    assert "with -r (--refresh-model)" in printed.err
    assert printed.out.startswith("Stale: ")
    assert difference in printed.out
    assert "Embedding(277, 64)" in printed.out
    assert main(["model", "construct", "--hidden-size", "128", "--json"]) == 0
    assert difference in json.loads(capsys.readouterr().out)["stale"]
    assert main(["model", "-r", "construct", "--hidden-size", "128"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Configuration")
    assert "Embedding(277, 128)" in printed.out


def test_a_stale_package_that_is_damaged_is_an_error(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct"]) == 0
    (package / "attention.py").unlink()
    assert main(["model", "construct"]) == 2
    assert "attention.py is missing; it cannot be constructed" in capsys.readouterr().err


def test_a_refresh_keeps_weights_and_says_when_they_do_not_fit(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "--device", "cpu", "--save-checkpoint", "construct"]) == 0
    weights = (package / "model.safetensors").read_bytes()
    (package / "runs").mkdir()
    (package / "runs" / "precious").write_text("kept")
    capsys.readouterr()
    assert main(["model", "-r", "construct"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["model", "-r", "construct", "--hidden-size", "32"]) == 0
    assert "21 of 21 do not fit" in capsys.readouterr().err
    assert (package / "model.safetensors").read_bytes() == weights
    assert (package / "runs" / "precious").read_text() == "kept"


@pytest.mark.case(7)
def test_sizes_given_as_flags_are_numbers_in_the_package(package: Path) -> None:
    assert main(["model", "--hidden-size", "128", "--num-attention-heads", "4", "construct"]) == 0
    config = json.loads((package / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["head_dim"]) == (128, 4, 32)


def test_the_rule_of_each_parameter_is_explained(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "construct", "--explain-init"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = r"model.layers.{0-1}.mlp.down_proj.weight [64, 96] \.(o|gate|down)_proj\.weight$"
    assert [*expected.split(), "DepthScaledNormal(std=0.02,", "num_layers=2)"] in lines
    assert main(["model", "construct"]) == 0
    assert "Initialization" not in capsys.readouterr().out


def test_a_report_for_programs(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "model --json --explain-init --gradient-checkpointing --device cpu --save-checkpoint construct"
    assert main(line.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["package"], said["stale"]) == (str(package), [])
    assert said["weights"] == [str(package / name) for name in ("model.safetensors", "model.safetensors.index.json")]
    assert said["parameters"]["total"] == sum(block["parameters"] for block in said["parameters"]["blocks"]) == 105408
    assert said["gradient_checkpointing"]
    assert said["config"]["hidden_size"] == 64
    assert said["tokenizer"]["tokens"] == 277
    assert said["modules"]["model.layers.1.mlp"] == "GatedMLP"
    assert {"dtype": "bfloat16", "optimizer": "AdamW", "total": 8 * 105408}.items() <= said["training_memory_bytes"][
        -1
    ].items()
    assert len(said["initialization"]) == len(load_file(package / "model.safetensors"))


def test_a_fused_optimizer_needs_memory_for_one_gradient(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, gradients in (([], 4 * 105408), (["--fuse-optim-with-backward"], 4 * 277 * 64)):
        assert main(["model", "--json", *flag, "construct"]) == 0
        assert json.loads(capsys.readouterr().out)["training_memory_bytes"][0]["gradients"] == gradients


def test_a_model_that_knows_no_sdpa_is_eager_unless_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace("llama", "gemma3").replace("{model_name", "{attn_logit_softcapping: 20.0, model_name")
    (project / "configs" / "capped.yaml").write_text(text)
    line = ["-t", "capped", "model", "--device", "cpu"]
    assert main([*line, "test", "--sequence-length", "8"]) == 0
    assert "float32, eager attention" in capsys.readouterr().out
    assert main([*line, "--attn-implementation", "sdpa", "construct"]) == 2
    assert "soft-cap" in capsys.readouterr().err


@pytest.mark.case(4, 6, 8)
@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("model --save-checkpoint construct", "--save-checkpoint: a model on the meta device", "--device cpu"),
        ("model --load-from-checkpoint x construct", "--load-from-checkpoint: a model on the meta", "--device cpu"),
        ("model --device cpu --load-from-checkpoint nowhere construct", "nowhere is not there", ""),
        ("model --save-checkpoint --no-init-weights --device cpu construct", "undefined weights", "--no-init-weights"),
        ("model --dtype float7 construct", "unknown dtype 'float7'", "bfloat16"),
        ("model --dtype nn construct", "unknown dtype 'nn'", "bfloat16"),
        ("model --dtype int8 construct", "parameters cannot be int8", "bfloat16"),
        ("model --device floppy construct", "unknown device 'floppy'", "cpu"),
        (
            "model construct --num-attention-heads 3",
            "hidden_size 64 is not a multiple of num_attention_heads 3: a hidden_size of 60 or 66 would be",
            "",
        ),
        ("model construct --num-key-value-heads 3", "num_attention_heads 4 is not a multiple of", ""),
        ('model construct --rope-parameters {"rope_type":"guess"}', "unknown rope_type 'guess'", ""),
        ('model construct --rope-parameters {"rope_type":"linear"}', "rope_type 'linear' needs factor", ""),
        ('model construct --rope-parameters {"rope_theta":"x"}', "are not the numbers of 'default'", ""),
        ("model construct --rope-parameters [1]", "error: rope_parameters is [1], not a mapping", "rope_theta"),
        ("model construct --rope-parameters foo", "error: rope_parameters is 'foo', not a mapping", "rope_theta"),
        ('model construct --rope-parameters {"rope_thet":3}', "no rope_thet; did you mean rope_theta?", ""),
        ("model construct --hidden-size many", "hidden", ""),
        ("model construct hf_config.hidden_size=abc", "no model can be made of the values in hf_config: ", "integers"),
        ("model construct hf_config.hidden_size=-8", "negative dimension -8", "integers"),
        (
            "model construct hf_config.num_hidden_layers=x",
            "no model can be made of the values in hf_config",
            "integers",
        ),
        ("model construct hf_config.vocab_size=10", "vocab_size 10 has no row for every token", "277 or more"),
        ("model construct --output-dir=", "--output-dir is empty", "--output-dir ./mine"),
        ("model construct --output-dir .", "is no folder of a model: it holds configs, project.yaml", "--output-dir"),
        ("model construct --model-name=", "'' is no model name", "--model-name"),
        ("model construct --model-name a/../../b", "'a/../../b' is no model name", "--model-name"),
        ("model construct --output-dir /proc/x", "cannot write the model package /proc/x", "--output-dir"),
        ("model construct --attn-implementation guess", "invalid choice: 'guess'", ""),
        ("model construct --steps 3", "--steps is a flag of `forgather model test`", ""),
        ("-t other model construct", "another kind", "-t"),
        ("model construct -o nowhere/x", "nowhere/x cannot be written: its folder is not there", "name a file"),
        ("model construct -e", "there is no terminal", "-o FILE"),
    ],
)
def test_bad_input(project: Path, capsys: pytest.CaptureFixture[str], line: str, message: str, fix: str) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in re.sub(r"\s+", " ", printed.err)
    assert fix in printed.err.partition("fix:")[2]
    assert not (project / "output_models" / "small").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp16", "float16"), ("bf16", "bfloat16"), ("torch.float64", "float64"), ("half", "float16"), ("fp32", "float32")],
)
def test_names_of_dtypes(project: Path, capsys: pytest.CaptureFixture[str], name: str, dtype: str) -> None:
    assert main(["model", "--dtype", name, "construct"]) == 0
    assert f"Model on meta, {dtype}," in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_flash_attention_without_a_gpu(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--attn-implementation", "flash_attention_2", "construct"]) == 2
    printed = capsys.readouterr()
    assert "flash_attention_2 needs a CUDA GPU" in printed.err
    assert "--attn-implementation sdpa" in printed.err


def test_flash_attention_without_its_library(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("forgather.models.attention_support.is_flash_attn_2_available", lambda: False)
    assert main(["model", "--attn-implementation", "flash_attention_2", "construct"]) == 2
    assert "pip install flash-attn" in capsys.readouterr().err


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
