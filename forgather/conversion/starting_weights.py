"""The weights that a run begins with, out of any checkpoint or Hugging Face folder, straight into today's shards."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from forgather.conversion.listing import listed
from forgather.conversion.model_folder import tokenizer_in
from forgather.conversion.weight_sources import CheckpointSource, WeightSource, fingerprint, open_weights
from forgather.distributed.collectives import (
    broadcast_object,
    failing_together,
    gather_objects,
    rank,
    require_equal,
)
from forgather.errors import CheckpointError
from forgather.tensor_boxes import local_box, local_part


class StartingWeights:
    """What a run that has no checkpoint of its own begins with: the weights in `path`, or with null those it has drawn.

    `path` is a checkpoint or a run (its newest), a Hugging Face folder, or one of its files. Weights alone are taken;
    learning rate, schedule, step and place in the data are the new run's. `tokenizer` is the run's: the weights of a
    token are of use only where it is the same token.
    """

    def __init__(self, path: str | Path | None, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.tokenizer = tokenizer

    def load(self, weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> str | None:
        """Fill `weights`, which may be sharded, and say what was done; None where there is nothing to begin with.

        Collective: each rank gives its own part of the model. `tied` maps names to those that they are tied to.
        CheckpointError, before a weight is changed, when shapes differ (both are listed), when the folder lacks a
        weight or has one that the model lacks, and when its tokenizer is another; and when the weights are not those
        that were saved. DistributedError when ranks find different files under one path.
        """
        if self.path is None:
            return None
        source = self._open(self.path)
        chosen = {name: found for name in weights if (found := _stored_name(name, source, tied)) is not None}
        shapes = {
            name: (list(weights[name].shape), list(source.kinds[there].shape))
            for name, there in chosen.items()
            if tuple(weights[name].shape) != source.kinds[there].shape
        }
        everywhere = gather_objects(([name for name in weights if name not in chosen], shapes, set(chosen.values())))
        used = set().union(*(names for _, _, names in everywhere)) | tied.keys()
        _require_fit(
            source,
            unused=[name for name in source.kinds if name not in used and not name.endswith(_COMPUTED)],
            missing=sorted({name for names, _, _ in everywhere for name in names}),
            differing={name: both for _, differing, _ in everywhere for name, both in differing.items()},
        )
        targets = {there: weights[name] for name, there in chosen.items()}
        if isinstance(source, CheckpointSource):
            source.read_into(targets)
        else:
            with failing_together(), torch.no_grad():
                _fill(source, targets)
        return f"beginning with the weights in {source.path}"

    def _open(self, path: Path) -> WeightSource:
        """The weights in `path`, which are the same on every rank."""
        source: WeightSource | None = None
        # A live run may save between two ranks' looks at it: which of its checkpoints is the newest, one rank says.
        with failing_together():
            if rank() == 0:
                source = open_weights(path)
        found = broadcast_object(None if source is None else source.path)
        assert found is not None, "rank 0 has opened it"
        with failing_together():
            source = source or open_weights(found)
            self._require_same_tokenizer(found)
            seen = fingerprint(source)
        fix = "let every host have the same files there: copy them anew, or use one folder that all hosts see"
        require_equal(f"what {found} holds", seen, fix=fix)
        return source

    def _require_same_tokenizer(self, path: Path) -> None:
        theirs = tokenizer_in(path)
        if theirs is None or self.tokenizer is None or theirs.get_vocab() == self.tokenizer.get_vocab():
            return
        raise CheckpointError(
            f"the tokenizer in {path} has {len(theirs)} tokens, and this run's, with {len(self.tokenizer)}, is "
            "another: rows of the embedding would stand for other tokens",
            fix="extend lib:train/fine_tune.yaml, which takes model and tokenizer from there",
        )


# Buffers that a model computes for itself, which older files have among their weights.
_COMPUTED = (".inv_freq", ".attn.bias", ".attn.masked_bias")


def _stored_name(name: str, source: WeightSource, tied: Mapping[str, str]) -> str | None:
    """What the source calls a weight: by its name, or by one that is tied to it."""
    names = [name, *(alias for alias, known in tied.items() if known == name)]
    return next((candidate for candidate in names if candidate in source.kinds), None)


def _require_fit(
    source: WeightSource, missing: list[str], unused: list[str], differing: Mapping[str, tuple[list[int], list[int]]]
) -> None:
    if differing:
        lines = [f"{name} {here}, {there}" for name, (here, there) in differing.items()]
        raise CheckpointError(
            f"{source.path} is of another model than this run; in this run, and in the folder:{listed(lines)}",
            fix="leave the sizes to the folder: extend lib:train/fine_tune.yaml; or give the run's model the same",
        )
    if missing:
        raise CheckpointError(
            f"{source.path} has no value for{listed(missing)}",
            fix="begin with a model of this architecture; `forgather import` brings in that of another",
        )
    if unused:
        raise CheckpointError(
            f"{source.path} is of a larger model than this run, which has no place for{listed(unused)}",
            fix="leave the sizes to the folder: extend lib:train/fine_tune.yaml; or give the run's model the same",
        )


def _fill(source: WeightSource, targets: Mapping[str, torch.Tensor]) -> None:
    for name in source.kinds:  # in the order of the source, which is that of its files
        if name in targets:
            offsets, sizes = local_box(targets[name])
            region = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            local_part(targets[name]).copy_(source.read(name)[region])
