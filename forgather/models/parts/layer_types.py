"""Which layers attend within a window and which turn by position, as lists that config.json carries.

`layer_types` and `sliding_window` are transformers' names: its caches and masks read them from the config.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
FULL = "full_attention"
SLIDING = "sliding_attention"


def alternating(num_layers: int, full_every: int) -> list[str]:
    """Every `full_every`-th layer attends to all, the others within the window: 6 is Gemma 3's pattern, 1 all full."""
    if full_every < 1:
        raise ValueError(f"full_every is {full_every}; it must be at least 1")
    return [SLIDING if (layer_idx + 1) % full_every else FULL for layer_idx in range(num_layers)]


def window(layer_types: Sequence[str] | None, layer_idx: int, sliding_window: int | None) -> int | None:
    """The window of layer `layer_idx`; without `layer_types` it is that of all layers."""
    if layer_types is None:
        return sliding_window
    kind = _of_layer(layer_types, layer_idx, "layer_types")
    if kind not in (FULL, SLIDING):
        raise ValueError(f"layer_types: unknown type '{kind}'; there are: {FULL}, {SLIDING}")
    if kind == SLIDING and sliding_window is None:
        raise ValueError(f"layer_types: layer {layer_idx} is {SLIDING}, but there is no sliding_window")
    return sliding_window if kind == SLIDING else None


def rotary_except_every(num_layers: int, interval: int | None) -> list[int]:
    """1 for a layer with rotary positions and 0 for every `interval`-th, which has none (NoPE); SmolLM3 has 4.

    The list is what transformers calls `no_rope_layers`; with `interval=None` all layers turn.
    """
    if interval is not None and interval < 1:
        raise ValueError(f"interval is {interval}; it must be at least 1, or null for rotary positions in all layers")
    return [1 if interval is None else int((layer_idx + 1) % interval != 0) for layer_idx in range(num_layers)]


def is_rotary(no_rope_layers: Sequence[int] | None, layer_idx: int) -> bool:
    """Whether layer `layer_idx` has rotary positions; without a list all have."""
    return no_rope_layers is None or bool(_of_layer(no_rope_layers, layer_idx, "no_rope_layers"))


def _of_layer(values: Sequence[T], layer_idx: int, name: str) -> T:
    if layer_idx >= len(values):
        raise ValueError(f"{name} has {len(values)} entries, and none for layer {layer_idx}")
    return values[layer_idx]
