"""Policies act on what is there and what comes, before it runs and until it is gone; what fails changes nothing."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core import judging, policing
from netnsd.core.actor import Actor
from netnsd.core.environment import Environment
from netnsd.core.judgement import Judgement, Passage
from netnsd.errors import (
    Forbidden,
    InvalidPolicy,
    InvalidRequest,
    KernelError,
    NotFound,
    PoliciesExhausted,
    StoreError,
)
from tests.fakes.faults import cancelling, raising
from tests.fakes.world import ALICE, BOB, CAROL, World, request
from tests.policies.worlds import document
from tests.unit import stocking

Clock = trio.testing.MockClock
ALL = document("all", {"ingress": [{"from": [{"podSelector": {}}]}]})
SHUT = document("shut", {"podSelector": {"matchLabels": {"app": "shut"}}, "policyTypes": ["Egress"]})
FROM_BOB = document("from-bob", {"ingress": [
    {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "bob"}},
               "podSelector": {"matchLabels": {"app": "web"}}}]}]})


def address(environment: Environment) -> int:
    return int(ipaddress.ip_address(environment.slot.address))


def lets(world: World, source: Environment, target: Environment) -> bool:
    a, b = address(source), address(target)
    return any(p.sources[0] <= a <= p.sources[1] and p.targets[0] <= b <= p.targets[1]
               for p in world.firewall.judgement.passages)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_policies_act_on_what_runs_and_on_what_comes(world: World) -> None:
    async with world.running() as environments:
        first = await environments.create(request("first"), ALICE)
        await environments.create(request("other"), BOB)
        await world.policies.apply([ALL], ALICE)
        assert lets(world, first, first)
        second = await environments.create(request("second"), ALICE)
        other = environments.registry.find("other", BOB)
        assert lets(world, first, second)
        assert lets(world, second, first)
        assert not lets(world, other, first)
        await world.policies.remove("all", ALICE)
        assert world.firewall.judgement == Judgement()
        assert [kind for kind in world.kinds() if kind.startswith("polic")] == ["policy_applied", "policy_removed"]


async def test_all_are_applied_or_none(world: World) -> None:
    async with world.running() as environments:
        await environments.create(request("web"), ALICE)
        for wrong in (document("Bad", {}), document("bad", {"egresses": []}), ALL, document("x", {}, namespace="bob")):
            with pytest.raises((InvalidPolicy, Forbidden)):
                await world.policies.apply([ALL, wrong], ALICE)
            assert world.store.policies() == []
            assert world.firewall.judgement == Judgement()
        await world.policies.apply([ALL, SHUT], ALICE)
        assert [(p.user, p.document) for p in world.store.policies()] == [("alice", ALL), ("alice", SHUT)]


async def test_one_of_the_same_name_takes_the_place_of_the_other(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(request("web"), ALICE)
        await world.policies.apply([ALL], ALICE)
        nobody = document("all", {"policyTypes": ["Egress"]})
        await world.policies.apply([nobody], ALICE)
        assert world.firewall.judgement == Judgement(confined=frozenset({address(web)}))
        assert [p.document for p in world.store.policies()] == [nobody]


@pytest.mark.parametrize("kind", [KernelError, RuntimeError])
async def test_what_the_kernel_refuses_changes_nothing(
        world: World, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_judgement: Judgement) -> None:
        raise kind("planted")

    async with world.running() as environments:
        web = await environments.create(request("web"), ALICE)
        await world.policies.apply([ALL], ALICE)
        kept, judged = [p.document for p in world.store.policies()], world.firewall.judgement
        for change in (lambda: world.policies.apply([SHUT, document("all", {})], ALICE),
                       lambda: world.policies.remove("all", ALICE)):
            with world.faults.recording() as steps:
                await environments.policing.follow(web)
            assert kind is RuntimeError or "firewall.judge" not in steps, "it is so already"
            with monkeypatch.context() as patch:
                patch.setattr(world.firewall, "judge", fail)
                with pytest.raises(kind):
                    await change()
            if kind is RuntimeError:  # nobody knows what the kernel holds now
                with world.faults.recording() as steps:
                    await environments.policing.follow(web)
                assert "firewall.judge" in steps
            assert [p.document for p in world.store.policies()] == kept
            assert world.firewall.judgement == judged
            assert [p.name for p in world.policies.visible(ALICE, everyones=False)] == ["all"]
    async with world.running():
        assert world.firewall.judgement == judged


@pytest.mark.parametrize("step", ["store.begin", "store.set_policy", "store.commit"])
async def test_what_cannot_be_stored_is_not_judged(world: World, step: str) -> None:
    async with world.running() as environments:
        await environments.create(request("web"), ALICE)
        world.faults.broken = {step}
        with pytest.raises(StoreError):
            await world.policies.apply([ALL], ALICE)
        world.faults.broken = set()
        assert world.firewall.judgement == Judgement()
        assert world.policies.visible(ALICE, everyones=False) == []


async def test_where_it_cannot_be_taken_back_that_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.running() as environments:
        await environments.create(request("web"), ALICE)

        async def fail(_judgement: Judgement) -> None:
            world.faults.broken = {"store.begin"}
            raise KernelError("planted")

        monkeypatch.setattr(world.firewall, "judge", fail)
        with pytest.raises(KernelError):
            await world.policies.apply([ALL], ALICE)
        assert world.kinds()[-1] == "store_failed"


# -- environments that come, change and go ------------------------------------------------------------------------


async def test_one_that_is_concerned_is_judged_before_anything_runs_in_it(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([FROM_BOB], ALICE)
        concerned: list[tuple[Actor, dict[str, Any]]] = [
            (ALICE, {}), (BOB, {"labels": {"app": "web"}}), (BOB, {"egress": "deny"})]
        for number, (who, fields) in enumerate(concerned):
            with world.faults.recording() as steps:
                await environments.create(request(f"web-{number}", "server", **fields), who)
            taken = list(steps)
            assert taken.index("firewall.judge") < taken.index("processes.launch")
            assert taken.count("firewall.judge") == 1


async def test_one_that_is_not_concerned_costs_no_step(world: World) -> None:
    async with world.running() as environments:
        with world.faults.recording() as steps:
            await environments.create(request("before", "server"), BOB)
        plain = list(steps)
        await world.policies.apply([FROM_BOB, SHUT], ALICE)
        with world.faults.recording() as steps:
            await environments.create(request("after", "server"), BOB)
        assert list(steps) == plain
        assert "firewall.judge" not in plain


async def test_its_address_is_nobodys_until_nothing_is_let_to_it_any_more(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        web = await environments.create(request("web", "server"), ALICE)
        with world.faults.recording() as steps:
            await environments.remove(web)
        taken = list(steps)
        assert taken.index("network.unwire") < taken.index("firewall.judge") < taken.index("store.delete")
        assert world.firewall.judgement == Judgement()
        # Where that fails it is not forgotten, and it is tried again.
        web = await environments.create(request("web", "server"), ALICE)
        world.faults.broken = {"firewall.judge"}
        with pytest.raises(KernelError):
            await environments.remove(web)
        assert environments.registry.addresses_free == world.plan.slots - 1
        world.faults.broken = set()
        await environments.check()
        await trio.testing.wait_all_tasks_blocked()
        assert environments.registry.addresses_free == world.plan.slots
        assert world.firewall.judgement == Judgement()


async def test_what_runs_in_one_that_goes_stays_confined_until_it_has_ended(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(request("web", "server", egress="deny"), ALICE)
        world.faults.broken = {"cgroups.remove"}
        with pytest.raises(KernelError):
            await environments.remove(web)
        await world.policies.apply([ALL], BOB)
        assert world.firewall.judgement.confined == {address(web)}
        world.faults.broken = set()
        await environments.remove(web)
        assert world.firewall.judgement == Judgement()


async def test_creation_under_a_policy_that_fails_at_any_step_leaves_nothing(world: World) -> None:
    wanted = request("web", "server", ports=1, egress="deny")
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        with world.faults.recording() as steps:
            await environments.remove(await environments.create(wanted, ALICE))
        plan = list(steps)
        count = plan.index("store.set_state")
        for number in range(count):
            with world.faults.fail_at(number, raising(KernelError)) as steps:
                with pytest.raises(KernelError, match="planted"):
                    await environments.create(wanted, ALICE)
            assert world.held() == {}, f"step {number}, {steps[number]}"


async def test_creation_under_a_policy_that_is_cancelled_at_any_step_leaves_nothing(world: World) -> None:
    wanted = request("web", "server", ports=1, egress="deny")
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        for number in range(100):
            with trio.CancelScope() as scope:
                with world.faults.fail_at(number, cancelling(scope)) as steps:
                    await environments.create(wanted, ALICE)
            if not scope.cancel_called:
                break
            await trio.testing.wait_all_tasks_blocked()
            if not scope.cancelled_caught:
                await environments.remove(environments.registry.find("web", ALICE))
            assert world.held() == {}, f"step {number}, {steps[number]}"
        assert number > 10


async def test_labels_and_egress_that_change_are_judged_anew_or_do_not_change(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([SHUT], ALICE)
        web = await environments.create(request("web"), ALICE)
        assert world.firewall.judgement == Judgement()
        for change, confined in ((wire.ChangeRequest(labels={"app": "shut"}), True),
                                 (wire.ChangeRequest(labels={"app": "open"}), False),
                                 (wire.ChangeRequest(egress="deny"), True),
                                 (wire.ChangeRequest(egress="allow"), False)):
            before, labels = world.firewall.judgement, web.labels
            for step in ("firewall.judge", "firewall.alter"):
                world.faults.broken = {step}
                with pytest.raises(KernelError):
                    await environments.change(web, change)
                world.faults.broken = set()
                assert (web.labels, web.egress) == (labels, web.egress)
                assert world.firewall.judgement == before
            await environments.change(web, change)
            assert (address(web) in world.firewall.judgement.confined) is confined


async def test_who_is_shared_with_the_network_is_let_in_only_when_policies_were_asked(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        web = await environments.create(request("web", ports=1), ALICE)
        for share, steps_wanted in (("lan", ["firewall.judge", "firewall.alter"]), ("owner", ["firewall.alter"])):
            await world.policies.apply([document("all", {"ingress": [{}]})], ALICE)
            with world.faults.recording() as steps:
                await environments.change(web, wire.ChangeRequest(share=share))
            assert [s for s in steps if s.startswith("firewall.")][:2][:len(steps_wanted)] == steps_wanted
            assert world.firewall.judgement.shielded == {address(web)}


async def test_where_it_cannot_be_shared_policies_are_as_before(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([SHUT], ALICE)
        web = await environments.create(request("web", ports=1), ALICE)
        world.faults.broken = {"firewall.alter"}
        with pytest.raises(KernelError):
            await environments.change(web, wire.ChangeRequest(share="lan", labels={"app": "shut"}))
        assert (web.share, web.labels) == ("owner", {})
        assert world.firewall.judgement == Judgement()


async def test_one_that_is_made_while_a_policy_comes_is_judged_by_it(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, begun, may = world.firewall.judge, trio.Event(), trio.Event()

    async def slow(judgement: Judgement) -> None:
        begun.set()
        await may.wait()
        await judge(judgement)

    async with world.running() as environments:
        await environments.create(request("first", labels={"app": "shut"}), ALICE)
        monkeypatch.setattr(world.firewall, "judge", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.policies.apply, [SHUT], ALICE)
            await begun.wait()
            nursery.start_soon(environments.create, request("second", "server", labels={"app": "shut"}), ALICE)
            await trio.testing.wait_all_tasks_blocked()
            assert world.processes.launches == [], "nothing runs there yet"
            may.set()
        assert len(world.firewall.judgement.confined) == 2


async def test_one_that_is_being_made_does_not_count_before_it_is_admitted(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, begun, may = world.firewall.open, trio.Event(), trio.Event()

    async def slow(opening: Any) -> None:
        begun.set()
        await may.wait()
        await opened(opening)

    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        first = await environments.create(request("first"), ALICE)
        monkeypatch.setattr(world.firewall, "open", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(environments.create, request("second"), ALICE)
            await begun.wait()
            await world.policies.apply([SHUT], ALICE)
            assert world.firewall.judgement.shielded == {address(first)}
            may.set()
        assert len(world.firewall.judgement.shielded) == 2


async def test_one_of_which_only_the_row_is_left_does_not_count(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        web = await environments.create(request("web"), ALICE)
        world.faults.broken = {"store.delete"}
        with pytest.raises((KernelError, StoreError)):
            await environments.remove(web)
        world.faults.broken = set()
        await world.policies.apply([document("all", {"ingress": [{}]})], ALICE)
        assert world.firewall.judgement == Judgement()
        await environments.remove(web)
        await world.policies.apply([ALL], ALICE)
        assert environments.policing._absent == set()


async def test_one_of_a_template_is_judged_by_the_labels_that_it_gets(
        tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    world = stocking.world(tmp_path)
    async with world.running():
        await stocking.add(world, 1)
        await world.policies.apply([SHUT], ALICE)
        assert world.firewall.judgement == Judgement()
        web = await world.templates.create(stocking.asked(labels={"app": "shut"}), ALICE)
        assert world.firewall.judgement.confined == {address(web)}
        await trio.sleep(1)
        judge = world.firewall.judge

        async def fail(_judgement: Judgement) -> None:
            monkeypatch.setattr(world.firewall, "judge", judge)
            raise KernelError("planted")

        monkeypatch.setattr(world.firewall, "judge", fail)
        (spoilt,) = stocking.stock_of(world)
        other = await world.templates.create(stocking.asked("other", labels={"app": "shut"}), ALICE)
        assert other.id != spoilt.id, "one that could not be judged is nobody's"
        assert spoilt not in world.environments.registry
        assert world.firewall.judgement.confined == {address(web), address(other)}
        assert world.policies.selected(world.policies.find("shut", ALICE)) == ["web", "other"]
        await world.policies.apply([document("shop", {"podSelector": {"matchLabels": {"app": "shop"}},
                                                      "policyTypes": ["Egress"]})], ALICE)
        await trio.sleep(120)
        assert len(world.firewall.judgement.confined) == 3, "what is in stock too"
        assert world.policies.selected(world.policies.find("shop", ALICE)) == [], "which nobody has yet"
        world.faults.broken = {"firewall.open"}  # so that no other one, for the stock, has it judged
        free = await world.templates.create(stocking.asked("free", labels={"app": "free"}), ALICE)
        assert address(free) not in world.firewall.judgement.confined
        world.faults.broken = set()
        await trio.sleep(120)
        await trio.sleep(120)  # another is started for the stock


async def test_what_comes_at_once_is_judged_together(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        with world.faults.recording() as steps:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(environments.create, request(f"web-{number}"), ALICE)
        assert 1 <= list(steps).count("firewall.judge") < 8
        assert world.firewall.judgement.passages == {
            Passage(*(2 * [(address(found[0]), address(found[-1]))]))
            for found in [sorted(environments.registry.all(), key=lambda e: e.slot.index)]}


async def test_one_that_comes_while_a_policy_does_is_not_forgotten(world: World) -> None:
    async with world.running() as environments:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(environments.create, request(f"web-{number}", labels={"app": "shut"}), ALICE)
                nursery.start_soon(world.policies.apply, [document(f"p{number}", SHUT["spec"])], ALICE)
        assert world.firewall.judgement.confined == {address(e) for e in environments.registry.all()}
        assert len(world.firewall.judgement.confined) == 8


# -- bounds -------------------------------------------------------------------------------------------------------


async def test_who_would_be_too_much_is_not_made_and_others_are(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MOST_PASSAGES_EACH", 3)
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        await environments.create(request("one"), ALICE)
        await environments.create(request("between"), BOB)
        failures: list[str] = []

        async def create(name: str, who: Any, **fields: Any) -> None:
            try:
                await environments.create(request(name, **fields), who)
            except PoliciesExhausted:
                failures.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create, "two", ALICE)
            nursery.start_soon(lambda: create("shut", BOB, egress="deny"))
        assert failures == ["two"]
        assert len(list(environments.registry.all())) == 3
        await environments.remove(environments.registry.find("between", BOB))
        monkeypatch.setattr(judging, "MOST_PASSAGES_EACH", 0)
        with pytest.raises(PoliciesExhausted):
            await environments.policing.follow(environments.registry.find("one", ALICE))


async def test_nobody_fails_for_anothers_policies(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bob's let everybody in: whoever comes makes more of them."""
    monkeypatch.setattr(judging, "MOST_PASSAGES_EACH", 1)
    everybody = document("open", {"ingress": [{"from": [{"namespaceSelector": {}}]}]})
    async with world.running() as environments:
        await world.policies.apply([everybody], BOB)
        his = await environments.create(request("his"), BOB)
        between = await environments.create(request("between", egress="deny"), ALICE)
        await environments.remove(between)
        assert lets(world, his, his)
        hers = [await environments.create(request(f"hers-{number}"), ALICE) for number in range(3)]
        await environments.remove(hers[0])  # there is a gap now: his policy comes to two passages
        assert not world.firewall.judgement.passages
        assert [details["uid"] for kind, _, details in world.events if kind == "policies_closed"] == [BOB.uid]
        await world.policies.apply([ALL], ALICE)
        assert lets(world, hers[1], hers[2]), "hers act all the same"
        with pytest.raises(PoliciesExhausted):
            await environments.create(request("more"), BOB)
        await world.policies.remove("open", BOB)
        await environments.create(request("more"), BOB)


