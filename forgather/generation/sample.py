"""Text from a model as it is in training: plain or spread over ranks with FSDP2, in any mode, at any moment.

    text = generate(model, tokenizer, "def main(", max_new_tokens=50, temperature=0.8, top_p=0.95, seed=1)

All ranks call it with equal arguments, for a forward of a sharded model gathers its parameters on all of them. A run
does not notice that it was asked: random numbers, train or eval mode and the sharded state are as before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgather.distributed import collectives
from forgather.distributed.fsdp import reshard
from forgather.errors import ModelError
from forgather.generation.sampling import Sampler
from forgather.models.vocabulary import vocab_size


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """`prompt` and what the model makes of it, the same text on every rank.

    It ends at the model's or the tokenizer's end token, after `max_new_tokens`, or when the model's context is full.
    Temperature, top_k, top_p and seed are those of `Sampler`. Raises ModelError for a prompt that fills the context.
    """
    ids = tokenizer(prompt)["input_ids"] or [_first_token(tokenizer)]
    sampler = Sampler(temperature, top_k, top_p, seed, vocab_size=vocab_size(tokenizer))
    new_ids = generate_ids(model, ids, sampler, max_new_tokens=max_new_tokens, stop_ids=find_stop_ids(model, tokenizer))
    return str(tokenizer.decode([*ids, *new_ids], skip_special_tokens=True))


def generate_ids(
    model: PreTrainedModel, ids: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """The tokens that follow `ids`; one of `stop_ids` ends them and is not among them."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(ids) >= context:
        raise ModelError(
            f"the prompt has {len(ids)} tokens, and the model's context holds {context}",
            fix=f"use a prompt of at most {context - 1} tokens",
        )
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    device = next(model.parameters()).device
    new_ids: list[int] = []
    with torch.no_grad(), evaluating(model):
        inputs = list(ids)
        cache = None
        while len(new_ids) < room:
            output = model(
                input_ids=torch.tensor([inputs], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = _agree_on(sampler.choose(output.logits[0, -1]), device)
            if token in stop_ids:
                break
            new_ids.append(token)
            cache = output.get("past_key_values")
            # A model that offers no cache reads the whole text again for each token.
            inputs = [token] if cache is not None else [*ids, *new_ids]
        reshard(model)
    return new_ids


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text, from the model's generation config and the tokenizer."""
    generation_config = getattr(model, "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token for token in [*found, tokenizer.eos_token_id] if token is not None))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _agree_on(token: int, device: torch.device) -> int:
    """Rank 0's token: a rank with other hardware may round to another, and they must go on with the same text."""
    if collectives.world_size() == 1:
        return token
    shared = torch.tensor(token, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError(
        "the prompt has no tokens, and the tokenizer has no token that begins a text",
        fix="use a prompt that is not empty",
    )
