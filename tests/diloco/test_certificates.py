"""Workers speak to the server that they mean and to no other, and a certificate stands for a token."""

import contextlib
import http.client
import inspect
import socket
import ssl
import stat
import threading

import pytest
from cryptography import x509

from forgather.diloco.address import naming, server_named
from forgather.diloco.certificates import is_for, make_certificates, own_names
from forgather.diloco.security import SecurityError
from forgather.diloco.tls import client_context, server_context
from forgather.diloco.training import address_of_server
from forgather.errors import DistributedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An authority, a server's certificate and one of the client `worker`."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ["127.0.0.1", "box.example.org", "::1"], ["worker"])
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The same of another authority."""
    folder = tmp_path_factory.mktemp("stranger")
    make_certificates(folder, ["127.0.0.1"], ["worker"])
    return folder


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "127.0.0.1"):
    """What the server knows of the client once a byte went each way: its certificate's subject, or None."""
    known: list[object] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, contextlib.suppress(OSError), server.wrap_socket(accepted, server_side=True) as peer:
            known.append(peer.getpeercert())
            peer.sendall(peer.recv(1))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname(), timeout=10) as raw,
            client.wrap_socket(raw, server_hostname=host) as speaker,
        ):
            speaker.sendall(b"x")
            assert speaker.recv(1) == b"x"
    finally:
        thread.join()
        listener.close()
    return known[0]


def pair(folder, name):
    return folder / f"{name}.pem", folder / f"{name}-key.pem"


@pytest.mark.parametrize("host", ["127.0.0.1", "box.example.org", "::1"])
def test_a_worker_knows_the_server_by_each_of_its_names(folder, host):
    assert shake_hands(server_context(*pair(folder, "server")), client_context(folder / "ca.pem"), host) is None
    assert is_for(folder / "server.pem", host)


def test_another_name_or_authority_is_refused(folder, stranger):
    server = server_context(*pair(folder, "server"))
    with pytest.raises(ssl.SSLCertVerificationError, match=r"127\.0\.0\.2"):
        shake_hands(server, client_context(folder / "ca.pem"), "127.0.0.2")
    assert not is_for(folder / "server.pem", "127.0.0.2")
    assert not is_for(folder / "server.pem", "example.org")
    for authority in (stranger / "ca.pem", None):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(server, client_context(authority))


def test_a_clients_certificate_is_optional_and_known(folder):
    server = server_context(*pair(folder, "server"), folder / "ca.pem")
    assert not shake_hands(server, client_context(folder / "ca.pem"))
    subject = shake_hands(server, client_context(folder / "ca.pem", *pair(folder, "worker")))["subject"]
    assert subject == ((("commonName", "worker"),),)


