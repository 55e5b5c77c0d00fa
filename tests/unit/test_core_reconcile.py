"""What a start makes of what it finds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core.addressing import Plan
from netnsd.core.environment import Command, Environment, Service
from netnsd.core.interfaces import Wiring
from netnsd.core.reconcile import Observed, adopted, faults, plan

PLAN = Plan("10.0.0.0/24", 253)
COMMAND = Command(("x",), {}, "/", 1, 1, (), 0, {}, False)
NOTHING: dict[str, Any] = {"boot_id": "now", "wiring": {}, "cgroups": frozenset(), "files": frozenset(),
                           "populated": frozenset(), "running": {}, "exited": {}}
HALF = Wiring(pinned=True)


def environment(index: int, state: Any, services: dict[str, Service] | None = None,
                boot_id: str = "now") -> Environment:
    return Environment(id=f"id{index}", name=f"e{index}", uid=1, user="u", slot=PLAN.slot(index), netns=f"e{index}",
                       labels={}, share="owner", created_at="", boot_id=boot_id, state=state, services=services or {})


def whole(index: int) -> Wiring:
    return Wiring(True, frozenset({f"e{index}"}), PLAN.slot(index).bridge.ifindex, is_sound=True)


@given(st.lists(st.tuples(
           st.sampled_from(["creating", "ready", "removing"]), st.sampled_from(["whole", "half", "none"]),
           st.booleans(), st.sampled_from(["no", "on-failure", "always"])), max_size=8),
       st.sets(st.integers(8, 12)), st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)))
def test_every_environment_ends_in_one_action_and_only_the_rest_is_orphaned(
    rows: list[tuple[str, str, bool, Any]], slots: set[int], cgroups: set[int], files: set[int]
) -> None:
    desired = [environment(n, state, {"s": Service("s", COMMAND, restart=policy)}, "now" if is_now else "before")
               for n, (state, _, is_now, policy) in enumerate(rows)]
    wiring = {n: whole(n) if held == "whole" else HALF for n, (_, held, _, _) in enumerate(rows) if held != "none"}
    actions = plan(desired, Observed(**{
        **NOTHING, "wiring": wiring | dict.fromkeys(slots, HALF), "cgroups": frozenset(f"nd{n}" for n in cgroups),
        "files": frozenset(f"id{n}" for n in files)}))
    ended = [e.id for e, _ in (*actions.adopt, *actions.remake)] + [e.id for e in (*actions.undo, *actions.lost)]
    assert sorted(ended) == sorted(e.id for e in desired)
    own = set(range(len(rows)))
    assert actions.orphans.slots == tuple(sorted(slots - own))
    assert set(actions.orphans.cgroups) == {f"nd{n}" for n in cgroups - own}
    assert set(actions.orphans.files) == {f"id{n}" for n in files - own}
    for (state, held, is_now, policy), e in zip(rows, desired, strict=True):
        assert (e in actions.undo) == (state != "ready")
        assert (e in [a for a, _ in actions.adopt]) == (state == "ready" and is_now)
        assert (e in actions.mend) == (state == "ready" and is_now and held != "whole")
        assert (e in [a for a, _ in actions.remake]) == (state == "ready" and not is_now and policy != "no")


def test_an_environment_without_a_service_that_was_answered_before_the_reboot_is_told_to_be_lost() -> None:
    answered = environment(0, "creating", boot_id="before")
    assert plan([answered], Observed(**NOTHING)).lost == [answered]


def test_what_is_kept_in_stock_is_not_made_again_after_a_reboot() -> None:
    kept = environment(0, "ready", {"s": Service("s", COMMAND, restart="always")}, "before")
    kept.stock = "template"
    assert plan([kept], Observed(**NOTHING)).lost == [kept]


@pytest.mark.parametrize(("wiring", "missing"), [
    (None, ("pin", "name", "link")), (whole(0), ()),
    (Wiring(True, frozenset({"e0", "other"}), PLAN.slot(0).bridge.ifindex, is_sound=True), ()),
    (Wiring(True, frozenset({"other"}), PLAN.slot(0).bridge.ifindex, is_sound=True), ("name",)),
    (Wiring(True, frozenset({"e0"}), None), ("link",)), (Wiring(True, frozenset({"e0"}), 5, is_sound=True), ("link",)),
    (Wiring(True, frozenset({"e0"}), PLAN.slot(0).bridge.ifindex), ("link",)),
], ids=["nothing", "whole", "two names", "another name", "no link", "another bridge", "down"])
def test_what_the_kernel_lacks_of_an_environment_is_told(wiring: Wiring | None, missing: tuple[str, ...]) -> None:
    assert faults(environment(0, "ready"), {} if wiring is None else {0: wiring}) == missing


def test_what_is_being_made_is_kept_only_where_it_is_whole_and_has_no_service() -> None:
    services = {"main": Service("main", COMMAND)}
    for state, some, held, undone in (
            ("creating", {}, whole(0), False), ("creating", services, whole(0), True),
            ("ready", services, whole(0), False), ("creating", {}, HALF, True),
            ("creating", {}, Wiring(True, frozenset({"e0"}), None), True)):
        actions = plan([environment(0, state, some)], Observed(**{**NOTHING, "wiring": {0: held}}))
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
