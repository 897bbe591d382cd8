"""Weights as the safetensors files of a Hugging Face folder, one or several, and the index of several."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from forgather.conversion.safetensors_file import SafetensorsFile, TensorKind

MAX_SHARD_BYTES = 5 * 10**9

# The tensors of these names, in this order; each is good until the next is asked for.
Stream = Callable[[Sequence[str]], Iterator[torch.Tensor]]


def shards_of(kinds: Mapping[str, TensorKind], max_bytes: int) -> list[list[str]]:
    """Names in the order of the model, cut so that no shard has more than `max_bytes` unless it is one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(kinds, key=_natural):
        if shards[-1] and size + kinds[name].num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += kinds[name].num_bytes
    return shards


def write_shards(folder: Path, kinds: Mapping[str, TensorKind], max_bytes: int, stream: Stream) -> dict[str, str]:
    """Write the weights that `kinds` tells of into `folder`, converted to the dtypes there, the index last.

    Returns the file of each tensor.
    """
    shards = shards_of(kinds, max_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        with SafetensorsFile(folder / file, {name: kinds[name] for name in names}) as written:
            for tensor in stream(written.order):
                written.write(tensor)
    if len(shards) > 1:
        write_index(folder / "model.safetensors.index.json", kinds, places)  # last: it names files that are whole
    return places


def write_index(path: Path, kinds: Mapping[str, TensorKind], places: Mapping[str, str]) -> None:
    """Tell in which file each tensor is, and how large they are together."""
    metadata = {
        "total_size": sum(kind.num_bytes for kind in kinds.values()),
        "total_parameters": sum(kind.num_bytes // kind.dtype.itemsize for kind in kinds.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def converted(kinds: Mapping[str, TensorKind], dtype: torch.dtype | None) -> dict[str, TensorKind]:
    """The same shapes, in `dtype` where they are floating-point and it is given."""
    return {
        name: TensorKind(kind.shape, dtype if dtype is not None and kind.dtype.is_floating_point else kind.dtype)
        for name, kind in kinds.items()
    }


def tell_dtype(config: Path, kinds: Mapping[str, TensorKind]) -> None:
    """Let config.json name the weights' dtype, which is what they are loaded in by default."""
    sizes: dict[torch.dtype, int] = {}
    for kind in kinds.values():
        if kind.dtype.is_floating_point:
            sizes[kind.dtype] = sizes.get(kind.dtype, 0) + kind.num_bytes
    if not sizes:
        return  # a model of integers alone loads as it is stored
    content = json.loads(config.read_text())
    content["dtype"] = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2) + "\n")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
