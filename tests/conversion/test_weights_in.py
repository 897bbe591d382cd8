"""Weights come in by name, from all that holds some, and what does not fit is refused before anything is written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from forgather.conversion import weight_sources
from forgather.conversion.weights_in import load_weights, open_weights
from forgather.errors import CheckpointError
from tests.conversion.small_llama import EMBEDDING, HEAD, llama
from tests.conversion.test_export import flip_a_byte, save_run
from tests.ranks import RankPool


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_holds(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


SAVERS: dict[str, Callable[[LlamaForCausalLM, Path], Path]] = {
    "folder": lambda model, path: model.save_pretrained(path) or path,
    "shards": lambda model, path: model.save_pretrained(path, max_shard_size="2KB") or path,
    "index": lambda model, path: (
        model.save_pretrained(path, max_shard_size="2KB") or path / "model.safetensors.index.json"
    ),
    "safetensors": lambda model, path: model.save_pretrained(path) or path / "model.safetensors",
    "bin": lambda model, path: torch.save(model.state_dict(), path.with_suffix(".bin")) or path.with_suffix(".bin"),
    "old bin": lambda model, path: (
        torch.save(model.state_dict(), path.with_suffix(".bin"), _use_new_zipfile_serialization=False)
        or path.with_suffix(".bin")
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SAVERS)
def test_each_form_of_weights_gives_the_very_values(tmp_path: Path, kind: str, tied: bool) -> None:
    source, model = llama(seed=1, tie_word_embeddings=tied), llama(seed=2, tie_word_embeddings=tied)
    report = load_weights(model, SAVERS[kind](source, tmp_path / "saved"))
    assert_holds(model, values(source))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert set(report.loaded) == set(source.state_dict())
    assert report.missing == report.unexpected == ()
    assert report.warning() is None


def save_bin_shards(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    places = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        torch.save({name: tensor.clone()}, folder / f"pytorch_model-{number}.bin")
        places[name] = f"pytorch_model-{number}.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_sharded_pickles_are_read(tmp_path: Path) -> None:
    source, model = llama(seed=1), llama(seed=2)
    save_bin_shards(source, tmp_path / "saved")
    load_weights(model, tmp_path / "saved", strict=True)
    assert_holds(model, values(source))


@pytest.mark.parametrize("part", ["", "checkpoints/step-00000002"])
def test_a_run_and_its_checkpoint_are_read(tmp_path: Path, part: str) -> None:
    weights = save_run(str(tmp_path / "run"), num_steps=2, tied=True)
    model = llama(tie_word_embeddings=True)
    report = load_weights(model, tmp_path / "run" / part, strict=True)
    assert report.path == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert_holds(model, weights)


def test_of_a_run_the_highest_step_that_is_whole_is_read_whatever_the_times_of_files(tmp_path: Path) -> None:
    save_run(str(tmp_path / "run"), num_steps=2)
    first, second = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    (first / "manifest.json").touch()
    assert open_weights(tmp_path / "run").path == second
    (second / "rank-00000.bin").write_bytes(b"")
    assert open_weights(tmp_path / "run").path == first
    (first / "rank-00000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint here is whole: .*step-00000002: rank-00000.bin: 0 bytes"):
        open_weights(tmp_path / "run")


def test_a_checkpoint_of_two_ranks_is_read_whole(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        weights = pool.run(save_run, str(tmp_path / "run"))[0]
    model = llama(tie_word_embeddings=True)
    load_weights(model, tmp_path / "run", strict=True)
    assert_holds(model, weights)


def test_a_changed_byte_of_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    save_run(str(tmp_path / "run"))
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-00000001", at=1 / 8)
    with pytest.raises(CheckpointError, match=r"rank-00000\.bin was altered where model/"):
        load_weights(llama(), tmp_path / "run")


@pytest.mark.case(41)
def test_what_is_missing_keeps_its_value_or_is_an_error(tmp_path: Path) -> None:
    source, model = llama(seed=1), llama(seed=2)
    weights = {name: weight for name, weight in values(source).items() if name != "model.norm.weight"}
    torch.save(weights | {"extra": torch.ones(1)}, tmp_path / "w.bin")
    nn.init.constant_(model.model.norm.weight, 7)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"has no value for\n  model\.norm\.weight\n  fix"):
        load_weights(model, tmp_path / "w.bin", strict=True)
    assert_holds(model, before)
    report = load_weights(model, tmp_path / "w.bin")
    assert_holds(model, weights)
    assert (model.model.norm.weight == 7).all()
    assert report.missing == ("model.norm.weight",)
    assert report.unexpected == ("extra",)
    assert report.warning() == (
        f"not in {tmp_path}/w.bin, and left as they were:\n  model.norm.weight\n"
        f"in {tmp_path}/w.bin, and not in the model:\n  extra"
    )


def test_a_checkpoint_of_other_sizes_is_refused_with_names_and_both_shapes(tmp_path: Path) -> None:
    source, model = llama(intermediate_size=48), llama(seed=2)
    source.save_pretrained(tmp_path)
    before = values(model)
    with pytest.raises(CheckpointError) as refused:
        load_weights(model, tmp_path)
    for layer in (0, 1):
        assert f"model.layers.{layer}.mlp.up_proj.weight [48, 16], [32, 16]" in refused.value.message
        assert f"model.layers.{layer}.mlp.down_proj.weight [16, 48], [16, 32]" in refused.value.message
    assert "self_attn" not in refused.value.message
    assert_holds(model, before)


def test_integers_are_no_weights_of_a_model_of_floats(tmp_path: Path) -> None:
    torch.save({name: weight.to(torch.int8) for name, weight in llama().state_dict().items()}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight torch\.int8, torch\.float32") as refused:
        load_weights(llama(), tmp_path / "w.bin")
    assert "dtype" in str(refused.value.fix)
    assert "sizes" not in str(refused.value)


def test_weights_of_nothing_that_the_model_has_are_refused(tmp_path: Path) -> None:
    torch.save({"bert.encoder": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"no name in common; it holds\n  bert\.encoder"):
        load_weights(llama(), tmp_path / "w.bin")


def test_weights_that_the_model_ties_must_be_equal(tmp_path: Path) -> None:
    untied, tied = llama(tie_word_embeddings=False), llama(tie_word_embeddings=True)
    untied.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"the model ties {EMBEDDING} and {HEAD}, which differ"):
        load_weights(tied, tmp_path)


def test_a_model_that_is_sharded_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "w.bin")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2)
        fully_shard(model)
        with pytest.raises(CheckpointError, match="sharded over ranks"):
            load_weights(model, tmp_path / "w.bin")
    finally:
        torch.distributed.destroy_process_group()


def test_either_name_of_a_tied_weight_is_enough(tmp_path: Path) -> None:
    source, model = llama(seed=1, tie_word_embeddings=True), llama(seed=2, tie_word_embeddings=True)
    torch.save({name: weight for name, weight in values(source).items() if name != EMBEDDING}, tmp_path / "w.bin")
    load_weights(model, tmp_path / "w.bin", strict=True)
    assert_holds(model, values(source))


@pytest.mark.case(10)
def test_values_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    source, model = llama(seed=1), llama(seed=2).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    load_weights(model, tmp_path, strict=True)
    assert_holds(model, {name: weight.bfloat16() for name, weight in values(source).items()})


@pytest.mark.case(36, 42)
def test_a_model_on_meta_gets_memory_ties_and_frequencies(tmp_path: Path) -> None:
    source = llama(seed=1, tie_word_embeddings=True)
    source.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = llama(tie_word_embeddings=True)
    load_weights(model, tmp_path)
    assert_holds(model, values(source))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(model.eval()(ids).logits, source.eval()(ids).logits)


def test_what_is_missing_of_a_model_on_meta_has_no_value_to_keep(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(16)}, tmp_path / "w.bin")
    with torch.device("meta"):
        model = llama()
    with pytest.raises(
        CheckpointError, match=r"has no value for\n  model\.embed_tokens(.|\n)*construct the model on a"
    ):
        load_weights(model, tmp_path / "w.bin")
    assert model.model.norm.weight.is_meta


class Tied(nn.Module):
    """Ties that no transformers method knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight


