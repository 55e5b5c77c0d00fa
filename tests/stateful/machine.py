"""All the rules together, in the world of a driver."""

from __future__ import annotations

from collections import Counter

from tests.stateful.asking import Asking
from tests.stateful.driver import Driver
from tests.stateful.dying import Dying


class Machine(Asking, Dying):
    """Everything that users ask, and everything that dies meanwhile."""


def on(driver: Driver) -> type[Machine]:
    """The machine in that driver's world."""
    return type("Machine", (Machine,), {"driver": driver, "counts": Counter()})
