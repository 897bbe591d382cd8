"""How a worker comes to a server that is not there, and what it is told of a run that is too short."""

import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from forgather.diloco.address import ServerAddress, naming
from forgather.diloco.joining import Introduction, join, require_welcome, too_few_steps
from forgather.diloco.presence import Registered
from forgather.diloco.security import SecurityError
from forgather.errors import EXIT_UNAVAILABLE, ConfigError, DistributedError, StoppedError, UnavailableError
from tests.diloco.loops import address_of
from tests.diloco.running_server import running_server, settings_of
from tests.diloco.test_exchange import VALUES
from tests.ranks import RankPool

NOWHERE = ServerAddress("127.0.0.1", 9)


def test_a_server_that_stays_away_is_no_users_mistake():
    said: list[str] = []
    with pytest.raises(UnavailableError, match="cannot be reached") as raised:
        join(NOWHERE, Introduction("alpha"), patience_s=0.2, may_be_away=False, say=said.append)
    assert raised.value.exit_code == EXIT_UNAVAILABLE
    assert len(said) == 1


def test_a_run_that_is_told_to_stop_does_not_wait_for_a_server():
    begun = time.monotonic()
    with pytest.raises(StoppedError, match="told to stop"):
        join(
            NOWHERE,
            Introduction("alpha"),
            patience_s=60,
            may_be_away=False,
            say=str,
            is_stopping=lambda: time.monotonic() > begun + 0.5,
        )
    assert time.monotonic() - begun < 10


def test_a_run_of_another_model_hears_what_differs_and_is_no_worker(tmp_path):
    with running_server(tmp_path, VALUES, settings_of(VALUES)) as server:
        with pytest.raises(ConfigError, match=r"of another shape: weight \(\[1, 1\] on the server, \[2\] here\)"):
            join(
                address_of(server),
                Introduction("alpha"),
                patience_s=5,
                may_be_away=False,
                say=str,
                trained={"weight": (2,)},
            )
        assert not server.status()["workers"]


def test_who_would_not_be_welcome_hears_it_before_the_run_is_ready(tmp_path, capsys):
    with running_server(tmp_path, VALUES, settings_of(VALUES, sync_every=4)) as server:
        address = address_of(server)
        require_welcome(address, 4, is_leased=False)
        with pytest.raises(SecurityError, match="has another token"):
            require_welcome(replace(address, token="0123456789abcdef"), None, is_leased=False)
        with pytest.raises(ConfigError, match="sync_every 4, and this worker was given 8"):
            require_welcome(address, 8, is_leased=False)
        with pytest.raises(ConfigError, match="the server leases none"):
            require_welcome(address, None, is_leased=True)
        assert not server.status()["workers"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("body", ["<html>", "{}", '{"protocol": 3}', None], ids=["page", "empty", "part", "none"])
def test_a_server_of_another_kind_is_named(body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = ServerAddress("127.0.0.1", server.server_port)
        with pytest.raises(DistributedError, match=f"{address} does not answer as a DiLoCo server") as raised:
            require_welcome(address, is_leased=False)
        thread.join()
    assert "''" not in raised.value.message
    assert raised.value.fix


def test_what_speaks_no_http_may_be_a_server_with_tls(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def end() -> None:
            listening.accept()[0].close()

        thread = threading.Thread(target=end)
        thread.start()
        require_welcome(ServerAddress("127.0.0.1", listening.getsockname()[1]), is_leased=False)
        thread.join()
    assert naming("tls_ca", "CA.pem") in capsys.readouterr().err


def test_all_ranks_hear_that_they_are_not_welcome(tmp_path):
    with running_server(tmp_path, VALUES, settings_of(VALUES)) as server, RankPool(2) as two_ranks:
        wrong = replace(address_of(server), token="0123456789abcdef")
        assert two_ranks.run(refusal, wrong) == [f"{wrong} has another token"] * 2


def refusal(address: ServerAddress) -> str:
    try:
        require_welcome(address, is_leased=False)
    except SecurityError as error:
        return error.message
    return ""


def test_a_server_that_is_away_may_come_while_the_run_prepares(capsys):
    require_welcome(NOWHERE, None, is_leased=True)
    assert "127.0.0.1:9: Connection refused; this run asks again when it is ready\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "momentum", "warning"),
    [
        (9, 0.9, "exchange every 10"),
        (100, 0.9, "10 rounds of 10"),
        (100, 0.5, None),
        (500, 0.9, None),
    ],
)
def test_what_a_run_of_few_rounds_is_told(steps, momentum, warning):
    registered = Registered(settings_of(VALUES, sync_every=10), [], outer={"lr": 0.7, "momentum": momentum})
    told = too_few_steps(Registered.from_json(registered.to_json()), steps)
    assert (told is None) if warning is None else warning in (told or "")
