"""What a start makes of what it finds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, Service
from netnsd.core.reconcile import Observed, adopted, plan

PLAN = Plan("10.0.0.0/24", 253)
COMMAND = Command(("x",), {}, "/", 1, 1, (), 0, {}, False)
NOTHING: dict[str, Any] = {"intact": frozenset(), "slots": frozenset(), "cgroups": frozenset(), "files": frozenset(),
                           "populated": frozenset(), "running": {}, "exited": {}}


def environment(index: int, state: Any, services: dict[str, Service] | None = None) -> Environment:
    return Environment(id=f"id{index}", name=f"e{index}", uid=1, user="u", slot=PLAN.slot(index), netns=f"e{index}",
                       labels={}, share="owner", created_at="", boot_id="", state=state, services=services or {})


@given(st.lists(st.tuples(st.sampled_from(["creating", "ready", "removing"]), st.booleans()), max_size=8),
       st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)))
def test_every_environment_ends_in_one_action_and_only_the_rest_is_orphaned(
    rows: list[tuple[str, bool]], slots: set[int], cgroups: set[int], files: set[int]
) -> None:
    desired = [environment(index, state) for index, (state, _) in enumerate(rows)]
    actions = plan(desired, Observed(**{
        **NOTHING, "intact": frozenset(f"id{n}" for n, (_, whole) in enumerate(rows) if whole),
        "slots": frozenset(slots), "cgroups": frozenset(f"nd{n}" for n in cgroups),
        "files": frozenset(f"id{n}" for n in files)}))
    ended = [e.id for e, _ in actions.adopt] + [e.id for e in actions.undo] + [e.id for e in actions.lost]
    assert sorted(ended) == sorted(e.id for e in desired)
    own = set(range(len(rows)))
    assert actions.orphan_slots == sorted(slots - own)
    assert set(actions.orphan_cgroups) == {f"nd{n}" for n in cgroups - own}
    assert set(actions.orphan_files) == {f"id{n}" for n in files - own}
    for (state, whole), e in zip(rows, desired, strict=True):
        assert (e in actions.undo) == (state == "removing" or (state == "creating" and not whole))
        assert (e in actions.lost) == (state == "ready" and not whole)


def test_what_is_being_made_with_services_is_undone_though_its_namespace_is_whole() -> None:
    for state, services, undone in (("creating", {}, False), ("creating", {"main": Service("main", COMMAND)}, True),
                                    ("ready", {"main": Service("main", COMMAND)}, False)):
        actions = plan([environment(0, state, services)], Observed(**{**NOTHING, "intact": frozenset({"id0"})}))
        assert bool(actions.undo) == undone
        assert bool(actions.adopt) != undone


@pytest.mark.parametrize("stored", ["starting", "running", "stopped", "exited"])
@pytest.mark.parametrize(("observed", "expected"), [
    ({"running": {"L": 77}, "populated": frozenset({("id0", "main")})}, ("running", 77, None)),
    ({"running": {"L": 77}}, ("running", 77, None)),
    ({"exited": {"L": 3}, "populated": frozenset({("id0", "main")})}, ("running", 5, 3)),
    ({"populated": frozenset({("id0", "main")})}, ("running", 5, None)),
    ({"exited": {"L": 3}}, ("exited", None, 3)),
    ({"exited": {"L": None}}, ("exited", None, None)),
    ({}, ("exited", None, None)),
    ({"running": {"M": 77}, "exited": {"M": 3}}, ("exited", None, None)),
], ids=["runs", "runs unseen", "daemonised", "launcher lost", "ended", "ended unknown", "gone", "another launch"])
def test_services_are_as_they_are_whatever_was_written(
    stored: Any, observed: dict[str, Any], expected: tuple[str, int | None, int | None]
) -> None:
    service = Service("main", COMMAND, stored, pid=5, launch_id="L")
    found = adopted(environment(0, "ready", {"main": service}), service, Observed(**{**NOTHING, **observed}))
    state, pid, code = expected
    if state == "exited" and stored == "stopped":
        state = "stopped"
    assert (found.state, found.pid, found.exit_code) == (state, pid, code)


def test_an_exit_code_that_was_stored_is_kept() -> None:
    service = Service("main", COMMAND, "exited", launch_id="L", exit_code=3)
    assert adopted(environment(0, "ready"), service, Observed(**NOTHING)).exit_code == 3


def test_a_service_that_never_started_is_as_it_was() -> None:
    service = Service("main", COMMAND)
    assert adopted(environment(0, "ready"), service, Observed(**NOTHING)) == service
