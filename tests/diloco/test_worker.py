"""A loop in a DiLoCo context: exact where it must be, equal to the server after each round, and alone without one."""

import threading
from collections.abc import Callable

import pytest
import torch

from forgather.diloco.outer import Nesterov
from forgather.errors import ConfigError, DistributedError, TrainingError
from tests.diloco.loops import adamw, equal, equals_server, sgd, small_model, train, values_of, worker
from tests.diloco.running_server import running_server, settings_of


def together(*bodies: Callable[[], None]) -> None:
    """Run these at once, and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
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
