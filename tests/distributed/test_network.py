"""The interface that reaches the peers is found, on hosts whose names and other cards lead elsewhere."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from forgather.distributed import network
from forgather.distributed.network import Interface, interfaces, is_this_host, route_to, use_interface
from forgather.errors import DistributedError

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = Interface("lo", ip_address("127.0.0.1"))
CARDS = [LOOPBACK, Interface("eth0", ip_address("10.0.0.1")), Interface("eth1", ip_address("192.168.5.1"))]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are listed on Linux only")


@pytest.fixture
def cards(monkeypatch):
    """A host with two cards, whose own name leads back to itself."""
    names = {"here": "127.0.1.1", "peer": "10.0.0.2", "other": "192.168.5.9", "far": "172.16.0.1"}
    routes = {"10.0.0.2": "10.0.0.1", "10.0.0.1": "10.0.0.1", "192.168.5.9": "192.168.5.1", "172.16.0.1": "192.168.5.1"}
    routes = {ip_address(there): ip_address(source) for there, source in routes.items()}
    found = list(CARDS)
    monkeypatch.setattr(network, "interfaces", lambda: found)
    monkeypatch.setattr(network, "_resolve", lambda host: [ip_address(names.get(host, host))])
    monkeypatch.setattr(network, "_source", lambda address: routes.get(address))
    return found


def test_this_hosts_interfaces_have_the_loopback():
    assert LOOPBACK in interfaces()
    assert is_this_host("127.0.0.1")
    assert not is_this_host("198.51.100.7")  # an address that is nobody's (RFC 5737)


@pytest.mark.parametrize(
    ("host", "expected"), [("peer", "eth0"), ("10.0.0.1", "eth0"), ("other", "eth1"), ("far", "eth1")]
)
def test_the_interface_is_the_one_that_the_system_would_send_by(cards, host, expected):
    assert route_to(host).name == expected


def test_a_host_is_known_by_its_addresses_whatever_its_name_leads_to(cards):
    assert is_this_host("10.0.0.1")
    assert is_this_host("192.168.5.1")
    assert is_this_host("here")
    assert not is_this_host("peer")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.5"])
def test_who_says_loopback_gets_it(cards, monkeypatch, host):
    monkeypatch.setattr(network, "_resolve", lambda host: [ip_address(host.replace("localhost", "127.0.0.1"))])
    assert route_to(host) == LOOPBACK


def test_a_name_that_leads_back_is_taken_for_the_only_card(cards):
    del cards[2]
    assert route_to("here") == CARDS[1]


def test_a_name_that_leads_back_is_refused_where_several_cards_could_be_meant(cards):
    with pytest.raises(DistributedError, match=r"here is 127\.0\.1\.1 here, which no other host can reach") as error:
        route_to("here")
    assert "10.0.0.1 (eth0), 192.168.5.1 (eth1)" in error.value.fix


def test_a_host_without_a_route_and_an_unknown_one_are_told(cards, monkeypatch):
    with pytest.raises(DistributedError, match=r"no interface of this host leads to 203\.0\.113\.1"):
        route_to("203.0.113.1")
    monkeypatch.undo()
    with pytest.raises(DistributedError, match=r"the host no-such-host\.invalid is not known here"):
        route_to("no-such-host.invalid")


def test_every_channel_is_told_its_interface(cards):
    environ: dict[str, str] = {}
    assert use_interface("peer", 2, environ) == CARDS[1]
    assert environ == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0", "TP_SOCKET_IFNAME": "eth0"}


def test_ranks_of_one_host_meet_on_the_loopback(cards):
    environ: dict[str, str] = {}
    assert use_interface("here", 1, environ) == LOOPBACK
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}


def test_what_the_user_has_set_stays_and_must_exist(cards):
    environ = {"NCCL_SOCKET_IFNAME": "^docker"}
    use_interface("peer", 2, environ)
    assert environ["NCCL_SOCKET_IFNAME"] == "^docker"
    environ = {"GLOO_SOCKET_IFNAME": "eth1"}
    assert use_interface("peer", 2, environ) is None
    assert environ == {"GLOO_SOCKET_IFNAME": "eth1"}
    with pytest.raises(
        DistributedError, match="GLOO_SOCKET_IFNAME is ib0, and this host has no such interface"
    ) as error:
        use_interface("peer", 2, {"GLOO_SOCKET_IFNAME": "ib0"})
    assert "eth0, eth1, lo" in error.value.fix


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them, and the words that run a command in each.

    Each has a second card that leads nowhere. The name of the first leads to 127.0.1.1, that of the second to the other
    card; their cables have 10.77.0.1 and 10.77.0.2.
    """
    names = [f"forgather-{os.getpid()}-{letter}" for letter in "ab"]
    commands = []
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            # Made before the cable is up, so that it comes first wherever somebody takes the first.
            _ip("-n", name, "link", "add", "decoy", "type", "veth", "peer", "name", "nowhere")
            for card, address in (("decoy", f"192.168.7{number}.1/24"), ("cable", f"10.77.0.{number}/24")):
                _ip("-n", name, "address", "add", address, "dev", card)
                _ip("-n", name, "link", "set", card, "up")
            _ip("-n", name, "link", "set", "nowhere", "up")
            own = "127.0.1.1" if number == 1 else f"192.168.7{number}.1"
            hosts = folder / f"hosts-{number}"
            hosts.write_text(f"127.0.0.1 localhost\n{own} {name}\n")
            script = f'mount --bind {hosts} /etc/hosts && hostname {name} && exec "$@"'
            commands.append(["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", script, "sh"])
        yield commands
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.skipif(shutil.which("ip") is None, reason="network namespaces need the command ip")
@pytest.mark.parametrize("kind", ["c10d", pytest.param("static", marks=pytest.mark.soak)])
def test_two_hosts_with_decoys_and_misleading_names_meet(tmp_path, kind):
    meet = {
        "c10d": [["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=one"]] * 2,
        "static": [["--master-addr=10.77.0.1", "--master-port=29400", f"--node-rank={number}"] for number in (0, 1)],
    }[kind]
    program = (
        "import sys; from forgather.distributed.launcher import launch; "
        "sys.exit(launch('tests.distributed.meeting_worker', [], 1, sys.argv[1:]))"
    )
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    with two_hosts(tmp_path) as commands:
        running = [
            subprocess.Popen(
                [*command, sys.executable, "-c", program, "--nnodes=2", *words],
                cwd=ROOT,
                env=environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command, words in zip(commands, meet, strict=True)
        ]
        try:
            said = "".join(process.communicate(timeout=200)[0] for process in running)
        finally:
            for process in running:
                process.kill()
                process.wait()
    assert [process.returncode for process in running] == [0, 0], said
    assert "sum 3 over 10.77.0.1 (cable)" in said
    assert "sum 3 over 10.77.0.2 (cable)" in said
