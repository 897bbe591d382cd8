"""What one optimizer step hands to the meter: device tensors, so that a step never waits for its own numbers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One rank's account of one optimizer step. Nothing in it has been copied off the device.

    loss_sum: 0-d, detached; this rank's sum of loss over its target tokens, divided by `num_targets`. Summed over the
        ranks it is the step's mean loss in nats a token.
    num_targets: target tokens of the whole global batch, the same on every rank.
    grad_norm: 0-d; the norm over all parameters and shards, before clipping, the same on every rank.
    lr: the learning rate that the step was made with.
    tokens: input tokens that this rank put through the model in this step, padding included.
    """

    loss_sum: Tensor
    num_targets: Tensor | int
    grad_norm: Tensor
    lr: float
    tokens: int
