"""A model whose weights somebody else will fill is not drawn, and everything else of it is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    initialization,
)

from forgather.ml.no_init_weights import no_init_weights
from forgather.ml.utils import default_dtype
from forgather.models.package import Package
from tests.models.example import package

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
STOCK: list[PreTrainedConfig] = [
    LlamaConfig(**SIZES),
    MistralConfig(**SIZES),
    Qwen3Config(**SIZES),
    Gemma3TextConfig(**SIZES),
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
]


class Draws(TorchDispatchMode):
    """Lists the random numbers that are drawn, whoever asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(word in name for word in ("normal_", "uniform_", "random_", "bernoulli", "rand")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    built = package(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=request.param)
    built.write()
    return built


def config_of(folder: Path) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.case(34)
def test_a_package_is_constructed_without_one_initialiser(built: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(built.dir)
    calls: list[str] = []
    for name in ("normal_", "uniform_", "ones_", "zeros_", "trunc_normal_", "kaiming_uniform_"):
        for module in (nn.init, initialization):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, _r=real, _n=name, **k: (calls.append(_n), _r(*a, **k))[1])
    with Draws() as draws:
        AutoModelForCausalLM.from_config(config)
        assert calls  # the hooks see what a construction with initialisers does
        assert draws.seen
        calls.clear(), draws.seen.clear()
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    assert calls == draws.seen == []
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.case(34)
@pytest.mark.parametrize("config", STOCK, ids=lambda config: config.model_type)
def test_models_of_transformers_are_not_drawn_and_compute_the_same_once_filled(config: PreTrainedConfig) -> None:
    drawn = AutoModelForCausalLM.from_config(config).eval()
    with no_init_weights(), Draws() as draws:
        model = AutoModelForCausalLM.from_config(config).eval()
    assert draws.seen == []
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    buffers = dict(drawn.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype
    model.load_state_dict(drawn.state_dict())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, drawn(ids).logits)


@pytest.mark.case(9, 36)
def test_the_block_of_the_documentation(built: Package, tmp_path: Path) -> None:
    tied = built.hf_config["tie_word_embeddings"]
    config = config_of(built.dir)
    float32 = AutoModelForCausalLM.from_config(config)
    float32.save_pretrained(tmp_path)  # which writes its dtype into the config
    with no_init_weights(), default_dtype(torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, float32.model.rotary_emb.inv_freq)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.case(42)
def test_from_pretrained_inside_has_its_buffers(built: Package, tmp_path: Path) -> None:
    saved = AutoModelForCausalLM.from_config(config_of(built.dir))
    saved.save_pretrained(tmp_path)
    with no_init_weights():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(model.model.rotary_emb.inv_freq, saved.model.rotary_emb.inv_freq)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


class DrawsByMethods(nn.Module):
    """Initialises itself as much code outside torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 3.0))
        self.weight.data.normal_()
        nn.init.orthogonal_(matrix := torch.zeros(2, 2))
        self.register_buffer("matrix", matrix)


def test_methods_of_tensors_do_not_draw_either() -> None:
    with no_init_weights():
        module = DrawsByMethods()
    assert torch.equal(module.weight, torch.full((4,), 3.0))
    assert not module.matrix.any()
    assert not torch.equal(DrawsByMethods().weight, torch.full((4,), 3.0))


class InitialisesInPlace(PreTrainedModel):
    """Its initialiser neither draws nor calls a function of torch.nn.init."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(3, 3)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.initialised = True


@pytest.mark.case(34)
def test_the_initialiser_of_a_model_is_not_even_called() -> None:
    assert InitialisesInPlace(LlamaConfig()).linear.initialised
    with no_init_weights():
        assert not hasattr(InitialisesInPlace(LlamaConfig()).linear, "initialised")


def test_everything_is_as_before_when_it_ends_also_by_an_error() -> None:
    before = (nn.init.normal_, nn.modules.activation.xavier_uniform_, PreTrainedModel.initialize_weights)
    with pytest.raises(ZeroDivisionError), no_init_weights(), no_init_weights():
        1 / (nn.init.normal_ is before[0])
    assert before == (nn.init.normal_, nn.modules.activation.xavier_uniform_, PreTrainedModel.initialize_weights)
    assert nn.Linear(8, 8, bias=False).weight.std() > 0.05


@pytest.mark.parametrize("given", ["dtype", "torch_dtype"])
def test_an_explicit_dtype_is_stronger_than_the_default(given: str, recwarn: pytest.WarningsRecorder) -> None:
    with default_dtype(torch.bfloat16):
        assert torch.ones(1).dtype == torch.bfloat16
        assert AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).dtype == torch.bfloat16
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), **{given: torch.float16})
    assert model.dtype == torch.float16


def test_a_dtype_of_integers_is_refused_and_nothing_changes() -> None:
    before = PreTrainedModel._from_config.__func__
    with pytest.raises(TypeError, match="floating"), default_dtype(torch.int64):
        pass
    assert torch.get_default_dtype() == torch.float32
    assert PreTrainedModel._from_config.__func__ is before
