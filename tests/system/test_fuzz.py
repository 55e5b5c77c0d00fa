"""Whatever is sent to the API is answered as the OpenAPI document says, and nothing is left of it."""

from __future__ import annotations

import pytest

from tests.fuzz import campaign
from tests.soak.figures import table

_SECONDS_PER_LISTENER = 12.0
_LEAST_REQUESTS = 100


@pytest.mark.timeout(300)
def test_nothing_that_is_sent_to_the_api_makes_it_fail() -> None:
    told: list[str] = []
    with campaign.on_a_host(told.append) as run:
        run.run(_SECONDS_PER_LISTENER * len(campaign.LISTENERS), seed=2026, least=_LEAST_REQUESTS)
        rows = run.rows()
    print(*told, table(rows), sep="\n")
    assert run.failures == [], "\n".join(run.failures)
    assert run.differences == []
    assert [row for row in rows if not row.holds] == [], table(rows)
    assert set(run.answers) == {listener.name for listener in campaign.LISTENERS}
    assert all(counts.total() >= _LEAST_REQUESTS for counts in run.answers.values()), run.answers
