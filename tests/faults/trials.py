"""One fault at one point of one path, and a look at what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.faults import paths
from tests.faults.control import Control, Step
from tests.faults.paths import Path
from tests.faults.primitives import failures_of, may_persist
from tests.faults.world import SETTLE_SECONDS, Reply, World
from tests.harness import wait_until
from tests.harness.waiting import DeadlineError

# What a step behind an answer may take until it is come to.
_BEHIND_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried: the ``occurrence``-th time that ``path`` comes to ``point``. ``what``: how it fails; "" a kill."""

    path: Path
    point: str
    occurrence: int
    what: str = ""
    persists: bool = False
    in_launcher: bool = False

    def __str__(self) -> str:
        how = f"fails with {self.what}{' for a while' if self.persists else ''}" if self.what else "is killed"
        where = " of the launcher" if self.in_launcher else ""
        return f"{self.path.name} {how} at {self.point}{where} ({self.occurrence})"

    def arm(self, world: World) -> Control:
        """Have it happen from now on."""
        control = world.daemon.launcher_control if self.in_launcher else world.control
        if self.what:
            control.fail_at(self.point, self.occurrence, self.what, persists=self.persists)
        else:
            control.kill_at(self.point, self.occurrence)
        return control


@dataclass(slots=True)
class Outcome:
    """What came of a trial. ``reached``: whether the path came to the point at all."""

    trial: Trial
    reached: bool
    differences: list[str]

    def __str__(self) -> str:
        return f"{self.trial}:\n" + "\n".join(f"    {line}" for line in self.differences)


@dataclass(slots=True)
class Recording:
    """What steps a path took, in a run in which nothing went wrong."""

    path: Path
    steps: list[Step] = field(default_factory=list)
    launcher_steps: list[Step] = field(default_factory=list)

    def counts(self, *kinds: str, in_launcher: bool = False) -> Counter[str]:
        """How often each point was come to."""
        steps = self.launcher_steps if in_launcher else self.steps
        return Counter(step.point for step in steps if step.kind in kinds)


def record(world: World, path: Path) -> Recording:
    """Go the path once. Raises AssertionError where it does not work even so."""
    path.prepare(world)
    world.record()
    if world.is_alive:
        world.wait_quiet()  # what the preparation left to do is none of the path's
        world.record()
    path.begin(world)
    reply = path.reply(world)
    assert reply.is_good or reply.code in path.fails, (path.name, reply)
    if reply.is_good:
        path.fulfilled(world)
    world.wait_quiet()
    recording = Recording(path, world.control.steps(), world.daemon.launcher_control.steps())
    world.disarm()
    if not world.is_alive:
        world.start()
    assert paths.examine(world, path) == []
    paths.clean(world)
    assert world.leaks() == []
    return recording


def kills(recording: Recording) -> Iterator[Trial]:
    """A kill before each change of the world: of the daemon, and of the launcher or its child."""
    for in_launcher in (False, True):
        for point, count in recording.counts("effect", in_launcher=in_launcher).items():
            for occurrence in range(1, count + 1):
                yield Trial(recording.path, point, occurrence, in_launcher=in_launcher)


def failures(recording: Recording) -> Iterator[Trial]:
    """Each step, in each way that it may fail."""
    for in_launcher, steps in ((False, recording.steps), (True, recording.launcher_steps)):
        names = {step.point: step.name for step in steps}
        for point, count in recording.counts("effect", "look", in_launcher=in_launcher).items():
            for occurrence in range(1, count + 1):
                for what in failures_of(names[point], point):
                    for persists in (False, True) if may_persist(names[point]) else (False,):
                        yield Trial(recording.path, point, occurrence, what, persists, in_launcher)


def attempt(world: World, trial: Trial) -> Outcome:
    """Do what the trial says, and look."""
    return fail(world, trial) if trial.what or trial.in_launcher else kill(world, trial)


def kill(world: World, trial: Trial) -> Outcome:
    """Have the daemon killed there, start it again, and look."""
    trial.path.prepare(world)
    control = trial.arm(world)
    trial.path.begin(world)
    _await_fired(world, control)
    reached = bool(control.fired)
    if not (reached and world.await_end(_BEHIND_SECONDS)) and world.is_alive:
        world.daemon.kill()
    trial.path.reply(world)
    return Outcome(trial, reached, _checked(world, trial.path))


def _checked(world: World, path: Path) -> list[str]:
    found: list[str] = []
    try:
        world.start()
        found += world.complaints_of_bystander()
        found += _settled(world)
        found += paths.examine(world, path)
        paths.clean(world)
        found += world.leaks()
    except AssertionError as error:
        found.append(f"{type(error).__name__}: {error}")
    found += _scandals(world)
    if found:
        recover(world)
    return found


def fail(world: World, trial: Trial) -> Outcome:
    """Have it fail there, and look what is answered, what is left, and whether it works again."""
    path = trial.path
    found: list[str] = []
    path.prepare(world)
    control = trial.arm(world)
    path.begin(world)
    reply = path.reply(world)
    found += _complaints_of_answer(reply)
    _await_fired(world, control)
    if trial.persists:
        time.sleep(0.05)  # for a while it goes on
    world.disarm()
    try:
        if isinstance(path, (paths.DaemonStart, paths.DaemonStop)):
            path.again(world)
        world.hang_up()
        found += world.complaints_of_bystander()
        found += _settled(world)
        if not reply.is_good and path.makes:
            found += [f"{name} was not made, and is there" for name in world.environments() if name in path.names]
        # A child that is killed before its exec is a server that was killed: it can be started.
        found += paths.examine(world, path, starts=trial.in_launcher)
        path.again(world)
        if path.name != "stop":
            found += paths.examine(world, path, starts=trial.in_launcher)
        paths.clean(world)
        if not world.is_alive:
            found.append("the daemon ended")
        found += world.leaks()
    except AssertionError as error:
        found.append(f"{type(error).__name__}: {error}")
    found += _scandals(world)
    if found:
        recover(world)
    return Outcome(trial, bool(control.fired), found)


def recover(world: World) -> None:
    """After a difference: a new daemon, and nothing but the bystander, so that the next trial tells of its own."""
    world.disarm()
    if world.is_alive:
        world.daemon.kill()
    world.start()
    _settled(world)
    paths.clean(world)
    if world.leaks():
        world.before = world.look()  # told once
    world.new_log()


def _complaints_of_answer(reply: Reply) -> list[str]:
    if reply.is_good:
        failed = reply.body.get("failed", []) if isinstance(reply.body, dict) else []
        return [f"answered {one}" for one in failed if one["error"]["code"] == "internal"]
    if reply.status and reply.code and reply.code != "internal":
        return []
    return [f"answered {reply}"]


def _await_fired(world: World, control: Control) -> None:
    deadline = time.monotonic() + _BEHIND_SECONDS
    while not control.fired and world.is_alive and time.monotonic() < deadline:
        time.sleep(0.005)


def _settled(world: World) -> list[str]:
    """What does not come to an end by itself, though the daemon looks after it."""
    def unsettled() -> list[str]:
        return [f"{e['name']} is {e['state']}" for e in world.environments().values()
                if e["state"] in ("creating", "removing")]

    try:
        wait_until(lambda: not unsettled(), seconds=SETTLE_SECONDS, what="an end")
    except DeadlineError:
        return unsettled()
    return []


def _scandals(world: World) -> list[str]:
    """What a daemon must never log."""
    return [line for line in world.new_log().splitlines()
            if "Traceback" in line or '"internal"' in line or "Exception ignored" in line or "never awaited" in line]
