"""A loop in a DiLoCo context: exact where it must be, equal to the server after each round, and alone without one."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from forgather.diloco.outer import Nesterov
from forgather.diloco.worker import DiLoCo
from forgather.errors import ConfigError, DistributedError, TrainingError
from tests.diloco.loops import adamw, equal, equals_server, sgd, small_model, train, values_of, worker
from tests.diloco.running_server import running_server, settings_of


def together(*bodies: Callable[[], None]) -> None:
    """Run these at once, and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def test_one_worker_of_a_server_that_only_averages_trains_as_it_does_alone(tmp_path):
    alone = small_model()
    train(alone, range(12), adamw(alone))
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=3)) as server:
        optimizer = adamw(model)
        with worker(model, optimizer, server):
            train(model, range(12), optimizer)
        assert server.status()["versions"] == [4]
        assert equals_server(model, server)
    assert equal(model, alone)


@pytest.mark.training_case(80)
@pytest.mark.parametrize("num_workers", [2, 4])
def test_averaging_after_every_step_is_one_process_on_the_whole_batch(tmp_path, num_workers):
    whole = small_model()
    train(whole, range(6), sgd(whole))
    models = [small_model() for _ in range(num_workers)]
    share = 8 // num_workers
    values = values_of(small_model())

    def body(number: int, server) -> None:
        optimizer = sgd(models[number])
        with worker(models[number], optimizer, server, f"w{number}"):
            train(models[number], range(6), optimizer, slice(number * share, (number + 1) * share))

    with running_server(tmp_path, values, settings_of(values), num_workers=num_workers) as server:
        together(*(lambda number=number: body(number, server) for number in range(num_workers)))
        assert all(equals_server(model, server) for model in models)
    for one, other in zip(models[0].parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_mean_is_weighted_by_tokens(tmp_path):
    values = {"weight": torch.zeros(3, 2)}

    def body(name: str, gradient: float, tokens: int, server) -> None:
        model = torch.nn.Linear(2, 3, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with worker(model, optimizer, server, name, tokens_per_step=tokens):
            model.weight.grad = torch.full((3, 2), gradient)
            optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((3, 2), -3.0))

    with running_server(tmp_path, values, settings_of(values), num_workers=2) as server:
        together(lambda: body("a", 1.0, 100, server), lambda: body("b", 5.0, 100, server))
    with running_server(tmp_path / "other", values, settings_of(values), num_workers=2) as server:
        together(lambda: body("a", 1.0, 100, server), lambda: body("b", 4.0, 200, server))


def pair(tmp_path, steps: int, **settings) -> tuple[list[torch.nn.Module], bool]:
    """Two workers on different rows; their models, and whether both equal the server's."""
    models = [small_model(), small_model()]
    values = values_of(models[0])
    chosen = settings_of(values, settings.pop("fragments", None), **settings)

    def body(number: int, server) -> None:
        optimizer = adamw(models[number])
        with worker(models[number], optimizer, server, f"w{number}") as diloco:
            train(models[number], range(steps), optimizer, slice(4 * number, 4 * number + 4))
            diloco.finish()

    with running_server(tmp_path, values, chosen, Nesterov(0.7, 0.9), num_workers=2) as server:
        together(lambda: body(0, server), lambda: body(1, server))
        return models, all(equals_server(model, server) for model in models)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_all_workers_end_with_what_the_server_has(tmp_path, codec):
    models, is_equal = pair(tmp_path, 9, sync_every=3, upload=codec, download=codec)
    assert is_equal
    assert equal(*models)
    assert not equal(models[0], small_model())


LAYERS = [[f"{layer}.weight", f"{layer}.bias"] for layer in range(4)]


def test_streaming_with_one_fragment_and_no_delay_is_classic(tmp_path):
    classic, _ = pair(tmp_path / "classic", 8, sync_every=4)
    streaming, _ = pair(
        tmp_path / "streaming", 8, sync_every=4, fragments=[[name for layer in LAYERS for name in layer]], delay=0
    )
    assert equal(classic[0], streaming[0])


def test_fragments_take_turns_and_all_are_exchanged(tmp_path):
    fragments = [LAYERS[0] + LAYERS[2], LAYERS[1] + LAYERS[3]]
    models = [small_model(), small_model()]
    values = values_of(models[0])

    def body(number: int, server) -> None:
        optimizer = adamw(models[number])
        with worker(models[number], optimizer, server, f"w{number}"):
            train(models[number], range(6), optimizer, slice(4 * number, 4 * number + 4))

    with running_server(tmp_path, values, settings_of(values, fragments, sync_every=4), num_workers=2) as server:
        together(lambda: body(0, server), lambda: body(1, server))
        assert server.status()["versions"] == [2, 1]  # after 2, 4 and 6 steps
        for name in fragments[0]:
            assert torch.equal(models[0].get_parameter(name).detach(), server.published(name))
        assert not torch.equal(models[0].get_parameter("1.weight").detach(), server.published("1.weight"))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_with_a_delay_the_progress_made_meanwhile_is_kept_on_top(tmp_path, alpha):
    """One weight, by hand: gradient 1, lr 1, sent after 2 steps, taken in after 3."""
    values = {"weight": torch.zeros(1, 1)}
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step() -> float:
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        return model.weight.item()

    settings = settings_of(values, sync_every=2, delay=1, alpha=alpha)
    with running_server(tmp_path, values, settings, Nesterov(lr=0.5, momentum=0.0)) as server:
        with worker(model, optimizer, server):
            # Sent: 2 steps, -2. The server moves by half of it, to -1; on top comes alpha of the step made meanwhile.
            assert [step(), step(), step()] == [-1.0, -2.0, -1.0 - alpha]
        assert server.published("weight").item() == -1.0


def test_a_delay_of_a_whole_cycle_leaves_no_turn_out(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=2, delay=2)) as server:
        optimizer = adamw(model)
        with worker(model, optimizer, server) as diloco:
            train(model, range(8), optimizer)
            diloco.finish()
        assert server.status()["versions"] == [4]


