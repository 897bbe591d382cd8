"""What is saved is what transformers and we load, in files of a bounded size, each tied weight once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from forgather.conversion import weights_out
from forgather.errors import CheckpointError
from forgather.ml.no_init_weights import no_init_weights
from forgather.ml.sharded_checkpoint import load_checkpoint, save_checkpoint
from forgather.ml.utils import default_dtype
from tests.conversion.small_llama import EMBEDDING, HEAD, llama


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())


def index_of(folder: Path, kind: str = "model.safetensors") -> dict[str, Any]:
    return json.loads((folder / f"{kind}.index.json").read_text())


@pytest.mark.case(3, 36, 37)
@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [10**9, 2000])
def test_saved_weights_load_here_and_in_transformers(tmp_path: Path, tied: bool, limit: int, safetensors: bool) -> None:
    model = llama(seed=1, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    save_checkpoint(tmp_path, model, max_shard_size=limit, safetensors=safetensors)
    other = llama(seed=2, tie_word_embeddings=tied)
    load_checkpoint(tmp_path, other)
    assert_equal(model, other)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal(model, theirs)
    for loaded in (other, theirs):
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    places = index_of(tmp_path, "model.safetensors" if safetensors else "pytorch_model.bin")["weight_map"]
    assert ((HEAD in places), (EMBEDDING in places)) == (not tied, True)


@pytest.mark.case(38, 39)
@pytest.mark.parametrize("limit", [10**9, 2000])
def test_index_and_files_agree_and_no_file_is_too_large(tmp_path: Path, limit: int) -> None:
    model = llama(tie_word_embeddings=True)
    files = save_checkpoint(tmp_path, model, max_shard_size=limit)
    index = index_of(tmp_path)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert set(files) == set(tmp_path.iterdir())
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(names)
        assert sum(weights[name].nbytes for name in names) <= limit or len(names) == 1
    assert (len(shards) == 1) == (limit == 10**9)
    assert len(shards) == 1 or all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name) for path in shards)


@pytest.mark.case(41)
def test_strict_is_the_default_and_what_is_missing_else_a_warning(tmp_path: Path) -> None:
    model = llama(seed=1, num_hidden_layers=1)
    save_checkpoint(tmp_path, model)
    deeper = llama(seed=2)
    kept = deeper.model.layers[1].mlp.up_proj.weight.clone()
    missing = [name for name in deeper.state_dict() if name.startswith("model.layers.1.")]
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path, deeper)
    assert re.findall(r"^  (model\S*)$", refused.value.message, re.MULTILINE) == missing
    with pytest.warns(UserWarning, match=r"left as they were:\n  model\.layers\.1\."):
        report = load_checkpoint(tmp_path, deeper, strict=False)
    assert list(report.missing) == missing
    assert torch.equal(deeper.model.layers[1].mlp.up_proj.weight, kept)
    assert torch.equal(deeper.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    part = model.model.layers[0]  # and a part of a model takes its own
    torch.save({f"{name}": tensor for name, tensor in part.state_dict().items()} | {"x": kept}, tmp_path / "part.bin")
    assert load_checkpoint(tmp_path / "part.bin", deeper.model.layers[1]).unexpected == ("x",)
    assert_equal(part, deeper.model.layers[1])


@pytest.mark.case(42)
@pytest.mark.parametrize("way", ["meta", "undrawn"])
def test_the_blocks_of_the_documentation(tmp_path: Path, way: str) -> None:
    with default_dtype(torch.bfloat16):
        source = llama(seed=1, tie_word_embeddings=True).eval()
    save_checkpoint(tmp_path, source)
    context = torch.device("meta") if way == "meta" else no_init_weights()
    with context, default_dtype(torch.bfloat16):
        model = AutoModelForCausalLM.from_config(source.config).eval()
    load_checkpoint(tmp_path, model, device="cpu")
    assert_equal(source, model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fresh = llama().model.rotary_emb.inv_freq
    assert fresh.dtype == model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(fresh, model.model.rotary_emb.inv_freq)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(source(ids).logits, model(ids).logits)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("limits", [(10**9, 2000), (2000, 10**9), (2000, 4000), (10**9, 10**9)])
def test_new_weights_replace_the_old_of_whatever_form(tmp_path: Path, limits: tuple[int, int], first: bool) -> None:
    (tmp_path / "notes.bin").write_text("not ours")
    model = llama(seed=2)
    save_checkpoint(tmp_path, llama(seed=1), max_shard_size=limits[0], safetensors=first)
    files = save_checkpoint(tmp_path, model, max_shard_size=limits[1], safetensors=not first)
    assert set(tmp_path.iterdir()) == {tmp_path / "notes.bin", *files}
    other = llama(seed=3)
    load_checkpoint(tmp_path, other)
    assert_equal(model, other)


def test_a_save_that_fails_while_writing_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(seed=1)
    save_checkpoint(tmp_path, model, max_shard_size=2000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_out, "write_index", full)
    with pytest.raises(CheckpointError, match=r"could not write weights into .*: No space left on device"):
        save_checkpoint(tmp_path, llama(seed=2), max_shard_size=2000)
    other = llama(seed=3)
    load_checkpoint(tmp_path, other)
    assert_equal(model, other)
    assert not list(tmp_path.glob(".weights-*"))


def test_a_save_that_is_killed_while_files_take_their_places_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, llama(seed=1), max_shard_size=2000)
    replace, calls = Path.replace, []

    def killed(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, llama(seed=2), max_shard_size=2000)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        load_checkpoint(tmp_path, llama())


def test_config_json_tells_the_dtype_that_was_saved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    save_checkpoint(tmp_path, llama().bfloat16())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_view_of_large_memory_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(10_000, 4)[:4].t())
    save_checkpoint(tmp_path, model, safetensors=False)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 4000
    other = nn.Linear(4, 4, bias=False)
    load_checkpoint(tmp_path, other)
    assert torch.equal(model.weight, other.weight)


def test_a_model_on_meta_has_nothing_to_save(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(CheckpointError, match=r"on the meta device has no values(.|\n)*--device cpu"):
        save_checkpoint(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
