"""More tokens: ids and rows that were there stay, ties hold, and a folder is either as it was or whole and new."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from forgather.checkpoint.run_folder import RunFolder
from forgather.cli.main import main
from forgather.conversion import vocabulary
from forgather.conversion.token_additions import PADDING, Wish, add, read_wishes
from forgather.conversion.vocabulary import extend_vocabulary
from forgather.conversion.weight_sources import open_weights
from forgather.conversion.weights_out import save_weights
from forgather.errors import CheckpointError, DataError, ModelError
from forgather.models.construct import construct
from tests.models.example import package, tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hugging_face(folder: Path, *, rows: int = 277, pad: bool = False, tied: bool = True, **options: Any) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=rows, num_attention_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder, **options)
    saved = tokenizer()
    if not pad:
        saved.pad_token = None
    saved.save_pretrained(folder)
    return folder


def ours(folder: Path, *, tied: bool = False) -> Path:
    package(folder, tie_word_embeddings=tied).write()
    save_weights(construct(folder, "cpu"), folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    return model.state_dict()


def tokens_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.case(52)
@pytest.mark.parametrize("tied", [True, False])
def test_a_tokenizer_without_padding_gets_it_with_a_row_of_zeros(tmp_path: Path, tied: bool) -> None:
    source = hugging_face(tmp_path / "in", tied=tied)
    assert main(["vocab", str(source), str(tmp_path / "out")]) == 0
    before, after, tokens = weights_of(source), weights_of(tmp_path / "out"), tokens_of(tmp_path / "out")
    assert (tokens.pad_token, tokens.pad_token_id, len(tokens)) == ("[PAD]", 277, 278)
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if name in (EMBEDDING, HEAD):
            assert after[name].shape[0] == 278
            assert not after[name][277].any()
    assert settings_of(tmp_path / "out") | {"transformers_version": ""} == settings_of(source) | {
        "vocab_size": 278,
        "pad_token_id": 277,
        "transformers_version": "",
    }
    assert settings_of(tmp_path / "out", "generation_config.json")["pad_token_id"] == 277


@pytest.mark.case(52)
def test_the_default_token_is_skipped_where_asked(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in")
    assert main(["vocab", str(source), str(tmp_path / "out"), "--skip-default-tokens"]) == 0
    assert tokens_of(tmp_path / "out").get_vocab() == tokens_of(source).get_vocab()
    assert tokens_of(tmp_path / "out").pad_token is None
    assert weights_of(tmp_path / "out")[EMBEDDING].shape[0] == 277


YAML = """
eos_token: "<|im_end|>"
special_tokens: ["<|im_start|>", {token: "<|tool|>", init: "copy:<|bos|>"}]
regular_tokens: [lorem, the]
"""


@pytest.mark.case(53, 54, 36)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [hugging_face, ours])
def test_tokens_of_a_file_are_added_once(tmp_path: Path, make: Callable[..., Path], tied: bool) -> None:
    source = make(tmp_path / "in", tied=tied)
    (tmp_path / "tokens.yaml").write_text(YAML)
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["vocab", str(source), str(once), "--add-tokens", str(tmp_path / "tokens.yaml")]) == 0
    old, tokens, before, after = tokens_of(source), tokens_of(once), weights_of(source), weights_of(once)
    assert tokens.get_vocab() == old.get_vocab() | {
        "<|im_end|>": 277,
        "<|im_start|>": 278,
        "<|tool|>": 279,
        "lorem": 280,
    }
    assert (tokens.eos_token, tokens.eos_token_id) == ("<|im_end|>", 277)
    assert tokens.decode([0, 277, 278, 279, 280], skip_special_tokens=True) == "lorem"
    for name in (EMBEDDING, HEAD):
        assert after[name].shape[0] == 281
        assert torch.equal(after[name][:277], before[name])
        assert torch.equal(after[name][277], before[name][2])
        assert torch.equal(after[name][279], before[name][0])
        mean = before[name].double().mean(dim=0).float()
        assert torch.equal(after[name][278], mean)
        assert torch.equal(after[name][280], mean)
    assert settings_of(once)["eos_token_id"] == 277
    assert GenerationConfig.from_pretrained(once).eos_token_id == [2, 277]
    text = "<|im_start|>that is the hat<|im_end|>"
    assert old.decode(tokens.encode("that is the hat")) == "that is the hat"
    assert tokens.decode(tokens.encode(text)) == text

    assert main(["vocab", str(once), str(twice), "--add-tokens", str(tmp_path / "tokens.yaml")]) == 0
    assert content_of(once) == content_of(twice)


@pytest.mark.case(54)
def test_a_role_that_is_taken_stays_where_only_a_missing_one_is_wanted(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in", pad=True)
    (tmp_path / "tokens.yaml").write_text('pad_token: {token: "[PAD]", if_missing: true}\n')
    result = extend_vocabulary(source, tmp_path / "out", read_wishes(tmp_path / "tokens.yaml"))
    assert not result.changes
    assert tokens_of(tmp_path / "out").pad_token == "<|pad|>"


def test_a_role_moves_to_a_token_that_is_there_without_touching_its_row(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in")
    result = extend_vocabulary(source, tmp_path / "out", [Wish("the", role="eos_token", init="zero")])
    assert result.num_rows == (277, 277)
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    new = tokens_of(source).get_vocab()["the"]
    assert tokens_of(tmp_path / "out").eos_token_id == settings_of(tmp_path / "out")["eos_token_id"] == new
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, new]


def test_a_padded_vocabulary_is_used_up_and_never_shrinks(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in", rows=280)
    wishes = [Wish("<|a|>", init="zero"), Wish("<|b|>")]
    result = extend_vocabulary(source, tmp_path / "out", wishes)
    assert (result.num_tokens, result.num_rows) == ((277, 279), (280, 280))
    before, after = weights_of(source)[EMBEDDING], weights_of(tmp_path / "out")[EMBEDDING]
    assert torch.equal(after[:277], before[:277])
    assert torch.equal(after[279], before[279])
    assert not after[277].any()
    assert torch.equal(after[278], before[:277].double().mean(dim=0).float())  # not of rows without a token
    with pytest.raises(DataError, match=r"279 rows are too few: the model has 280.*never shrinks\n  fix: ask for 280"):
        extend_vocabulary(source, tmp_path / "other", [], num_rows=279)
    with pytest.raises(DataError, match=r"281 rows are too few: .* need 282"):
        extend_vocabulary(source, tmp_path / "other", [Wish(f"<|{n}|>") for n in range(5)], num_rows=281)
    assert extend_vocabulary(source, tmp_path / "more", [], num_rows=281, multiple_of=64).num_rows == (280, 320)
    assert weights_of(tmp_path / "more")[EMBEDDING].shape[0] == 320


def test_files_of_the_trunk_alone_grow_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=277, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2))
    model.transformer.save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    settings = settings_of(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings | {"architectures": ["GPT2LMHeadModel"]}))
    extend_vocabulary(tmp_path / "in", tmp_path / "out", [Wish("<|a|>", init="copy:5")])
    grown = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(grown.transformer.wte.weight[:277], model.transformer.wte.weight)
    assert torch.equal(grown.lm_head.weight[277], model.transformer.wte.weight[5])


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
RENAMED = {
    "gpt_neox": (GPTNeoXConfig, {}, "embed_out.weight"),
    "gpt_neox-tied": (GPTNeoXConfig, {"tie_word_embeddings": True}, "gpt_neox.embed_in.weight"),
    "mixtral": (
        MixtralConfig,
        {"num_key_value_heads": 1, "num_local_experts": 2},
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ),
}


@pytest.mark.parametrize("family", RENAMED)
def test_weights_that_transformers_saves_by_other_names_than_its_modules(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    config, options, stored = RENAMED[family]
    model = AutoModelForCausalLM.from_config(config(vocab_size=277, bos_token_id=0, eos_token_id=2, **SMALL, **options))
    model.save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    assert stored in open_weights(tmp_path / "in").kinds
    extend_vocabulary(tmp_path / "in", tmp_path / "out", [Wish("<|a|>", init="copy:5")])
    before, after = model.state_dict(), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        if len(tensor) == 277:
            assert torch.equal(after[name][277:], tensor[[5]]), name
    assert len([tensor for tensor in after.values() if len(tensor) == 278]) == 2
    assert open_weights(tmp_path / "in").kinds.keys() == open_weights(tmp_path / "out").kinds.keys()


def test_a_head_with_a_bias_grows_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=277, bos_token_id=0, eos_token_id=2, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    extend_vocabulary(tmp_path / "in", tmp_path / "out", [Wish("<|a|>", init="copy:5"), Wish("<|b|>", init="zero")])
    bias = weights_of(tmp_path / "out")["lm_head.bias"]
    assert torch.equal(bias, torch.cat([model.lm_head.bias, model.lm_head.bias[[5]], torch.zeros(1)]))


def test_what_a_token_begins_like_is_checked_also_where_the_token_is_there(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in")
    for init in ("copy:99999", "copy:<|nowhere|>"):
        with pytest.raises(DataError, match=r"'the' shall begin like '.*', which is no token"):
            extend_vocabulary(source, tmp_path / "out", [Wish("the", special=False, init=init)])
    assert not (tmp_path / "out").exists()
    extend_vocabulary(source, tmp_path / "out", [Wish("the", special=False, init="copy:3")])


@pytest.mark.parametrize("source_options", [{}, {"max_shard_size": "4KB"}])
def test_shards_are_read_and_written(tmp_path: Path, source_options: dict[str, Any]) -> None:
    source = hugging_face(tmp_path / "in", tied=False, **source_options)
    extend_vocabulary(source, tmp_path / "out", [PADDING], max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())


def test_of_tied_pickles_one_safetensors_is_made(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in")
    torch.save(AutoModelForCausalLM.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    extend_vocabulary(source, tmp_path / "out", [PADDING])
    assert not list((tmp_path / "out").glob("*.bin"))
    assert HEAD not in open_weights(tmp_path / "out").kinds
    assert weights_of(tmp_path / "out")[HEAD].shape[0] == 278


@pytest.mark.case(55)
@pytest.mark.parametrize("where", [["out"], ["--in-place"], []])
def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    source = hugging_face(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    before = content_of(tmp_path)
    capsys.readouterr()
    assert main(["vocab", str(source), *where, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "added '[PAD]': id 277, row zero, pad_token",
        "tokens: 277 -> 278",
        "rows: 277 -> 278",
        "nothing was written",
    ]
    assert content_of(tmp_path) == before


def test_in_place_nothing_else_in_the_folder_changes(tmp_path: Path) -> None:
    source = ours(tmp_path / "model")
    run = source / "runs" / "one"
    run.mkdir(parents=True)
    (run / "log.txt").write_text("step 1")
    (source / "notes.bin").write_text("mine")
    (source / "link").symlink_to("runs")
    old = weights_of(source)
    before = content_of(source)
    assert main(["vocab", str(source), "--in-place", "--special-token", "<|a|>"]) == 0
    after = content_of(source)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",  # one file needs none
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (source / "link").is_symlink()
    assert torch.equal(weights_of(source)[EMBEDDING][:277], old[EMBEDDING])
    assert package(source).differences() == ["config.json says vocab_size: 278, the configuration 277"]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("model", ".model.lock")]

    inodes = {path.name: path.stat().st_ino for path in source.iterdir()}
    assert main(["vocab", str(source), "--in-place", "--special-token", "<|a|>"]) == 0
    assert {path.name: path.stat().st_ino for path in source.iterdir()} == inodes  # nothing to do is not done


@pytest.mark.parametrize("destination", ["out", None])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str | None
) -> None:
    source = hugging_face(tmp_path / "in")
    before = content_of(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vocabulary, "write_shards", full)
    with pytest.raises(CheckpointError, match=r"could not write .*: No space left on device"):
        extend_vocabulary(source, tmp_path / destination if destination else None, [PADDING])
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    source = hugging_face(tmp_path / "in")
    before = content_of(source)
    rename, calls = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            extend_vocabulary(source, None, [PADDING])
    assert source.exists() == (killed_at == 1)
    extend_vocabulary(source, None, [], dry_run=True)
    assert content_of(source) == before
    assert extend_vocabulary(source, None, [PADDING]).num_rows == (277, 278)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_kill_while_the_old_folder_is_removed_stands_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hugging_face(tmp_path / "in")
    rmtree = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if path.name == ".in.before" and path.exists():
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            extend_vocabulary(source, None, [Wish("<|a|>")])
    assert (tmp_path / ".in.before").exists()
    extend_vocabulary(source, None, [Wish("<|b|>")])
    assert tokens_of(source).convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [277, 278]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_of_two_at_once_in_one_place_neither_loses_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first has read and not yet written: it is refused."""
    source = hugging_face(tmp_path / "in")
    refused = []

    def late(tokenizer: PreTrainedTokenizerBase, wishes: Any) -> Any:
        monkeypatch.setattr(vocabulary, "add", add)
        with pytest.raises(CheckpointError, match="another process is writing"):
            extend_vocabulary(source, None, [Wish("<|b|>")])
        refused.append(wishes)
        return add(tokenizer, wishes)

    monkeypatch.setattr(vocabulary, "add", late)
    extend_vocabulary(source, None, [Wish("<|a|>")])
    assert refused
    extend_vocabulary(source, None, [Wish("<|b|>")])
    assert tokens_of(source).convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [277, 278]


