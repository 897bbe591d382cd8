"""A run begins with the weights of any folder: its shape and tokenizer if asked, never its learning rate or step."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from forgather.cli.main import main
from forgather.conversion import starting_weights
from forgather.conversion.model_folder import ModelFolder, tokenizer_in
from forgather.conversion.starting_weights import StartingWeights
from forgather.conversion.weight_sources import WeightSource, open_weights
from forgather.distributed.collectives import rank
from forgather.errors import CheckpointError, DistributedError, ForgatherError, ModelError
from tests.checkpoint.test_train_crash import CONFIG
from tests.conversion.small_llama import llama
from tests.conversion.test_export import flip_a_byte, save_run
from tests.conversion.test_native import build
from tests.models.example import tokenizer
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def begin(path: str, sharded: bool, **sizes: object) -> dict[str, torch.Tensor]:
    """The weights that a model of another seed has after it was begun with those in `path`."""
    model = llama(seed=7, **sizes)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    weights = dict(model.named_parameters())
    said = StartingWeights(path).load(weights, model.all_tied_weights_keys)
    assert said is not None
    assert path in said
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone() for n, w in weights.items()}


def test_a_hugging_face_folder_and_a_checkpoint_fill_shards(tmp_path: Path, two_ranks: RankPool) -> None:
    source = llama(seed=1)
    source.save_pretrained(tmp_path / "hub", max_shard_size="2KB")
    expected = {name: weight.detach() for name, weight in source.named_parameters()}
    for weights in (begin(str(tmp_path / "hub"), False), *two_ranks.run(begin, str(tmp_path / "hub"), True)):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_conflict_of_shapes_lists_both_on_every_rank(tmp_path: Path, two_ranks: RankPool) -> None:
    llama(seed=1).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError) as raised:
        begin(str(tmp_path / "hub"), False, intermediate_size=48)
    assert "in this run, and in the folder:" in raised.value.message
    there = llama(seed=1).model.layers[0].mlp.gate_proj.weight.shape
    assert f"gate_proj.weight [48, {there[1]}], {list(there)}" in raised.value.message


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    llama(seed=1, num_hidden_layers=1).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"has no value for\n  model\.layers\.1\."):
        begin(str(tmp_path / "hub"), False, num_hidden_layers=2)


def test_a_folder_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    llama(seed=1, num_hidden_layers=2).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"has no place for\n  model\.layers\.1\."):
        begin(str(tmp_path / "hub"), False, num_hidden_layers=1)


def begin_or_say(path: str) -> str:
    """What is wrong with the weights in `path`, for a model in shards."""
    try:
        begin(path, True, tie_word_embeddings=True)
    except ForgatherError as error:
        return error.message
    return ""


@pytest.mark.parametrize("at", [0.0, 1 / 8])
def test_an_altered_byte_is_noticed_where_no_rank_has_a_place_for_all_that_was_saved_in_one_piece(
    tmp_path: Path, two_ranks: RankPool, at: float
) -> None:
    save_run(str(tmp_path / "run"))
    assert two_ranks.run(begin_or_say, str(tmp_path / "run")) == ["", ""]
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    flip_a_byte(step, at=at)
    for said in two_ranks.run(begin_or_say, str(tmp_path / "run")):
        assert said.startswith(f"{step} is damaged: rank-00000.bin was altered where ")


def test_a_place_that_was_altered_is_noticed(tmp_path: Path) -> None:
    """The bytes there may be another weight of the same shape."""
    save_run(str(tmp_path / "run"), num_steps=2)
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    layout = newer / "tensors.json"
    content = layout.read_text()
    layout.write_text(content.replace('"shape": [16, 16]', '"shape": [61, 16]', 1))
    assert layout.stat().st_size == len(content)
    assert open_weights(tmp_path / "run").path == older
    with pytest.raises(CheckpointError, match=r"no checkpoint here is whole: .*tensors\.json: other bytes than were"):
        open_weights(newer)


def begin_beside_a_live_run(path: str) -> str:
    """Which checkpoint a rank begins with, when the run has another one as soon as rank 0 has looked."""
    newest = Path(path) / "checkpoints" / "step-00000002"

    def open_and_save(source: Path) -> WeightSource:
        until = time.monotonic() + 60
        while rank() != 0 and not newest.exists() and time.monotonic() < until:
            time.sleep(0.001)
        opened = open_weights(source)
        if rank() == 0:
            newest.with_name("later").rename(newest)
        return opened

    starting_weights.open_weights = open_and_save
    try:
        model = llama(seed=7, tie_word_embeddings=True)
        weights = dict(model.named_parameters())
        return StartingWeights(path).load(weights, model.all_tied_weights_keys) or "nothing"
    finally:
        starting_weights.open_weights = open_weights


def test_all_ranks_begin_with_one_checkpoint_of_a_run_that_goes_on(tmp_path: Path, two_ranks: RankPool) -> None:
    save_run(str(tmp_path / "run"), num_steps=2)
    first, second = sorted((tmp_path / "run" / "checkpoints").iterdir())
    second.rename(second.with_name("later"))
    said = two_ranks.run(begin_beside_a_live_run, str(tmp_path / "run"))
    assert said == [f"beginning with the weights in {first}"] * 2


def begin_with_folders_that_differ(path: str) -> str:
    starting_weights.open_weights = lambda source: open_weights(source if rank() == 0 else source.parents[1] / "other")
    try:
        begin(path, False)
    except DistributedError as error:
        return str(error)
    finally:
        starting_weights.open_weights = open_weights
    return "begun"


@pytest.mark.parametrize("kind", ["hub", "run"])
def test_ranks_that_see_other_files_under_one_path_are_told(tmp_path: Path, two_ranks: RankPool, kind: str) -> None:
    """As hosts do that have copies of their own."""
    if kind == "hub":
        llama(seed=1).save_pretrained(tmp_path / "hub")
        llama(seed=1, vocab_size=17).save_pretrained(tmp_path / "other")
    else:
        save_run(str(tmp_path / "hub"), tied=False)
        save_run(str(tmp_path / "hub" / "other"), tied=False, seed=2)
    for said in two_ranks.run(begin_with_folders_that_differ, str(tmp_path / "hub")):
        assert "is not the same on all ranks (rank 0: " in said
        assert "fix: let every host have the same files there" in said


def test_no_question_is_asked_about_our_own_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = build(tmp_path / "package", "llama").write()
    found = tokenizer_in(package)
    assert found is not None
    assert found.get_vocab() == tokenizer().get_vocab()
    assert capfd.readouterr() == ("", "")


def test_nothing_to_begin_with_changes_nothing() -> None:
    assert StartingWeights(None).load({}, {}) is None


@pytest.mark.parametrize("dropout", [None, 0.5])
def test_the_shape_is_the_folders_and_the_dropout_the_runs(tmp_path: Path, dropout: float | None) -> None:
    llama(seed=1, attention_dropout=0.2).save_pretrained(tmp_path / "hub")
    model = ModelFolder(tmp_path / "hub", dropout).construct()
    assert model.config.hidden_size == llama(seed=1).config.hidden_size
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.config.attention_dropout == (0.2 if dropout is None else 0.5)
    assert all(layer.self_attn.attention_dropout == model.config.attention_dropout for layer in model.model.layers)


def test_a_dropout_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "vocab_size": 16}')
    with pytest.raises(ModelError, match="names no dropout"):
        ModelFolder(tmp_path, 0.5).construct()


@pytest.mark.training_case(26)
def test_a_folder_without_tokenizer_or_model_is_told(tmp_path: Path) -> None:
    llama(seed=1).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        _ = ModelFolder(tmp_path / "hub").tokenizer
    with pytest.raises(ForgatherError, match="neither a checkpoint nor a run"):
        ModelFolder(tmp_path)


TUNED = (
    CONFIG[: CONFIG.index("letters:")].replace("causal_lm", "fine_tune")
    + "dataset_project:\n  with:\n    sources: !ref sources\n"
)


def test_train_begins_with_a_run_and_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a user types it: shape and tokenizer from the first run, dropout and steps of the second."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "project.yaml").write_text("name: tuning\ndescription: A run begun with another\ndefault: tiny\n")
    (tmp_path / "configs" / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "configs" / "tuned.yaml").write_text(TUNED)
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(str(number * k) for k in range(300)))
    train = ["-p", str(tmp_path), "train", "--device", "cpu", "--threads", "1"]
    assert main([*train, "--steps", "3"]) == 0
    capsys.readouterr()
    first = str(tmp_path / "runs" / "tiny")
    more = ["-t", "tuned", "--init-from", first, "--dropout", "0.4", "--steps", "2", "--warmup", "1"]
    assert main([*train, *more]) == 0
    said = capsys.readouterr()
    assert f"beginning with the weights in {first}" in said.err
    assert "step 1/2" in said.out.replace("  ", " ")
    assert main([*train, *more, "--steps", "3"]) == 0  # goes on with its own, and not with the first run's
    said = capsys.readouterr()
    assert "beginning with" not in said.err
    assert "going on from" in said.err
    (tmp_path / "text" / "0.txt").write_text("A text in which there are letters, too.")
    other = ["model_project.args.model_name=other", "--run-name", "other", "--init-from", first, "--steps", "3"]
    assert main([*train, *other]) == 2
    said = capsys.readouterr()
    assert "the tokenizer in" in said.err
    assert "fix: extend lib:train/fine_tune.yaml" in said.err
