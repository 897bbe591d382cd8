"""Floating-point operations a token needs, and what a device can do at most: the two sides of MFU.

    6 N + 12 L h q T     for one token, forward and backward (PaLM, arXiv:2204.02311, appendix B)

N: weights that a token is multiplied with, which is all matrices but the embeddings; the output head counts, also
when it is tied to the input embedding. L layers, h query heads of width q, T tokens in a row. A multiply-add is two
operations; backward costs twice forward. Recomputed activations do not count: MFU is about what the model needs.

The attention term is that of full attention, as published figures have it. A causal mask needs half of it, and rows
packed with several documents need less still, so a kernel that skips the masked part is credited with more than it did.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Dense bf16 with fp32 accumulation, FLOP/s, from the makers' data sheets (the sparse figures there are twice as high).
# The first pattern that is found in the device's name counts, so the variants stand before the family.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 836e12),
    (r"\bG?H200\b", 989.4e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989.4e12),
    (r"\bA100\b", 312e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362.05e12),
    (r"\bL40\b", 181.05e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 5090\b", 209.5e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
)


@dataclass(frozen=True)
class Flops:
    """Operations of one token, forward and backward."""

    matmul: int
    attention: int

    @property
    def per_token(self) -> int:
        return self.matmul + self.attention


def count_flops(model: nn.Module, length: int) -> Flops:
    """What one token of a row of `length` tokens costs `model`, a Transformers causal LM, also on meta or sharded."""
    return Flops(matmul=6 * count_matmul_weights(model), attention=_attention(model, length))


def count_matmul_weights(model: nn.Module) -> int:
    """How many weights a token is multiplied with: matrices without embeddings, and the head."""
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    count = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in lookups)
    head = model.get_output_embeddings()  # type: ignore[operator]  # a method of every Transformers causal LM
    if head is not None and id(head.weight) in lookups:
        count += head.weight.numel()  # tied: looked up at the entry, multiplied at the exit
    return count


def _attention(model: nn.Module, length: int) -> int:
    config: Any = model.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 12 * int(config.num_hidden_layers) * heads * width * length


def peak_flops(device: torch.device) -> float | None:
    """The most that `device` can do in a second, or None where that is not known, as on a CPU."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """The same by the name that CUDA gives the device."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)
