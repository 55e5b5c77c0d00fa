"""Faults where a test wants them: every call of an adapter is a numbered step, and any step can be made to fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from netnsd.errors import KernelError, StoreError

# Looks, and a message that is not answered: by the protocols they cannot fail.
_NOT_STEPS = frozenset({"exits", "populated", "pids", "acknowledge", "observe", "processes.prepare"})


class Killed(BaseException):
    """The daemon is dead: no step is done any more, of whatever tidies up after others neither."""


@dataclass(slots=True)
class Plan:
    """At which step what happens. ``after``: the step is done first, and then fails or is cancelled."""

    number: int
    action: Callable[[str], None]
    after: bool = False
    again: bool = False


@dataclass(slots=True)
class Faults:
    """Counts steps while ``armed``; ``steps`` has their names, such as ``network.wire``.

    Steps in ``broken`` fail always, as their protocol says. All raise Killed while ``is_dead``.
    """

    steps: list[str] = field(default_factory=list)
    armed: bool = False
    plan: Plan | None = None
    broken: set[str] = field(default_factory=set)
    is_dead: bool = False

    def wrap(self, adapter: Any, name: str) -> Any:
        """``adapter`` with each of its calls a step."""
        return _Tap(adapter, name, self)

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        """Count from here on, and nothing fails."""
        self.steps, self.armed, self.plan = [], True, None
        try:
            yield self.steps
        finally:
            self.armed = False

    @contextmanager
    def fail_at(self, number: int, action: Callable[[str], None], *, after: bool = False,
                again: bool = False) -> Iterator[list[str]]:
        """Have the step with that number, counted from 0, run ``action``, which raises or cancels; it gets the name.

        With ``again`` the same step fails each time that it is tried.
        """
        with self.recording() as steps:
            self.plan = Plan(number, action, after, again)
            try:
                yield steps
            finally:
                self.plan = None

    def enter(self, step: str) -> Callable[[], None] | None:
        """A step begins; returns what it is to do when it is done."""
        if self.is_dead:
            raise Killed(step)
        if step in self.broken:
            failing(step)
        if not self.armed:
            return None
        self.steps.append(step)
        plan = self.plan
        if plan is None:
            return None
        number = len(self.steps) - 1
        if number != plan.number and not (plan.again and number > plan.number and step == self.steps[plan.number]):
            return None
        if plan.after:
            return partial(plan.action, step)
        plan.action(step)
        return None


class _Tap:
    """Looks like the adapter."""

    def __init__(self, adapter: Any, name: str, faults: Faults) -> None:
        self._adapter, self._name, self._faults = adapter, name, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._adapter, name)
        step = f"{self._name}.{name}"
        if not _NOT_STEPS.isdisjoint({name, step}) or name.startswith("_") or not callable(value):
            return value
        if inspect.iscoroutinefunction(value):
            return self._asynchronous(step, value)
        if name == "transaction":
            return lambda: self._transaction(value)
        return self._synchronous(step, value)

    def _asynchronous(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def stepped(*arguments: Any, **named: Any) -> Any:
            then = self._faults.enter(step)
            result = await call(*arguments, **named)
            if then is not None:
                then()
                await trio.lowlevel.checkpoint()
            return result

        return stepped

    def _synchronous(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            then = self._faults.enter(step)
            result = call(*arguments, **named)
            if then is not None:
                then()
            return result

        return stepped

    @contextmanager
    def _transaction(self, begin: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        started = self._faults.enter(f"{self._name}.begin")
        with begin():
            if started is not None:
                started()
            yield
            ended = self._faults.enter(f"{self._name}.commit")
        if ended is not None:
            ended()


def raising(kind: type[Exception]) -> Callable[[str], None]:
    """An action for ``fail_at``."""
    def action(step: str) -> None:
        raise kind(f"planted at {step}")

    return action


def cancelling(scope: trio.CancelScope) -> Callable[[str], None]:
    """An action for ``fail_at``."""
    return lambda _step: scope.cancel()


def failing(step: str) -> None:
    """An action for ``fail_at``: the error that the step's protocol names."""
    raising(StoreError if step.startswith("store.") else KernelError)(step)