async def test_policies_of_one_user_are_bounded_by_number_and_by_what_they_say(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policing, "MOST_POLICIES", 2)
    monkeypatch.setattr(policing, "MOST_PARTS", 6)
    async with world.running():
        await world.policies.apply([document("a", {}), document("b", {})], ALICE)
        with pytest.raises(PoliciesExhausted):
            await world.policies.apply([document("c", {})], ALICE)
        await world.policies.apply([document("c", {})], BOB)
        rule = {"from": [{"podSelector": {}}] * 3, "ports": [{"port": 1}, {"port": 3}]}
        await world.policies.apply([document("a", {"ingress": [rule]})], ALICE)
        with pytest.raises(PoliciesExhausted):
            await world.policies.apply([document("b", {"ingress": [{}]})], ALICE)
        asked = [{"key": f"k{number}", "operator": "DoesNotExist"} for number in range(6)]
        for spec in ({"podSelector": {"matchExpressions": asked[:1]}}, {"ingress": [{"from": [{"podSelector": {
                "matchExpressions": asked}}]}]}):
            with pytest.raises(PoliciesExhausted):  # others' creations are asked each of them
                await world.policies.apply([document("b", spec)], ALICE)
        monkeypatch.setattr(policing, "MOST_BYTES", 2000)
        for text, refused in (("x" * 1000, False), ("x" * 2000, True)):
            large = document("b", {})
            large["metadata"]["annotations"] = {"note": text}
            with pytest.raises(PoliciesExhausted) if refused else contextlib.nullcontext():
                await world.policies.apply([large], ALICE)
        assert len(world.policies.visible(ALICE, everyones=False)) == 2


