"""A text whose entropy is known: what a model that has learned all of it would reach, and no model goes below.

Each token depends on the one before. A small model learns that in minutes, so ways to train can be compared where they
end, and not while the loss still falls.
"""

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 64
_SHARPNESS = 2.0  # of the transitions: the entropy is then 2.68 nats, where 64 equal ones would have 4.16


class MarkovText:
    """So many rows of `length` tokens, drawn by a seed; all seeds draw from the same transitions."""

    def __init__(self, seed: int, rows: int, length: int) -> None:
        generator = np.random.default_rng(seed)
        limits = transitions().cumsum(1)
        self._rows = np.empty((rows, length + 1), np.int64)
        self._rows[:, 0] = generator.integers(VOCABULARY, size=rows)
        for place in range(length):
            drawn = generator.random((rows, 1)) < limits[self._rows[:, place]]
            drawn[:, -1] = True  # the last limit may be rounded to less than 1
            self._rows[:, place + 1] = drawn.argmax(1)

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Inputs, targets and positions of rows, each [rows, length]."""
        rows = self._rows[numbers]
        inputs, targets = rows[:, :-1], rows[:, 1:]
        return inputs, targets, np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape).copy()


def transitions() -> NDArray[np.float64]:
    """[VOCABULARY, VOCABULARY]: the probability of each token after each."""
    scores = np.exp(_SHARPNESS * np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)))
    return scores / scores.sum(1, keepdims=True)


def entropy() -> float:
    """Nats a token, in the long run."""
    table = transitions()
    shares = np.full(VOCABULARY, 1 / VOCABULARY)
    for _ in range(1000):
        shares = shares @ table
    return float(-(shares[:, None] * table * np.log(table)).sum())
