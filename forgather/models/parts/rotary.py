"""Rotary position embedding in all the variants that transformers knows."""

import math
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from forgather.models.parts.buffers import ComputedBuffers

# What each variant reads, by transformers' names. An own one, registered in ROPE_INIT_FUNCTIONS, may read anything.
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
_POSITIVE = ("rope_theta", "factor")


class RotaryEmbedding(ComputedBuffers):
    """Gives the cosines and sines that turn queries and keys by their position.

    `config.rope_parameters` chooses the variant (`rope_type`: default, linear, dynamic, yarn, longrope, llama3,
    proportional) and its numbers (`rope_theta`, `factor`; with `partial_rotary_factor` below 1 the last channels of a
    head stay as they are). It may hold such parameters for each layer type (full_attention, sliding_attention), and
    `forward` is then asked for one of them. Source: Su et al. 2021, "RoFormer", arXiv:2104.09864.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
        if not parameters:
            raise ValueError("rope_parameters is missing; {rope_type: default, rope_theta: 10000.0} would do")
        self.layer_types = [key for key, value in parameters.items() if isinstance(value, dict)]
        types = {kind: self._rope_type(kind) for kind in self._kinds()}
        # transformers' update of the dynamic variants finds what it changes by these names.
        self.rope_type = types if self.layer_types else types[None]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.attention_scalings: dict[str | None, float] = {}
        for kind in self._kinds():
            frequencies = self._frequencies(kind, None)
            self.register_buffer(buffer_name(kind, "inv_freq"), frequencies, persistent=False)
            self.register_buffer(buffer_name(kind, "original_inv_freq"), frequencies.clone(), persistent=False)

    def _kinds(self) -> list[str | None]:
        return [*self.layer_types] if self.layer_types else [None]

    def reset_buffers(self) -> None:
        for kind in self._kinds():
            device = getattr(self, buffer_name(kind, "inv_freq")).device
            frequencies = self._frequencies(kind, device)
            setattr(self, buffer_name(kind, "inv_freq"), frequencies)
            setattr(self, buffer_name(kind, "original_inv_freq"), frequencies.clone())
            setattr(self, buffer_name(kind, "max_seq_len_cached"), self.original_max_seq_len)

    def _variant(self, kind: str | None) -> dict[str, Any]:
        parameters: dict[str, Any] = self.config.rope_parameters
        return parameters if kind is None else parameters[kind]

    def _rope_type(self, kind: str | None) -> str:
        rope_type = str(self._variant(kind).get("rope_type", "default"))
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters: unknown rope_type '{rope_type}'; there are: {known}")
        return rope_type

    def _frequencies(self, kind: str | None, device: torch.device | None) -> torch.Tensor:
        """[C / 2] float32; yarn and longrope also say what cosines and sines are multiplied with."""
        rope_type = self._rope_type(kind)
        check_parameters(rope_type, self._variant(kind))
        try:
            if rope_type == "default":
                frequencies, scaling = default_frequencies(self.config, self._variant(kind), device), 1.0
            else:
                frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](self.config, device, layer_type=kind)
        except KeyError as error:
            raise ValueError(f"rope_parameters: rope_type '{rope_type}' needs {error.args[0]}") from error
        except TypeError as error:
            given = self._variant(kind)
            raise ValueError(f"rope_parameters: {given} are not the numbers of '{rope_type}': {error}") from error
        self.attention_scalings[kind] = scaling
        return frequencies.float()

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(
        self, hidden_BLD: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [B, L, C], in the dtype of the hidden states."""
        frequencies: torch.Tensor = getattr(self, buffer_name(layer_type, "inv_freq"))
        angles = position_ids[..., None].float() * frequencies.to(hidden_BLD.device)
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.attention_scalings[layer_type]
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return cos.to(hidden_BLD.dtype), sin.to(hidden_BLD.dtype)

    def extra_repr(self) -> str:
        return str(self.rope_type)


def check_parameters(rope_type: str, parameters: dict[str, Any]) -> None:
    """Raise ValueError for a name that nothing would read, and for a base or factor that is not more than 0."""
    if rope_type in _NUMBERS:
        known = (*_ALWAYS, *_NUMBERS[rope_type])
        for key in parameters:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                there = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
                raise ValueError(f"rope_parameters: rope_type '{rope_type}' has no {key}; {there}")
    for key in _POSITIVE:
        value = parameters.get(key)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"rope_parameters: {key} is {value}, and must be more than 0, and finite")


def buffer_name(layer_type: str | None, name: str) -> str:
    """transformers' name for a buffer of one layer type, or of all layers."""
    return name if layer_type is None else f"{layer_type}_{name}"


def default_frequencies(
    config: PreTrainedConfig, parameters: dict[str, Any], device: torch.device | None
) -> torch.Tensor:
    """theta ** (-2i / C) for i < C / 2; transformers leaves this plain variant to the models."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    steps = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    return 1.0 / (parameters["rope_theta"] ** (steps / channels))  # bit for bit as transformers' own


def rotate(x_BHLC: torch.Tensor, cos_BLC: torch.Tensor, sin_BLC: torch.Tensor) -> torch.Tensor:
    """Turns each pair of channels (i, i + C / 2), the pairing of Hugging Face's Llama checkpoints.

    Channels beyond those that cosine and sine are for stay as they are.
    """
    channels = cos_BLC.shape[-1]
    if channels < x_BHLC.shape[-1]:
        return torch.cat((rotate(x_BHLC[..., :channels], cos_BLC, sin_BLC), x_BHLC[..., channels:]), dim=-1)
    first, second = x_BHLC.chunk(2, dim=-1)
    return x_BHLC * cos_BLC.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BLC.unsqueeze(1)
