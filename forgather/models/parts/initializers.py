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
class Uniform:
    """U(-bound, bound)."""

    bound: float
    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.uniform_(tensor, -self.bound, self.bound, generator=generator)


@dataclass(frozen=True, kw_only=True)
class FanInNormal:
    """N(0, gain / sqrt(inputs)) for a matrix [outputs, inputs]: outputs are of the size of the inputs, times `gain`.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6.
    """

    gain: float = 1.0
    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.normal_(tensor, std=self.gain / math.sqrt(fan_in(tensor)), generator=generator)


@dataclass(frozen=True, kw_only=True)
class FanInUniform:
    """U(-gain / sqrt(inputs), gain / sqrt(inputs)) for a matrix [outputs, inputs]: how torch.nn.Linear begins."""

    gain: float = 1.0
    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        bound = self.gain / math.sqrt(fan_in(tensor))
        init.uniform_(tensor, -bound, bound, generator=generator)


@dataclass(frozen=True, kw_only=True)
class XavierUniform:
    """Uniform with a standard deviation of gain * sqrt(2 / (inputs + outputs)).

    Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
    """

    gain: float = 1.0
    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.xavier_uniform_(tensor, gain=self.gain, generator=generator)


@dataclass(frozen=True, kw_only=True)
class XavierNormal:
    """N(0, gain * sqrt(2 / (inputs + outputs))); source as XavierUniform."""

    gain: float = 1.0
    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.xavier_normal_(tensor, gain=self.gain, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """A matrix whose rows, or columns where there are fewer of them, are orthogonal and of length `gain`.

    Source: Saxe et al. 2013, "Exact solutions to the nonlinear dynamics of learning", arXiv:1312.6120.
    """

    gain: float = 1.0
    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        init.orthogonal_(tensor, gain=self.gain, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """`value` everywhere."""

    value: float
    may_match_nothing: bool = False
    needs_whole = False

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        init.constant_(tensor, self.value)


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


@dataclass(frozen=True, kw_only=True)
class ZeroRow:
    """What `initializer` fills with, and zero in one row: an embedding whose padding token means nothing.

    With `row=None`, as where there is no padding token, it is `initializer` alone.
    """

    initializer: Initializer
    row: int | None
    may_match_nothing: bool = False

    def __post_init__(self) -> None:
        if self.initializer.fill is None:
            raise ValueError(
                "ZeroRow needs an initializer that fills; Keep leaves the padding row of an embedding at 0"
            )

    @property
    def needs_whole(self) -> bool:
        return self.row is not None or self.initializer.needs_whole

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        assert self.initializer.fill is not None, "checked when made"
        self.initializer.fill(tensor, generator)
        # A row is a tensor of its own, without the mark by which transformers protects what a checkpoint has filled.
        if self.row is not None and not getattr(tensor, "_is_hf_initialized", False):
            init.zeros_(tensor[self.row])


def fan_in(tensor: torch.Tensor) -> int:
    """The number of inputs of a matrix [outputs, inputs]; ValueError for another number of dimensions."""
    if tensor.dim() != 2:
        raise ValueError(
            f"an initializer by fan-in or fan-out is for matrices, not for a shape of {list(tensor.shape)}"
        )
    return tensor.shape[1]
