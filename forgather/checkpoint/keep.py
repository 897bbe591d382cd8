"""Which checkpoints of a run stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forgather.errors import CheckpointError


@dataclass(frozen=True)
class Keep:
    """What stays: the `last` newest, each whose step `every` divides, and the `best` by a metric; the union of them.

    A checkpoint has the metrics of the evaluation that was made at its very step, in its manifest; the best are those
    with the lowest value of `metric`, or with `highest` the highest. One that was not evaluated is none of the best.
    So there is no list of the best beside the checkpoints, which could say something else than they do.
    """

    last: int = 2
    every: int | None = None
    best: int | None = None
    metric: str = "loss"
    highest: bool = False

    def __post_init__(self) -> None:
        if self.last < 1:
            raise CheckpointError(f"keep.last is {self.last}, and a run needs one checkpoint", fix="keep.last: 1")
        for key, value in (("every", self.every), ("best", self.best)):
            if value is not None and value < 1:
                raise CheckpointError(f"keep.{key} is {value}", fix="a whole number from 1, or null for no such rule")

    def doomed(self, whole: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that no rule keeps, lowest first, of whole checkpoints given as step and metrics."""
        steps = sorted(whole)
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.best is not None:
            kept |= set(self.ranked(whole)[: self.best])
        return [step for step in steps if step not in kept]

    def ranked(self, whole: Mapping[int, Mapping[str, float]]) -> Sequence[int]:
        """The steps that have the metric, best first; of equals the later."""
        measured = {step: metrics[self.metric] for step, metrics in whole.items() if self.metric in metrics}
        # A value that is no number (NaN is unequal to itself) is no candidate: it would compare as anything.
        sound = [step for step, value in measured.items() if value == value]
        return sorted(sound, key=lambda step: (-measured[step] if self.highest else measured[step], -step))