def test_ties_of_any_module_survive_meta(tmp_path: Path) -> None:
    source = Tied()
    torch.save(source.state_dict(), tmp_path / "w.bin")
    with torch.device("meta"):
        model = Tied()
    load_weights(model, tmp_path / "w.bin")
    assert model.two.weight is model.one.weight
    assert torch.equal(model.one.weight, source.one.weight)


class Runs:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_that_is_not_weights_is_refused_and_nothing_runs(
    tmp_path: Path, save: Callable[[Any, Path], object], nested: bool
) -> None:
    bomb = Runs(tmp_path / "ran")
    save({"model.norm.weight": bomb} if nested else bomb, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="pickle of more than tensors, and was not loaded: nothing that it asks"):
        open_weights(tmp_path / "w.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]


def truncated(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("w.bin", lambda path: path.write_bytes(b""), "is no file of torch.save, or is damaged"),
        ("w.bin", lambda path: path.write_bytes(b"hello world"), "is no file of torch.save, or is damaged"),
        ("w.bin", truncated, "is no file of torch.save, or is damaged"),
        ("w.bin", lambda path: torch.save({"step": 3}, path), "holds other things than named tensors: step"),
        ("w.pt", lambda path: torch.save(torch.ones(1), path), "holds a Tensor, and not tensors by their names"),
        ("w.pt", lambda path: torch.save([1, 2], path), "holds a list, and not tensors by their names"),
        ("w.pt", lambda path: torch.save({"a": torch.ones(1, device="meta")}, path), "other things .*: a"),
        ("w.pt", lambda path: torch.save({"a": torch.ones(2).to_sparse()}, path), "other things .*: a"),
        ("w.safetensors", lambda path: path.write_bytes(b"12345678"), "cannot be read as safetensors"),
        ("w.npz", lambda path: path.write_bytes(b""), "has the name of no weights"),
        ("a.index.json", lambda path: path.write_text("[]"), "is no index of weights"),
        ("a.index.json", lambda path: path.write_text('{"weight_map": {"a": "../x.bin"}}'), "no file beside it"),
        ("a.index.json", lambda path: path.write_text('{"weight_map": {"a": "x.bin"}}'), "not there: x.bin"),
        ("a.index.json", lambda path: path.write_text('{"weight_map": {"a": ".."}}'), r"not there: \.\."),
        ("a.index.json", lambda path: path.write_text("[" * 100_000), "is no index of weights"),
        ("folder", Path.mkdir, "is neither a checkpoint nor a run"),
        ("nothing", lambda path: None, "is not there"),
    ],
)
def test_what_is_no_weights_is_said_to_be_none(
    tmp_path: Path, name: str, write: Callable[[Path], object], said: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=said):
        open_weights(tmp_path / name)


def test_for_a_file_beside_weights_their_folder_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for fix, name in (
        ("name a file that ends in ", "unrelated"),
        (f"name its folder, {tmp_path}, ", "pytorch_model.bin"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError) as error:
            open_weights(tmp_path / "config.json")
        assert (error.value.fix or "").startswith(fix)


def test_an_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    (tmp_path / "i.index.json").write_text('{"weight_map": {"b": "x.bin"}}')
    with pytest.raises(CheckpointError, match=r"names tensors that x\.bin does not hold: b"):
        open_weights(tmp_path / "i.index.json")


def test_reading_sharded_weights_in_their_order_opens_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="10KB")
    source = open_weights(tmp_path)
    opened: list[Path] = []
    real = weight_sources.safe_open
    monkeypatch.setattr(weight_sources, "safe_open", lambda path, **rest: (opened.append(path), real(path, **rest))[1])
    for name in source.kinds:
        assert source.read(name).shape == source.kinds[name].shape
    assert len(opened) == len(set(opened))
    assert len(opened) + 1 >= len(list(tmp_path.glob("*.safetensors"))) == 3
