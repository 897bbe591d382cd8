"""Hosts that are real to the network: namespaces on a bridge, each with its own address, a decoy interface and a rate.

    with Lan(2, rate="100mbit") as lan:
        server, worker = lan.hosts
        process = server.start([sys.executable, "-m", "http.server"])
        worker.run(["curl", f"http://{server.address}:8000"])
        worker.sent()                                     # bytes out of its interface so far

Every host has `lan0`, limited to the rate in both directions, and `decoy0`: up, with an address and the default route,
and no host at its other end. The bridge is in a namespace of its own, so nothing of a Lan is seen outside, and nothing
outside is reached from it.

Nothing is left behind, whatever happens. A namespace lives as long as a process in it, and the system ends those when
their parent ends, however it ends: so a Lan belongs to the thread that made it. Each command is the first process of a
process namespace of its own, so that all it has started ends with it.

`missing()` says why there can be none here, for a test to be skipped with:

    pytestmark = pytest.mark.skipif(bool(missing()), reason=f"{missing()}")
"""

import ctypes
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

INTERFACE, DECOY = "lan0", "decoy0"
_CLONE_NEWNET = 0x40000000
_TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv")


@functools.cache
def missing() -> str | None:
    """Why there can be no hosts here; None where there can."""
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: hosts in namespaces need iproute2 and util-linux"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        with Lan(1):
            return None
    except (LanError, OSError) as error:
        return f"no network namespaces here: {error}"


class LanError(Exception):
    """A command that makes hosts failed; the message is what it said."""


class Namespace:
    """A network namespace that lasts as long as this object's process."""

    def __init__(self) -> None:
        # The shell says a word when it is inside, and waits for ever.
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo inside; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "inside\n":
            said = self._holder.stderr.read()
            self.close()
            raise LanError(said.strip())
        self._set("ip link set lo up")

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    def inside(self, command: Sequence[str]) -> list[str]:
        """The same command, run in here."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def _set(self, command: str) -> str:
        done = subprocess.run(self.inside(command.split()), capture_output=True, text=True, check=False)
        if done.returncode:
            raise LanError(f"{command}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        for stream in (self._holder.stdout, self._holder.stderr):
            assert stream is not None
            stream.close()


class Host(Namespace):
    """A host: `address` is what the others reach it by."""

    def __init__(self, number: int, bridge: "Bridge", rate: str) -> None:
        super().__init__()
        self.name = f"host{number}"
        self.address = f"10.77.0.{number}"
        self.decoy_address = f"10.78.0.{number}"
        self.rate = rate
        self._port = f"port{number}"
        bridge.plug(self, self._port, INTERFACE)
        bridge.plug(self, f"void{number}", DECOY, is_bridged=False)
        self._set(f"ip addr add {self.decoy_address}/24 dev {DECOY}")
        self._set(f"ip link set {DECOY} up")
        self._set(f"ip route add default dev {DECOY}")
        self._set(f"ip addr add {self.address}/24 dev {INTERFACE}")
        self._set(f"ip link set {INTERFACE} up")
        self._bridge = bridge
        self.limit(rate)

    def limit(self, rate: str) -> None:
        """Let the interface carry so much from now on, in each direction: `1gbit`, `100mbit`."""
        self.rate = rate
        shape = f"root tbf rate {rate} burst 256k latency 50ms"
        self._set(f"tc qdisc replace dev {INTERFACE} {shape}")
        self._bridge._set(f"tc qdisc replace dev {self._port} {shape}")

    def cut(self) -> None:
        """Pull the cable: connections are not closed, nothing comes through."""
        self._bridge._set(f"ip link set {self._port} down")

    def mend(self) -> None:
        self._bridge._set(f"ip link set {self._port} up")

    def sent(self, interface: str = INTERFACE) -> int:
        """Bytes that have left by an interface."""
        return self._counters(interface)[8]

    def received(self, interface: str = INTERFACE) -> int:
        """Bytes that have come in by an interface."""
        return self._counters(interface)[0]

    def _counters(self, interface: str) -> list[int]:
        for line in Path(f"/proc/{self.pid}/net/dev").read_text(encoding="ascii").splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == interface:
                return [int(number) for number in numbers.split()]
        raise LanError(f"{self.name} has no interface {interface}")

    def start(self, command: Sequence[str], **arguments: Any) -> "HostProcess":
        """Start a command on this host; `arguments` are those of Popen."""
        return HostProcess(self, command, **arguments)

    def run(self, command: Sequence[str], *, timeout_s: float = 60.0, **arguments: Any) -> str:
        """What a command on this host prints; AssertionError, with what it said, unless it succeeds."""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **arguments) as process:
            output, said = process.popen.communicate(timeout=timeout_s)
        assert process.popen.returncode == 0, f"{' '.join(command)} on {self.name}:\n{said}"
        return str(output)

    def enter(self) -> None:
        """Let the calling thread, and those that it starts from now on, be on this host."""
        with self.path.open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise LanError(f"cannot enter {self.name}: {os.strerror(ctypes.get_errno())}")


class Bridge(Namespace):
    """The switch that the hosts are plugged into."""

    def __init__(self) -> None:
        super().__init__()
        self._set("ip link add switch type bridge")
        self._set("ip link set switch up")

    def plug(self, host: Host, port: str, interface: str, *, is_bridged: bool = True) -> None:
        """Run a cable from `interface` of a host to a port of this switch, or to nowhere."""
        self._set(f"ip link add {port} type veth peer name {interface} netns {host.pid}")
        for namespace, name in ((host, interface), (self, port)):
            _without_ipv6(namespace, name)
        if is_bridged:
            self._set(f"ip link set {port} master switch")
        self._set(f"ip link set {port} up")


def _without_ipv6(namespace: Namespace, interface: str) -> None:
    """Neighbours that announce themselves would be counted as traffic."""
    path = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
    command = namespace.inside(["sh", "-c", f"test ! -e {path} || echo 1 > {path}"])
    subprocess.run(command, check=True)


class HostProcess:
    """A command on a host, with all that it starts: killed when the block ends, or when this process does."""

    def __init__(self, host: Host, command: Sequence[str], **arguments: Any) -> None:
        self.popen = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *host.inside(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *command]),
            ],
            **arguments,
        )

    def pids(self) -> list[int]:
        """All processes of the command, its own first, as they are numbered here."""
        found: list[int] = []
        children: dict[int, list[int]] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The name of a process is in parentheses and may hold anything.
                parent = int(status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(status.parent.name))
        waiting = [self.popen.pid]
        while waiting:
            below = sorted(children.get(waiting.pop(0), []))
            found += below
            waiting += below
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, as `kill` would; to all its processes where it stops or goes on."""
        pids = self.pids()
        for pid in pids if number in (signal.SIGSTOP, signal.SIGCONT) else pids[:1]:
            os.kill(pid, number)

    def kill(self) -> None:
        """End it at once, with all that it has started."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.popen.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


class Lan:
    """`rates` of the hosts, or a number of hosts with one `rate`."""

    def __init__(self, hosts: int | Sequence[str], *, rate: str = "1gbit") -> None:
        self.rates = [rate] * hosts if isinstance(hosts, int) else list(hosts)
        self.hosts: list[Host] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            bridge = Bridge()
            opening.callback(bridge.close)
            for number, rate in enumerate(self.rates, 1):
                host = Host(number, bridge, rate)
                opening.callback(host.close)
                self.hosts.append(host)
            self._open = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()
        self.hosts.clear()
