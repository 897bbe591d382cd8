"""Rotary position embedding in all the variants that transformers knows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class RotaryEmbedding(nn.Module):
    """Gives the cosines and sines that turn queries and keys by their position.

    `config.rope_parameters` chooses the variant (`rope_type`: default, linear, dynamic, yarn, longrope, llama3) and its
    numbers (`rope_theta`, `factor`). The inverse frequencies are float32 and stay so when the model is cast:
    in bfloat16 a position above 256 would no longer be an integer. They are in no checkpoint, so `reset_buffers` must
    follow `to_empty`. Source: Su et al. 2021, "RoFormer", arXiv:2104.09864.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        if self.rope_type != "default" and self.rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters: unknown rope_type '{self.rope_type}'; there are: {known}")
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.attention_scaling = 1.0
        frequencies = self._frequencies(None)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def reset_buffers(self) -> None:
        """Compute the buffers anew on the device they are on."""
        self.inv_freq = self._frequencies(self.inv_freq.device)
        self.original_inv_freq = self.inv_freq.clone()

    def _frequencies(self, device: torch.device | None) -> torch.Tensor:
        """[C / 2] float32; sets `attention_scaling`, which yarn and longrope multiply the result with."""
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, default_frequencies)
        frequencies, self.attention_scaling = compute(self.config, device)
        return frequencies.float()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype != torch.float32:
            self.reset_buffers()
        return self

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, hidden_BLD: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [B, L, C], in the dtype of the hidden states."""
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_BLD.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_BLD.dtype), sin.to(hidden_BLD.dtype)

    def extra_repr(self) -> str:
        return f"{self.rope_type}, channels={2 * self.inv_freq.shape[0]}"


def default_frequencies(config: PreTrainedConfig, device: torch.device | None) -> tuple[torch.Tensor, float]:
    """theta ** (-2i / C) for i < C / 2; transformers leaves this plain variant to the models."""
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    steps = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    return 1.0 / (config.rope_parameters["rope_theta"] ** (steps / channels)), 1.0  # bit for bit as transformers' own


def rotate(x_BHLC: torch.Tensor, cos_BLC: torch.Tensor, sin_BLC: torch.Tensor) -> torch.Tensor:
    """Turns each pair of channels (i, i + C / 2), the pairing of Hugging Face's Llama checkpoints."""
    first, second = x_BHLC.chunk(2, dim=-1)
    return x_BHLC * cos_BLC.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BLC.unsqueeze(1)
