"""Finds the network interface through which this host reaches its peers, so that every channel uses that one.

Left alone, Gloo takes the address that the host's own name has. On many hosts that is 127.0.1.1, or a card that leads
elsewhere, and the ranks of other hosts wait for it until they time out. What reaches the meeting place reaches the
peers: the system is asked which address it would send from, and whose interface that is.
"""

import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass

from forgather.errors import DistributedError

# What reads the name of an interface: Gloo, NCCL and torch's RPC. NCCL takes a prefix unless it begins with "=".
_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "TP_SOCKET_IFNAME": "{}"}
_DISCARD = 9  # a port that no packet is sent to: connecting a UDP socket only chooses a route

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Interface:
    """An address of this host, and the interface that has it."""

    name: str
    address: Address

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


def route_to(host: str) -> Interface:
    """The interface and own address by which this host sends to `host`, a name or an address of any host.

    DistributedError where the name is unknown, leads back to this host by a loopback address only while several
    interfaces could be meant, or no route leads there. `localhost` and loopback addresses are taken at their word.
    """
    resolved = _resolve(host)
    outside = [address for address in resolved if not address.is_loopback]
    if not outside:
        loopback = next((each for each in interfaces() if each.address.is_loopback), None)
        is_meant = host == "localhost" or host == str(resolved[0])
        return loopback if is_meant and loopback is not None else _only_interface(host, resolved[0])
    for address in outside:
        source = _source(address)
        for interface in interfaces():
            if interface.address == source:
                return interface
    raise DistributedError(
        f"no interface of this host leads to {host} ({outside[0]})",
        fix=f"see `ip route get {outside[0]}`; this host has {_listed(_reachable())}",
    )


def is_this_host(host: str) -> bool:
    """Whether `host`, a name or an address, is this host: one of its addresses is here, whatever its own name says."""
    own = {interface.address for interface in interfaces()}
    return any(address.is_loopback or address in own for address in _resolve(host))


def use_interface(host: str, num_hosts: int, environ: MutableMapping[str, str] | None = None) -> Interface | None:
    """Let every channel of this process and its children use the interface that reaches `host`; returns it.

    Ranks that are all on this host use the loopback, whatever its name leads to. What the user has set stays, and must
    exist; then, and on systems whose interfaces are not known, returns None.
    """
    environ = os.environ if environ is None else environ
    if sys.platform != "linux":
        return None
    _check_asked(environ)
    if "GLOO_SOCKET_IFNAME" in environ:
        return None
    if num_hosts > 1:
        interface: Interface | None = route_to(host)
    else:
        interface = next((each for each in interfaces() if each.address.is_loopback), None)
    if interface is not None:
        for variable, form in _VARIABLES.items():
            # On one host NCCL knows better ways than any interface.
            if num_hosts > 1 or variable != "NCCL_SOCKET_IFNAME":
                environ.setdefault(variable, form.format(interface.name))
    return interface


def _check_asked(environ: MutableMapping[str, str]) -> None:
    known = sorted({interface.name for interface in interfaces()})
    for variable in _VARIABLES:
        asked = environ.get(variable, "")
        if not asked or asked.startswith("^"):  # NCCL: all but these
            continue
        for name in asked.removeprefix("=").split(","):
            if not any(existing.startswith(name) for existing in known):
                raise DistributedError(
                    f"{variable} is {asked}, and this host has no such interface that is up",
                    fix=f"unset it, or use one of {', '.join(known)}",
                )


def interfaces() -> list[Interface]:
    """The addresses of this host's interfaces that are up, loopback included; empty where Linux is not the system."""
    if sys.platform != "linux":
        return []
    library = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        raise DistributedError(f"the interfaces cannot be listed: {os.strerror(ctypes.get_errno())}")
    found = []
    try:
        entry = first
        while entry:
            address = _read_address(entry.contents)
            if address is not None and entry.contents.flags & _IS_UP:
                found.append(Interface(entry.contents.name.decode(), address))
            entry = entry.contents.next
    finally:
        library.freeifaddrs(first)
    return found


class _Entry(ctypes.Structure):
    """`struct ifaddrs` of Linux, as far as it is read here."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
_IS_UP = 1


def _read_address(entry: _Entry) -> Address | None:
    if not entry.address:
        return None
    family = ctypes.c_ushort.from_address(entry.address).value
    if family == socket.AF_INET:  # family, port, 4 bytes
        return ipaddress.IPv4Address(ctypes.string_at(entry.address + 4, 4))
    if family == socket.AF_INET6:  # family, port, flow, 16 bytes
        address = ipaddress.IPv6Address(ctypes.string_at(entry.address + 8, 16))
        return None if address.is_link_local else address
    return None


def _resolve(host: str) -> list[Address]:
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise DistributedError(
            f"the host {host} is not known here: {error.strerror}", fix="use its address, 10.0.0.1 say"
        ) from error
    return list(dict.fromkeys(ipaddress.ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers))


def _source(address: Address) -> Address | None:
    """The address that this host would send to `address` from; None without a route."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), _DISCARD))
        except OSError:
            return None
        return ipaddress.ip_address(probe.getsockname()[0])


def _only_interface(host: str, loopback: Address) -> Interface:
    """The one interface by which others can reach this host, whose name leads only back to itself."""
    reachable = _reachable()
    names = {interface.name for interface in reachable}
    if len(names) == 1:
        return next(interface for interface in reachable)
    if not names:
        raise DistributedError(f"{host} is {loopback} here, and this host has no interface that others could reach")
    raise DistributedError(
        f"{host} is {loopback} here, which no other host can reach, and this host has several interfaces",
        fix=f"name the one that leads to the others by its address: one of {_listed(reachable)}",
    )


def _reachable() -> list[Interface]:
    return [interface for interface in interfaces() if not interface.address.is_loopback]


def _listed(found: list[Interface]) -> str:
    return ", ".join(map(str, found)) or "no interface that is up"
