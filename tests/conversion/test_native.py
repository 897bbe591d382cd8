"""A native export is a model of transformers' own, or it is refused with the reason and nothing is left of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from forgather import Project
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.cli.main import main
from forgather.conversion import native as module
from forgather.conversion.export import export
from forgather.conversion.weight_sources import open_weights
from forgather.conversion.weights_out import save_weights
from forgather.errors import EXIT_OK, EXIT_USER, CheckpointError, ModelError
from forgather.models.construct import construct
from forgather.models.package import Package
from tests.models.example import tokenizer

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
}


def build(folder: Path, project: str, words: tuple[str, ...] = (), **args: Any) -> Package:
    """A package of a shipped project, with sizes for tests."""
    arguments = {"model_name": folder.name, "output_dir": folder, **SIZES, **args}
    package: Package = Project(f"lib:models/{project}", args=arguments, words=words).build(
        "package", given={"tokenizer": tokenizer()}
    )
    return package


def with_weights(package: Package) -> PreTrainedModel:
    """Its model, whose weights are saved beside it."""
    model = package.construct("cpu", attn_implementation="eager").eval()
    save_weights(model, package.dir)
    return model


def save_run(folder: Path, package: Package, num_steps: int = 1) -> PreTrainedModel:
    """A run of the model, trained by a few steps; returns the model as its last checkpoint holds it."""
    model = package.construct("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with RunFolder(folder) as opened:
        opened.describe("package", package.dir)
        store = CheckpointStore(opened, asynchronous=False)
        for step in range(1, num_steps + 1):
            input_ids = torch.arange(8)[None]
            model(input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            store.save(TrainState(model, optimizer, {}), step)
    return model.eval()


def require_same(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Whoever has only transformers loads what the package computes; returns what was loaded."""
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert type(loaded).__module__.startswith("transformers.models.")
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)
    return loaded


@pytest.mark.parametrize(
    ("project", "args"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"sliding_window": 16}),
        ("qwen3", {}),
        ("gemma3", {"sliding_window": 16, "sliding_window_pattern": 2, "head_dim": 8}),
        ("gpt2", {}),
    ],
)
def test_what_a_project_makes_is_a_model_of_transformers(tmp_path: Path, project: str, args: dict[str, Any]) -> None:
    model = with_weights(build(tmp_path / "package", project, **args))
    export(tmp_path / "package", tmp_path / "native", native=True, max_shard_bytes=20_000)
    require_same(tmp_path / "native", model)
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not {name for name in names if name.endswith(".py") or name == "forgather_package.json"}


def test_from_a_run_and_from_one_checkpoint_of_it(tmp_path: Path) -> None:
    package = build(tmp_path / "package", "gpt2", attention_dropout=0.0, dropout=0.0)
    package.write()
    model = save_run(tmp_path / "run", package, num_steps=2)
    shutil.rmtree(package.dir)
    export(tmp_path / "run", tmp_path / "native", native=True, max_shard_bytes=9_000)
    newest = require_same(tmp_path / "native", model)
    export(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "first", native=True)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert not torch.equal(first.transformer.wte.weight, newest.transformer.wte.weight)


def test_of_a_run_the_newest_whole_checkpoint_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = build(tmp_path / "package", "llama")
    package.write()
    save_run(tmp_path / "run", package, num_steps=2)
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 8] ^= 1
    file.write_bytes(content)
    export(tmp_path / "run", tmp_path / "native", native=True)
    assert "the newest that is whole" in capsys.readouterr().err
    export(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "first", native=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "first"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dtype_converts_and_is_compared_as_converted(tmp_path: Path) -> None:
    model = with_weights(build(tmp_path / "package", "llama"))
    export(tmp_path / "package", tmp_path / "native", native=True, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name], weight.bfloat16()) for name, weight in model.state_dict().items())


