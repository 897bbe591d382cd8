"""A trial trains as the formula of SGD says, fused or not, recomputed or not, and names what is not finite."""

import math
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forgather.errors import ModelError
from forgather.models.package import Package
from forgather.models.parts.positions import LearnedPositions, SinusoidalPositions
from forgather.trainers.trial import TrialStep, try_training
from forgather.trainers.trial_batches import random_batches
from tests.models.example import package
from tests.models.parts.composing import compose, config

VOCABULARY = 50


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package(tmp_path_factory.mktemp("trial") / "composed")


def tiny(*, tied: bool = False, layers: int = 2, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",
        )
    )


def batches(steps: int, *, length: int = 12) -> Iterator[dict[str, Tensor]]:
    return islice(random_batches(VOCABULARY, rows=3, length=length, packed=False), steps)


def numbers(steps: list[TrialStep]) -> list[tuple[float | None, float | None]]:
    return [(step.loss, step.grad_norm) for step in steps]


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_sgd_on_the_models_own_loss(tied: bool) -> None:
    model, reference = tiny(tied=tied), tiny(tied=tied)
    steps = list(try_training(model, batches(3), lr=0.5))
    for step, batch in zip(steps, batches(3), strict=True):
        loss = reference(**batch).loss
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), abs=1e-6)
        assert step.grad_norm == pytest.approx(
            torch.nn.utils.get_total_norm(
                [parameter.grad for parameter in reference.parameters() if parameter.grad is not None]
            ).item(),
            rel=1e-5,
        )
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.case(13)
@pytest.mark.parametrize("tied", [False, True])
def test_fused_gives_the_same_values_and_leaves_no_gradient(tied: bool) -> None:
    apart, fused = tiny(tied=tied), tiny(tied=tied)
    before = [parameter.detach().clone() for parameter in fused.parameters()]
    expected = list(try_training(apart, batches(3), lr=0.5))
    for step, other in zip(try_training(fused, batches(3), lr=0.5, fuse=True), expected, strict=True):
        assert all(parameter.grad is None for parameter in fused.parameters())
        assert step.loss == other.loss
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    for was, one, two in zip(before, apart.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(was, two)


def test_a_fused_trial_holds_one_gradient_at_a_time() -> None:
    model = tiny(layers=4)
    most = 0

    def count(_parameter: Tensor) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # before the trial's, so while the gradient is still there
    list(try_training(model, batches(1), lr=0.1, fuse=True))
    assert most == 1


def test_hooks_do_not_outlive_the_trial() -> None:
    model = tiny()
    list(try_training(model, batches(1), lr=0.1, fuse=True))
    [batch] = batches(1)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.case(26)
@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
@pytest.mark.parametrize("fuse", [False, True])
def test_recomputation_changes_no_value(every: int, recomputed: list[int], fuse: bool) -> None:
    plain, saving = tiny(layers=4), tiny(layers=4)
    saving.activation_checkpointing_enable(every_n_layers=every)
    forwards = [0] * 4
    for number, layer in enumerate(saving.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, number=number: forwards.__setitem__(number, forwards[number] + 1)
        )
    assert numbers(list(try_training(plain, batches(2), lr=0.5, fuse=fuse))) == numbers(
        list(try_training(saving, batches(2), lr=0.5, fuse=fuse))
    )
    assert forwards == [4 if number in recomputed else 2 for number in range(4)]
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.case(12)
@pytest.mark.parametrize("fuse", [False, True])
def test_on_meta_only_shapes_are_known(fuse: bool, composed: Package) -> None:
    model = composed.construct("meta")
    vocabulary = model.config.vocab_size
    steps = list(try_training(model, batches(2), lr=0.1, fuse=fuse))
    assert steps == [TrialStep(1, (3, 12, vocabulary)), TrialStep(2, (3, 12, vocabulary))]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_packed_rows_on_meta(composed: Package) -> None:
    model = composed.construct("meta")
    packed = islice(random_batches(VOCABULARY, rows=2, length=9, packed=True), 1)
    assert [step.logits_shape for step in try_training(model, packed, lr=0.1)] == [(2, 9, model.config.vocab_size)]


@pytest.mark.parametrize("fuse", [False, True])
def test_a_loss_that_is_not_finite_names_the_module_and_ends_the_trial(fuse: bool) -> None:
    model = tiny()
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: output * math.inf)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    [step] = try_training(model, batches(3), lr=0.1, fuse=fuse)
    assert step.problem is not None
    assert step.problem.startswith("loss nan: the first output that is not finite is that of model.layers.1")
    assert step.grad_norm is None
    assert all(torch.equal(was, parameter) for was, parameter in zip(before, model.parameters(), strict=True))


