"""Text from plain and sharded models: what transformers' own generate gives, and the run not disturbed."""

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forgather.errors import ModelError
from forgather.generation.sample import find_stop_ids, generate, generate_ids
from forgather.generation.sampling import Sampler
from tests.ranks import RankPool

PROMPT = [3, 1, 4, 1, 5]


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,  # wide, so that the likeliest token changes from place to place
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))


def letters(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 26 letters, `.` for an end and `?` for what it does not know."""
    vocabulary = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz.?")}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_greedy_is_what_transformers_generates(make):
    model = make().eval()
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    ours = generate_ids(model, PROMPT, Sampler(temperature=0), max_new_tokens=30)
    assert PROMPT + ours == expected[0].tolist()
    assert len(set(ours)) > 5  # not the same token for ever, which would prove little


def test_a_model_without_a_cache_gives_the_same():
    model = llama()
    expected = generate_ids(model, PROMPT, Sampler(seed=4), max_new_tokens=20)
    forward = model.forward
    lengths = []

    def forget(**arguments):
        lengths.append(arguments["input_ids"].shape[1])
        output = forward(**arguments | {"use_cache": False})
        output.past_key_values = None
        return output

    model.forward = forget
    assert generate_ids(model, PROMPT, Sampler(seed=4), max_new_tokens=20) == expected
    assert lengths == list(range(5, 25))


def test_a_run_does_not_notice():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    first = generate(model, letters(), "ab", max_new_tokens=10)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(99)
    assert generate(model, letters(), "ab", max_new_tokens=10) == first  # no dropout, no global random numbers


def test_the_mode_comes_back_after_an_error():
    model = llama().train()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        generate(model, letters(), "ab")
    assert model.training


def test_an_end_token_ends_the_text_and_is_not_shown():
    model, tokenizer = llama(), letters(eos_token=".")
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(40))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 5.0
    assert generate(model, tokenizer, "ab", max_new_tokens=10, temperature=0) == "a b"


def test_end_tokens_come_from_the_model_and_the_tokenizer():
    model = llama()
    assert find_stop_ids(model, letters()) == ()
    assert find_stop_ids(model, letters(eos_token=".")) == (26,)
    model.generation_config.eos_token_id = [5, 26]
    assert find_stop_ids(model, letters(eos_token=".")) == (5, 26)


def test_an_empty_prompt_begins_with_the_first_token_there_is():
    model = llama()
    assert generate(model, letters(bos_token="."), "", max_new_tokens=3)
    with pytest.raises(ModelError, match=r"no tokens(.|\n)*fix"):
        generate(model, letters(), "")


def test_tokens_that_the_tokenizer_does_not_have_are_never_written():
    model = llama()  # 40 tokens; the tokenizer has 28
    model.lm_head.weight.data[28:] *= 100
    text = generate(model, letters(), "ab", max_new_tokens=30, seed=3)
    assert len(text.split()) == 32


def test_the_context_is_a_limit_with_a_name():
    model = llama(max_position_embeddings=8)
    assert len(generate_ids(model, PROMPT, Sampler(), max_new_tokens=50)) == 3
    with pytest.raises(ModelError, match="has 8 tokens, and the model's context holds 8"):
        generate_ids(model, [1] * 8, Sampler(), max_new_tokens=1)


@pytest.fixture(scope="module")
def two_ranks():
    with RankPool(2) as pool:
        yield pool


def sample_sharded(cast_inputs: bool | None, by_block: bool, seed: int) -> tuple[list[int], list[int], bool, int]:
    """Greedy and drawn tokens; whether all parameters are shards afterwards; a number only this rank knows."""
    model = llama()
    policy = MixedPrecisionPolicy()
    if cast_inputs is not None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast_inputs)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers if by_block else []:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    torch.manual_seed(dist.get_rank())  # ranks differ in the random numbers of the run
    greedy = generate_ids(model, PROMPT, Sampler(temperature=0), max_new_tokens=20)
    drawn = generate_ids(model, PROMPT, Sampler(seed=seed), max_new_tokens=20)
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return greedy, drawn, sharded, torch.initial_seed()


@pytest.mark.parametrize("by_block", [True, False])
def test_two_ranks_write_what_one_process_writes(two_ranks, by_block):
    model = llama()
    greedy = generate_ids(model, PROMPT, Sampler(temperature=0), max_new_tokens=20)
    drawn = generate_ids(model, PROMPT, Sampler(seed=7), max_new_tokens=20)
    assert two_ranks.run(sample_sharded, None, by_block, 7) == [(greedy, drawn, True, 0), (greedy, drawn, True, 1)]


@pytest.mark.parametrize("cast_inputs", [True, False])
def test_mixed_precision_keeps_the_cache(two_ranks, cast_inputs):
    model = llama()
    for parameter in model.parameters():  # buffers, the rotary frequencies, stay in fp32 under FSDP
        parameter.data = parameter.data.bfloat16()
    greedy = generate_ids(model, PROMPT, Sampler(temperature=0), max_new_tokens=20)
    first, second = two_ranks.run(sample_sharded, cast_inputs, True, 7)
    assert first[0] == second[0] == greedy
