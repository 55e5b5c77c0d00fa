"""Sets of packets, as few boxes: by protocol and port (``Traffic``), and by whom it is with too (``Reach``). Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from netnsd.core.judgement import ANY_PORT, ANY_PROTOCOL, Span

# Protocols and ports of the destination. Sorted and disjoint; all of it is one box, else each is of one protocol.
Traffic = tuple[tuple[Span, Span], ...]
# By addresses, which are sorted and disjoint, as few as can be; what is missing is not reached.
Reach = tuple[tuple[Span, Traffic], ...]

NOTHING: Traffic = ()
EVERYTHING: Traffic = ((ANY_PROTOCOL, ANY_PORT),)
# Assigned numbers: https://www.iana.org/assignments/protocol-numbers
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


def of_protocol(name: str, ports: Span = ANY_PORT) -> Traffic:
    """Some ports of a protocol, ``tcp``, ``udp`` or ``sctp``."""
    return (((PROTOCOLS[name], PROTOCOLS[name]), ports),)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same numbers in as few spans as can be, in order."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def without(spans: Iterable[Span], holes: Iterable[Span]) -> list[Span]:
    """``spans`` but for what is in ``holes``, in as few spans as can be."""
    found: list[Span] = []
    cut = merged(holes)
    passed = 0  # holes that are behind: each is looked at once for a span, as users say how many there are
    for begin, end in merged(spans):
        while passed < len(cut) and cut[passed][1] < begin:
            passed += 1
        free, place = begin, passed
        while place < len(cut) and cut[place][0] <= end:
            if free < cut[place][0]:
                found.append((free, cut[place][0] - 1))
            free = cut[place][1] + 1
            place += 1
        if free <= end:
            found.append((free, end))
    return found


def united(parts: Iterable[Traffic]) -> Traffic:
    """What is in any of them."""
    ports: dict[Span, list[Span]] = {}
    for part in parts:
        if part == EVERYTHING:
            return EVERYTHING
        for protocols, span in part:
            ports.setdefault(protocols, []).append(span)
    return tuple((protocols, span) for protocols in sorted(ports) for span in merged(ports[protocols]))


def common(one: Traffic, other: Traffic) -> Traffic:
    """What is in both."""
    if one == EVERYTHING:
        return other
    if other == EVERYTHING:
        return one
    found: list[tuple[Span, Span]] = []
    mine = theirs = 0
    while mine < len(one) and theirs < len(other):
        (protocols, ports), (others, spans) = one[mine], other[theirs]
        if protocols == others and max(ports[0], spans[0]) <= min(ports[1], spans[1]):
            found.append((protocols, (max(ports[0], spans[0]), min(ports[1], spans[1]))))
        if (protocols, ports[1]) <= (others, spans[1]):
            mine += 1
        else:
            theirs += 1
    return tuple(found)


def reach_of(parts: Iterable[tuple[Span, Traffic]]) -> Reach:
    """What any of these parts lets, which may overlap."""
    begins: dict[int, list[Traffic]] = {}
    ends: dict[int, list[Traffic]] = {}
    for (first, last), traffic in parts:
        begins.setdefault(first, []).append(traffic)
        ends.setdefault(last + 1, []).append(traffic)
    pieces: list[tuple[Span, Traffic]] = []
    here: Counter[Traffic] = Counter()
    for first, beyond in pairwise(sorted({*begins, *ends})):
        here.update(begins.get(first, ()))
        here -= Counter(ends.get(first, ()))
        pieces.append(((first, beyond - 1), united(here)))
    return _joined(pieces)


def common_reach(one: Reach, other: Reach) -> Reach:
    """What both let."""
    pieces: list[tuple[Span, Traffic]] = []
    mine = theirs = 0
    while mine < len(one) and theirs < len(other):
        (first, last), traffic = one[mine]
        (begin, end), others = other[theirs]
        if max(first, begin) <= min(last, end):
            pieces.append(((max(first, begin), min(last, end)), common(traffic, others)))
        if last <= end:
            mine += 1
        else:
            theirs += 1
    return _joined(pieces)


def _joined(pieces: Sequence[tuple[Span, Traffic]]) -> Reach:
    found: list[tuple[Span, Traffic]] = []
    for span, traffic in pieces:
        if traffic and found and found[-1][1] == traffic and found[-1][0][1] + 1 == span[0]:
            found[-1] = ((found[-1][0][0], span[1]), traffic)
        elif traffic:
            found.append((span, traffic))
    return tuple(found)
