"""The composed Llama computes what transformers' Llama computes, whichever way it is called."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from forgather import Project
from forgather.errors import ModelError
from forgather.models.construct import construct, load_classes
from forgather.models.initialize import initialize
from forgather.models.package import Package
from tests.models.example import LLAMA, llama_config, package

TOKENS = torch.arange(60).view(3, 20) % 53 + 3


def twin(model: PreTrainedModel, **sizes: Any) -> LlamaForCausalLM:
    """transformers' Llama with the same weights, in the same implementation of attention."""
    other = LlamaForCausalLM._from_config(llama_config(**sizes), attn_implementation=model.config._attn_implementation)
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def model(tiny: Package) -> PreTrainedModel:
    return tiny.construct("cpu").eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_are_llamas(tiny: Package, attention: str, packed: bool) -> None:
    ours = tiny.construct("cpu", attn_implementation=attention)
    theirs = twin(ours)
    positions = torch.cat([torch.arange(9), torch.arange(6), torch.arange(5)]).expand(3, -1) if packed else None
    labels = TOKENS.clone()
    labels[:, :4] = -100
    outputs = [
        model(TOKENS, position_ids=positions, labels=labels, use_cache=False, num_items_in_batch=7)
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, one), (same, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_packed_documents_do_not_see_one_another(
    model: PreTrainedModel, attention: str, use_cache: bool | None
) -> None:
    model.set_attn_implementation(attention)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(3, -1)
    together = model(TOKENS, position_ids=positions, use_cache=use_cache).logits
    apart = torch.cat([model(TOKENS[:, :12]).logits, model(TOKENS[:, 12:]).logits], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_the_built_graph_and_the_generated_package_are_one_model(tiny: Package, model: PreTrainedModel) -> None:
    config = load_classes(tiny.dir).config
    config._attn_implementation = "sdpa"
    graph = Project(LLAMA).build("model", given={"hf_config": config}).eval()
    initialize(graph, tiny.init_rules, 0)
    model.set_attn_implementation("sdpa")
    assert torch.equal(graph(TOKENS).logits, model(TOKENS).logits)


def test_attention_is_looked_up_at_each_call(model: PreTrainedModel) -> None:
    logits = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        outputs = model(TOKENS, output_attentions=attention == "eager", output_hidden_states=True)
        logits.append(outputs.logits)
        assert len(outputs.hidden_states) == 4
        if attention == "eager":
            assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 4, 20, 20)] * 3
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_changes_nothing_before_it(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    changed = TOKENS.clone()
    changed[:, 11] = 99
    before, after = model(TOKENS).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_greedy_generation_is_the_same_with_any_cache_and_padding(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = TOKENS[:, :6]
    plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(plain, model.generate(prompt, **options))
    assert torch.equal(plain, model.generate(prompt, cache_implementation="static", disable_compile=True, **options))
    padded = torch.cat([torch.ones(3, 4, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(10) >= 4).long().expand(3, -1)
    assert torch.equal(plain[:, 6:], model.generate(padded, attention_mask=mask, **options)[:, 10:])
    assert torch.equal(plain, twin(model).eval().generate(prompt, pad_token_id=1, **options))


def test_a_cache_continues_where_it_stopped(model: PreTrainedModel) -> None:
    whole = model(TOKENS, use_cache=False)
    assert whole.past_key_values is None
    first = model(TOKENS[:, :13])
    assert isinstance(first.past_key_values, DynamicCache)
    second = model(TOKENS[:, 13:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole.logits[:, 13:], rtol=1e-5, atol=1e-5)


def test_no_cache_is_opened_in_training(tiny: Package) -> None:
    assert tiny.construct("cpu").train()(TOKENS).past_key_values is None


def test_recomputation_changes_no_gradient(tiny: Package) -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny.construct("cpu").train()
        if recompute:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_is_mistrals(tmp_path: Any, attention: str) -> None:
    ours = package(tmp_path / "windowed", sliding_window=4).construct("cpu", attn_implementation=attention).eval()
    sizes = llama_config().to_dict()
    config = MistralConfig(**{key: sizes[key] for key in sizes if key not in ("model_type", "architectures")})
    config.sliding_window = 4
    theirs = MistralForCausalLM._from_config(config, attn_implementation=attention).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(ours.generate(TOKENS, **options), theirs.generate(TOKENS, **options))
    one_layer = ours.model
    one_layer.layers = one_layer.layers[:1]
    changed = TOKENS.clone()
    changed[:, 0] = 99
    same = (one_layer(TOKENS).last_hidden_state == one_layer(changed).last_hidden_state).all(-1)
    assert same[:, 4:].all()
    assert not same[:, 3].any()


def test_rotary_frequencies_stay_float32_and_are_transformers(tmp_path: Any) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"rope_parameters": rope, "hidden_size": 256, "max_position_embeddings": 131072}
    ours = package(tmp_path / "long", **sizes).construct("cpu", dtype=torch.bfloat16)
    theirs = LlamaForCausalLM(llama_config(**sizes)).model.rotary_emb.inv_freq
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs)
    cast = ours.float().bfloat16()
    assert torch.equal(cast.model.rotary_emb.inv_freq, theirs)
    assert theirs[1].item() == pytest.approx(0.6636, abs=1e-4)
    assert theirs[-1].item() == pytest.approx(9.418e-8, rel=1e-3)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rotary_variants_are_transformers(tmp_path: Any, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    sizes = {"rope_parameters": rope, "max_position_embeddings": 16}
    ours = package(tmp_path / rope_type, **sizes).construct("cpu").eval()
    torch.testing.assert_close(ours(TOKENS).logits, twin(ours, **sizes).eval()(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 60}, "15 channels"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "unknown rope_type 'spiral'; .*llama3"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        package(tmp_path / "wrong", **sizes).construct()


def test_unknown_attention(tiny: Package) -> None:
    with pytest.raises(ModelError, match="'guessing'\n  fix: use one of eager, sdpa, "):
        construct(tiny.dir, attn_implementation="guessing")


def test_neither_ids_nor_embeddings(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    embedded = model.get_input_embeddings()(TOKENS)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(TOKENS).logits)