INEXPRESSIBLE: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {
    "window": ("llama", (), {"sliding_window": 64}, "config.json: sliding_window is 64"),
    "activation": (
        "llama",
        ("_layer.result.mlp.activation=gelu",),
        {},
        r"model\.layers\.\*\.mlp\.\w+ is GELUActivation, and LlamaForCausalLM has SiLUActivation there",
    ),
    "bias": (
        "mistral",
        ("_layer.result.self_attn.bias=true",),
        {},
        r"self_attn\.q_proj\.bias is \[32\], and MistralForCausalLM has None",
    ),
    "dropout": ("llama", ("_layer.result.dropout=0.5",), {}, r"model\.layers\.\*\.dropout.* is .*0\.5, and"),
    "eps": (
        "qwen3",
        ("_layer.result.self_attn.q_norm.eps=0.01",),
        {},
        r"q_norm\.\w+ is 0\.01, and Qwen3ForCausalLM has 1e-06 there",
    ),
    "scale": ("llama", ("_layer.result.self_attn.scaling=0.5",), {}, r"self_attn.scaling is 0\.5, and"),
    "soft-capped scores": ("gemma3", (), {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
    "alibi": ("deepone", (), {}, "names no hf_model_type"),
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_what_transformers_class_cannot_say_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    project, words, args, reason = INEXPRESSIBLE[what]
    with_weights(build(tmp_path / "package", project, words, **args))
    monkeypatch.delattr(module, "write_shards")  # none is called for
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=reason) as raised:
        export(tmp_path / "package", tmp_path / "native", native=True)
    assert "--as package" in str(raised.value.fix)
    assert sorted(tmp_path.iterdir()) == there


def test_a_package_that_computes_something_else_is_not_left(tmp_path: Path) -> None:
    """Its parts look like those of a Llama, and one of them was edited."""
    with_weights(build(tmp_path / "package", "llama"))
    code = tmp_path / "package" / "layer.py"
    assert code.read_text().count("self.mlp(self.post_attention_layernorm(hidden_BLD))") == 1
    code.write_text(
        code.read_text().replace(
            "self.mlp(self.post_attention_layernorm(hidden_BLD))",
            "0.99 * self.mlp(self.post_attention_layernorm(hidden_BLD))",
        )
    )
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"logits differ by up to .* between PackageForCausalLM and LlamaForCausalLM"):
        export(tmp_path / "package", tmp_path / "native", native=True)
    assert sorted(tmp_path.iterdir()) == there


def test_files_that_hold_something_else_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_weights(build(tmp_path / "package", "gpt2"))
    following = module.following

    def swapping(recipes: Any, stream: Any) -> Any:
        return lambda names: (tensor.flip(0) for tensor in following(recipes, stream)(names))

    monkeypatch.setattr(module, "following", swapping)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"logits differ by up to .* between GPT2LMHeadModel and PackageForCausalLM"):
        export(tmp_path / "package", tmp_path / "native", native=True)
    assert sorted(tmp_path.iterdir()) == there


def test_a_package_form_of_a_package_is_a_copy_cut_anew(tmp_path: Path) -> None:
    model = with_weights(build(tmp_path / "package", "deepone"))
    (tmp_path / "package" / "runs").mkdir()
    export(tmp_path / "package", tmp_path / "copy", max_shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "runs" not in names
    assert "forgather_package.json" not in names
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    assert construct(tmp_path / "copy").config.hidden_size == 32


def test_a_tied_weight_that_is_stored_twice_is_written_once(tmp_path: Path) -> None:
    package = build(tmp_path / "package", "llama", tie_word_embeddings=True)
    model = with_weights(package)
    for path in package.dir.glob("model*"):
        if path.suffix != ".py":
            path.unlink()
    torch.save(model.state_dict(), package.dir / "pytorch_model.bin")
    export(package.dir, tmp_path / "native", native=True)
    require_same(tmp_path / "native", model)
    assert "lm_head.weight" not in open_weights(tmp_path / "native").kinds

    weights = model.state_dict()
    torch.save(weights | {"lm_head.weight": 2 * weights["lm_head.weight"]}, package.dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"ties lm_head.weight to model.embed_tokens.weight"):
        export(package.dir, tmp_path / "other", native=True)
    assert not (tmp_path / "other").exists()


def test_sources_that_are_no_package(tmp_path: Path) -> None:
    package = build(tmp_path / "package", "llama")
    package.write()
    with pytest.raises(CheckpointError, match=r"has a config.json and no weights(.|\n)*--save-checkpoint"):
        export(tmp_path / "package", tmp_path / "out", native=True)
    with_weights(package)
    export(tmp_path / "package", tmp_path / "native", native=True)
    with pytest.raises(ModelError, match=r"no model package(.|\n)*forgather import"):
        export(tmp_path / "native", tmp_path / "out", native=True)


def test_weights_that_are_not_the_packages(tmp_path: Path) -> None:
    with_weights(build(tmp_path / "package", "llama"))
    file = tmp_path / "package" / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items() if name != "lm_head.weight"}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        export(tmp_path / "package", tmp_path / "native", native=True)
    assert not (tmp_path / "native").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_weights(build(tmp_path / "package", "llama"))
    package, out = str(tmp_path / "package"), str(tmp_path / "native")
    assert main(["export", package, out, "--as", "native", "--max-shard-size", "40KB"]) == EXIT_OK
    assert "weights in" in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(out)) is LlamaForCausalLM
    with_weights(build(tmp_path / "other", "deepone"))
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "no"), "--as=native"]) == EXIT_USER
    assert "names no hf_model_type" in capsys.readouterr().err
    assert json.loads((tmp_path / "native" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_package_that_is_older_than_what_its_project_reads(tmp_path: Path) -> None:
    with_weights(build(tmp_path / "package", "gemma3"))
    key = "attn_logit_softcapping"
    for name, before, after in (
        ("config.json", f'  "{key}": null,\n', ""),
        ("modeling.py", f"    {key}: Any = None\n", ""),
        ("architecture.py", f"hf_config.{key}", "None"),
    ):
        file = tmp_path / "package" / name
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ModelError, match=r"config.json lacks what the project reads today: .*attn_logit_softcapping"):
        export(tmp_path / "package", tmp_path / "native", native=True)
    assert not (tmp_path / "native").exists()
