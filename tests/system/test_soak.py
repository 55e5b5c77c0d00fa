"""A small part of the soak, so that it works when it is wanted."""

from __future__ import annotations

import pytest

from tests.soak import cycles
from tests.soak.figures import table


@pytest.mark.timeout(180)
def test_cycles_of_creation_use_and_removal_leave_nothing_though_the_daemon_dies() -> None:
    told: list[str] = []
    with cycles.on_a_host(2026, told.append) as run:
        run.run(cycles.Sizes(warm_up=40, steady=80, rough=30, per_client=10, calm=(0.1, 0.8),
                             patience_seconds=0), seconds=90)
        rows = run.rows()
        assert run.failures == []
        assert run.differences == []
        assert run.done >= 150
        assert run.deaths.total() > 0
        assert [row for row in rows if not row.holds] == [], table(rows)
        assert told