def test_an_asynchronous_server_takes_what_comes_when_it_comes(tmp_path):
    """Two workers by hand, lr 1: each contribution moves the server by itself, and nobody waits for anybody."""
    values = {"weight": torch.zeros(1, 1)}
    settings = settings_of(values, mode="async")
    with running_server(tmp_path, values, settings, num_workers=1) as server:
        models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
        first, second = (
            worker(model, optimizer, server, f"w{number}")
            for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True))
        )
        with first, second:
            for number, moved in ((0, 1.0), (0, 1.0), (1, 0.5)):
                models[number].weight.grad = torch.full((1, 1), moved)
                optimizers[number].step()
            wait_for(lambda: server.status()["versions"] == [3])
        assert -2.5 <= server.published("weight").item() < -2.0  # the last was of version 0, and may weigh less


def test_finish_takes_in_what_is_under_way(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=2, delay=5)) as server:
        optimizer = adamw(model)
        with worker(model, optimizer, server) as diloco:
            train(model, range(2), optimizer)
            assert diloco.metrics()["round"] == 0
            diloco.finish()
            assert diloco.metrics()["round"] == 1
        assert equals_server(model, server)


def test_a_run_begins_with_the_values_of_the_server(tmp_path):
    values = {name: value + 1.0 for name, value in values_of(small_model()).items()}
    model = small_model()
    with running_server(tmp_path, values) as server, worker(model, sgd(model), server):
        assert equals_server(model, server)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_parameters_in_bf16_send_what_was_learned_and_not_their_rounding(tmp_path, codec):
    """A worker that learns nothing moves nothing, though its parameters cannot hold the server's numbers."""
    values = values_of(small_model())
    model = small_model(torch.bfloat16)
    optimizer = sgd(model)
    with running_server(tmp_path, values, settings_of(values, upload=codec, download=codec)) as server:
        with worker(model, optimizer, server):
            for _ in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
        assert server.status()["versions"] == [3]
        assert all(torch.equal(server.published(name), value) for name, value in values.items())
        assert equals_server(model, server)


