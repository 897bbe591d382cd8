"""FLOPs of a token, against sums done by hand, and the table of peaks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from forgather.metrics.flops import (
    count_flops,
    count_flops_of,
    count_matmul_weights,
    peak_flops,
    peak_flops_by_name,
)


def llama(**changes) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


# q and o: 64 x 64; k and v: 64 x 32 (2 of 4 heads); gate, up and down: 64 x 160. Norms are no matrices.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
HEAD = 1000 * 64


@pytest.mark.parametrize("tied", [False, True])
def test_llama_by_hand(tied):
    flops = count_flops(llama(tie_word_embeddings=tied), length=128)
    assert flops.matmul == 6 * (3 * LAYER + HEAD)  # the head counts once, tied or not; the embedding never
    assert flops.attention == 12 * 3 * 4 * 16 * 128
    assert flops.per_token == flops.matmul + flops.attention == 1_158_144 + 294_912


def test_heads_wider_than_the_hidden_size_over_their_number():
    assert count_flops(llama(head_dim=32), length=10).attention == 12 * 3 * 4 * 32 * 10


def test_gpt2_small_counts_no_positions_and_its_tied_head():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    block = 768 * (3 * 768) + 768 * 768 + 2 * 768 * (4 * 768)
    assert count_matmul_weights(model) == 12 * block + 50257 * 768 == 123_532_032


@pytest.mark.training_case(44)
def test_six_operations_a_weight():
    # A million weights and no attention to speak of, a thousand tokens: 6e9 operations.
    class Linear(nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**shape))

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1000, 1000, device="meta"))

        def get_output_embeddings(self) -> None:
            return None

    shape = {"num_attention_heads": 1, "hidden_size": 1, "num_hidden_layers": 0}
    assert count_flops(Linear(), length=1000).per_token * 1000 == 6 * 10**9


def test_of_a_mixture_the_experts_count_that_a_token_is_sent_to():
    with torch.device("meta"):
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=1000,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=8,
                num_experts_per_tok=2,
            )
        )
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert count_matmul_weights(model) == 3 * (attention + 8 * 64 + 2 * 3 * 64 * 160) + HEAD
    assert count_flops(model, 1).parameters == 3 * (attention + 8 * 64 + 8 * 3 * 64 * 160 + 2 * 64) + 2 * HEAD + 64


def test_a_source_is_counted_whole_without_being_held():
    class Source:
        def construct(self, device: str = "meta") -> nn.Module:
            assert device == "meta"
            return llama(tie_word_embeddings=True)

    flops = count_flops_of(Source(), length=128)
    assert flops == count_flops(llama(tie_word_embeddings=True), length=128)
    assert flops.parameters == 3 * (LAYER + 2 * 64) + HEAD + 64


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA A1000", None),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA RTX 6000 Ada Generation", 364.25),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_by_device_name(name, tera):
    assert peak_flops_by_name(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
