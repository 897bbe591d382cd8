"""The shipped model projects build, check, and have the parameters they name; their parts can be swapped from YAML."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from forgather import Project
from forgather.cli.size import num_parameters
from forgather.config.files import list_configs, shipped_configs
from forgather.errors import ModelError
from forgather.models.package import Package
from forgather.models.report import count_parameters, report
from tests.models.example import LLAMA, llama_config, tokenizer

SIZES = {"1M": (2000, 1_028_992), "4M": (2000, 4_434_176), "30M": (4000, 30_321_152), "117M": (8000, 119_161_856)}
PROJECTS = sorted(path.parent for path in (shipped_configs() / "models").glob("*/project.yaml"))
CONFIGS = [(project, row.name.removesuffix(".yaml")) for project in PROJECTS for row in list_configs(project)]
ROW = re.compile(r"^\| `(\S+)` \| ([\d,]+) \|", re.MULTILINE)


def build(project: Project) -> Package:
    package = project.build("package", given={"tokenizer": tokenizer()})
    assert isinstance(package, Package)
    return package


def llama(folder: Path, config: str = "default", *, vocab_size: int = 277, **arguments: Any) -> Package:
    overrides = {"hf_config.vocab_size": vocab_size}
    return build(Project(LLAMA, config=config, args={"output_dir": folder / "built", **arguments}, set=overrides))


def child(folder: Path, text: str) -> Project:
    """A project of a user's own, with one config that extends the shipped Llama."""
    (folder / "configs").mkdir()
    (folder / "project.yaml").write_text("name: mine\ndefault: mine\n")
    (folder / "configs" / "mine.yaml").write_text("extends: lib:models/llama/configs/1M.yaml\n" + text)
    return Project(folder)


def rows(project: Path) -> dict[str, int]:
    """Configs and their parameters, as the project's page has them."""
    page = (project / "README.md").read_text()
    return {name: int(count.replace(",", "")) for name, count in ROW.findall(page)}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_the_page_of_a_project_names_each_of_its_configs(project: Path) -> None:
    assert rows(project).keys() == {name for each, name in CONFIGS if each == project}


@pytest.mark.case(1)
@pytest.mark.parametrize(("project", "config"), CONFIGS, ids=[f"{project.name}-{name}" for project, name in CONFIGS])
def test_a_config_has_the_parameters_that_the_page_says(project: Path, config: str) -> None:
    assert num_parameters(Project(project, config)) == rows(project)[config]


def test_names_of_presets_hold() -> None:
    counts = {name: count for name, count in rows(LLAMA.parent / "mypt").items() if "M" in name}
    assert len(counts) == 8
    for name, count in counts.items():
        assert count == pytest.approx(float(name.partition("M")[0]) * 1e6, rel=0.02), name


@pytest.mark.parametrize("config", SIZES)
def test_numbers_of_parameters(tmp_path: Path, config: str) -> None:
    vocab_size, total = SIZES[config]
    project = Project(LLAMA, config=config)
    assert project.argument("model_name") == f"llama_{config.lower()}"
    model = llama(tmp_path, config, vocab_size=vocab_size).construct()
    count = count_parameters(model)
    assert (count.total, count.trainable) == (total, total)
    assert count.embedding == vocab_size * model.config.hidden_size
    assert f"({total:,})" in report(model, tokenizer())