def test_a_parameter_that_is_not_finite_is_named() -> None:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    [step] = try_training(model, batches(3), lr=0.1)
    assert step.problem == "loss nan: values that are not finite in model.layers.0.mlp.up_proj.weight"


def test_a_gradient_that_is_not_finite_names_the_parameter_and_updates_nothing() -> None:
    model = tiny()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    [step] = try_training(model, batches(3), lr=0.1)
    assert step.problem == "gradient norm nan: model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(was, parameter) for was, parameter in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fuse", [False, True])
def test_an_update_that_leaves_no_finite_values_is_a_problem_of_its_step(fuse: bool) -> None:
    model = tiny()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 9.0))
    [step] = try_training(model, batches(1), lr=1e38, fuse=fuse)
    assert step.problem is not None
    assert "the update left values that are not finite in model.embed_tokens.weight" in step.problem
    assert "lower the learning rate" in step.problem


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float16, 1e5), (torch.float32, 1e39)])
def test_a_learning_rate_that_the_dtype_cannot_hold_is_refused(dtype: torch.dtype, lr: float) -> None:
    with pytest.raises(ModelError, match=f"more than {str(dtype).removeprefix('torch.')} holds"):
        list(try_training(tiny().to(dtype), batches(1), lr=lr))


def test_parameters_that_backward_does_not_reach_are_named() -> None:
    model = tiny()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    model.model.norm.weight.requires_grad_(False)
    [step] = try_training(model, batches(1), lr=0.1)
    assert step.without_gradient == ("idle",)
    assert model.model.norm.weight.eq(1).all()


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        list(try_training(tiny().requires_grad_(False), batches(1), lr=0.1))


def test_what_a_part_refuses_is_the_users_to_mend() -> None:
    model = tiny()

    def refuse(_module: object, _inputs: object) -> None:
        raise ValueError("a row of 12 tokens, and positions for 8")

    model.model.embed_tokens.register_forward_pre_hook(refuse)
    with pytest.raises(ModelError, match="positions for 8"):
        list(try_training(model, batches(1), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_are_measured_without_overflow(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 300.0))  # squares leave float16
    [step] = try_training(model, batches(1), lr=0.0)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert step.grad_norm == pytest.approx(300.0 * total**0.5, rel=1e-2)
    assert step.problem is None


@pytest.mark.parametrize("kind", [LearnedPositions, SinusoidalPositions])
def test_on_meta_a_position_beyond_the_last_is_what_it_is_elsewhere(
    kind: type[LearnedPositions | SinusoidalPositions],
) -> None:
    message = "a sequence of 21 tokens is longer than the 20 positions"
    for device in ("cpu", "meta"):
        model = compose(config("sdpa"), embed_positions=kind(20, 32)).to(device)
        with pytest.raises(ModelError, match=message):
            list(try_training(model, batches(1, length=21), lr=0.1))
        packed = random_batches(VOCABULARY, rows=2, length=24, packed=True)
        [step] = try_training(model, islice(packed, 1), lr=0.1)
        assert step.logits_shape[:2] == (2, 24), "a packed row may be longer than its documents"