@pytest.mark.training_case(79)
def test_numbers_that_are_not_finite_are_not_sent(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values) as server:
        optimizer = sgd(model)

        def body() -> None:
            with worker(model, optimizer, server):
                model[2].weight.grad = torch.full_like(model[2].weight, float("nan"))
                optimizer.step()

        with pytest.raises(TrainingError, match=r"2\.weight has numbers that are not finite"):
            body()
        status = server.status()
        assert status["versions"] == [0]
        assert status["bytes_up"] == 0


def test_without_a_server_it_does_nothing(tmp_path):
    alone, model = small_model(), small_model()
    train(alone, range(3), sgd(alone))
    optimizer = sgd(model)
    with DiLoCo(model, optimizer) as diloco:
        train(model, range(3), optimizer)
        diloco.finish()
    assert equal(model, alone)
    assert diloco.state_dict() == {}
    assert diloco.metrics() == {}


def test_other_parameters_than_the_servers_are_refused_by_name(tmp_path):
    model = small_model()
    values = values_of(model)
    values["extra.weight"] = values.pop("3.bias")
    values["0.weight"] = torch.zeros(20, 7)
    with running_server(tmp_path, values) as server:
        with pytest.raises(ConfigError) as refused:
            worker(model, sgd(model), server).__enter__()
        said = str(refused.value)
        assert all(word in said for word in ("extra.weight", "3.bias", "0.weight", "[20, 7]", "[20, 6]"))
        assert not server.status()["workers"]


def test_another_h_than_the_servers_is_refused(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=7)) as server:
        with pytest.raises(ConfigError, match="sync_every 7, and this worker was given 5"):
            worker(model, sgd(model), server, sync_every=5).__enter__()
        with worker(model, sgd(model), server, sync_every=7) as diloco:
            assert "every 7 steps" in diloco.describe()


def test_a_second_worker_of_a_name_is_refused_and_the_first_goes_on(tmp_path):
    models = [small_model(), small_model()]
    values = values_of(models[0])
    with running_server(tmp_path, values) as server:
        optimizer = sgd(models[0])
        with worker(models[0], optimizer, server):
            with pytest.raises(DistributedError, match="with another key"):
                worker(models[1], sgd(models[1]), server).__enter__()
            train(models[0], range(2), optimizer)
        assert server.status()["versions"] == [2]


def test_no_server_is_an_error_that_says_so(tmp_path):
    model = small_model()
    with pytest.raises(DistributedError, match="cannot be reached"):
        DiLoCo(model, sgd(model), "127.0.0.1:9", "alpha", patience_s=0.2, say=lambda text: None).__enter__()


def test_the_server_hears_how_it_goes_and_commands_are_heard(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=2, heartbeat_s=0.05)) as server:
        optimizer = sgd(model)
        with worker(model, optimizer, server, tokens_per_step=100) as diloco:
            train(model, range(4), optimizer)
            diloco.loss = 2.5
            wait_for(lambda: server.status()["workers"]["alpha"]["loss"] == 2.5)
            told = server.status()["workers"]["alpha"]
            assert told["steps"] == 4
            for command, heard in (("save", diloco.wants_save), ("stop", diloco.wants_stop)):
                assert not heard()
                server.call(lambda command=command: server.coordinator.controls.command(None, command))
                wait_for(heard)
            assert not diloco.wants_save()  # it was told once
            assert diloco.wants_stop()  # it stays so
            moved = diloco.metrics()
            assert moved["up_mb"] * 1e6 >= 2 * 4 * sum(value.numel() for value in values.values())
            assert diloco.metrics()["up_mb"] == 0  # since the last log


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
