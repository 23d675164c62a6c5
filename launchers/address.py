"""By which interface this machine reaches another: ``python -m moba_cp.launchers.address HEAD``.

Prints the interface, this machine's address on it, and 1 if this machine is HEAD itself, else 0. Names often resolve to
the loopback interface on the machine that they name, so the question is put to the routing table instead.
"""

import socket
import sys

import psutil


def reach(head: str) -> tuple[str, str, bool]:
    """(Interface, this machine's address on it, whether ``head`` is this machine).

    Raises:
        ValueError: the name is not known, there is no route, or it resolves to the loopback interface.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ValueError(f"head={head!r}: {error.strerror}; give the address of one of the machines") from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only chooses the route.
            probe.connect(target)
        except OSError as error:
            raise ValueError(f"head={head!r}: {error.strerror} from this machine") from None
        own = probe.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own.partition("%")[0] for address in addresses):
            return interface, own, own == target[0]
    raise ValueError(f"head={head!r}: no interface has the address {own}; set GLOO_SOCKET_IFNAME")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--port"]:
            print(free_port())
        else:
            interface, own, same = reach(sys.argv[1])
            print(interface, own, int(same))
    except ValueError as error:
        sys.exit(f"moba_cp.launchers.address: {error}")
