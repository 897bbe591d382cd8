"""What no checkpoint holds is there again in a model that was saved and loaded, in any dtype."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from forgather import Project
from forgather.config.files import shipped_configs
from tests.models.example import tokenizer
from tests.models.parts.composing import TOKENS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": None}
# Computed: ALiBi's fixed slopes, sinusoids, frequencies for two types of layers; trained: ALiBi's slopes.
PROJECTS = {
    "single_head": ["model.layers.0.self_attn.alibi.slopes"],
    "causal_lm": ["model.embed_positions.table"],
    "gemma3": ["model.rotary_emb.full_attention_inv_freq", "model.rotary_emb.sliding_attention_inv_freq"],
    "deepone": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROJECTS)
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    project = Project(shipped_configs() / "models" / name, args=SIZES | {"output_dir": tmp_path / "package"})
    model = project.build("package", given={"tokenizer": tokenizer()}).construct("cpu", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    buffers = dict(loaded.named_buffers())
    for buffer in PROJECTS[name]:
        assert buffers[buffer].dtype == torch.float32
        assert buffer not in loaded.state_dict()
    if name == "deepone":
        assert "model.layers.0.self_attn.alibi.slopes" in loaded.state_dict()
