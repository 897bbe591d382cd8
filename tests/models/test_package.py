"""The package loads without Forgather, is kept, noticed as stale and rebuilt, and never collides with another."""

import errno
import json
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from forgather.conversion.weights_out import save_weights
from forgather.errors import ModelError
from forgather.models.construct import construct, load_classes
from forgather.models.package import MANIFEST, Package
from forgather.models.parts.initializers import Keep, Normal, Zeros
from tests.models.example import PLAN, SIZES, SOURCE, package, tokenizer
from tests.ranks import RankPool
from tests.test_durable import what_is_done

TOKENS = torch.arange(3, 23).view(2, 10)


def test_the_files_that_the_brief_names(tiny: Package) -> None:
    names = {path.name for path in tiny.dir.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "modeling.py",
        "attention.py",
    }
    assert not [name for name in names if "safetensors" in name or name == "__pycache__"]
    config = json.loads((tiny.dir / "config.json").read_text())
    assert {key: config[key] for key in SIZES} == SIZES
    assert config["architectures"] == ["TinyLlamaForCausalLM"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert json.loads((tiny.dir / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    assert json.loads((tiny.dir / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
    }
    assert tiny.tokenizer.special_tokens_map == AutoTokenizer.from_pretrained(tiny.dir).special_tokens_map
    for source in tiny.dir.glob("*.py"):
        assert "import forgather" not in source.read_text()
        assert "from forgather" not in source.read_text()


def test_plans_and_conventions(tiny: Package) -> None:
    model = tiny.construct()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert list(model._no_split_modules) == ["PreNormLayer"]
    assert model.config.base_model_tp_plan == PLAN["base_model_tp_plan"]
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert model.base_model is model.model
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.generation_config.eos_token_id == 2


def test_from_config_needs_no_trust_flag_once_loaded(tiny: Package) -> None:
    construct(tiny.dir)
    config = AutoConfig.from_pretrained(tiny.dir)
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "TinyLlamaForCausalLM"
    assert type(AutoModel.from_config(config)).__name__ == "TinyLlamaModel"


def test_a_rule_holds_beside_a_parameter_that_keeps_its_own_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    construct(package(folder, source=SOURCE.replace("bias=False", "bias=True ")).write())
    config = AutoConfig.from_pretrained(folder)
    rules = {r"lm_head\.weight": Zeros(), r"lm_head\.bias": Keep(), ".": Normal(std=0.02)}
    monkeypatch.setattr(AutoModelForCausalLM._model_mapping[type(config)], "init_rules", staticmethod(lambda _: rules))
    head = AutoModelForCausalLM.from_config(config).lm_head
    assert not head.weight.any()
    assert 0 < head.bias.abs().max() <= head.in_features**-0.5


@pytest.mark.case(33)
def test_what_keep_cannot_draw_is_an_error_for_from_config_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = construct(package(folder).write())
    for kind in (type(model), type(model.model)):
        monkeypatch.setattr(kind, "init_rules", staticmethod(lambda _: {"norm": Keep(), ".": Normal(std=0.02)}))
    assert torch.equal(type(model)._from_config(model.config).model.norm.weight, torch.ones(64))
    monkeypatch.delattr(type(model.model.norm), "reset_parameters")
    with pytest.raises(ValueError, match=r"Keep needs RMSNorm to have a method reset_parameters"):
        type(model)._from_config(model.config)


def test_the_vocabulary_can_be_resized(tied: Package) -> None:
    model = tied.construct("cpu")
    old = model.lm_head.weight[:277].clone()
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.config.vocab_size == 300
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:277], old)
    assert model.lm_head.weight[277:].std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_weights_are_saved_beside_the_code_and_replaced(folder: Path) -> None:
    built = package(folder)
    saved = built.construct("cpu", seed=3)
    (built.write() / "model-00001-of-00002.safetensors").write_text("older weights")
    files = [path.name for path in save_weights(saved, folder)]
    assert files == ["model.safetensors", "model.safetensors.index.json"]
    assert not list(folder.glob("model-*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert built.differences() == []


def test_the_process_that_has_written_a_package_uses_it_from_there(folder: Path, tmp_path: Path) -> None:
    package(folder).write()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    model.save_pretrained(tmp_path / "copy")  # takes the code along from where it was imported
    assert (tmp_path / "copy" / "modeling.py").read_bytes() == (folder / "modeling.py").read_bytes()


def test_save_pretrained_takes_the_code_along_and_leaves_it_where_it_is(folder: Path, tmp_path: Path) -> None:
    built = package(folder)
    model = built.construct("cpu").eval()
    sources = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    for _ in range(2):
        model.save_pretrained(folder)
    model.config.save_pretrained(f"{folder}/")
    model.save_pretrained(tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        assert {path.name: path.read_bytes() for path in place.glob("*.py")} == sources
        config = json.loads((place / "config.json").read_text())
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling.TinyLlamaForCausalLM"
        loaded = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert built.differences() == []


def test_dtype_and_seed(tiny: Package) -> None:
    model = tiny.construct("cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    one, same, other = (tiny.construct("cpu", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_weights_that_were_saved_in_another_dtype_do_not_decide(folder: Path) -> None:
    built = package(folder)
    save_weights(built.construct("cpu", dtype=torch.bfloat16), folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert built.construct("cpu").dtype == torch.float32


def test_weights_can_be_left_to_whoever_loads_them(tied: Package) -> None:
    model = tied.construct("cpu", seed=None)
    whole = tied.construct("cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model.eval()(TOKENS).logits, whole.eval()(TOKENS).logits)


def test_an_equal_package_is_kept(folder: Path) -> None:
    package(folder).write()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    package(folder).write()
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"hidden_size": 128}, "hidden_size: 64, the configuration 128"), ({"rms_norm_eps": 1e-6}, "rms_norm_eps")],
)
def test_another_package_is_stale_until_refreshed(folder: Path, sizes: dict[str, Any], said: str) -> None:
    package(folder).write()
    (folder / "runs").mkdir()
    (folder / "model.safetensors").write_text("weights")
    other = package(folder, **sizes)
    with pytest.raises(ModelError, match=r"is stale: .*config\.json") as raised:
        other.construct()
    assert said in str(raised.value)
    assert "with -r (--refresh-model)" in str(raised.value.fix)
    other.write(refresh=True)
    assert other.differences() == []
    assert (folder / "runs").is_dir()
    assert (folder / "model.safetensors").read_text() == "weights"
    assert load_classes(folder).config.hidden_size == sizes.get("hidden_size", 64)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny_llama.lock", "tiny_llama"]


def test_a_package_of_another_architecture_is_stale(folder: Path) -> None:
    package(folder).write()
    other = package(folder, source=SOURCE.replace("activation='silu'", "activation='gelu'"))
    assert "architecture.py would be different" in other.differences()


def test_edits_by_hand_are_stale(folder: Path) -> None:
    built = package(folder)
    built.write()
    with (folder / "attention.py").open("a") as file:
        file.write("# mine\n")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 9}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "norm.py").unlink()
    assert built.differences() == [
        "attention.py was edited",
        "norm.py is missing",
        "config.json says num_hidden_layers: 9, the configuration 3",
    ]


@pytest.mark.parametrize("content", [b"", b'{"model_type": ', b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_damaged_files_are_stale(folder: Path, name: str, content: bytes) -> None:
    built = package(folder)
    built.write()
    (folder / name).write_bytes(content)
    assert built.differences() == [f"{name} is damaged"]
    built.write(refresh=True)
    assert built.differences() == []


def test_parts_that_are_no_longer_used_go_with_a_refresh(folder: Path) -> None:
    package(folder).write()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["former.py"] = "0"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "former.py").write_text("")
    with pytest.raises(ModelError, match=r"former\.py is no longer part of it"):
        package(folder).write()
    package(folder).write(refresh=True)
    assert not (folder / "former.py").exists()


@pytest.mark.parametrize("refresh", [False, True])
def test_a_foreign_folder_is_left_alone(folder: Path, refresh: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds config\.json, which Forgather has not written"):
        package(folder).write(refresh)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_folder_with_runs_only_is_used(folder: Path) -> None:
    (folder / "runs").mkdir(parents=True)
    assert package(folder).construct().config.hidden_size == 64


def test_a_folder_of_other_things_is_no_place_for_a_package(folder: Path) -> None:
    (folder / "runs").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"is no folder of a model: it holds notes\.txt\n") as raised:
        package(folder).write()
    assert f"--output-dir {folder / 'tiny_llama'}" in str(raised.value.fix)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "runs"]


def test_weights_that_came_first_and_hidden_files_are_no_hindrance(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".gitignore"):
        (folder / name).write_text("{}")
    assert package(folder).write() == folder


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b c", "/a", "a\\b"])
def test_what_is_no_model_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is no model name") as raised:
        Package(
            name=name, source=SOURCE, init_source="", hf_config=SIZES, tokenizer=tokenizer(), plan=PLAN, dir=tmp_path
        )
    assert "--model-name" in str(raised.value.fix)


def test_an_equal_package_on_a_read_only_disk_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    package(folder).write()
    monkeypatch.setattr("forgather.models.package.FileLock", refused)
    assert package(folder).construct().config.hidden_size == 64
    with pytest.raises(ModelError, match="Read-only file system"):
        package(folder, rms_norm_eps=1e-6).write(refresh=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write the model package") as raised:
        package(tmp_path / "file" / "model").write()
    assert "--output-dir" in str(raised.value.fix)


def test_sizes_that_do_not_fit_leave_no_package(folder: Path) -> None:
    with pytest.raises(ModelError, match="not a multiple"):
        package(folder, num_attention_heads=3).construct()
    assert [path.name for path in folder.parent.iterdir()] == [".tiny_llama.lock"]
    package(folder).write()
    with pytest.raises(ModelError, match="not a multiple"):
        package(folder, num_attention_heads=3).write(refresh=True)
    assert package(folder).differences() == []


def test_the_fix_names_the_sizes_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(ModelError, match="not a multiple") as raised:
        package(folder, num_attention_heads=3).write()
    assert raised.value.fix == "change hidden_size or num_attention_heads"


RULES = """
from forgather.models.parts.initializers import Normal
def rules(hf_config):
    return {}
"""


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("{'proj': Normal(std=1.0)}", r"no initialisation rule for model\.embed_tokens\.weight, "),
        ("{'.': Normal(std=1.0), 'nobody': Normal(std=1.0)}", "rules that match no parameter: nobody"),
        ("None", "init_rules is None, not a mapping"),
        ("{'.': 3}", r"init_rules: \.: 3 is no initializer, it has no fill, needs_whole, may_match_nothing"),
        ("{'(': Normal(std=1.0)}", r"init_rules: '\(' is no regular expression"),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_rules_that_cannot_draw_are_an_error_on_any_device(folder: Path, rules: str, said: str, device: str) -> None:
    built = package(folder, init_source=RULES.format(rules))
    with pytest.raises(ModelError, match=said) as raised:
        built.construct(device)
    assert raised.value.fix
    assert not folder.exists()
    built.construct("meta", seed=None)  # for whoever loads weights
    with pytest.raises(ModelError, match=said):
        built.construct(device)


def test_the_fix_for_a_parameter_without_a_rule_is_a_rule_in_front(folder: Path) -> None:
    with pytest.raises(ModelError) as raised:
        package(folder, init_source=RULES.format("{'proj|embed|head|layernorm': Normal(std=1.0)}")).write()
    assert r"`init_rules: !prepend`, as norm\.weight$: !singleton:" in (raised.value.fix or "")
    assert "docs/reference/model-initialisation.md" in (raised.value.fix or "")


def test_code_that_needs_forgather_is_refused(folder: Path) -> None:
    built = package(folder, source="from forgather.errors import ModelError\n" + SOURCE)
    with pytest.raises(ModelError, match=r"architecture\.py would import forgather\.errors"):
        built.write()
    assert not folder.exists()


def test_two_packages_with_the_same_names_do_not_collide(tmp_path: Path) -> None:
    one = package(tmp_path / "a" / "llama")
    other = package(tmp_path / "b" / "llama", source=SOURCE.replace("activation='silu'", "activation='gelu'"))
    models = [one.construct("cpu"), other.construct("cpu")]
    assert type(models[0]) is not type(models[1])
    for built, model in zip((one, other), models, strict=True):
        config = AutoConfig.from_pretrained(built.dir)
        assert config.model_type == model.config.model_type
        assert type(AutoModelForCausalLM.from_config(config)) is type(model)
        assert model(TOKENS).logits.shape == (2, 10, 277)


def test_a_refreshed_package_is_imported_anew(folder: Path) -> None:
    before = package(folder).construct()
    changed = SOURCE.replace("bias=False", "bias=True ")  # of equal size, within the same second
    package(folder, source=changed).write(refresh=True)
    assert before.lm_head.bias is None
    assert construct(folder).lm_head.bias is not None


def write_with_others(folder: Path) -> str:
    import torch.distributed as dist

    built = package(folder)
    dist.barrier()
    built.write()
    assert built.construct("cpu").lm_head.weight.isfinite().all()
    return built.digest


def test_several_processes_may_write_one_package(folder: Path) -> None:
    with RankPool(3) as pool:
        assert len(set(pool.run(write_with_others, folder))) == 1
    assert package(folder).differences() == []
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny_llama.lock", "tiny_llama"]


def test_a_writer_that_was_killed_leaves_nothing_in_the_way(folder: Path) -> None:
    built = package(folder)
    aside = folder.parent / f".tiny_llama-{built.digest[:16]}.partial"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("half")
    built.write()
    assert built.differences() == []
    assert not aside.exists()


def test_a_package_is_on_the_disk_before_it_has_its_name(folder: Path) -> None:
    built = package(folder)
    with what_is_done() as done:
        built.write()
    at = done.index("> tiny_llama")
    assert {path.name for path in folder.iterdir()} <= set(done[:at])
    assert done[at + 1 :] == [folder.parent.name]


def test_a_refresh_is_on_the_disk_before_its_manifest_has_its_name(folder: Path) -> None:
    package(folder).write()
    changed = package(folder, source=SOURCE.replace("bias=False", "bias=True"))
    with what_is_done() as done:
        changed.write(refresh=True)
    marked, finished = (number for number, name in enumerate(done) if name == f"> {MANIFEST}")
    assert {path.name for path in folder.iterdir()} <= set(done[:marked])
    assert done[marked + 1] == done[finished - 1] == done[finished + 1] == folder.name


@pytest.mark.parametrize("moves", [1, 18, 20])
def test_a_refresh_that_was_killed_is_noticed_by_either(
    folder: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who goes on and by who goes back, also where all that differs is in a file that is not compared."""
    package(folder).write()
    before = package(folder)
    other = package(folder)
    other.tokenizer.chat_template = "{{ other }}"
    moved = count()

    def killed(self: Path, target: Path) -> Path:
        if next(moved) == moves:
            raise KeyboardInterrupt
        return replace(self, target)

    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            other.write(refresh=True)
    assert other.differences() == before.differences() == ["a refresh of it was interrupted"]
    with pytest.raises(ModelError, match="is stale: a refresh of it was interrupted"):
        other.write()
    other.write(refresh=True)
    assert other.differences() == []
    assert (folder / "chat_template.jinja").read_text() == "{{ other }}"


def test_importing_the_package_module_costs_no_torch() -> None:
    code = "import sys, forgather.models.package; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
