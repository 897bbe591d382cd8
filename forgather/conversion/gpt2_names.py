"""GPT-2 in transformers' names and in ours.

Theirs has one matrix for queries, keys and values, and keeps matrices as [in, out] (its Conv1D); ours has three, as
[out, in] like every `nn.Linear`.
"""

import re
from collections.abc import Sequence
from functools import partial

import torch

from forgather.conversion.recipes import Recipe

_LAYER = re.compile(r"(transformer\.h|model\.layers)\.(\d+)\.(.+)\.(weight|bias)")
_TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_MODULES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_JOINT = "attn.c_attn"


def of_package(name: str) -> Recipe:
    """How a parameter of ours is made of transformers'."""
    if name in _TOP:
        return Recipe((_TOP[name],))
    layer, module, kind = _parts(name)
    if module in _JOINED:
        return Recipe((f"transformer.h.{layer}.{_JOINT}.{kind}",), partial(_third, place=_JOINED.index(module)))
    return Recipe((f"transformer.h.{layer}.{_MODULES[module]}.{kind}",), _transposed)


def of_stock(name: str) -> Recipe:
    """How a parameter of transformers is made of ours."""
    top = {stock: ours for ours, stock in _TOP.items()}
    if name in top:
        return Recipe((top[name],))
    layer, module, kind = _parts(name)
    if module == _JOINT:
        return Recipe(tuple(f"model.layers.{layer}.{each}.{kind}" for each in _JOINED), _joined)
    back = {stock: ours for ours, stock in _MODULES.items()}
    return Recipe((f"model.layers.{layer}.{back[module]}.{kind}",), _transposed)


def _parts(name: str) -> tuple[str, str, str]:
    """Layer, module in it, and weight or bias."""
    match = _LAYER.fullmatch(name)
    assert match, f"{name} is no parameter of GPT-2"
    return match[2], match[3], match[4]


# A vector is its own transpose.
def _transposed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].t()


def _third(tensors: Sequence[torch.Tensor], *, place: int) -> torch.Tensor:
    return tensors[0].chunk(3, dim=-1)[place].t()


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tuple(tensors)).t()
