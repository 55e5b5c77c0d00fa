"""Commands that run once in an environment, as a service's user, and whose end is awaited: health checks."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from netnsd.core.environment import Command, Environment
from netnsd.core.interfaces import Adapters, Exited, Launch
from netnsd.errors import KernelError, LauncherUnavailable

# Builds what the launcher is told: environment, command, group, launch id, and a descriptor for its output.
LaunchOf = Callable[[Environment, Command, str, str, int], Launch]


class _End:
    def __init__(self) -> None:
        self.came = trio.Event()
        self.code: int | None = None
        self.is_lost = False


class Errands:
    """Runs them, each in a cgroup of its own, of which nothing is left afterwards.

    Args:
        turn: an environment's lock. It is held while a command is started, so that none starts in what is removed.
        launch_of: makes the launch.
    """

    def __init__(self, adapters: Adapters, turn: Callable[[Environment], AbstractAsyncContextManager[None]],
                 launch_of: LaunchOf) -> None:
        self._a = adapters
        self._turn = turn
        self._launch_of = launch_of
        self._awaited: dict[str, _End] = {}

    async def run(self, environment: Environment, name: str, command: Command, timeout_seconds: float) -> int | None:
        """Run ``command`` and return its exit code, None where nobody could tell. Its output is dropped.

        Raises trio.TooSlowError where it does not end in time: it is killed. Raises LaunchFailed, NotFound and
        WrongState (the environment goes), and other NetnsdErrors where it could not be tried.
        """
        group, launch_id, end = f"{environment.slot.cgroup}/h-{name}", uuid.uuid4().hex, _End()
        self._awaited[launch_id] = end
        try:
            async with self._turn(environment):
                with trio.fail_after(timeout_seconds):
                    await self._start(environment, command, group, launch_id)
            with trio.fail_after(timeout_seconds):
                await end.came.wait()
        finally:
            del self._awaited[launch_id]
            with trio.CancelScope(shield=True):
                await self._a.cgroups.remove(group)
        if end.is_lost:
            raise LauncherUnavailable("the launcher ended while a check ran", hint="It is tried again.")
        return end.code

    async def _start(self, environment: Environment, command: Command, group: str, launch_id: str) -> None:
        await self._a.cgroups.remove(group)  # of a daemon that was killed meanwhile
        await self._a.cgroups.create(group)
        try:
            output = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError.at("stdio", error) from error
        try:
            await self._a.processes.launch(self._launch_of(environment, command, group, launch_id, output))
        finally:
            os.close(output)

    def take(self, exited: Exited) -> bool:
        """Whether that is the end of one of these."""
        end = self._awaited.get(exited.launch_id)
        if end is not None:
            end.code = exited.code
            end.came.set()
        return end is not None

    def launcher_lost(self) -> None:
        """Nobody will tell the ends of those that run."""
        for end in self._awaited.values():
            end.is_lost = True
            end.came.set()
