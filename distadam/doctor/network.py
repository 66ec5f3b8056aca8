"""Interfaces and ports: which card gloo and NCCL will take, and whether the ranks can meet."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distadam.doctor.finding import Finding, error, ok, warning

_GET_FLAGS, _GET_ADDRESS = 0x8913, 0x8915  # SIOCGIFFLAGS, SIOCGIFADDR
_UP, _LOOPBACK = 0x1, 0x8
_CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network card, real or not. ``address`` is its IPv4 address, empty without one."""

    name: str
    address: str
    is_up: bool
    is_loopback: bool


def find_interfaces() -> list[Interface]:
    """Return the interfaces of this process's network namespace."""
    found = []
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asker:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack_from("H", fcntl.ioctl(asker, _GET_FLAGS, request), 16)[0]
            except OSError:
                continue
            try:
                address = socket.inet_ntoa(fcntl.ioctl(asker, _GET_ADDRESS, request)[20:24])
            except OSError:
                address = ""
            is_up, is_loopback = bool(flags & _UP), bool(flags & _LOOPBACK)
            found.append(Interface(name=name, address=address, is_up=is_up, is_loopback=is_loopback))
    return found


def can_bind(address: str, port: int = 0) -> OSError | None:
    """Return why a socket cannot listen there, or None if it can."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError as problem:
            return problem
    return None


def resolve(host: str) -> list[str]:
    """Return a host's addresses; none if its name is not known."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError:
        return []


# Which card a backend takes -------------------------------------------------------------------------------------------


def gloo_card(environment: Mapping[str, str], cards: Sequence[Interface]) -> tuple[Interface | None, str]:
    """Return the card that torch's gloo will take, or None, and why.

    GLOO_SOCKET_IFNAME, else the one with the address of this host's name, else loopback.
    """
    named = environment.get("GLOO_SOCKET_IFNAME", "")
    if named:
        first = named.split(",")[0]
        return next((card for card in cards if card.name == first), None), f"GLOO_SOCKET_IFNAME={named}"
    host = socket.gethostname()
    usable = [address for address in resolve(host) if can_bind(address) is None]
    for address in usable:
        for card in cards:
            if card.address == address or (card.is_loopback and ipaddress.ip_address(address).is_loopback):
                return card, f"the host's name {host} stands for {address}"
    loopback = next((card for card in cards if card.is_loopback), None)
    return loopback, f"the host's name {host} stands for no address of this host"


def nccl_card(environment: Mapping[str, str], cards: Sequence[Interface]) -> tuple[Interface | None, str]:
    """Return the card that NCCL will take for TCP, or None, and why.

    NCCL_SOCKET_IFNAME is a list of prefixes (``=`` before it: of names, ``^``: to leave out). Without it: InfiniBand,
    then whatever is neither loopback nor Docker's, then Docker's, then loopback.
    """
    usable = [card for card in cards if card.is_up and card.address]
    setting = environment.get("NCCL_SOCKET_IFNAME", "")
    if setting:
        without, rest = setting.startswith("^"), setting.lstrip("^")
        exact, rest = rest.startswith("="), rest.lstrip("=")
        names = rest.split(",")
        fits = [
            card
            for card in usable
            if any(card.name == name if exact else card.name.startswith(name) for name in names) is not without
        ]
        return next(iter(fits), None), f"NCCL_SOCKET_IFNAME={setting}"

    def order(card: Interface) -> int:
        if card.name.startswith("ib"):
            return 0
        return 3 if card.is_loopback else 2 if card.name.startswith("docker") else 1

    return min(usable, key=order, default=None), "NCCL's own order of cards"


def check_cards(
    environment: Mapping[str, str], cards: Sequence[Interface], meeting: str, *, has_cuda: bool
) -> list[Finding]:
    """Look which card gloo and NCCL will take, and whether the other hosts can be reached from it.

    Args:
        environment: of the ranks.
        cards: of this host.
        meeting: address at which ranks meet; empty if they are all on this host.
        has_cuda: NCCL will be used.
    """
    several = bool(meeting) and not ipaddress.ip_address(meeting).is_loopback
    findings = []
    for backend, choose in (("gloo", gloo_card), ("nccl", nccl_card)):
        variable = f"{backend.upper()}_SOCKET_IFNAME"
        if backend == "nccl" and not has_cuda and variable not in environment:
            continue
        card, why = choose(environment, cards)
        findings += _about_card(backend, variable, card, why, cards, meeting if several else "")
    return findings


