"""Token buckets: at most the burst at once, the rate for ever, and memory for so many keys only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core import pace
from netnsd.core.pace import Pace


def test_a_burst_then_the_rate() -> None:
    bounded = Pace(rate=2, burst=3)
    assert [bounded.take("a", 10.0) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert bounded.take("a", 10.25) == 0.25
    assert bounded.take("a", 10.5) == 0
    assert bounded.take("a", 10.5) == 0.5
    assert [bounded.take("a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5]


def test_keys_do_not_know_each_other() -> None:
    bounded = Pace(rate=1, burst=1)
    assert [bounded.take(key, 0.0) for key in ("a", "b", "a", "b")] == [0, 0, 1, 1]


@given(st.floats(0.1, 100), st.integers(1, 20), st.lists(st.floats(0, 3), max_size=60))
def test_never_more_than_burst_and_rate(rate: float, burst: int, pauses: list[float]) -> None:
    bounded, now, taken = Pace(rate, burst), 5.0, 0
    for pause in pauses:
        now += pause
        wait = bounded.take("a", now)
        taken += wait == 0
        assert 0 <= wait <= 1 / rate * (1 + 1e-9)
        assert taken <= burst + rate * (now - 5.0) + 1e-6
        if wait:
            bounded.take("a", now)  # to ask in vain costs nothing
            assert bounded.take("a", now) == pytest.approx(wait)


def test_so_many_keys_are_kept() -> None:
    bounded = Pace(rate=0.001, burst=1)
    for number in range(3 * pace._MOST):
        assert bounded.take(number, 0.0) == 0
    assert len(bounded._left) == pace._MOST
    assert bounded.take(3 * pace._MOST - 1, 0.0) > 0
