"""What a server shows is shown to those who have its token, and a browser can read it and change nothing."""

import base64
import http.client
import json

import pytest
import torch

from forgather.diloco.address import ServerAddress
from forgather.diloco.package_service import PackageArchive, fetch, package_digest
from forgather.diloco.page import HEADERS
from forgather.diloco.prometheus import CONTENT_TYPE
from forgather.diloco.security import SecurityError
from forgather.diloco.views import views
from forgather.errors import DistributedError
from tests.diloco.running_server import TOKEN, running_server, settings_of

VALUES = {"a": torch.zeros(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A package with code."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "config.json").write_text("{}")
    (folder / "modeling.py").write_text("pass\n")
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    settings = settings_of(VALUES, package=package_digest(folder))
    extra = {"extra": views(PackageArchive(folder))}
    with running_server(tmp_path_factory.mktemp("run") / "run", VALUES, settings, serve=extra) as running:
        yield running


def ask(server, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


BEARER = {"Authorization": f"Bearer {TOKEN}"}
BASIC = {"Authorization": f"Basic {base64.b64encode(f'me:{TOKEN}'.encode()).decode()}"}


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/package", "/v1/status", "/v1/settings"])
def test_nothing_is_shown_without_the_token(server, path):
    status, headers, body = ask(server, "GET", path)
    assert (status, body) == (401, b'{"error": "unauthorized"}')
    assert headers["WWW-Authenticate"].startswith("Basic ")
    assert ask(server, "GET", path, **BEARER)[0] == ask(server, "GET", path, **BASIC)[0] == 200


def test_a_browser_changes_nothing(server):
    assert ask(server, "POST", "/v1/control/save", **BASIC)[0] == 401
    assert ask(server, "POST", "/v1/control/save", Origin="http://elsewhere", **BEARER)[0] == 401
    assert ask(server, "POST", "/v1/control/save", **BEARER)[0] == 200


def test_the_page_is_as_its_headers_say(server):
    _, headers, body = ask(server, "GET", "/", **BASIC)
    assert {name: headers[name] for name in HEADERS} == dict(HEADERS)
    assert b"nobody has come yet" in body


def test_metrics_are_of_this_server(server):
    _, headers, body = ask(server, "GET", "/metrics", **BEARER)
    assert headers["Content-Type"] == CONTENT_TYPE
    assert b"forgather_diloco_model_parameters 4\n" in body


def test_a_worker_fetches_the_package(server, folder, tmp_path):
    address = ServerAddress(server.host, server.port, token=TOKEN)
    with pytest.raises(SecurityError, match=r"modeling\.py"):
        fetch(address, tmp_path, trust_code=False)
    fetched = fetch(address, tmp_path, trust_code=True)
    assert package_digest(fetched) == package_digest(folder)
    with pytest.raises(SecurityError, match="another token"):
        fetch(ServerAddress(server.host, server.port, token="x" * 20), tmp_path, trust_code=True)


def test_a_server_without_a_package_says_so(tmp_path):
    with running_server(tmp_path / "run", VALUES, serve={"extra": views()}) as running:
        address = ServerAddress(running.host, running.port, token=TOKEN)
        with pytest.raises(DistributedError, match="has no model package"):
            fetch(address, tmp_path, trust_code=True)
        status, _, body = ask(running, "GET", "/v1/package", **BEARER)
        assert (status, "fix" in json.loads(body)) == (404, True)
