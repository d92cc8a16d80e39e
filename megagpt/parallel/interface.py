"""The network interface by which the ranks of several hosts talk, chosen or named in an error (no torch).

gloo listens on the address that this host's own name resolves to, which on many systems is a loopback address that no
other host can reach. The interface towards the master is the one that hosts share; the master's own host takes that
towards all others.
"""

import os
import socket
from collections.abc import MutableMapping

import psutil

from megagpt.errors import LaunchError
from megagpt.launchers import spans_hosts

VARIABLE = "GLOO_SOCKET_IFNAME"
_ELSEWHERE = "192.0.2.1"
"""Nobody's address (RFC 5737), to which the default route leads."""


def choose_interface(master_addr: str, environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Have gloo use the interface by which this host reaches the master, unless the user has named one.

    Args:
        master_addr: host of rank 0.
        environ: variables of this rank, where the choice is left; NCCL makes its own, which knows InfiniBand.

    Returns:
        Its name; None if all ranks are on this host, or no interface has the address.

    Raises:
        LaunchError: the user has named an interface that this host does not have, or has to name one.
    """
    interfaces = addresses()
    named = environ.get(VARIABLE)
    if named:
        missing = [name for name in named.split(",") if name not in interfaces]
        if missing:
            raise LaunchError(
                f"{VARIABLE}={named}: {socket.gethostname()} has no interface {missing[0]}, it has {_words(interfaces)}"
            )
        return named
    own = own_address(master_addr)
    if own is not None and own.startswith("127."):
        if own == master_addr or not spans_hosts(environ):
            return None
        own = outer_address()
        if own is None:  # several networks, none of which is the way to everywhere
            raise LaunchError(
                f"MASTER_ADDR={master_addr} is a loopback address to {socket.gethostname()} itself, and no default "
                f"route tells by which interface others reach it; set {VARIABLE} to one of {_words(interfaces)}"
            )
    found = next((name for name, address in interfaces.items() if address == own), None)
    if found is not None:
        environ[VARIABLE] = found
    return found


def own_address(master_addr: str) -> str | None:
    """This host's address on the way to the master; None if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master_addr, 9))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


def outer_address() -> str | None:
    """This host's address on the default route, or its only one; None if there are several, or only the loopback's."""
    found = own_address(_ELSEWHERE)
    if found is not None:
        return found
    others = [address for address in addresses().values() if not address.startswith("127.")]
    return others[0] if len(others) == 1 else None


def addresses() -> dict[str, str]:
    """IPv4 address of each interface of this host."""
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                found[name] = entry.address
    return found


def describe_interfaces() -> str:
    """Interfaces of this host with their addresses, for errors."""
    return _words(addresses())


def _words(interfaces: dict[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in interfaces.items() if name != "lo")
