"""Layers of which each rank has a part: their parameters are DTensors, their arithmetic is that of plain tensors.

A layer keeps its class, names and parameters; it only gets a subclass of its class as its own, whose forward lends the
module this rank's part of each parameter and exchanges what goes in or comes out. DTensors would do the exchange by
themselves, but cost every operation of a layer its dispatch.

Where the sequence is split, what is between the layers of a block (norms, the residual stream) has a piece of the
tokens on each rank. That is so in every forward that makes gradients, and in no other: texts are sampled by the token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forgather.distributed import exchange
from forgather.distributed.exchange import Group
from forgather.distributed.tensor_random import OwnStream
from forgather.errors import DistributedError
from forgather.tensor_boxes import local_box

SEQUENCE = 1  # the dimension of the tokens in [B, L, D]


@dataclass
class Shared:
    """What the layers that begin a split part know together: queries, keys and values read one input, entered once."""

    source: Tensor | None = None
    version: int = -1
    result: Tensor | None = None
    own_stream: OwnStream | None = None  # of what is drawn between these layers and the one that ends the part

    def end(self) -> None:
        self.source = self.result = None
        if self.own_stream is not None:
            self.own_stream.leave()


@dataclass
class Part:
    """What a layer that is split, or that works on split tokens, knows of it."""

    group: Group
    sequence: bool = False  # between the layers of this one's block, tokens are split
    shared: Shared | None = None
    gathers_output: bool = False
    splits_input: bool = False
    size: int = 0  # channels of the whole output
    keeps_product: bool = False  # what the matrix gives is kept for the backward, so no sum is written over it
    plain_class: type[nn.Module] = field(default=nn.Module)

    @property
    def tokens_are_split(self) -> bool:
        return self.sequence and torch.is_grad_enabled()


def part_of(module: nn.Module) -> Part | None:
    """What `make_part` has made of a module, or None."""
    part: Part | None = module.__dict__.get("_part")
    return part


def make_part(module: nn.Module, kind: type["Whole"], part: Part) -> None:
    """Give `module` the forward of `kind` around its own."""
    plain = type(module)
    part.plain_class = plain
    module.__dict__["_part"] = part
    module.__class__ = type(plain.__name__, (kind, plain), {"__module__": plain.__module__})


class Whole(nn.Module):
    """A layer that every rank has: of all tokens, or of its own where the sequence is split."""

    _part: Part
    sums_gradients = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = self._part
        with _lent(self, part.group if self.sums_gradients or part.tokens_are_split else None):
            return super().forward(*args, **kwargs)


class WholeForHeads(Whole):
    """A layer that every rank has and applies to its own heads, so each knows a part of its gradient."""

    sums_gradients = True


class SplitByOutput(Whole):
    """A linear layer whose output channels are split; it takes all tokens, whole."""

    def forward(self, x: Tensor) -> Any:
        part = self._part
        x = _enter_once(x, part)
        if part.shared is not None and part.shared.own_stream is not None and self.training:
            part.shared.own_stream.enter(x.device)
        with _lent(self):
            y: Tensor = super(Whole, self).forward(x)
        return exchange.gather(y, y.dim() - 1, part.size, part.group) if part.gathers_output else y


class SplitByInput(Whole):
    """A linear layer whose input channels are split; what comes out is whole, or split by tokens."""

    def forward(self, x: Tensor) -> Any:
        part = self._part
        if part.shared is not None:
            part.shared.end()
        if part.splits_input:
            x = exchange.split(x, x.dim() - 1, part.group)
        with _lent(self, without=("bias",)):
            y: Tensor = super(Whole, self).forward(x)
        split = part.tokens_are_split
        if split:
            y = exchange.add_and_split(y, SEQUENCE, part.group)
        else:
            y = exchange.add(y, part.group, over=not part.keeps_product)
        bias = self._parameters.get("bias")
        return y if bias is None else y + _local(bias, part.group if split else None)


class SplitByToken(Whole):
    """An embedding of which each rank has the rows of some tokens."""

    def forward(self, token_ids: Tensor) -> Any:
        part = self._part
        (start, _), (rows, _) = local_box(self._parameters["weight"])  # type: ignore[arg-type]
        ids = token_ids - start
        elsewhere = (ids < 0) | (ids >= rows)
        padding: int | None = self.__dict__["padding_idx"]
        with _lent(self):
            # The row that learns nothing has another number here, or is another rank's.
            is_here = padding is not None and start <= padding < start + rows
            self.__dict__["padding_idx"] = padding - start if padding is not None and is_here else None
            try:
                embedded: Tensor = super(Whole, self).forward(ids.masked_fill(elsewhere, 0))
            finally:
                self.__dict__["padding_idx"] = padding
        return exchange.add(embedded.masked_fill(elsewhere.unsqueeze(-1), 0.0), part.group)


def _enter_once(x: Tensor, part: Part) -> Tensor:
    if part.tokens_are_split:
        return x  # the module that this layer belongs to has entered it, see `gather_tokens`
    shared = part.shared
    if shared is not None and shared.source is x and shared.version == x._version and shared.result is not None:
        return shared.result
    entered = exchange.enter(x, part.group)
    if shared is not None:
        shared.source, shared.version, shared.result = x, x._version, entered
    return entered


def split_tokens(first: nn.Module, last: nn.Module, group: Group) -> None:
    """Let the first block of a model take whole tokens and split them, and the last one put them together again."""

    def split(tokens_BLD: Tensor) -> Tensor:
        if tokens_BLD.shape[SEQUENCE] % group.size():
            raise DistributedError(
                f"rows of {tokens_BLD.shape[SEQUENCE]} tokens cannot be split over mesh.tensor {group.size()}",
                fix=f"use a block_length that is a multiple of {group.size()}, or sequence_parallel: false",
            )
        return exchange.split(tokens_BLD, SEQUENCE, group)

    def gather(_block: nn.Module, _args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        piece: Tensor = output if isinstance(output, Tensor) else output[0]
        whole = exchange.gather(piece, SEQUENCE, piece.shape[SEQUENCE] * group.size(), group)
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    _change_input(first, split)
    last.register_forward_hook(gather)


def draw_apart(block: nn.Module, own_stream: OwnStream) -> None:
    """Let what is drawn in a block, whose tokens are split, be other numbers on each rank."""

    def enter(module: nn.Module, _args: Any, _kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            own_stream.enter(next(module.parameters()).device)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(lambda *_: own_stream.leave(), always_call=True)


def gather_tokens(module: nn.Module, group: Group) -> None:
    """Let a module of a block, which is split by channels inside, take split tokens and work on all of them."""
    _change_input(module, lambda tokens_BLD: exchange.gather_and_enter(tokens_BLD, SEQUENCE, group))


def _change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the first argument of a module's forward, given by position or by name, where gradients are made."""
    name = next(iter(signature(module.forward).parameters))

    def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        return ((change(args[0]), *args[1:]), kwargs) if args else (args, {**kwargs, name: change(kwargs[name])})

    module.register_forward_pre_hook(pre_hook, with_kwargs=True)


@contextmanager
def _lent(module: nn.Module, sum_gradients: Group | None = None, without: tuple[str, ...] = ()) -> Iterator[None]:
    """Within, the module's own parameters are this rank's parts, as plain tensors."""
    own = dict(module._parameters)
    lent: dict[str, Any] = module._parameters
    for name, parameter in own.items():
        if parameter is not None:
            lent[name] = None if name in without else _local(parameter, sum_gradients)
    try:
        yield
    finally:
        lent.update(own)


def _local(parameter: Tensor, sum_gradients: Group | None) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local if sum_gradients is None else exchange.enter(local, sum_gradients)
