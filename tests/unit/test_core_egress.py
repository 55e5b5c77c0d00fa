"""What an environment reaches outside: the words, and their bounds."""

from __future__ import annotations

import pytest

from netnsd.core.egress import ALL_ADDRESSES, MOST_ENTRIES, reach
from netnsd.core.specification import check_egress
from netnsd.core.traffic import EVERYTHING
from netnsd.errors import InvalidRequest

TCP, UDP, SCTP, EVERY = (6, 6), (17, 17), (132, 132), (0, 65535)
A = (10 << 24) + 1


def test_allow_is_everything_and_deny_nothing() -> None:
    assert reach("allow") == ((ALL_ADDRESSES, EVERYTHING),)
    assert reach("deny") == ()


@pytest.mark.parametrize(("text", "found"), [
    ("10.0.0.1", (((A, A), EVERYTHING),)), ("10.0.0.1/32", (((A, A), EVERYTHING),)),
    ("10.0.0.0/8", (((10 << 24, (11 << 24) - 1), EVERYTHING),)),
    ("10.0.0.1:53", (((A, A), ((TCP, (53, 53)), (UDP, (53, 53)))),)),
    ("10.0.0.1:80-90/tcp", (((A, A), ((TCP, (80, 90)),)),)), ("10.0.0.1/udp", (((A, A), ((UDP, EVERY),)),)),
    ("10.0.0.0/31/sctp", (((A - 1, A), ((SCTP, EVERY),)),)),
    ("0.0.0.0/0:443/tcp", ((ALL_ADDRESSES, ((TCP, (443, 443)),)),)),
    ("10.0.0.1:1/tcp,10.0.0.1:2-65535/tcp", (((A, A), ((TCP, (1, 65535)),)),)),
    ("10.0.0.0,10.0.0.1", (((A - 1, A), EVERYTHING),))])
def test_entries_say_where_and_how(text: str, found: object) -> None:
    assert reach(text) == found
    assert check_egress(text) == text


@pytest.mark.parametrize("text", [
    "", "Allow", "all", "10.0.0.0/8,", ",", "10.0.0.1/8", "10.0.0.0/33", "10.0.0", "10.0.0.256", "010.0.0.1",
    "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:90-80", "10.0.0.1:", "10.0.0.1:80-", "10.0.0.1/icmp", "10.0.0.1/TCP",
    "10.0.0.1:http", "::/0", "example.com", "allow,deny", "10.0.0.1 ", "10.0.0.1\n", "10.0.0.1:80/tcp/udp",
    "\u0661\u0660.0.0.1", "10.0.0.1:\u0668\u0660", "9" * 5000, ",".join(["10.0.0.1"] * (MOST_ENTRIES + 1))])
def test_what_is_no_egress_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_egress(text)
    assert len(caught.value.message) < 200
    assert caught.value.hint


def test_so_many_entries() -> None:
    assert len(reach(",".join(f"10.0.{2 * number}.1" for number in range(MOST_ENTRIES)))) == MOST_ENTRIES