def _about_card(
    backend: str, variable: str, card: Interface | None, why: str, cards: Sequence[Interface], meeting: str
) -> list[Finding]:
    check = f"network.{backend}"
    others = [other.name for other in cards if other.is_up and other.address and not other.is_loopback]
    leaving = _leaves_by(meeting, cards) if meeting else ""
    better = leaving or next(iter(others), "")
    cure = f"export {variable}={better}" if better else f"unset {variable}"
    if card is None:
        known = ", ".join(other.name for other in cards)
        return [error(check, f"{why}: no such interface here; there are {known}", cure)]
    if not card.is_up or not card.address:
        state = "has no IPv4 address" if card.is_up else "is down"
        return [error(check, f"{backend} will take {card.name} ({why}), which {state}", cure)]
    text = f"{backend} will take {card.name}, {card.address} ({why})"
    if meeting and card.is_loopback:
        return [error(check, f"{text}: other hosts cannot reach it", cure, interface=card.name)]
    if leaving and leaving != card.name:
        text += f", but the way to {meeting} is {leaving}"
        return [warning(check, text, f"export {variable}={leaving}", interface=card.name)]
    return [ok(check, text, interface=card.name, address=card.address)]


def _leaves_by(address: str, cards: Sequence[Interface]) -> str:
    """Return the name of the card by which packets to ``address`` leave; loopback, for an own one, does not count."""
    own = next((card.name for card in cards if card.address == address), "")
    if own:
        return own
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as prober:
        try:
            prober.connect((address, 9))  # sends nothing
            source = prober.getsockname()[0]
        except OSError:
            return ""
    return next((card.name for card in cards if card.address == source and not card.is_loopback), "")


# Where ranks meet -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT, or torchrun's --rdzv-endpoint."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read host:port.

        Raises:
            ValueError: it is something else.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"expected host:port but got {text!r}")
        return cls(host=host.strip("[]"), port=int(port))


def check_endpoint(endpoint: Endpoint, is_first: bool | None) -> tuple[list[Finding], str]:
    """Look whether ranks could meet there; return the findings and the address.

    Args:
        endpoint: where.
        is_first: this is the host that listens there; None: if the address is this host's.
    """
    addresses = resolve(endpoint.host)
    where = f"{endpoint.host}:{endpoint.port}"
    if not addresses:
        cure = "correct the name, or give the address itself; every host must resolve it (DNS or /etc/hosts)"
        return [error("network.endpoint", f"the name {endpoint.host!r} is not known on this host", cure)], ""
    address = addresses[0]
    is_own = can_bind(address) is None
    if is_first is None:
        is_first = is_own
    if not is_first:
        return [_try_to_connect(where, address, endpoint.port)], address
    if not is_own:
        cure = "start node rank 0 on the host that has this address, or give the first host's own"
        return [error("network.endpoint", f"this host is the first but does not have the address {where}", cure)], ""
    problem = can_bind(address, endpoint.port)
    if problem is not None:
        cure = f"end what listens there (ss -ltnp 'sport = :{endpoint.port}'), or choose another port on all hosts"
        return [error("network.port", f"port {where} is taken: {problem.strerror}", cure)], address
    return [ok("network.port", f"port {where} is free")], address


def _try_to_connect(where: str, address: str, port: int) -> Finding:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        cure = "start the first host's job; if it runs, check its port and that it listens on this address"
        return error("network.port", f"nothing listens at {where}: connection refused", cure)
    except OSError as problem:
        reason = "no answer" if isinstance(problem, TimeoutError) else problem.strerror or str(problem)
        cure = f"open TCP port {port} between the hosts (firewall, security group); check the address and the route"
        return error("network.port", f"{where} cannot be reached: {reason}", cure)
    return ok("network.port", f"{where} answers")
