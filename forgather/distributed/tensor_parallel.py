"""Splitting every layer of a model over the ranks of the `tensor` axis, by the plan that the model itself has.

Parameters become DTensors under the names that they had; those that are not split do so too, so that all of a model's
parameters live on one mesh. A tied embedding and head stay one parameter.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from forgather.distributed.blocks import find_blocks
from forgather.distributed.mesh import Mesh
from forgather.distributed.tensor_layers import (
    Part,
    Shared,
    SplitByInput,
    SplitByOutput,
    SplitByToken,
    Whole,
    WholeForHeads,
    draw_apart,
    gather_tokens,
    make_part,
    split_tokens,
)
from forgather.distributed.tensor_plan import (
    BY_INPUT,
    BY_OUTPUT,
    BY_TOKEN,
    WHOLE_FOR_HEADS,
    read_plan,
    reason_against_split_sequence,
)
from forgather.distributed.tensor_random import OwnStream, drops_out
from forgather.errors import DistributedError

_SPLIT = "_forgather_split"  # the attribute of a model in which apply_tensor_parallel notes what it did


def apply_tensor_parallel(model: nn.Module, mesh: Mesh, *, sequence_parallel: bool = True) -> None:
    """Split the layers of `model` in place over the `tensor` axis of `mesh`; nothing where that is 1.

    Works on a model on meta, and on a part of one (a stage of a pipeline). With `sequence_parallel` each rank keeps the
    tokens of its own between the layers of a block, where the model allows it: activations there take 1/n of the
    memory, for the same communication. Raises DistributedError for a model without a plan or with sizes that the ranks
    do not divide.
    """
    if mesh.tensor_mesh is None:
        return
    styles = read_plan(model, mesh.tensor)
    blocks = list(find_blocks(model))
    reason = reason_against_split_sequence(model, blocks, styles) if sequence_parallel else "as asked"
    group = mesh.tensor_mesh.get_group()
    names = {module: name for name, module in model.named_modules()}
    in_blocks = {module for block in blocks for module in block.modules()} if reason is None else set()
    shared = _shared_inputs(styles)
    own_stream = OwnStream(mesh.coordinate("tensor"))
    for parent, inputs in shared.items():
        if reason is not None and _splits_heads(parent, styles) and drops_out(model.get_submodule(parent)):
            inputs.own_stream = own_stream
    placed: dict[Tensor, nn.Parameter] = {}
    for module, name in names.items():
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        style = styles.get(name, "replicate")
        part = Part(group, sequence=module in in_blocks, shared=shared.get(name.rpartition(".")[0]))
        kind = _kind(style)
        if kind is SplitByOutput:
            part.gathers_output = style != "colwise"
            part.size = int(module.weight.shape[0])
        part.splits_input = style in ("rowwise_split_input", "rowwise_rep")
        _place_parameters(name, module, kind, mesh.tensor_mesh, placed)
        make_part(module, kind, part)
    if reason is None:
        split_tokens(blocks[0], blocks[-1], group)
        for block in blocks:
            for child in block.children():
                if any(names[module] in styles for module in child.modules()):
                    gather_tokens(child, group)
            if drops_out(block):
                draw_apart(block, own_stream)
    tokens = "and so are tokens between them" if reason is None else f"tokens are not ({reason})"
    model.__dict__[_SPLIT] = f"layers split over {mesh.tensor} ranks, {tokens}"


def describe_split(model: nn.Module) -> str | None:
    """How `apply_tensor_parallel` has split `model`, in words; None where it has not."""
    words: str | None = model.__dict__.get(_SPLIT)
    return words


def _kind(style: str) -> type[Whole]:
    if style in BY_OUTPUT:
        return SplitByOutput
    if style in BY_INPUT:
        return SplitByInput
    if style in BY_TOKEN:
        return SplitByToken
    return WholeForHeads if style in WHOLE_FOR_HEADS else Whole


def _shared_inputs(styles: dict[str, str]) -> dict[str, Shared]:
    """One for each module that has layers split by output and, to end with, a layer split by input."""
    parents = {name.rpartition(".")[0] for name, style in styles.items() if style in BY_INPUT}
    return {parent: Shared() for parent in parents}


def _splits_heads(parent: str, styles: dict[str, str]) -> bool:
    """Whether what lies between the layers of `parent` is split: where outputs are gathered all ranks compute it."""
    return any(style == "colwise" for name, style in styles.items() if name.rpartition(".")[0] == parent)


def _place_parameters(
    name: str, module: nn.Module, kind: type[Whole], mesh: DeviceMesh, placed: dict[Tensor, nn.Parameter]
) -> None:
    """Make DTensors of the module's own parameters; one that is met again is the one that it was made to."""
    for attribute, parameter in module._parameters.items():
        if parameter is None:
            continue
        place: Shard | Replicate = Replicate()
        if kind in (SplitByOutput, SplitByToken):
            place = Shard(0)
        elif kind is SplitByInput and attribute != "bias":
            place = Shard(1)
        if parameter not in placed:
            # Every rank has the same values, or none yet: nothing has to be sent.
            split = distribute_tensor(parameter.detach(), mesh, [place], src_data_rank=None)
            placed[parameter] = nn.Parameter(split, requires_grad=parameter.requires_grad)
        elif placed[parameter].placements != (place,):  # type: ignore[attr-defined]
            raise DistributedError(
                f"{name}.{attribute} is tied to a parameter that the model's plan splits in another way",
                fix="give the config's base_model_tp_plan embed_tokens: embedding_rowwise",
            )
        module._parameters[attribute] = placed[parameter]
