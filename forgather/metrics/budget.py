"""What a run is about to do, said before it starts: mesh, size, tokens, epochs, and where the output goes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_RECOMMENDED = (2.0, 3.5, 5.0)


@dataclass(frozen=True)
class Coverage:
    """How often a run of `steps` sees each train token; evaluation and validation tokens do not count."""

    steps: int
    tokens_per_step: int
    train_tokens: int

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        return self.tokens / self.train_tokens

    @property
    def band(self) -> str:
        """very low < 0.5 <= low < 1 <= below < 2 <= good <= 5 < high <= 10 < very high."""
        epochs = self.epochs
        if epochs > 10:
            return "very high"
        if epochs > 5:
            return "high"
        lower_edges = ((2.0, "good"), (1.0, "below"), (0.5, "low"))
        return next((band for edge, band in lower_edges if epochs >= edge), "very low")

    def steps_for(self, epochs: float) -> int:
        """The fewest steps that see each train token `epochs` times; rounded up, so that it is really reached."""
        return math.ceil(epochs * self.train_tokens / self.tokens_per_step)


_MEANING = {
    "very low": "most of the data is never seen",
    "low": "some of the data is never seen",
    "below": "less than the 2 to 5 epochs that are usual for a small corpus",
    "good": "2 to 5 epochs are usual for a small corpus",
    "high": "the model may begin to learn the data by heart",
    "very high": "the model will learn the data by heart",
}


def describe(
    *,
    mesh: str,
    parameters: int,
    coverage: Coverage,
    output: str,
    steps_done: int = 0,
    notes: Sequence[str] = (),
) -> str:
    """The lines printed before a run; a pure function of its arguments. It informs and never asks.

    `parameters` of the whole model, tied ones once. `steps_done` of an earlier part of the run, which counts as well.
    `notes` are further lines ("name: text") of those who know more, such as what an `auto` became.
    """
    lines = [
        ("mesh", mesh),
        ("parameters", f"{parameters:,}"),
        ("tokens", f"{_tokens(coverage)}; {coverage.tokens / parameters:,.3g} a parameter"),
        ("data", _epochs(coverage)),
    ]
    if steps_done:
        lines.append(("resumed", _resumed(coverage, steps_done)))
    lines += [(name.strip(), text.strip()) for name, _, text in (note.partition(":") for note in notes)]
    lines.append(("output", output))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _tokens(coverage: Coverage) -> str:
    return f"{coverage.tokens_per_step:,} a step x {coverage.steps:,} steps = {coverage.tokens:,}"


def _epochs(coverage: Coverage) -> str:
    text = (
        f"{coverage.train_tokens:,} train tokens: {coverage.epochs:.2f} epochs, "
        f"{coverage.band} ({_MEANING[coverage.band]})"
    )
    if coverage.band == "good":
        return text
    wanted = ", ".join(f"{coverage.steps_for(epochs):,} for {epochs:g}" for epochs in _RECOMMENDED)
    return f"{text}; steps: {wanted}"


def _resumed(coverage: Coverage, steps_done: int) -> str:
    done = Coverage(steps_done, coverage.tokens_per_step, coverage.train_tokens)
    left = Coverage(max(0, coverage.steps - steps_done), coverage.tokens_per_step, coverage.train_tokens)
    return f"after step {steps_done:,}: {done.epochs:.2f} epochs seen, {left.epochs:.2f} to come"
