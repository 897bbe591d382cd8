"""The model of every shipped project: how it begins, how it generates, what it sees, and whether its plans fit it."""

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from forgather import Project
from forgather.config.files import shipped_configs
from tests.models.example import tokenizer

MODELS = shipped_configs() / "models"
SMALL = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "max_position_embeddings": 64}
# Dropout would make what is compared random, and one layer would hide what layers do to one another.
PROJECTS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2},
    "mistral": SMALL | {"num_hidden_layers": 2, "sliding_window": 5},
    "qwen3": SMALL | {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 5},
    "gemma3": SMALL | {"num_hidden_layers": 3, "sliding_window_pattern": 2, "sliding_window": 5},
    "gpt2": SMALL | {"num_hidden_layers": 2, "dropout": 0.0, "attention_dropout": 0.0},
    "mypt": SMALL | {"num_hidden_layers": 2, "dropout": 0.0},
    "causal_lm": SMALL | {"num_hidden_layers": 2},
    "deepone": SMALL | {"num_hidden_layers": 2},
    "single_head": {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80},
    "single_head/attention_only": {"hidden_size": 48, "num_hidden_layers": 2},
}
TOKENS = torch.arange(60).view(3, 20) % 53 + 3


def test_no_project_is_left_out() -> None:
    assert {path.parent.name for path in MODELS.glob("*/project.yaml")} == {name.split("/")[0] for name in PROJECTS}


def construct(name: str, folder: Path, **sizes: Any) -> PreTrainedModel:
    project, _, config = name.partition("/")
    arguments = {"output_dir": folder / "built", "vocab_size": None, **PROJECTS[name], **sizes}
    configured = Project(MODELS / project, config or None, args=arguments)
    model: PreTrainedModel = configured.build("package", given={"tokenizer": tokenizer()}).construct("cpu")
    return model


@pytest.fixture(scope="module", params=PROJECTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return construct(request.param, tmp_path_factory.mktemp("project")).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_generation_is_the_same_with_any_cache_and_padding(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    prompt = TOKENS[:, :8]
    plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(plain, model.generate(prompt, **options))
    assert torch.equal(plain, model.generate(prompt, cache_implementation="static", disable_compile=True, **options))
    padded = torch.cat([torch.ones(3, 4, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(12) >= 4).long().expand(3, -1)
    assert torch.equal(plain[:, 8:], model.generate(padded, attention_mask=mask, **options)[:, 12:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_and_later_tokens_are_not_seen(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(3, -1)
    together = model(TOKENS, position_ids=positions).logits
    apart = torch.cat([model(TOKENS[:, :12]).logits, model(TOKENS[:, 12:]).logits], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    changed = TOKENS.clone()
    changed[:, 11] = 99
    before, after = model(TOKENS).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_every_parameter_learns(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A bias of the keys moves all scores of a query alike, and softmax does not see it.
    assert all(name.endswith("k_proj.bias") for name in idle)


def test_plans_name_what_the_model_has(model: PreTrainedModel) -> None:
    names = [name for name, _ in model.model.named_modules()]
    for pattern in model.config.base_model_tp_plan or {}:
        assert fnmatch.filter(names, pattern), pattern
    stages = list(model.config.base_model_pp_plan)
    children = {name for name, _ in model.model.named_children()}
    assert set(stages) == children - {"dropout", "rotary_emb"}
    layers = stages.index("layers")
    assert all(name.startswith("embed_") for name in stages[:layers])
    assert stages[layers + 1 :] == (["norm"] if "norm" in children else [])


@pytest.mark.case(30)
@pytest.mark.parametrize("name", PROJECTS)
def test_norms_begin_at_one_and_biases_at_zero(tmp_path: Path, name: str) -> None:
    model = construct(name, tmp_path)
    for key, parameter in model.named_parameters():
        if re.search(r"norm\.weight$", key):
            assert (parameter == (0 if name == "gemma3" else 1)).all(), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            assert parameter.any(), key
    pad_row = model.get_input_embeddings().weight[model.config.pad_token_id]
    assert bool(pad_row.any()) == (name in ("llama", "mistral", "qwen3", "gemma3", "gpt2", "mypt"))


@pytest.mark.case(29)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_begins_as_its_page_says(tmp_path: Path, tied: bool) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "tie_word_embeddings": tied}
    model = construct("llama", tmp_path, **sizes, num_key_value_heads=4)
    spread = {"q": 0.02, "k": 0.02, "v": 0.02, "up": 0.02, "o": 0.00707, "gate": 0.00707, "down": 0.00707}
    for key, parameter in model.named_parameters():
        if found := re.search(r"(\w+)_proj", key):
            assert parameter.std().item() == pytest.approx(spread[found[1]], rel=0.03), key
    embedding = 256**-0.5 if tied else 1.0
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(embedding, rel=0.03)
    assert model.lm_head.weight.std().item() == pytest.approx(0.0625, rel=0.03)


def test_a_deepnet_begins_as_the_paper_says(tmp_path: Path) -> None:
    layers = 8
    model = construct("deepone", tmp_path, hidden_size=128, num_hidden_layers=layers, intermediate_size=256)
    layer = model.model.layers[3]
    assert layer.alpha == pytest.approx(2.0)
    gain = (8 * layers) ** -0.25
    xavier = (2 / (128 + 128)) ** 0.5
    for projection, wanted in (("q", xavier), ("k", xavier), ("v", gain * xavier), ("o", gain * xavier)):
        weight = getattr(layer.self_attn, f"{projection}_proj").weight
        assert weight.std().item() == pytest.approx(wanted, rel=0.03), projection
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(gain * (2 / (128 + 256)) ** 0.5, rel=0.03)
    assert layer.self_attn.q_proj.weight.abs().max() > 3 * xavier, "normal, not uniform"
    assert layer.self_attn.alibi.slopes.tolist() == pytest.approx([2**-1, 2 ** (-1 - 7 / 3), 0.0, 0.0])
    assert layer.self_attn.alibi.slopes.requires_grad


def test_a_gpt2_begins_as_the_paper_says(tmp_path: Path) -> None:
    model = construct("gpt2", tmp_path, hidden_size=128, num_hidden_layers=8, intermediate_size=512)
    layer = model.model.layers[3]
    for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert model.model.embed_positions.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_model_without_feed_forward_networks_has_no_size_for_them() -> None:
    assert "intermediate_size" not in Project(MODELS / "single_head", "attention_only").parameters
    assert "intermediate_size" in Project(MODELS / "single_head").parameters
