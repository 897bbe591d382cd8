"""What `forgather model construct` says of a model: as text to read, and as data for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from forgather.models.explain_init import Explained, describe_init
from forgather.models.training_memory import TrainingMemory, training_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; one that several modules share counts once."""

    total: int
    trainable: int
    embedding: int  # of the input embedding, which is the head too where the two are tied


@dataclass(frozen=True)
class Block:
    """A part of the model as one would draw it: an embedding, a layer, a head; shared parameters count where first."""

    name: str
    kind: str
    parameters: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count without touching a value, so that a model on the meta device will do."""
    parameters = list(model.parameters())
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_embeddings().parameters() if get_embeddings is not None else ()
    return ParameterCount(
        total=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        embedding=sum(parameter.numel() for parameter in embeddings),
    )


def count_blocks(model: nn.Module) -> list[Block]:
    """The blocks that hold parameters, in order; their numbers add up to the total."""
    counted: set[nn.Parameter] = set()
    blocks = []
    for name, module, parameters in _blocks(model):
        new = set(parameters) - counted
        counted |= new
        if parameters:
            blocks.append(Block(name, type(module).__name__, sum(parameter.numel() for parameter in new)))
    return blocks


def facts(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    explained: Sequence[Explained] = (),
    fused: bool = False,
) -> dict[str, Any]:
    """What `report` says, as plain data; `initialization` is in it when `explained` is given."""
    first = next(model.parameters())
    return {
        "device": str(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "gradient_checkpointing": _recomputes(model),
        "config": model.config.to_dict(),
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
            "special_tokens": dict(tokenizer.special_tokens_map),
            "has_chat_template": bool(tokenizer.chat_template),
        },
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "parameters": {**asdict(count_parameters(model)), "blocks": [asdict(block) for block in count_blocks(model)]},
        "training_memory_bytes": [
            {**asdict(need), "total": need.total} for need in training_memory(model, fused=fused)
        ],
        **({"initialization": [asdict(each) for each in explained]} if explained else {}),
    }


def report(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    explained: Sequence[Explained] = (),
    fused: bool = False,
) -> str:
    """Configuration, tokenizer, module tree with equal layers folded, parameters, and memory for training.

    With `explained` also which rule each parameter began by. `fused` says that the optimizer steps within backward.
    """
    count = count_parameters(model)
    tied = " (tied to the head)" if getattr(model.config, "tie_word_embeddings", False) else ""
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    recompute = ", gradient checkpointing" if _recomputes(model) else ""
    return "\n".join(
        [
            _header("Configuration"),
            model.config.to_json_string().rstrip(),
            _header("Tokenizer"),
            f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
            *(f"  {role}: {token!r}" for role, token in tokenizer.special_tokens_map.items()),
            f"  chat template: {'yes' if tokenizer.chat_template else 'no'}",
            _header(f"Model on {first.device}, {dtype}, {model.config._attn_implementation} attention{recompute}"),
            repr(model),
            _header("Parameters"),
            f"total      {_number(count.total)}",
            f"trainable  {_number(count.trainable)}",
            f"embedding  {_number(count.embedding)}{tied}",
            *_block_lines(count_blocks(model)),
            _header("Memory for training, without activations"),
            *_memory_lines(training_memory(model, fused=fused), fused),
            *([_header("Initialization"), *describe_init(explained)] if explained else []),
            "",
        ]
    )


def bytes_text(count: int) -> str:
    """1536 -> "1.50 KiB"."""
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} B"


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _blocks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """What holds a list of modules is opened, and so is what holds that; all else is a block."""
    if not any(isinstance(each, nn.ModuleList) for each in module.modules()):
        yield name, module, list(module.parameters())
        return
    yield name, module, list(module.parameters(recurse=False))
    for child_name, child in module.named_children():
        inside = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, nn.ModuleList):
            for number, each in enumerate(child):
                yield f"{inside}.{number}", each, list(each.parameters())
        else:
            yield from _blocks(child, inside)


def _block_lines(blocks: Sequence[Block]) -> list[str]:
    """A line for each block, one for a run of equal layers."""
    rows = []
    for _, members in groupby(blocks, key=lambda block: (block.name.rpartition(".")[0], block.kind, block.parameters)):
        run = list(members)
        first, last = run[0].name, run[-1].name.rpartition(".")[2]
        name = first if len(run) == 1 else f"{first}-{last}"
        times = "" if len(run) == 1 else f"{len(run)} x "
        shared = "  (shared, counted above)" if run[0].parameters == 0 else ""
        rows.append((f"  {name}", f"{times}{run[0].parameters:,}", f"{run[0].kind}{shared}"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return [f"{name:<{widths[0]}}  {number:>{widths[1]}}  {kind}" for name, number, kind in rows]


def _memory_lines(needs: Sequence[TrainingMemory], fused: bool) -> list[str]:
    head = ("dtype", "optimizer", "weights", "gradients", "state", "together")
    rows = [
        head,
        *(
            (
                need.dtype,
                need.optimizer,
                *map(bytes_text, (need.weights, need.gradients, need.optimizer_state, need.total)),
            )
            for need in needs
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [*lines, "with one gradient at a time, the largest"] if fused else lines


def _header(title: str) -> str:
    return f"\n{title}\n{'-' * len(title)}"


def _number(count: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit} ({count:,})"
    return str(count)
