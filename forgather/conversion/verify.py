"""Whether two models compute the same, each with the weights of its own files and a module of them in memory at a time.

Shapes: B rows, L tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from forgather.conversion.recipes import Recipe
from forgather.conversion.weight_sources import Read
from forgather.errors import ModelError

TOLERANCE = 1e-5  # of the largest logit, and of 1 where none is as large
_LENGTH = 24
_WINDOW = 8  # so narrow, a sliding window shows within the tokens of the test
# What is enough to show whether random weights are computed with in the same way: a round of Gemma's layers, for one.
_LAYERS = 6
_VOCABULARY = 512


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values, to be computed with in float32 by the formula of attention as it is written.

    A sliding window becomes narrow: weights do not depend on it, and a short test would not show a wide one.
    """
    config = type(config).from_dict(config.to_dict())
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = min(config.sliding_window, _WINDOW)
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """What the model needs to be given: each parameter, of tied ones one."""
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def require_equal(
    one: PreTrainedModel, reader: Callable[[], Read], other: PreTrainedModel, other_reader: Callable[[], Read]
) -> float:
    """The largest difference of the logits [B, L, V] of two models from `on_meta`; ModelError when it is too large.

    Readers are asked for what reads a weight by its name, the second when the first is done with and its files are
    closed: what is mapped of a file takes memory, too.
    """
    logits = logits_of(one, reader())
    expected = logits_of(other, other_reader())
    for model, values in ((one, logits), (other, expected)):
        if not values.isfinite().all():
            raise ModelError(
                f"logits of {type(model).__name__} are not finite, so that nothing can be compared",
                fix="take weights that hold no NaN and no infinity, such as an earlier checkpoint's",
            )
    difference = (logits - expected).abs().max().item()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    if difference > limit:
        raise ModelError(
            f"logits differ by up to {difference:.3g} between {type(one).__name__} and {type(other).__name__}, "
            f"and at most {limit:.3g} is rounding: they do not compute the same",
            fix="nothing was kept; report it with both config.json",
        )
    return difference


def converting(read: Read, dtype: torch.dtype | None) -> Read:
    """What `read` gives, in `dtype` where it is floating-point and that is given."""

    def converted(name: str) -> torch.Tensor:
        tensor = read(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return converted


def require_same_computation(
    one: type[PreTrainedModel],
    config: PreTrainedConfig,
    other: type[PreTrainedModel],
    other_config: PreTrainedConfig,
    recipe: Callable[[str], Recipe],
) -> None:
    """ModelError unless the classes compute the same from random weights, in which everything has its effect.

    The weights of a model that has hardly been trained may hide what a layer does; and nothing needs to be read or
    written for this. The models have the first layers and tokens of their configs; `recipe` makes a parameter of `one`
    of those of `other`.
    """
    ours, theirs = on_meta(one, _beginning(config)), on_meta(other, _beginning(other_config))
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}

    def draw(name: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        drawn = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed))
        return drawn.mul_(max(drawn.shape) ** -0.5) if drawn.dim() > 1 else drawn.mul_(0.3).add_(0.6)

    def make(name: str) -> torch.Tensor:
        made = recipe(name)
        return made.make([draw(source) for source in made.names])

    require_equal(ours, lambda: make, theirs, lambda: draw)


def _beginning(config: PreTrainedConfig) -> PreTrainedConfig:
    config = type(config).from_dict(config.to_dict())
    config.num_hidden_layers = min(config.num_hidden_layers, _LAYERS)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:_LAYERS]
    config.vocab_size = min(config.vocab_size, _VOCABULARY)
    # They may be beyond, which transformers warns of; padding decides about gradients alone, and the others about none.
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


@torch.no_grad()
def logits_of(model: PreTrainedModel, read: Read) -> torch.Tensor:
    """Logits [B, L, V] of fixed tokens, at the first positions and at the last that the model has."""
    config: Any = model.config
    length = min(_LENGTH, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    input_ids_BL = torch.randint(config.vocab_size, (2, length), generator=generator)
    starts = torch.tensor([[0], [config.max_position_embeddings - length]])
    with _streaming(model, read):
        logits: torch.Tensor = model(
            input_ids=input_ids_BL, position_ids=starts + torch.arange(length), use_cache=False
        ).logits
    return logits


@contextmanager
def _streaming(model: PreTrainedModel, read: Read) -> Iterator[None]:
    """Each module has its parameters while it computes, and no longer."""
    _compute_buffers(model)
    tied = model.all_tied_weights_keys
    hooks = []
    for prefix, module in model.named_modules():
        names = {
            attribute: tied.get(name := f"{prefix}.{attribute}".removeprefix("."), name)
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }
        if names:
            hooks += _hooks(module, names, read)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(module: nn.Module, names: dict[str, str], read: Read) -> list[torch.utils.hooks.RemovableHandle]:
    on_meta = dict(module._parameters)

    def fill(*_: object) -> None:
        for attribute, name in names.items():
            module._parameters[attribute] = nn.Parameter(read(name).float(), requires_grad=False)

    def drop(*_: object) -> None:
        module._parameters.update(on_meta)

    return [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]


def _compute_buffers(model: PreTrainedModel) -> None:
    """What no checkpoint holds, such as rotary frequencies, as a loaded model has it."""
    for module in model.modules():
        if not module._buffers:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
        else:
            model._init_weights(module)
