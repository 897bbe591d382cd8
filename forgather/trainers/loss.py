"""The loss of a causal language model: the sum of cross-entropy over the target tokens of a batch.

The logits of a batch are the largest tensor of a step (rows x vocabulary). Where the model's logits are nothing but
`hidden @ head.weight.T`, they are never made: the head is asked for the loss instead, and computes it in chunks of
rows together with its gradient. Shapes: B rows, L tokens, N = B L, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from forgather.data.batch import NO_TARGET, Batch
from forgather.distributed.exchange import enter
from forgather.distributed.fsdp import reshard
from forgather.distributed.tensor_layers import SplitByOutput, part_of
from forgather.errors import ModelError
from forgather.tensor_boxes import local_box
from forgather.trainers.linear_cross_entropy import VocabularyPart, linear_cross_entropy


class CausalLoss:
    """`loss(batch)` is the sum of the model's cross-entropy over the batch's target tokens: 0-d, fp32.

    The head computes the loss itself where an inspection of `model` finds that allowed; else logits are made.
    `chunk_rows` is how many rows of logits exist at a time; null asks for all. Making one is collective: the inspection
    runs a forward, unless it is `inspected`, a model on meta of the same making, that is to be looked at instead.
    """

    def __init__(
        self, model: PreTrainedModel, chunk_rows: int | None = 512, *, inspected: PreTrainedModel | None = None
    ) -> None:
        self.model = model
        self.chunk_rows = chunk_rows
        self.reason_for_logits = "as asked" if chunk_rows is None else find_reason_for_logits(inspected or model)

    def describe(self) -> str:
        if self.reason_for_logits is None:
            return f"linear cross-entropy, {self.chunk_rows} rows at a time"
        return f"cross-entropy of full logits ({self.reason_for_logits})"

    def __call__(self, batch: Batch) -> Tensor:
        # position_ids restart at each document; the model keeps documents apart by them.
        return self.of(
            batch.targets,
            lambda: self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits,
        )

    def of(self, targets_BL: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """The same for a `forward` of the model that the caller makes; it returns the model's logits."""
        if self.chunk_rows is None or self.reason_for_logits is not None:
            logits_NV = forward().flatten(0, 1).float()
            return F.cross_entropy(logits_NV, targets_BL.flatten(), ignore_index=NO_TARGET, reduction="sum")
        return self._from_head(targets_BL.flatten(), forward, self.chunk_rows)

    def total(self, batches: Iterable[Batch]) -> Tensor:
        """The sum over several batches; all ranks call it with equally many. For what is not trained on."""
        device = next(self.model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            total += self(batch.to(device))
        reshard(self.model)
        return total

    def _from_head(self, targets_N: Tensor, forward: Callable[[], Tensor], chunk_rows: int) -> Tensor:
        head = self.model.get_output_embeddings()

        def compute_loss(hidden_BLD: Tensor) -> Tensor:
            weight, part = head.weight, None
            if isinstance(head, SplitByOutput):
                (first, _), _ = local_box(weight)
                part = VocabularyPart(first, head._part.group)
                hidden_BLD = enter(hidden_BLD, part.group)
            weight_VD = weight.to_local() if isinstance(weight, DTensor) else weight
            return linear_cross_entropy(hidden_BLD.flatten(0, 1), weight_VD, targets_N, chunk_rows, part)

        # Inside the model's forward, where FSDP has gathered the head's weight.
        with replaced_forward(head, compute_loss):
            return forward()


def find_reason_for_logits(model: PreTrainedModel) -> str | None:
    """Why the logits of `model` are more than `hidden @ head.weight.T`, or None when they are just that.

    Looks at the head, then runs two tokens and sees whether the model's logits are the very tensor that the head
    returned. All ranks call it. Raises ModelError for a model without a head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings", fix="train a causal language model (one with a head)"
        )
    split = part_of(head)
    if (type(head) if split is None else split.plain_class).forward is not nn.Linear.forward:
        return f"the head is a {type(head).__name__}"
    if head.bias is not None:
        return "the head has a bias"
    if head._forward_hooks or head._forward_pre_hooks:
        return "the head has hooks"
    returned: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, _args, output: returned.append(output))
    token = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    # A mask of all pairs is taken as it is; to make one of tokens, transformers would have to see values.
    mask = torch.ones((1, 1, 2, 2), dtype=torch.bool, device="meta") if token.is_meta else None
    with torch.no_grad():
        logits = model(input_ids=token, attention_mask=mask, use_cache=False).logits
    hook.remove()
    reshard(model)
    if len(returned) != 1 or logits is not returned[0]:
        return "the model changes the logits after its head"
    return None


@contextmanager
def replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within, calling `module` calls `function`; its hooks still run."""
    module.forward = function  # shadows the method of the class
    try:
        yield
    finally:
        del module.forward