def test_every_token_has_a_row_where_ids_have_gaps(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<end>": 0, "low": 1, "high": 999}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    gaps = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    project = Project(LLAMA, config="1M", args={"output_dir": tmp_path / "built"})
    package = project.build("package", given={"tokenizer": gaps})
    model = package.construct("cpu")
    assert model.get_input_embeddings().num_embeddings == 1000
    assert model(torch.tensor([gaps("low high")["input_ids"]])).logits.shape == (1, 2, 1000)


def test_a_tied_weight_counts_once(tmp_path: Path) -> None:
    model = llama(tmp_path, "4M", vocab_size=2000, tie_word_embeddings=True).construct()
    assert count_parameters(model).total == SIZES["4M"][1] - 2000 * 256
    assert "embedding  512.00K (512,000) (tied to the head)" in report(model, tokenizer())


@pytest.mark.case(7)
def test_declared_parameters_reach_config_json(tmp_path: Path) -> None:
    package = llama(
        tmp_path, hidden_size=128, num_attention_heads=4, sliding_window=16, rope_parameters={"rope_theta": 5e5}
    )
    config = package.construct().config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (128, 4, 4)
    assert (type(config.hidden_size), type(config.num_attention_heads), config.head_dim) == (int, int, 32)
    assert config.sliding_window == 16
    assert config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert config.pad_token_id == 1


@pytest.mark.case(8)
@pytest.mark.parametrize(
    ("project", "sizes", "message"),
    [
        ("llama", {"hidden_size": 130}, "hidden_size 130 is not a multiple of num_attention_heads 4"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("gpt2", {"hidden_size": 130}, "hidden_size 130 is not a multiple of num_attention_heads 4"),
        ("deepone", {"hidden_size": 130}, "hidden_size 130 is not a multiple of num_attention_heads 4"),
        ("llama", {"vocab_size": 276}, "vocab_size 276 has no row for every token: the tokenizer's ids go up to 276"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, project: str, sizes: dict[str, Any], message: str) -> None:
    arguments = {"output_dir": tmp_path / "built", **sizes}
    with pytest.raises(ModelError, match=message):
        build(Project(LLAMA.parent / project, args=arguments)).construct()


@pytest.mark.case(8)
def test_a_head_may_have_channels_of_its_own_number(tmp_path: Path) -> None:
    model = llama(tmp_path, hidden_size=130, head_dim=34).construct()
    assert tuple(model.model.layers[0].self_attn.q_proj.weight.shape) == (4 * 34, 130)


def test_rows_that_no_token_has_yet(tmp_path: Path) -> None:
    package = build(Project(LLAMA, args={"output_dir": tmp_path / "built", "vocab_size": 300}))
    assert package.construct().lm_head.weight.shape[0] == 300


def test_no_two_layers_share_a_module(tmp_path: Path) -> None:
    model = llama(tmp_path).construct()
    modules = [id(module) for module in model.modules()]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert len(set(modules)) == len(names)


def test_weights_are_named_as_in_transformers_llama(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        stock = LlamaForCausalLM(llama_config(num_hidden_layers=4))
    assert set(llama(tmp_path).construct().state_dict()) == set(stock.state_dict())


def test_a_child_swaps_a_part(tmp_path: Path) -> None:
    model = build(child(tmp_path, "_layer: {result: {mlp: {activation: gelu}}}\n")).construct()
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "GELUActivation"


def test_a_child_puts_a_rule_in_front(tmp_path: Path) -> None:
    text = """
init_rules: !prepend
  layers\\.0\\..*up_proj: !singleton:forgather.models.parts.initializers:Zeros {}
"""
    model = build(child(tmp_path, text)).construct("cpu")
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert model.model.layers[1].mlp.up_proj.weight.any()


def test_a_part_in_a_file_that_python_cannot_import_by_name(tmp_path: Path) -> None:
    (tmp_path / "my-mlp.py").write_text("from torch.nn import Identity\n")
    text = "_layer:\n  result:\n    mlp: !factory:../my-mlp.py:Identity {}\n"
    with pytest.raises(ModelError, match=r"my-mlp\.py cannot be part .* no name of a Python module"):
        build(child(tmp_path, text)).construct()


def test_a_child_brings_a_part_of_its_own(tmp_path: Path) -> None:
    text = """
_layer:
  result:
    mlp: !factory:../doubling.py:DoublingMLP
      hidden_size: ${hf_config.hidden_size}
init_rules: !append
  doubling: !singleton:forgather.models.parts.initializers:Keep {}
"""
    (tmp_path / "doubling.py").write_text(
        "from torch import nn\n"
        "from forgather.models.parts.norm import RMSNorm\n\n\n"
        "class DoublingMLP(nn.Module):\n"
        "    def __init__(self, hidden_size):\n"
        "        super().__init__()\n"
        "        self.doubling = nn.Linear(hidden_size, hidden_size)\n"
        "        self.norm = RMSNorm(hidden_size)\n\n"
        "    def forward(self, hidden):\n"
        "        return self.doubling(self.norm(hidden))\n"
    )
    package = build(child(tmp_path, text))
    model = package.construct("cpu")
    assert isinstance(model, PreTrainedModel)
    assert model(torch.arange(8).view(1, 8)).logits.isfinite().all()
    sources = {path.name: path.read_text() for path in package.dir.glob("*.py")}
    assert "from .norm import RMSNorm" in sources["doubling.py"]
    assert "mlp.py" not in sources
    assert str(tmp_path) not in "".join(sources.values())


@pytest.mark.parametrize("mistake", ["nn.Linear(hidden_size, 'wide')", "1 + '1'"])
def test_a_mistake_in_a_part_of_its_own_is_shown_as_that(tmp_path: Path, mistake: str) -> None:
    text = """
_layer:
  result:
    mlp: !factory:../broken.py:BrokenMLP
      hidden_size: ${hf_config.hidden_size}
"""
    (tmp_path / "broken.py").write_text(
        "from torch import nn\n\n\n"
        "class BrokenMLP(nn.Module):\n"
        "    def __init__(self, hidden_size):\n"
        "        super().__init__()\n"
        f"        self.up = {mistake}\n"
    )
    with pytest.raises(TypeError):
        build(child(tmp_path, text)).construct()
