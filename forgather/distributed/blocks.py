"""The repeated layers of a model, on which options act that change how they run and not what they compute."""

from collections.abc import Iterator

from torch import nn

from forgather.errors import ModelError


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose class the model names in `_no_split_modules`, in order; none where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


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