def test_a_folder_with_a_live_run_in_it_is_not_replaced(tmp_path: Path) -> None:
    """What the run saves while its folder is taken along would be lost."""
    source = ours(tmp_path / "model")
    with RunFolder(source / "runs" / "one") as run:
        before = content_of(source)
        with pytest.raises(CheckpointError, match=r"runs/one is used by a live run: process \d+"):
            extend_vocabulary(source, None, [Wish("<|a|>")])
        assert content_of(source) == before
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["model"]
    assert extend_vocabulary(source, None, [Wish("<|a|>")]).num_rows == (277, 278)
    assert run.checkpoints.is_dir()
    RunFolder(run.dir).close()


def with_gaps(folder: Path) -> None:
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 200, "c": 3}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=gaps).save_pretrained(folder)


def of_other_sizes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(settings_of(folder) | {"vocab_size": 300}))


def with_two_heads(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HEAD: 2 * weights[EMBEDDING]}, folder / "model.safetensors", metadata={"format": "pt"})


def with_foreign_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    added = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(settings_of(folder) | added))


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (with_two_heads, ModelError, "ties lm_head.weight to model.embed_tokens.weight, and the two weights differ"),
        (with_gaps, DataError, "would get the id 3, which is that of 'c': the ids have gaps"),
        (of_other_sizes, ModelError, r"is \[277, 16\] in .*, and config.json makes it \[300, 16\]"),
        (with_foreign_code, ModelError, "brings code of its own, which is not run"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "no config.json with weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), DataError, "has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("["), CheckpointError, "config.json cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], said: str
) -> None:
    source = hugging_face(tmp_path / "in")
    spoil(source)
    before = content_of(tmp_path)
    with pytest.raises(error, match=said):
        extend_vocabulary(source, tmp_path / "out", [Wish("<|a|>"), Wish("<|b|>")])
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eos: x", "unknown key 'eos'\n  fix: did you mean eos_token"),
        ("special_tokens: x", "special_tokens is no list"),
        ("special_tokens: [1]", "has 1, which is no token"),
        ("special_tokens: [{token: x, if_missing: true}]", "unknown key 'if_missing'"),
        ("pad_token: {token: x, init: random}", "'x' has an unknown init 'random'"),
        ('pad_token: ""', "a token is empty"),
        ("[]", "holds no mapping"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_file_of_tokens_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tokens.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        read_wishes(tmp_path / "tokens.yaml")


def test_a_token_in_a_role_begins_like_the_one_before_it_unless_told_otherwise() -> None:
    numbered = tokenizer()
    numbered.eos_token = "7"
    seven = numbered.get_vocab()["7"]
    assert seven != 7
    assert add(numbered, [Wish("<|end|>", role="eos_token")]).inits == {277: seven}
    assert add(tokenizer(), [Wish("<|end|>", role="eos_token", init="zero")]).inits == {277: "zero"}
    assert add(tokenizer(), [Wish("<|end|>", role="eos_token", init="copy:0")]).inits == {277: 0}


def test_a_token_to_begin_like_must_be_there() -> None:
    with pytest.raises(DataError, match=r"'<\|a\|>' shall begin like 'nobody', which is no token before it"):
        add(tokenizer(), [Wish("<|a|>", init="copy:nobody")])
    additions = add(tokenizer(), [Wish("<|a|>", init="copy:<|bos|>"), Wish("<|b|>", init="copy:<|a|>")])
    assert additions.inits == {277: 0, 278: 277}


@pytest.mark.parametrize("where", [[], ["out", "--in-place"]])
def test_where_to_write_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: list[str]) -> None:
    assert main(["vocab", str(tmp_path), *where]) == 2
    assert "name OUT, or give --in-place" in capsys.readouterr().err
