"""A server is open to nobody who lacks its token, and the token is nowhere but in its file."""

import base64
import os
import stat
from multiprocessing.pool import ThreadPool

import pytest

from forgather.diloco.security import (
    SecurityError,
    is_authorized,
    is_loopback,
    require_protection,
    token_of_client,
    token_of_server,
)


def test_the_token_is_made_once_and_is_for_its_owner_alone(tmp_path):
    file = tmp_path / "server" / "token"
    umask = os.umask(0)
    try:
        token = token_of_server(file)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(token) >= 43
    assert token_of_server(file) == token == file.read_text().strip()
    assert [path.name for path in file.parent.iterdir()] == ["token"]
    assert token_of_server(tmp_path / "other") != token


def test_two_that_start_at_once_have_one_token(tmp_path):
    with ThreadPool(8) as pool:
        assert len(set(pool.map(lambda _: token_of_server(tmp_path / "token"), range(8)))) == 1


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644])
def test_a_token_that_others_can_read_is_none(tmp_path, mode):
    file = tmp_path / "token"
    token = token_of_server(file)
    file.chmod(mode)
    for read in (token_of_server, token_of_client):
        with pytest.raises(SecurityError, match="others than its owner") as caught:
            read(file)
        assert str(caught.value.fix) == f"chmod 600 {file}"
        assert token not in str(caught.value)


@pytest.mark.parametrize("content", ["", "short", "two words of some length", "caf\xe9" * 8, "x" * 600])
def test_what_is_no_token_is_refused_without_being_shown(tmp_path, content):
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(content)
    with pytest.raises(SecurityError, match="holds no token") as caught:
        token_of_client(file)
    assert not content or content not in str(caught.value)


def test_where_a_worker_finds_the_token(tmp_path):
    first, second = token_of_server(tmp_path / "first"), token_of_server(tmp_path / "second")
    environ = {"FORGATHER_DILOCO_TOKEN_FILE": str(tmp_path / "second"), "FORGATHER_DILOCO_TOKEN": "t" * 20}
    assert token_of_client(tmp_path / "first", environ) == first
    assert token_of_client(None, environ) == second
    assert token_of_client(None, {"FORGATHER_DILOCO_TOKEN": "t" * 20 + "\n"}) == "t" * 20
    assert token_of_client(None, {}) is None
    with pytest.raises(SecurityError, match="cannot be read"):
        token_of_client(tmp_path / "absent", {})
    with pytest.raises(SecurityError, match="FORGATHER_DILOCO_TOKEN holds no token"):
        token_of_client(None, {"FORGATHER_DILOCO_TOKEN": "bad"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_without_a_token_on_loopback(host):
    assert is_loopback(host)
    require_protection(host, without_token=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "me"])
def test_no_server_without_a_token_elsewhere(host):
    require_protection(host, without_token=False)
    with pytest.raises(SecurityError, match="--no-auth") as caught:
        require_protection(host, without_token=True)
    assert "127.0.0.1" in str(caught.value.fix)


TOKEN = "a-token-of-some-length"


def basic(words: str) -> str:
    return f"Basic {base64.b64encode(words.encode()).decode()}"


@pytest.mark.parametrize(
    ("header", "method", "is_right"),
    [
        (f"Bearer {TOKEN}", "POST", True),
        (f"bearer {TOKEN}", "PUT", True),
        (None, "GET", False),
        ("", "GET", False),
        ("Bearer ", "GET", False),
        (f"Bearer {TOKEN}x", "GET", False),
        (f"Bearer {TOKEN[:-1]}", "GET", False),
        ("Bearer \xff", "GET", False),
        ("Bearer \udcff", "GET", False),
        ("Basic \udcff", "GET", False),
        (TOKEN, "GET", False),
        (basic(f"me:{TOKEN}"), "GET", True),
        (basic(f":{TOKEN}"), "HEAD", True),
        # A foreign page could let the browser send this.
        (basic(f"me:{TOKEN}"), "POST", False),
        (basic(f"me:{TOKEN}"), "DELETE", False),
        (basic(TOKEN), "GET", False),
        ("Basic ~~~", "GET", False),
        ("Basic /w==", "GET", False),
    ],
)
def test_who_is_answered(header, method, is_right):
    assert is_authorized(header, TOKEN, method=method) is is_right
    assert is_authorized(header, None, method=method)
    assert is_authorized(header, TOKEN, method=method, has_certificate=True)


def test_a_foreign_page_changes_nothing():
    for token in (TOKEN, None):
        for method in ("POST", "PUT", "DELETE"):
            assert not is_authorized(f"Bearer {TOKEN}", token, method=method, origin="http://elsewhere")
            assert not is_authorized(None, token, method=method, origin="null", has_certificate=True)
        assert is_authorized(f"Bearer {TOKEN}", token, method="GET", origin="http://elsewhere")
