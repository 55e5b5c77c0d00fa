"""Random sequences of requests and deaths on fakes, against a model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import on
from tests.stateful.on_fakes import FakeDriver

# The same ones in each run: the soak draws others.
SETTINGS = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.mark.timeout(300)
def test_service_and_model_agree_whatever_is_asked_and_whatever_dies() -> None:
    with FakeDriver() as driver:
        run_state_machine_as_test(on(driver), settings=SETTINGS)