# -- the daemon's start -------------------------------------------------------------------------------------------


async def test_a_start_judges_before_anything_is_reached(world: World) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        await environments.create(request("web", "server"), ALICE)
        judged = world.firewall.judgement
    world.firewall.judgement = Judgement(frozenset({Passage((1, 2), (3, 4))}))
    with world.faults.recording() as steps:
        async with world.running():
            assert list(steps).index("firewall.judge") < list(steps).index("firewall.restore")
            assert world.firewall.judgement == judged
            assert world.policies.find("all", ALICE).document == ALL


async def test_a_start_without_policies_takes_away_what_another_left(world: World) -> None:
    world.firewall.judgement = Judgement(frozenset({Passage((1, 2), (3, 4))}))
    async with world.running():
        assert world.firewall.judgement == Judgement()


async def test_a_start_with_more_than_may_be_closes_whose_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.running() as environments:
        await world.policies.apply([ALL], ALICE)
        await world.policies.apply([ALL], BOB)
        web = await environments.create(request("web", "server"), ALICE)
        other = await environments.create(request("web", "server"), BOB)
    monkeypatch.setattr(judging, "MOST_PASSAGES", 0)
    async with world.running() as environments:
        assert world.firewall.judgement == Judgement(shielded=frozenset({address(web), address(other)}))
        assert world.kinds().count("policies_closed") == 2
        monkeypatch.undo()
        await environments.policing.follow(web)
        assert world.firewall.judgement.passages


