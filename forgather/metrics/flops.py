"""Floating-point operations a token needs, and what a device can do at most: the two sides of MFU.

    6 N + 12 L h q T     for one token, forward and backward (PaLM, arXiv:2204.02311, appendix B)

N: weights that a token is multiplied with, which is all matrices but the embeddings; the output head counts, also
when it is tied to the input embedding. L layers, h query heads of width q, T tokens in a row. A multiply-add is two
operations; backward costs twice forward. Recomputed activations do not count: MFU is about what the model needs.

The attention term is that of full attention, as published figures have it. A causal mask needs half of it, and rows
packed with several documents need less still, so a kernel that skips the masked part is credited with more than it did.
Of a mixture of experts the ones that a token is sent to count.

What is counted is the whole model, on meta, before it is cut over a mesh: a rank may hold a slice of each matrix, or a
few of the layers, and all of them share the work of a token.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

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
    (r"\bH800\b", 989.4e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362.05e12),
    (r"\bL40\b", 181.05e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 6000 Ada\b", 364.25e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 5090\b", 209.5e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 4080 SUPER\b", 104.4e12),
    (r"\bRTX 4080\b", 97.5e12),
    (r"\bRTX 3090 Ti\b", 80e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bMI300X\b", 1307.4e12),
)


@dataclass(frozen=True)
class Flops:
    """Operations of one token, forward and backward, and the `parameters` of the whole model, tied ones once."""

    parameters: int
    matmul: int
    attention: int

    @property
    def per_token(self) -> int:
        return self.matmul + self.attention


class Source(Protocol):
    """What a model is made from: `forgather.models.package.Package` is one."""

    def construct(self, device: str = "meta") -> nn.Module: ...


def count_flops_of(source: Source, length: int) -> Flops:
    """What one token of a row of `length` tokens costs the model of `source`, whatever part of it this rank holds."""
    return count_flops(source.construct("meta"), length)


def count_flops(model: nn.Module, length: int) -> Flops:
    """The same of `model`, a whole Transformers causal LM; its parameters may be on meta."""
    return Flops(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matmul=6 * count_matmul_weights(model),
        attention=_attention(model, length),
    )


def count_matmul_weights(model: nn.Module) -> int:
    """How many weights a token is multiplied with: matrices without embeddings, and the head."""
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    count = sum(_weights_used(p, model) for p in model.parameters() if p.ndim >= 2 and id(p) not in lookups)
    head = model.get_output_embeddings()  # type: ignore[operator]  # a method of every Transformers causal LM
    if head is not None and id(head.weight) in lookups:
        count += head.weight.numel()  # tied: looked up at the entry, multiplied at the exit
    return count


def _weights_used(parameter: nn.Parameter, model: nn.Module) -> int:
    """How many of a matrix's weights meet a token: all, or those of the experts it is sent to, of a stack of them."""
    config: Any = _text_config(model)
    experts = next((getattr(config, name) for name in _NUM_EXPERTS if getattr(config, name, None)), None)
    if parameter.ndim == 3 and experts is not None and parameter.shape[0] == experts:
        return int(parameter.numel() // experts * config.num_experts_per_tok)
    return int(parameter.numel())


_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _text_config(model: nn.Module) -> Any:
    """The configuration of the decoder, also where it is a part of a larger one."""
    config: Any = model.config
    return config.get_text_config()


def _attention(model: nn.Module, length: int) -> int:
    config = _text_config(model)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 12 * int(config.num_hidden_layers) * heads * width * length


def peak_flops(device: torch.device) -> float | None:
    """The most that `device` can do in a second, or None where that is not known, as on a CPU."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """The same by the name that CUDA gives the device."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)
