"""Feed-forward networks and the norms before them."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from forgather.models.parts.mlp import MLP, GatedMLP
from forgather.models.parts.norm import GemmaRMSNorm, RMSNorm

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_network_is_llamas(activation: str, bias: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    theirs = LlamaMLP(LlamaConfig(**sizes, hidden_act=activation, mlp_bias=bias))
    ours = GatedMLP(hidden_size=16, intermediate_size=24, activation=activation, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(X), theirs(X))


def test_a_plain_network_is_two_matrices_with_an_activation_between() -> None:
    ours = MLP(hidden_size=16, intermediate_size=24, activation="relu")
    wanted = ours.up_proj(X).relu() @ ours.down_proj.weight.T + ours.down_proj.bias
    torch.testing.assert_close(ours(X), wanted)
    assert MLP(hidden_size=16, intermediate_size=24, bias=False).up_proj.bias is None


@pytest.mark.parametrize("kind", [GatedMLP, MLP])
def test_dropout_is_before_the_last_matrix(kind: type[GatedMLP | MLP]) -> None:
    network = kind(hidden_size=16, intermediate_size=24, bias=True, dropout=1.0)
    assert torch.equal(network.train()(X), network.down_proj.bias.expand(2, 5, 16))
    assert not torch.equal(network.eval()(X), network.down_proj.bias.expand(2, 5, 16))


@pytest.mark.parametrize("kind", [GatedMLP, MLP])
def test_activations_that_there_are_not(kind: type[GatedMLP | MLP]) -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'swoosh'; there are: .*silu"):
        kind(hidden_size=16, intermediate_size=24, activation="swoosh")


@pytest.mark.parametrize(("kind", "theirs"), [(RMSNorm, LlamaRMSNorm), (GemmaRMSNorm, Gemma3RMSNorm)])
def test_norms_are_transformers(kind: type[RMSNorm], theirs: type[nn.Module]) -> None:
    ours, other = kind(16, eps=1e-2), theirs(16, eps=1e-2)
    assert torch.equal(ours.weight, other.weight), "where a fresh norm begins"
    torch.testing.assert_close(ours(X), other(X))
    nn.init.normal_(ours.weight, generator=torch.Generator().manual_seed(1))
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), other(X))
    ours.reset_parameters()
    assert torch.equal(ours.weight, kind(16).weight)


def test_gemmas_norm_keeps_float32_until_it_has_scaled() -> None:
    ours, theirs = GemmaRMSNorm(16).bfloat16(), Gemma3RMSNorm(16).bfloat16()
    nn.init.normal_(ours.weight, generator=torch.Generator().manual_seed(1))
    theirs.load_state_dict(ours.state_dict())
    x = (X * 1000).bfloat16()
    assert torch.equal(ours(x), theirs(x))