async def test_a_state_file_with_what_is_no_policy_is_refused_before_anything_is_done(world: World) -> None:
    async with world.running():
        await world.policies.apply([ALL], ALICE)
        world.store._db.execute("UPDATE policies SET document = '{}'")
    with world.faults.recording() as steps, pytest.raises((StoreError, ExceptionGroup)) as caught:
        async with world.running():
            pass
    assert [step for step in steps if not step.startswith("store.")] == []
    assert caught.group_contains(StoreError, depth=None) if isinstance(caught.value, ExceptionGroup) else True


# -- whose they are -----------------------------------------------------------------------------------------------


async def test_a_policy_is_its_users_alone_and_admins_may(world: World) -> None:
    async with world.running() as environments:
        web = await environments.create(request("web"), BOB)
        await world.policies.apply([document("own", {}, namespace="bob"), document("a.b", {})], BOB)
        for ref in ("own", "own.bob", "a.b.bob"):
            with pytest.raises(NotFound):
                world.policies.find(ref, ALICE)
            with pytest.raises(NotFound):
                await world.policies.remove(ref, ALICE)
        assert world.policies.visible(ALICE, everyones=True) == []
        with pytest.raises(Forbidden):
            await world.policies.apply([document("theirs", {}, namespace="bob")], ALICE)
        with pytest.raises(InvalidPolicy):
            await world.policies.apply([document("theirs", {}, namespace="eve")], CAROL)
        await world.policies.apply([document("theirs", {"policyTypes": ["Egress"]}, namespace="bob")], CAROL)
        assert world.firewall.judgement.confined == {address(web)}
        assert [p.name for p in world.policies.visible(CAROL, everyones=True)] == ["a.b", "own", "theirs"]
        assert world.policies.visible(CAROL, everyones=False) == []
        assert [p.name for p in world.policies.visible(BOB, everyones=False)] == ["a.b", "own", "theirs"]
        await world.policies.remove("a.b.bob", CAROL)
        await world.policies.remove("theirs.bob", BOB)
        assert [p.name for p in world.policies.visible(BOB, everyones=True)] == ["own"]
        events = [(kind, details["uid"]) for kind, _, details in world.events if kind.startswith("policy")]
        assert {uid for _, uid in events} == {BOB.uid}


async def test_egress_is_checked_when_it_is_asked_for(world: World) -> None:
    async with world.running() as environments:
        with pytest.raises(InvalidRequest):
            await environments.create(request("web", egress="some"), ALICE)
        web = await environments.create(request("web", egress="192.0.2.0/24:443/tcp"), ALICE)
        assert world.firewall.judgement == Judgement(
            frozenset({Passage((address(web), address(web)), (0xC0000200, 0xC00002FF), (6, 6), (443, 443))}),
            frozenset({address(web)}))
