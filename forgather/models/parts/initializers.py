"""How a parameter gets its first values; a model's rules map a pattern over parameter names to one of these.

An initializer fills any float tensor with independent draws, so a parameter can be drawn in blocks by the ranks that
hold them; one that cannot, because it looks at the shape or at all values, says `needs_whole = True` and is given the
whole, of which each rank keeps its part. `may_match_nothing` marks a rule that is meant for some shapes of the model
only. transformers' functions are used instead of torch's because they leave alone what a checkpoint has already filled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import initialization as init


class Initializer(Protocol):
    """What a rule names."""

    @property
    def may_match_nothing(self) -> bool: ...

    @property
    def needs_whole(self) -> bool:
        """Whether `fill` must be given the whole parameter in its shape, as its values depend on one another or on it.

        Without, it may be given any stretch of the parameter, flat, and each rank draws only what it holds.
        """

    @property
    def fill(self) -> Callable[..., None] | None:
        """`fill(tensor, generator=None)`; None leaves the parameter to its module's own `reset_parameters`."""


@dataclass(frozen=True, kw_only=True)
class Normal:
    """N(mean, std)."""

    std: float
    mean: float = 0.0
    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.normal_(tensor, mean=self.mean, std=self.std, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DepthScaledNormal:
    """N(0, std / sqrt(2 * num_layers)), for the projections that add to the residual stream.

    Each of `num_layers` layers adds twice to it; so scaled, its variance does not grow with depth. Source: Radford et
    al. 2019 (GPT-2), section 2.3.
    """

    std: float
    num_layers: int
    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.normal_(tensor, std=self.std / math.sqrt(2 * self.num_layers), generator=generator)


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal:
    """N(0, std) without what lies further out than `cutoff` standard deviations."""

    std: float
    cutoff: float = 3.0
    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        reach = self.cutoff * self.std
        init.trunc_normal_(tensor, std=self.std, a=-reach, b=reach, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Ones:
    """One everywhere: the weight of a norm."""

    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        init.ones_(tensor)


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """Zero everywhere: a bias."""

    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        init.zeros_(tensor)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What the module's own `reset_parameters` draws: torch's values."""

    may_match_nothing: bool = False
    needs_whole = False
    fill: None = None
