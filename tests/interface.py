"""What the kernel counts of this network namespace."""

from __future__ import annotations

from pathlib import Path


def sent(name: str) -> tuple[int, int]:
    """Return bytes and packets that an interface has sent, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        found, _, counters = line.partition(":")
        if found.strip() == name:
            nbytes, num_packets = map(int, counters.split()[8:10])
            return nbytes, num_packets
    raise AssertionError(f"expected an interface {name} in /proc/net/dev")


def num_sent_again() -> int:
    """Return how many segments TCP has sent again, as it does where a busy receiver is slow to acknowledge."""
    names, numbers = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:")
    return int(numbers[names.index("RetransSegs")])
