"""An imported package computes what the model of transformers does, and goes back to it without a bit changed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from forgather.cli.main import main
from forgather.conversion import importing
from forgather.conversion.export import export
from forgather.conversion.families import FAMILIES
from forgather.conversion.importing import import_model
from forgather.errors import EXIT_OK, EXIT_USER, CheckpointError, ForgatherError, ModelError
from tests.conversion.stock_models import LLAMA3, VARIANTS, save_stock

WEIGHTS = "model.safetensors"


def told(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """What the folder's config.json says to the class of `config`."""
    return dict(type(config).from_pretrained(folder).to_dict())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    weights = {name: weight.clone() for name, weight in weights.items()}
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.case(50)
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    family, settings = VARIANTS[variant]
    stock = save_stock(tmp_path / "source", family, **settings)
    made = import_model(tmp_path / "source", tmp_path / "package", max_shard_bytes=20_000)
    assert made.difference is not None
    assert made.num_parameters == stock.num_parameters()

    package = AutoModelForCausalLM.from_pretrained(tmp_path / "package").eval()
    assert type(package) is not type(stock)
    assert not any("inv_freq" in name for name in package.state_dict())
    input_ids = torch.randint(288, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(package(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=1e-5)

    export(tmp_path / "package", tmp_path / "native", native=True)
    assert not list((tmp_path / "native").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "native" / "config.json").read_text())
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(back) is type(stock)
    assert not any(report.values()), report
    before, after = stock.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    assert told(tmp_path / "source", stock.config) == told(tmp_path / "native", stock.config)
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "native" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "native")) == 277


def test_shards_hold_each_weight_once_in_the_dtype_of_the_source(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "source", "gpt2", torch.bfloat16)
    made = import_model(tmp_path / "source", tmp_path / "package", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "package" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.num_bytes == 2 * stock.num_parameters()
    assert json.loads((tmp_path / "package" / "config.json").read_text())["dtype"] == "bfloat16"
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "package" / file, framework="pt") as shard:
            names = list(shard.keys())
            tensors = [shard.get_tensor(name) for name in names]
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        assert sum(tensor.nbytes for tensor in tensors) <= 10_000 or len(names) == 1


def test_dtype_converts_the_weights(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "source", "llama")
    import_model(tmp_path / "source", tmp_path / "package", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "package")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name], weight.bfloat16()) for name, weight in stock.state_dict().items())


