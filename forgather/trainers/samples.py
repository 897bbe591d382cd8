"""Text that the model writes now and then during a run: the quickest way to see what it has learnt."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgather.generation.sample import generate
from forgather.metrics.meter import Meter
from forgather.trainers.events import Finished, Outcome, StepEnded
from forgather.trainers.interval import Interval
from forgather.trainers.reports import Reports


class SampleText:
    """A hook that lets the model continue each of `prompts`, every `every` steps and after the last one of the run.

    The same seed each time: what changes between two samples is the model. Training does not notice. A run that is told
    to stop may have seconds left, and takes none of them for a sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reports: Reports,
        meter: Meter,
        *,
        prompts: Sequence[str],
        every: int | None = None,
        max_new_tokens: int = 60,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = 0.95,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reports = reports
        self.meter = meter
        self.prompts = prompts
        self.interval = Interval("every of the samples", every)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self._last: int | None = None

    def on_step_end(self, event: StepEnded) -> None:
        if self.interval.is_due(event.step) and not event.is_stopping:
            self.write(event.step)

    def on_finish(self, event: Finished) -> None:
        if event.outcome is Outcome.FINISHED and self._last != event.step:
            self.write(event.step)

    def write(self, step: int) -> None:
        """Sample now, and report the texts under the kind `sample`. All ranks call it."""
        self._last = step
        with self.meter.doing("sampling"):
            for number, prompt in enumerate(self.prompts):
                text = generate(
                    self.model,
                    self.tokenizer,
                    prompt,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    seed=self.seed,
                )
                self.reports.write(step, {f"text_{number}": text}, kind="sample")
