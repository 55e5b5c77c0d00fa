"""The stateful tests with fresh seeds, for as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.soak.figures import Row
from tests.stateful.driver import Driver
from tests.stateful.machine import on
from tests.stateful.on_fakes import FakeDriver
from tests.stateful.on_host import HostDriver

_STEPS = 40
_TELL_SECONDS = 20.0


def on_fakes(first_seed: int, seconds: float, tell: Callable[[str], None]) -> list[Row]:
    """On fakes. A failure is made small, and raised with its seed."""
    with FakeDriver() as driver:
        return _run(driver, first_seed, seconds, tell, examples=25, phases=(Phase.generate, Phase.shrink))


def on_a_host(first_seed: int, seconds: float, tell: Callable[[str], None]) -> list[Row]:
    """With a real daemon. What chance has done is not done again, so that a failure is raised as it was found."""
    with HostDriver() as driver:
        return _run(driver, first_seed, seconds, tell, examples=2, phases=(Phase.generate,))


def _run(driver: Driver, first_seed: int, seconds: float, tell: Callable[[str], None], *, examples: int,
         phases: tuple[Phase, ...]) -> list[Row]:
    machine = on(driver)
    bounds = settings(max_examples=examples, stateful_step_count=_STEPS, deadline=None, database=None, phases=phases,
                      suppress_health_check=list(HealthCheck))
    begin = told = time.monotonic()
    number = first_seed
    while time.monotonic() - begin < seconds:
        try:
            run_state_machine_as_test(seed(number)(machine), settings=bounds)
        except BaseException:
            tell(f"failed with seed {number}")
            raise
        number += 1
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            tell(f"{machine.counts['sequences']} sequences, {machine.counts['steps']} steps")
    return [*(Row(what, None, machine.counts[what], None) for what in ("sequences", "steps")),
            Row("seeds", None, number - first_seed, None), Row("differences from the model", None, 0, 0)]
