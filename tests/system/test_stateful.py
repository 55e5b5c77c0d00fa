"""Random sequences of requests and deaths with a real daemon and real servers, against a model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import on
from tests.stateful.on_host import HostDriver

# The same ones in each run: the soak draws others. None is made smaller, as what chance did is not done again.
SETTINGS = settings(max_examples=4, stateful_step_count=25, deadline=None, derandomize=True, database=None,
                    phases=(Phase.generate,), suppress_health_check=list(HealthCheck))


@pytest.mark.timeout(180)
def test_daemon_and_model_agree_whatever_is_asked_and_whatever_dies() -> None:
    with HostDriver() as driver:
        run_state_machine_as_test(on(driver), settings=SETTINGS)