def test_a_trunk_with_old_buffers_as_gpt2_was_published(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "source", "gpt2")

    def as_published(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    change_weights(tmp_path / "source", as_published)
    import_model(tmp_path / "source", tmp_path / "package")
    export(tmp_path / "package", tmp_path / "native", native=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "native").state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in stock.state_dict().items())


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    save_stock(tmp_path / "source", "llama", tie_word_embeddings=True)

    def twice(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(tmp_path / "source", twice)
    import_model(tmp_path / "source", tmp_path / "package")
    assert "lm_head.weight" not in load_file(tmp_path / "package" / WEIGHTS)

    change_weights(tmp_path / "source", lambda weights: weights["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match=r"ties lm_head.weight to model.embed_tokens.weight, and .* differ"):
        import_model(tmp_path / "source", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tied_weight_that_is_stored_under_its_other_name(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "source", "llama", tie_word_embeddings=True)
    change_weights(
        tmp_path / "source",
        lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}),
    )
    import_model(tmp_path / "source", tmp_path / "package")
    loaded = load_file(tmp_path / "package" / WEIGHTS)
    assert torch.equal(loaded["model.embed_tokens.weight"], stock.lm_head.weight)
    assert "lm_head.weight" not in loaded


def test_weights_of_torch_save(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "source", "llama")
    (tmp_path / "source" / WEIGHTS).unlink()
    torch.save(stock.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    import_model(tmp_path / "source", tmp_path / "package")
    loaded = load_file(tmp_path / "package" / WEIGHTS)
    assert all(torch.equal(loaded[name], weight) for name, weight in stock.state_dict().items())


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention biases": ("llama", {"attention_bias": True}, "attention_bias is True"),
    "mlp biases": ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    "activation": ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is computed"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "soft-capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "unscaled": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, and only True"),
    "quantized": ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "the weights are quantized"),
    "unknown": ("llama", {"model_type": "falcon"}, r"no project computes a model_type 'falcon'(.|\n)*llama, mistral"),
    "images": ("gemma3", {"model_type": "gemma3"}, "only the text model"),
    "no type": ("llama", {"model_type": None}, "no project computes a model_type None"),
    "wrong": ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers"),
    "rope": ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
}


@pytest.mark.case(51)
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_supported_is_refused_before_the_weights(tmp_path: Path, what: str) -> None:
    family, settings, reason = UNSUPPORTED[what]
    save_stock(tmp_path / "source", family)
    change_json(tmp_path / "source" / "config.json", **settings)
    (tmp_path / "source" / WEIGHTS).write_bytes(b"whoever reads this fails")
    with pytest.raises(ModelError, match=reason) as raised:
        import_model(tmp_path / "source", tmp_path / "below" / "package")
    assert raised.value.fix
    assert names_in(tmp_path) == ["source"]


def test_a_key_that_the_project_has_not_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a newer version of transformers computes with more than this version of the project."""
    save_stock(tmp_path / "source", "llama")
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], kept=frozenset({"use_cache", "pretraining_tp"})))
    with pytest.raises(ModelError, match=r"has no place for: initializer_range is 0\.02") as raised:
        import_model(tmp_path / "source", tmp_path / "package")
    assert raised.value.fix
    assert names_in(tmp_path) == ["source"]


def without_norm(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))


def with_integers(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))


def with_score(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(score=torch.zeros(2)))


def with_other_rows(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=290)


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def with_large_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(20)])
    tokenizer.save_pretrained(folder)


def with_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def with_deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def as_package(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("plain"))
    shutil.rmtree(folder)
    import_model(folder.with_name("plain"), folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_norm, "model.norm.weight is missing"),
        (with_integers, r"model.norm.weight is torch.int8"),
        (with_score, "score is there, and the model has none"),
        (with_other_rows, r"model.embed_tokens.weight gives \[288, 32\], the model has \[290, 32\]"),
        (without_tokenizer, "has no tokenizer"),
        (with_large_tokenizer, r"ids up to 296, and the model only 288 rows"),
        (with_damaged_config, "config.json cannot be read"),
        (with_deep_config, "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
        (as_package, "is a model package already"),
    ],
)
def test_a_source_that_is_not_what_it_says(tmp_path: Path, change: Callable[[Path], None], reason: str) -> None:
    save_stock(tmp_path / "source", "llama")
    change(tmp_path / "source")
    there = names_in(tmp_path)
    with pytest.raises(ForgatherError, match=reason) as raised:
        import_model(tmp_path / "source", tmp_path / "below" / "it" / "package")
    assert raised.value.fix
    assert names_in(tmp_path) == there


def test_a_package_that_would_not_compute_the_same_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_stock(tmp_path / "source", "llama")
    following = importing.following

    def transposing(recipes: Any, stream: Any) -> Any:
        made = following(recipes, stream)
        return lambda names: (
            tensor.t() if "q_proj" in name else tensor for name, tensor in zip(names, made(names), strict=True)
        )

    monkeypatch.setattr(importing, "following", transposing)
    with pytest.raises(ModelError, match=r"logits differ by up to .* between PackageForCausalLM and LlamaForCausalLM"):
        import_model(tmp_path / "source", tmp_path / "package")
    assert names_in(tmp_path) == ["source"]


def test_a_tokenizer_that_changes_as_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_stock(tmp_path / "source", "llama")

    def saved_otherwise(package: Path, *_: Any) -> None:
        change_json(package / "tokenizer.json", normalizer={"type": "Lowercase"})

    monkeypatch.setattr(importing, "write_shards", saved_otherwise)
    with pytest.raises(ModelError, match="once saved, the tokenizer gives other ids"):
        import_model(tmp_path / "source", tmp_path / "package")
    assert names_in(tmp_path) == ["source"]


def test_a_file_that_cannot_be_read_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_stock(tmp_path / "source", "llama")
    gone = tmp_path / "source" / "gone.json"
    monkeypatch.setattr(importing, "write_shards", lambda *_: gone.read_bytes())
    with pytest.raises(CheckpointError, match=r"could not write .*package: No such file or directory \(.*gone.json\)"):
        import_model(tmp_path / "source", tmp_path / "package")
    assert names_in(tmp_path) == ["source"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save_stock(tmp_path / "source", "llama")
    (tmp_path / "package").mkdir()
    with pytest.raises(CheckpointError, match="already there"):
        import_model(tmp_path / "source", tmp_path / "package")


@pytest.mark.case(55)
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_stock(tmp_path / "source", "llama")
    source, out = str(tmp_path / "source"), str(tmp_path / "below" / "package")
    assert main(["import", source, out, "--dry-run"]) == EXIT_OK
    assert "would be llama, 33,952 parameters" in capsys.readouterr().out
    assert names_in(tmp_path) == ["source"]
    assert main(["import", source, out, "--max-shard-size", "40KB", "--dtype", "bf16"]) == EXIT_OK
    assert "logits equal those of transformers within" in capsys.readouterr().out
    assert len(list(Path(out).glob("*.safetensors"))) > 1
    assert main(["import", source, out]) == EXIT_USER
    assert "already there" in capsys.readouterr().err


def test_a_config_as_older_versions_wrote_it(tmp_path: Path) -> None:
    """Frequencies in two keys, sizes that follow from others left out, and keys that no model reads."""
    stock = save_stock(tmp_path / "source", "llama", rope_parameters=LLAMA3, num_key_value_heads=4)
    path = tmp_path / "source" / "config.json"
    old = json.loads(path.read_text())
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "dtype"):
        del old[key]
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old |= {"rope_theta": LLAMA3["rope_theta"], "rope_scaling": scaling, "torch_dtype": "float32", "_flash": True}
    path.write_text(json.dumps(old))
    import_model(tmp_path / "source", tmp_path / "package")
    package = AutoModelForCausalLM.from_pretrained(tmp_path / "package")
    assert package.config.rope_parameters == LLAMA3
    assert package.config.num_key_value_heads == 4
    export(tmp_path / "package", tmp_path / "native", native=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert back.config.rope_parameters == stock.config.rope_parameters
