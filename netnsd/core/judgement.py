"""What policies and egress come to: values that the firewall can hold. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

# First and last, both included.
Span = tuple[int, int]
ANY_PROTOCOL: Span = (0, 255)
ANY_PORT: Span = (0, 65535)


@dataclass(frozen=True, slots=True, order=True)
class Passage:
    """A box of packets that may go: all of its combinations do. Addresses, protocols and ports are numbers.

    ``ports`` are of the destination.
    """

    sources: Span
    targets: Span
    protocols: Span = ANY_PROTOCOL
    ports: Span = ANY_PORT


@dataclass(frozen=True, slots=True)
class Judgement:
    """Who may go where, beside what holds always.

    Between two environments, what one of ``passages`` allows goes, and nothing else. To the outside an environment goes
    freely, unless it is one of ``confined``: then by ``passages`` only. From the outside (share ``lan``) to one of
    ``shielded`` by ``passages`` only. Passages do not overlap. Addresses are numbers.
    """

    passages: frozenset[Passage] = frozenset()
    confined: frozenset[int] = frozenset()
    shielded: frozenset[int] = frozenset()
