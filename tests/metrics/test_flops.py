"""FLOPs of a token, against sums done by hand, and the table of peaks."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from forgather.metrics.flops import count_flops, count_matmul_weights, peak_flops, peak_flops_by_name


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
    ],
)
def test_peaks_by_device_name(name, tera):
    assert peak_flops_by_name(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
