"""Which token comes next: greedy, or drawn at a temperature from the likeliest few."""

import torch
from torch import Tensor

from forgather.errors import ModelError, TrainingError


class Sampler:
    """Chooses tokens from scores. The same seed and scores give the same tokens, on any device.

    temperature: 0 takes the likeliest token; 1 draws from the model's own distribution; more flattens it.
    top_k: draw among the k likeliest only. top_p: among the fewest that have this much of the probability together
        (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751).
    vocab_size: tokens from here on are never chosen: a model's vocabulary may be padded beyond its tokenizer's.

    It draws from a generator of its own and on the CPU, so the run's random numbers stay as they are.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if temperature < 0:
            raise TrainingError(f"temperature is {temperature}", fix="use 0 for the likeliest token, or more")
        if top_k is not None and top_k < 1:
            raise TrainingError(f"top_k is {top_k}", fix="use 1 or more, or null for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise TrainingError(f"top_p is {top_p}", fix="use more than 0 and at most 1, or null for all tokens")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token for scores of shape [V]."""
        logits_V = logits_V.detach().float().cpu()[: self.vocab_size]
        if logits_V.isnan().any():
            # Where the draw would abort the process on some devices.
            raise ModelError(
                "the model's scores are not numbers (NaN)", fix="go back to a checkpoint with a finite loss"
            )
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = self.distribution(logits_V)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))

    def distribution(self, logits_V: Tensor) -> Tensor:
        """The probabilities [V] that tokens are drawn with, at a temperature above 0."""
        sorted_V, order_V = (logits_V / self.temperature).sort(descending=True, stable=True)
        if self.top_k is not None:
            sorted_V[self.top_k :] = -torch.inf
        probabilities_V = sorted_V.softmax(0)
        if self.top_p is not None:
            # A token stays when those before it do not have top_p yet; so the likeliest always stays.
            before_V = probabilities_V.cumsum(0) - probabilities_V
            probabilities_V[before_V >= self.top_p] = 0.0
        return torch.zeros_like(probabilities_V).scatter_(0, order_V, probabilities_V / probabilities_V.sum())
