"""The daemon is killed at its steps, and its steps fail: everything is whole or gone, and nothing is left.

A sample: a kill at half of the points, and a sixth of them fail; FAULTS_SEED decides on which path, at which time and
how. ``python -m tests.faults --minutes N`` tries them all, in time.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path as File

import pytest

from tests.faults import campaign, planting, primitives, trials
from tests.faults.campaign import Figures
from tests.faults.found import FOUND
from tests.faults.paths import Path
from tests.faults.primitives import Kind
from tests.faults.trials import Outcome, Recording, Trial
from tests.faults.world import World

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
SEED = int(os.environ.get("FAULTS_SEED", "1"))
# Of the points of failures so many are left for other seeds, for each that is tried.
OTHERS = 5
PACKAGE = File(__file__).parents[2] / "netnsd"
WorldOf = Callable[[Path], World]

# Changes of the world that no path of these comes to, and where they are tried instead.
ELSEWHERE = {
    "daemon.main._watchdog:": "the watchdog of systemd",
    "kernel._child.Child._await_order:os._exit": "a child whose launcher ends: tests/kernel/test_prepared.py",
    "kernel.files._make_in:": "directories that somebody removed: tests/system/test_hostility_files.py",
    "kernel.launcher.Launcher.close:": "a launcher that ends by itself: tests/kernel/test_launcher.py",
    "kernel.limits.Limits._enable:os.makedirs": "the group is there by then: hosts with controllers of cgroup v2",
    "kernel.limits._kill:": "what left the group of cgroup v2: tests/kernel/test_limits.py",
    "kernel.probes._status:": "a check by HTTP asks the server, and changes nothing",
    "kernel.processes.LauncherProcesses.look:": "a socket that somebody removed: tests/system/test_hostility_files.py",
    "kernel.shortage.more_in_v1:os.eventfd_read": "memory that runs out: tests/system/test_resources.py",
    "kernel.tracked.": "connections to the outside: tests/system/test_reach.py",
    "store.SqliteStore.ids:": "the doctor's look",
    "store.SqliteStore.set_boot:": "another boot: tests/system/test_reboot.py",
    "store.SqliteStore.set_command:": "another boot, and groups that were lost: tests/unit/test_core_accounts.py",
    "daemon.main.launcher:": "the program of the launcher's unit: it becomes the launcher",
    "kernel._monitor.": "commands that users run: tests/kernel/test_attach.py",
    "kernel.launcher.Launcher._attach:": "commands that users run: tests/kernel/test_attach.py",
    "kernel.launcher.main:os.write": "what is wrong with its arguments: tests/kernel/test_launcher.py",
    "kernel._child.Child._join_cgroup:": "kernels without clone3: tests/kernel/test_launcher.py",
    "kernel._forking._fork:os.fork": "kernels without clone3: tests/kernel/test_launcher.py",
    "kernel._child.Child._set_limits:os.write": "a launcher with an oom_score_adj: tests/kernel/test_launcher.py",
    "kernel.files.EnvironmentFiles._punch:": "logs that grow: tests/system/test_logs.py",
    "kernel.files._take_back:os.ftruncate": "a log that has a second name: tests/system/test_attacks_3.py",
    "kernel.inhabitants.kill:": "processes that left their cgroup: tests/system/test_processes.py",
    "kernel._hiding.Hiding._unmount:": "pins that were there before the launcher: tests/kernel/test_launcher.py",
    "kernel.namespace_thread.bind:os.unlink": "the undo of a mount that failed: the failures of that mount",
    "kernel.network._make_mount:libc.mount#": "the host's first daemon: tests/system",
    "kernel.processes.LauncherProcesses._start:signal.pidfd_send_signal": "a launcher that has ended is signalled too",
    "kernel.processes.LauncherProcesses._flush:self._socket.shutdown": "the failures of the sending before it",
    "kernel.processes._discard:": "who asked for a start is gone: tests/kernel/test_launcher.py",
    "kernel._startup.listen:os.unlink": "a socket that a killed launcher left: tests/kernel/test_launcher.py",
    "kernel.bridges.Forwarding.": "hosts with an uplink: tests/system/test_network.py",
    "kernel.bridges.Bridges._delete:": "bridges that were half-made: the kills of what makes them",
    "store.SqliteStore._roll_back:": "the undo of a statement that failed: the failures of that statement",
}


@pytest.fixture(scope="module")
def world_of() -> Iterator[WorldOf]:
    with campaign.worlds() as made:
        yield made


@pytest.fixture(scope="module")
def recordings(world_of: WorldOf) -> dict[str, Recording]:
    return {recording.path.name: recording for recording in campaign.recorded(world_of)}


@pytest.fixture(scope="module")
def done() -> set[object]:
    """What was tried already on another path."""
    return set()


@pytest.fixture(scope="module")
def figures() -> Iterator[Figures]:
    made = Figures()
    yield made
    print(f"\nfaults, seed {SEED}: {made}")


def nothing_differs(world_of: WorldOf, chosen: list[Trial], figures: Figures) -> list[Outcome]:
    """Try them, and return those whose step did not come about."""
    outcomes: list[Outcome] = []
    campaign.run(world_of, chosen, tell=outcomes.append, figures=figures)
    differing = [outcome for outcome in outcomes if outcome.differences]
    assert not differing, "\n".join(str(outcome) for outcome in differing)
    return [outcome for outcome in outcomes if not outcome.reached]


def test_every_change_of_the_world_is_come_to_by_a_path(recordings: dict[str, Recording]) -> None:
    steps = [step for r in recordings.values() for step in (*r.steps, *r.launcher_steps)]
    seen = {step.point for step in steps}
    methods = {step.name.rpartition(".")[2] for step in steps if step.kind == "effect"} - {"run", "open", "replace"}
    missing, excused = [], set()
    for module, path in planting.modules(str(PACKAGE)):
        for place in planting.plant(File(path).read_text(), module)[1]:
            called = place.point.partition(":")[2].partition("#")[0].rpartition(".")[2]
            # Where the code alone does not say what is called, its name does.
            is_change = primitives.kind_of(place.name) is Kind.EFFECT if place.name else called in methods
            excuse = next((prefix for prefix in ELSEWHERE if place.point.startswith(prefix)), None)
            if excuse is not None:
                excused.add(excuse)
            elif is_change and place.point not in seen:
                missing.append(f"{path}:{place.line} {place.point}")
    assert not missing, "nothing is ever killed there:\n" + "\n".join(missing)
    assert excused == ELSEWHERE.keys(), "what is excused is there no more"


@pytest.mark.parametrize("trial", FOUND, ids=str)
def test_a_fault_that_was_found_stays_mended(world_of: WorldOf, figures: Figures, trial: Trial) -> None:
    assert nothing_differs(world_of, [trial], figures) == [], "the code has no such step any more: see found.py"


@pytest.mark.parametrize("path", campaign.ALL, ids=lambda path: path.name)
def test_killed_at_any_step_everything_is_whole_or_gone(
        world_of: WorldOf, recordings: dict[str, Recording], done: set[object], figures: Figures, path: Path) -> None:
    candidates = [trial for trial in campaign.shuffled(trials.kills(recordings[path.name]), SEED)
                  if zlib.crc32(trial.point.encode()) % 2 == SEED % 2]
    nothing_differs(world_of, campaign.first_of_each(candidates, done=done), figures)


@pytest.mark.parametrize("path", campaign.ALL, ids=lambda path: path.name)
def test_where_a_step_fails_the_answer_says_it_and_nothing_is_left(
        world_of: WorldOf, recordings: dict[str, Recording], done: set[object], figures: Figures, path: Path) -> None:
    candidates = [trial for trial in campaign.shuffled(trials.failures(recordings[path.name]), SEED)
                  if zlib.crc32(trial.point.encode()) % (1 + OTHERS) == SEED % (1 + OTHERS)]
    chosen = campaign.first_of_each(candidates, key=lambda t: ("fails", t.point, t.in_launcher), done=done)
    nothing_differs(world_of, chosen, figures)


def test_most_of_what_was_tried_came_about(figures: Figures) -> None:
    """Threads take turns as they like, so that a step may come less often than it was recorded; no more than that."""
    tried = figures.kills + figures.failures
    assert figures.missed <= tried // 10, str(figures)
    assert list(itertools.chain(figures.points)), "nothing was tried"
