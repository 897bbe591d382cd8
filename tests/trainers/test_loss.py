"""The loss from the head equals that of full logits; where a model does more than a linear head, logits are made."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from forgather.errors import ModelError
from forgather.trainers.linear_cross_entropy import linear_cross_entropy
from forgather.trainers.loss import CausalLoss
from tests.trainers.tiny import LENGTH, VOCABULARY, join, rows_of_step, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
}


def soft_capped() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0, attn_implementation="eager"))


def scaled() -> nn.Module:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def biased() -> nn.Module:
    model = tiny_llama()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    return model


def of_other_kind() -> nn.Module:
    class Cosine(nn.Linear):
        def forward(self, x):
            return F.linear(F.normalize(x, dim=-1), self.weight)

    model = tiny_llama()
    model.lm_head.__class__ = Cosine
    return model


def hooked() -> nn.Module:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output / 2)
    return model


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH, resid_pdrop=0.0)
    )


REASONS = {
    soft_capped: "changes the logits after its head",
    scaled: "changes the logits after its head",
    biased: "the head has a bias",
    of_other_kind: "the head is a Cosine",
    hooked: "the head has hooks",
    gpt2: None,
    tiny_llama: None,
}


@pytest.mark.case(57)
@pytest.mark.training_case(21)
@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_the_loss_is_that_of_the_logits_whatever_the_model_does(make):
    torch.manual_seed(0)
    model = make().eval()
    reference = copy.deepcopy(model)
    loss = CausalLoss(model, chunk_rows=24)
    if REASONS[make] is None:
        assert loss.describe() == "linear cross-entropy, 24 rows at a time"
    else:
        assert loss.describe().startswith("cross-entropy of full logits (")
        assert REASONS[make] in loss.describe()

    batch = join(rows_of_step(0))
    logits = reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    expected.backward()
    ours = loss(batch)
    ours.backward()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    # Generation still gets logits.
    assert model(input_ids=batch.input_ids).logits.shape == (*batch.input_ids.shape, VOCABULARY)


def test_full_logits_are_never_made():
    model = tiny_llama()
    loss = CausalLoss(model, chunk_rows=8)
    made: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.numel()) or t, lambda t: t):
        loss(join(rows_of_step(0)))
    assert max(made) < 8 * LENGTH * VOCABULARY


def test_documents_of_a_row_do_not_see_each_other():
    model = tiny_llama().eval()
    loss = CausalLoss(model)
    batch = rows_of_step(0)[0]
    split = int((batch.position_ids[0] == 0).nonzero()[1])
    batch.targets[0, :split] = -100
    before = loss(batch).item()
    batch.input_ids[0, :split] = (batch.input_ids[0, :split] + 1) % VOCABULARY
    assert loss(batch).item() == before


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(ModelError, match="LlamaModel has no output embeddings"):
        CausalLoss(tiny_llama().model)


def hidden_weight_targets(rows: int, width: int, vocabulary: int, dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width) * 0.1
    weight[8192:] *= 5  # the highest logit of many rows stands in a later slice
    weight = weight.to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.case(57)
@pytest.mark.parametrize("chunk_rows", [64, 100, 4096])
@pytest.mark.parametrize("vocabulary", [300, 8192 + 11])
@pytest.mark.training_case(19)
def test_bf16_is_as_good_as_a_softmax_in_fp32(chunk_rows, vocabulary):
    hidden, weight, targets = hidden_weight_targets(512, 64, vocabulary, torch.bfloat16)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    exact = F.cross_entropy(exact_hidden @ exact_weight.T, targets, reduction="sum")
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, chunk_rows).item() == loss.item()

    (exact * 0.5).backward()
    (loss * 0.5).backward()
    for ours, theirs in ((hidden, exact_hidden), (weight, exact_weight)):
        assert ours.grad.dtype == torch.bfloat16
        # bf16 has 8 bits: a rounding of the whole result costs 1.7e-3.
        assert (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm() < 4e-3


@pytest.mark.case(57)
@pytest.mark.parametrize("chunk_rows", [64, 100, 4096])
@pytest.mark.parametrize("vocabulary", [300, 8192 + 11])
@pytest.mark.training_case(19)
def test_fp32_is_exact(chunk_rows, vocabulary):
    hidden, weight, targets = hidden_weight_targets(512, 64, vocabulary, torch.float32)
    double_hidden, double_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = F.cross_entropy(double_hidden @ double_weight.T, targets, reduction="sum")
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows)
    assert loss.item() == pytest.approx(exact.item(), rel=3e-7)
    exact.backward()
    loss.backward()
    for ours, theirs in ((hidden, double_hidden), (weight, double_weight)):
        assert (ours.grad - theirs.grad).norm() / theirs.grad.norm() < 5e-7


@pytest.mark.case(58)
@pytest.mark.training_case(20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_target_teach_nothing(dtype):
    hidden, weight, targets = hidden_weight_targets(32, 8, 50, dtype)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), 8)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()
