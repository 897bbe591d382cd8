"""Hosts in namespaces: they reach one another at their rate, by the right interface, and nothing of them is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lan import DECOY, INTERFACE, Lan, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"{missing()}")

RECEIVE = """
import socket, sys
with socket.create_server(("", 9000)) as server:
    print("listening", flush=True)
    connection, peer = server.accept()
    total = 0
    while block := connection.recv(1 << 18):
        total += len(block)
    connection.sendall(b"!")
    print(total, peer[0], flush=True)
"""
SEND = """
import socket, sys, time
address, size = sys.argv[1], int(sys.argv[2])
with socket.create_connection((address, 9000)) as connection:
    begun = time.monotonic()
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(time.monotonic() - begun)
"""


def send(sender, receiver, size: int) -> tuple[float, str]:
    """Seconds that so many bytes took, and from which address they came."""
    command = [sys.executable, "-c", RECEIVE]
    with receiver.start(command, stdout=subprocess.PIPE, text=True) as listening:
        assert listening.popen.stdout.readline() == "listening\n"
        seconds = float(sender.run([sys.executable, "-c", SEND, receiver.address, str(size)]))
        received, peer = listening.popen.stdout.readline().split()
    assert int(received) == size
    return seconds, peer


def test_hosts_reach_one_another_at_their_rate_and_not_by_the_decoy():
    size = 6_000_000
    with Lan(["100mbit", "100mbit"]) as lan:
        one, other = lan.hosts
        sent, received = one.sent(), other.received()
        seconds, peer = send(one, other, size)
        assert peer == one.address
        # Bits over the rate, but for the burst that a token bucket lets through; 4.6 % is framing.
        at_rate_s = (size * 1.046 - 2 * 256 * 1024) * 8 / 100e6
        assert 0.9 * at_rate_s <= seconds <= 1.1 * (at_rate_s + 2 * 256 * 1024 * 8 / 100e6)
        assert size <= one.sent() - sent <= 1.1 * size
        assert size <= other.received() - received <= 1.1 * size
        assert one.sent(DECOY) == other.sent(DECOY) == 0
        assert one.sent(INTERFACE) > size


def test_the_way_to_a_host_is_not_the_decoys():
    where = "from forgather.distributed.network import route_to; import sys; print(route_to(sys.argv[1]).name)"
    with Lan(2) as lan:
        one, other = lan.hosts
        assert one.run([sys.executable, "-c", where, other.address]).strip() == INTERFACE


def test_a_cut_host_is_not_reached_until_it_is_mended():
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 9000), timeout=0.5)"
    with Lan(2) as lan:
        one, other = lan.hosts
        other.cut()
        with pytest.raises(AssertionError, match=r"timed out|No route"):
            one.run([sys.executable, "-c", reach, other.address])
        other.mend()
        send(one, other, 1000)


def stopped(pids):
    """Whether all of them are stopped, soon: a signal on its way to a process that computes takes its time."""
    deadline = time.monotonic() + 10
    while {state(pid) for pid in pids} != {"T"} and time.monotonic() < deadline:
        time.sleep(0.01)
    return {state(pid) for pid in pids} == {"T"}


def test_all_processes_of_a_command_stop_and_end_together():
    nest = "import subprocess, time; subprocess.Popen(['sleep', '1000']); print('nested', flush=True); time.sleep(1000)"
    with Lan(1) as lan, lan.hosts[0].start([sys.executable, "-c", nest], stdout=subprocess.PIPE, text=True) as process:
        assert process.popen.stdout.readline() == "nested\n"
        pids = process.pids()
        assert len(pids) == 2
        process.signal(signal.SIGSTOP)
        assert stopped(pids)
        process.signal(signal.SIGCONT)
        process.kill()
        assert ended(pids)


def test_nothing_is_left_of_a_test_that_was_killed():
    script = """
import sys, time
from tests.lan import Lan
with Lan(1) as lan:
    process = lan.hosts[0].start([sys.executable, "-c", "import time; time.sleep(1000)"])
    while not (pids := process.pids()):
        time.sleep(0.01)
    print(lan.hosts[0].pid, lan._open is not None, *pids, flush=True)
    time.sleep(1000)
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as crashing:
        holder, _, *pids = crashing.stdout.readline().split()
        crashing.kill()
    assert ended([int(holder), *map(int, pids)])


def test_a_thread_can_enter_a_host():
    script = "import os; print(os.readlink('/proc/self/ns/net'))"
    with Lan(1) as lan:
        entered = lan.hosts[0].run([sys.executable, "-c", script]).strip()
        code = f"""
import os, types
from tests.lan import Host
from pathlib import Path
Host.enter(types.SimpleNamespace(path=Path("{lan.hosts[0].path}"), name="it"))
print(os.readlink("/proc/thread-self/ns/net"))
"""
        root = Path(__file__).parents[1]
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
        assert inside.stdout.strip() == entered != str(Path("/proc/self/ns/net").readlink())


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def ended(pids: list[int]) -> bool:
    """Whether they are all gone within a while."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if all(state(pid) in ("gone", "Z") for pid in pids):
            return True
        time.sleep(0.02)
    return False
