"""From the flags of `forgather model` to a model: what both of its verbs do first."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgather.cli.devices import device_named, dtype_named
from forgather.cli.options import Options
from forgather.cli.terminal import print_warning
from forgather.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from forgather.models.package import Package


@dataclass(frozen=True)
class Choice:
    """Device and dtype that the flags name, known to be there and to fit the other flags."""

    device: "torch.device"
    dtype: "torch.dtype"


@dataclass(frozen=True)
class Constructed:
    """A model, the package that it is of, and what became of that package."""

    model: "PreTrainedModel"
    package: "Package"
    differences: list[str]  # of the package on disk from what would be generated now; empty unless it is stale
    saved: list[Path]


def check_flags(options: Options) -> Choice:
    """What can be said to be wrong before anything is built or written."""
    if options.device == "meta":
        for flag, given in (
            ("--save-checkpoint", options.save_checkpoint),
            ("--load-from-checkpoint", options.load_from_checkpoint is not None),
        ):
            if given:
                raise ModelError(
                    f"{flag}: a model on the meta device has no weights; --device says where it gets them",
                    fix="add --device cpu",
                )
    if options.save_checkpoint and options.no_init_weights and options.load_from_checkpoint is None:
        raise ModelError(
            "--save-checkpoint would save undefined weights",
            fix="leave out --no-init-weights, or load some with --load-from-checkpoint PATH",
        )
    device = device_named(options.device)
    dtype = dtype_named(options.dtype or "float32")
    from forgather.models.attention_support import require_construction

    require_construction(options.attn_implementation)
    if options.load_from_checkpoint is not None:
        from forgather.conversion.weight_sources import open_weights

        open_weights(Path(options.load_from_checkpoint))  # says whether weights are there; reads names only
    return Choice(device, dtype)


def construct_model(options: Options, choice: Choice, *, refuse_stale: bool) -> Constructed:
    """Write the package where it is not there, construct its model, and load and save weights as asked.

    A package that is stale stays as it is and is told, or is an error with `refuse_stale`.
    """
    from forgather.conversion.weights_out import save_weights
    from forgather.models.construct import construct

    package: Package = options.project.build("package")
    was_there = package.is_there
    differences = [] if options.refresh_model else package.differences()
    if differences and refuse_stale:
        raise package.stale(differences)
    if differences:
        stale = package.stale(differences)
        print_warning(f"{stale.message}; constructing what is there. {stale.fix}")
    else:
        package.write(refresh=options.refresh_model, undrawn=options.no_init_weights)
    try:
        model = construct(
            package.dir,
            choice.device,
            dtype=choice.dtype,
            attn_implementation=options.attn_implementation,
            seed=None if options.no_init_weights else 0,
        )
    except (AttributeError, ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        if not differences:  # of a stale package anything may be wrong, and that it is stale says most
            raise
        raise package.stale([*differences, f"it cannot be constructed: {error}"]) from error
    if options.load_from_checkpoint is not None:
        _load(model, options)
    saved = save_weights(model, package.dir) if options.save_checkpoint else []
    if options.refresh_model and not saved:
        _warn_of_weights(model, package.dir)
    if options.gradient_checkpointing:
        _recompute(model)
    kept = was_there and not options.refresh_model and not differences
    print(f"model package: {package.dir}{' (as it was; -r regenerates it)' if kept else ''}", file=sys.stderr)
    for path in saved:
        print(f"weights: {path}", file=sys.stderr)
    return Constructed(model, package, differences, saved)


def _warn_of_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Say so when a refresh has left weights in the package that the new definition cannot load."""
    from forgather.conversion.weight_sources import HUGGING_FACE_FILES, open_weights

    if not any((folder / name).exists() for name in HUGGING_FACE_FILES):
        return
    kinds = open_weights(folder).kinds
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = [name for name, kind in kinds.items() if tuple(kind.shape) != shapes.get(name)]
    if differing:
        print_warning(
            f"the weights in {folder} are of the definition before: {len(differing)} of {len(kinds)} do not fit, "
            f"{differing[0]} for one; --save-checkpoint replaces them"
        )


def _load(model: "PreTrainedModel", options: Options) -> None:
    from forgather.conversion.listing import listed
    from forgather.conversion.weights_in import load_weights

    loaded = load_weights(model, Path(options.load_from_checkpoint))
    if (warning := loaded.warning()) is not None:
        print_warning(warning)
    if loaded.missing and options.no_init_weights:
        raise ModelError(
            f"--no-init-weights leaves undefined what {loaded.path} does not hold:{listed(loaded.missing)}",
            fix="leave out --no-init-weights: what is not found is then drawn by the model's rules",
        )


def _recompute(model: "PreTrainedModel") -> None:
    # transformers 5.23 has this under a new name and warns of the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise ModelError(f"--gradient-checkpointing: {error}", fix="leave it out") from error