def test_a_clients_certificate_of_another_authority_is_refused(folder, stranger):
    server = server_context(*pair(folder, "server"), folder / "ca.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake_hands(server, client_context(folder / "ca.pem", *pair(stranger, "worker")))


def test_a_clients_certificate_is_none_of_a_server_and_the_other_way(folder):
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_context(*pair(folder, "worker")), client_context(folder / "ca.pem"))
    server = server_context(*pair(folder, "server"), folder / "ca.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake_hands(server, client_context(folder / "ca.pem", *pair(folder, "server")))


def test_keys_are_for_their_owner_alone(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        **dict.fromkeys(["ca.pem", "server.pem", "worker.pem"], 0o644),
        **dict.fromkeys(["ca-key.pem", "server-key.pem", "worker-key.pem"], 0o600),
    }


def test_the_authority_stays_and_what_is_asked_for_again_is_renewed(tmp_path):
    make_certificates(tmp_path, ["10.0.0.1"], ["a"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert make_certificates(tmp_path).files == []
    made = make_certificates(tmp_path, clients=["b"])
    assert [file.name for file in made.files] == ["b-key.pem", "b.pem"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    make_certificates(tmp_path, ["10.0.0.2"])
    assert (tmp_path / "ca.pem").read_bytes() == before["ca.pem"]
    assert is_for(tmp_path / "server.pem", "10.0.0.2")
    assert not is_for(tmp_path / "server.pem", "10.0.0.1")


def test_without_hosts_it_is_for_all_that_this_machine_is_called(tmp_path):
    assert make_certificates(tmp_path).hosts == own_names()
    assert all(is_for(tmp_path / "server.pem", name) for name in own_names())
    assert {"localhost", "127.0.0.1"} <= set(own_names())


def test_it_is_valid_for_as_long_as_asked_and_a_little_earlier(tmp_path):
    make_certificates(tmp_path, ["10.0.0.1"], valid_days=3)
    found = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    assert (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds() == 3 * 86400 + 3600


@pytest.mark.parametrize("host", ["", "a b", "http://x", "10.0.0.1:8512", "-x", "a..b"])
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(SecurityError, match="neither the name nor the address"):
        make_certificates(tmp_path / "new", [host])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "ca", "server", "../x", "x-key", ".x"])
def test_what_is_no_name_of_a_client_is_refused(tmp_path, name):
    with pytest.raises(SecurityError, match="no name for a client"):
        make_certificates(tmp_path / "new", clients=[name])
    assert not (tmp_path / "new").exists()


def test_files_that_do_not_fit_are_named(folder, stranger, tmp_path):
    with pytest.raises(SecurityError, match="no certificate and its key") as caught:
        server_context(folder / "server.pem", stranger / "server-key.pem")
    assert "server-key.pem" in str(caught.value)
    with pytest.raises(SecurityError, match="cannot be read"):
        server_context(folder / "absent.pem", folder / "server-key.pem")
    with pytest.raises(SecurityError, match="no certificate of an authority"):
        client_context(folder / "ca-key.pem")
    with pytest.raises(SecurityError, match="together"):
        client_context(folder / "ca.pem", folder / "worker.pem")
    (tmp_path / "ca.pem").write_bytes((folder / "ca.pem").read_bytes())
    with pytest.raises(SecurityError, match="not its key"):
        make_certificates(tmp_path)
    (tmp_path / "ca-key.pem").write_bytes((stranger / "ca-key.pem").read_bytes())
    with pytest.raises(SecurityError, match="not the key of its"):
        make_certificates(tmp_path)


def test_a_client_finds_its_certificates_where_it_is_told(folder):
    assert server_named("10.0.0.1", environ={}).tls is None
    environ = {"FORGATHER_DILOCO_TLS_CA": str(folder / "ca.pem"), "FORGATHER_DILOCO_TOKEN": "t" * 20}
    found = server_named("[::1]:99", environ=environ)
    assert (found.host, found.port, str(found), found.token) == ("::1", 99, "[::1]:99", "t" * 20)
    assert found.tls is not None
    assert found.tls.get_ca_certs()
    assert "tttt" not in repr(found)
    with pytest.raises(SecurityError, match="together"):
        server_named("10.0.0.1", tls_cert=folder / "worker.pem", environ=environ)
    with pytest.raises(SecurityError, match="without TLS"):
        server_named("http://10.0.0.1", environ=environ)
    assert server_named("https://box.example.org", environ={}).tls is not None


def reasoned(text: str) -> ssl.SSLError:
    error = ssl.SSLError(1, text)
    error.reason = text
    return error


def test_a_server_that_ends_the_connection_may_not_accept_the_certificate(folder):
    shown = server_named(
        "a", tls_ca=folder / "ca.pem", tls_cert=folder / "worker.pem", tls_key=folder / "worker-key.pem"
    )
    without = server_named("a", tls_ca=folder / "ca.pem", environ={})
    plain = server_named("a", environ={})
    assert (shown.has_certificate, without.has_certificate, plain.has_certificate) == (True, False, False)
    closed = "Remote end closed connection without response"
    ended = [http.client.RemoteDisconnected(closed), BrokenPipeError(), ConnectionResetError(), ssl.SSLEOFError()]
    for error in ended:
        told = shown.unreachable(error)
        assert isinstance(told, DistributedError)  # it may also be a server that ends just now
        assert "may not accept this certificate" in told.message
        assert "--client-ca" in str(told.fix)
        told = without.unreachable(error)
        assert "may not accept a client without a certificate" in told.message
        assert naming("tls_cert", "CLIENT.pem") in str(told.fix)
    assert "does not accept this certificate" in shown.unreachable(reasoned("TLSV1_ALERT_UNKNOWN_CA")).message
    for address, error in ((without, "TLSV1_ALERT_UNKNOWN_CA"), (shown, "WRONG_VERSION_NUMBER")):
        assert "do not agree about TLS" in address.unreachable(reasoned(error)).message
    assert "certificate" not in str(plain.unreachable(ended[0]))
    assert "no DiLoCo server at a:8512" in shown.unreachable(ConnectionRefusedError()).message


@pytest.mark.parametrize("name", ["token_file", "tls_ca", "tls_cert"])
def test_remedies_name_what_a_run_takes(name):
    assert naming(name, "FILE").startswith(
        f"diloco_address.{name}=FILE of `train`, --{name.replace('_', '-')} FILE of "
    )
    assert name in inspect.signature(address_of_server).parameters
