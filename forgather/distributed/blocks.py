"""The repeated layers of a model, on which options act that change how they run and not what they compute."""

from collections.abc import Iterator

from torch import nn

from forgather.errors import ModelError


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose class the model names in `_no_split_modules`, in order; none where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


_OPTIONS = "_forgather_block_options"  # the attribute of a model in which it is noted what its blocks do


def blocks_for(option: str, model: nn.Module) -> list[nn.Module]:
    """The blocks of `model`, in order; ModelError, naming the option that wants them, where it does not say its blocks.

    A stage of a pipeline may have none.
    """
    if not getattr(model, "_no_split_modules", None):
        raise ModelError(
            f"{option} acts on the blocks of a model, and {type(model).__name__} does not name its own",
            fix=f"leave {option} as it is by default, or give the class _no_split_modules",
        )
    return list(find_blocks(model))


def remember(model: nn.Module, what: str) -> None:
    """Note what some blocks of `model` do, for the lines before a run."""
    model.__dict__.setdefault(_OPTIONS, []).append(what)


def describe_blocks(model: nn.Module) -> list[str]:
    """A line about what the blocks of `model` do beside their work; none where that is nothing."""
    noted = model.__dict__.get(_OPTIONS, [])
    return [f"blocks: {', '.join(noted)}"] if noted else []
