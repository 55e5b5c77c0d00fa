"""The routes of templates, pools, metrics, and of many environments at once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd.core.admission import AT_ONCE
from netnsd.core.pool import MOST_SLOTS, PoolSettings
from netnsd.core.specification import MAX_COUNT
from netnsd.errors import KernelError
from tests.fakes.serving import Served, error_of, serving
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World, request

SHOP = {"name": "shop", "warm": 0,
        "specification": {"command": ["server"], "env": {"SECRET": "hush"}, "labels": {"app": "shop"}}}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, world=World(tmp_path / "state", pool=PoolSettings(2, 4))) as made:
        yield made


async def make(served: Served, *names: str, owner: Any = ALICE, **fields: Any) -> list[str]:
    return [(await served.world.environments.create(request(name, **fields), owner)).id for name in names]


async def names(served: Served) -> list[str]:
    return [e["name"] for e in (await served.ask("GET", "/v1/environments")).json["environments"]]


async def until(condition: Any) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


# -- more than the daemon takes -----------------------------------------------------------------------------------


async def test_a_creation_past_the_bound_is_answered_at_once_with_when_to_try_again(tmp_path: Path) -> None:
    async with serving(tmp_path, world=World(tmp_path / "state", creations_waiting=0)) as served:
        async with AsyncExitStack() as turns:
            for _ in range(AT_ONCE):
                await turns.enter_async_context(served.world.environments.admission.turn(BOB.uid))
            answer = await served.ask("POST", "/v1/environments", {"name": "web"})
            assert (answer.status, answer.code) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
            assert error_of(answer)["details"] == {"waiting": 0, "retry_after_seconds": 1}
            assert (await served.ask("GET", "/v1/environments/web")).status == 404
        assert (await served.ask("POST", "/v1/environments", {"name": "web"})).status == 201


async def test_other_errors_name_no_time_to_try_again(served: Served) -> None:
    assert "retry-after" not in (await served.ask("GET", "/v1/environments/web")).headers


# -- many at once ---------------------------------------------------------------------------------------------------


async def test_count_makes_a_list_of_so_many(served: Served) -> None:
    answer = await served.ask("POST", "/v1/environments", {"name": "web", "count": 3, "labels": {"a": "b"}})
    assert answer.status == 201
    assert [e["name"] for e in answer.json["environments"]] == ["web-1", "web-2", "web-3"]
    assert answer.json == (await served.ask("GET", "/v1/environments")).json
    answer = await served.ask("POST", "/v1/environments", {"name": "web", "count": 1})
    assert answer.code == "name_taken", "one of many is named as one of many"
    assert len((await served.ask("POST", "/v1/environments", {"count": 1})).json["environments"]) == 1


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 2.5, "3", True])
async def test_a_bad_count_is_named(served: Served, count: Any) -> None:
    answer = await served.ask("POST", "/v1/environments", {"name": "web", "count": count})
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert "count" in error_of(answer)["message"]


async def test_removal_in_bulk_by_refs_is_in_their_order_and_tells_each_failure(served: Served) -> None:
    ids = await make(served, "one", "two", "three", "four")
    await make(served, "theirs", owner=BOB)
    answer = await served.ask("DELETE", f"/v1/environments?ref=three&ref={ids[0]}&ref=theirs&ref=none&ref=three")
    assert answer.status == 200
    assert answer.json["removed"] == ["three", "one"]
    assert [(f["ref"], f["error"]["code"]) for f in answer.json["failed"]] == [("theirs", "not_found"),
                                                                               ("none", "not_found")]
    assert set(answer.json["failed"][0]["error"]) == {"code", "message", "hint", "details"}
    assert await names(served) == ["two", "four"]


async def test_removal_in_bulk_names_one_that_is_named_twice_once(served: Served) -> None:
    [one] = await make(served, "one")
    assert (await served.ask("DELETE", f"/v1/environments?ref=one&ref={one}")).json == {"removed": ["one"],
                                                                                       "failed": []}


async def test_removal_in_bulk_by_labels_and_of_everything_is_of_ones_own(served: Served) -> None:
    await make(served, "a", "b", labels={"team": "x", "n": "1"})
    await make(served, "c", labels={"team": "x"})
    await make(served, "d")
    await make(served, "theirs", labels={"team": "x"}, owner=BOB)
    for who in (ALICE, CAROL):
        served.actor = who
        await make(served, "own", labels={"team": "x", "n": "1"}, owner=who)
    answer = await served.ask("DELETE", "/v1/environments?label=team=x&label=n=1")
    assert answer.json == {"removed": ["own"], "failed": []}, "an admin's own are meant, too"
    served.actor = ALICE
    answer = await served.ask("DELETE", "/v1/environments?label=team=x&label=n=1")
    assert answer.json == {"removed": ["a", "b", "own"], "failed": []}
    assert (await served.ask("DELETE", "/v1/environments?label=team=none")).json == {"removed": [], "failed": []}
    assert (await served.ask("DELETE", "/v1/environments?everything=1")).json["removed"] == ["c", "d"]
    assert (await served.ask("DELETE", "/v1/environments?everything=1")).json == {"removed": [], "failed": []}
    assert [e.name for e in served.world.environments.registry.all()] == ["theirs"]


@pytest.mark.parametrize("query", ["", "everything=0", "ref=a&everything=1", "ref=a&label=a=b",
                                   "label=a=b&everything=1", "everything=yes", "wait=0", "ref=a&wait=2", "label=a"])
async def test_removal_in_bulk_of_what_is_not_clear_removes_nothing(served: Served, query: str) -> None:
    await make(served, "a", labels={"a": "b"})
    answer = await served.ask("DELETE", f"/v1/environments?{query}")
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert await names(served) == ["a"]


async def test_removal_that_fails_is_told_and_the_others_are_gone(served: Served) -> None:
    world = served.world
    await make(served, "one", "two", "three")
    two = world.environments.registry.find("two", ALICE)
    original = world.network.unwire

    async def unwire(slots: Any) -> None:
        if two.slot in [slot for slot, _ in slots]:
            raise ExceptionGroup("unwire", [KernelError("planted", stage="link")])
        await original(slots)

    world.network.unwire = unwire  # type: ignore[method-assign]
    answer = (await served.ask("DELETE", "/v1/environments?everything=1")).json
    assert answer["removed"] == ["one", "three"]
    assert [(f["ref"], f["error"]["code"]) for f in answer["failed"]] == [("two", "kernel_error")]


@pytest.mark.parametrize("path", ["/v1/environments/web?wait=0", "/v1/environments?ref=web&wait=0",
                                  "/v1/environments?everything=1&wait=0", "/v1/environments?label=a=b&wait=0"])
async def test_who_does_not_wait_is_answered_that_it_will_be_done(served: Served, path: str) -> None:
    world = served.world
    await make(served, "web", labels={"a": "b"})
    blocked, original = trio.Event(), world.network.unwire

    async def unwire(slots: Any) -> None:
        await blocked.wait()
        await original(slots)

    world.network.unwire = unwire  # type: ignore[method-assign]
    answer = await served.ask("DELETE", path)
    assert answer.status == 202
    assert answer.json == ({} if "?wait" in path else {"removed": ["web"], "failed": []})
    assert (await served.ask("GET", "/v1/environments/web")).json["state"] == "removing"
    blocked.set()
    await until(lambda: len(world.environments.registry) == 0)


# -- templates ------------------------------------------------------------------------------------------------------


async def test_life_of_a_template_over_the_api(served: Served) -> None:
    made = await served.ask("POST", "/v1/templates", SHOP)
    assert made.status == 201
    assert made.json | {"id": "", "created_at": ""} == {
        "id": "", "name": "shop", "owner": {"uid": ALICE.uid, "user": "alice"}, "warm": 0, "ready": 0, "reason": "",
        "services": [{"name": "main", "command": ["server"], "cwd": None}], "ports": [], "labels": {"app": "shop"},
        "created_at": ""}
    listed = await served.ask("GET", "/v1/templates")
    shown = await served.ask("GET", "/v1/templates/shop")
    assert listed.json == {"templates": [made.json]}
    assert shown.json == made.json == (await served.ask("GET", f"/v1/templates/{made.json['id']}")).json
    for answer in (made, listed, shown):
        assert b"hush" not in answer.body
        assert b"SECRET" not in answer.body
    again = await served.ask("POST", "/v1/templates", SHOP)
    assert (again.status, again.code) == (409, "name_taken")
    replaced = await served.ask("POST", "/v1/templates", SHOP | {"replace": True})
    assert replaced.status == 201
    assert replaced.json["id"] != made.json["id"]
    web = await served.ask("POST", "/v1/environments", {"name": "web", "template": "shop", "labels": {"x": "y"}})
    assert web.status == 201
    assert web.json["services"][0]["command"] == ["server"]
    assert web.json["labels"] == {"app": "shop", "x": "y"}
    many = await served.ask("POST", "/v1/environments", {"name": "more", "template": "shop", "count": 2})
    assert [e["name"] for e in many.json["environments"]] == ["more-1", "more-2"]
    refused = await served.ask("POST", "/v1/environments", {"template": "shop", "command": ["x"]})
    assert (refused.status, refused.code) == (422, "invalid_request")
    assert (await served.ask("DELETE", "/v1/templates/shop")).json == {}
    for answer in (await served.ask("GET", "/v1/templates/shop"), await served.ask("DELETE", "/v1/templates/shop"),
                   await served.ask("POST", "/v1/environments", {"template": "shop"})):
        assert (answer.status, answer.code) == (404, "not_found")
    assert await names(served) == ["web", "more-1", "more-2"]


async def test_anothers_template_is_not_there(served: Served) -> None:
    theirs = (await served.ask("POST", "/v1/templates", SHOP)).json
    served.actor = BOB
    for ref in ("shop", theirs["id"]):
        for answer in (await served.ask("GET", f"/v1/templates/{ref}"),
                       await served.ask("DELETE", f"/v1/templates/{ref}"),
                       await served.ask("POST", "/v1/environments", {"template": ref})):
            nothing = error_of(await served.ask("GET", "/v1/templates/nothing"))
            assert answer.code == "not_found"
            assert error_of(answer)["message"].replace(ref, "nothing") == nothing["message"]
    assert (await served.ask("GET", "/v1/templates")).json == {"templates": []}
    served.actor = CAROL
    assert (await served.ask("GET", f"/v1/templates/{theirs['id']}")).json == theirs
    assert (await served.ask("DELETE", f"/v1/templates/{theirs['id']}")).status == 200


@pytest.mark.parametrize("body", [
    {}, {"name": "shop"}, {"specification": {}}, {"name": "shop", "specification": {"name": "x"}},
    {"name": "shop", "specification": {"count": 2}}, {"name": "shop", "specification": {}, "warm": "1"},
    {"name": "shop", "specification": {}, "warm": 10**9}, {"name": "shop", "specification": {"template": "x"}},
    {"name": "Shop", "specification": {}}, {"name": "shop", "specification": {"command": []}}, [], None])
async def test_bad_templates_are_refused_in_the_one_shape(served: Served, body: Any) -> None:
    answer = await served.ask("POST", "/v1/templates", json.dumps(body).encode())
    assert answer.status in (400, 422)
    assert answer.code in ("bad_json", "invalid_request", "invalid_name", "invalid_command")
    assert (await served.ask("GET", "/v1/templates")).json == {"templates": []}


async def test_stock_is_hidden_from_every_route_and_its_readiness_is_shown(served: Served) -> None:
    await served.ask("POST", "/v1/templates", SHOP | {"warm": 2})
    stocks = served.world.templates._stocks
    await until(lambda: sum(len(stock.ready) for stock in stocks.values()) == 2)
    assert (await served.ask("GET", "/v1/templates/shop")).json["ready"] == 2
    hidden = list(served.world.environments.registry.all())
    served.actor = CAROL
    assert (await served.ask("GET", "/v1/environments?all=1")).json == {"environments": []}
    for environment in hidden:
        for ref in (environment.id, environment.name):
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/stop"), ("GET", "/logs"), ("GET", "/wait")):
                assert (await served.ask(method, f"/v1/environments/{ref}{path}")).status == 404
    assert (await served.ask("DELETE", "/v1/environments?everything=1")).json == {"removed": [], "failed": []}
    served.actor = ALICE
    assert (await served.ask("DELETE", "/v1/environments?everything=1")).json == {"removed": [], "failed": []}
    assert (await served.ask("DELETE", "/v1/environments?label=app=shop")).json == {"removed": [], "failed": []}
    web = (await served.ask("POST", "/v1/environments", {"name": "web", "template": "shop"})).json
    assert web["id"] in {e.id for e in hidden}
    assert await names(served) == ["web"]


# -- pools ----------------------------------------------------------------------------------------------------------


async def test_pools_are_shown_to_anybody_and_those_of_templates_to_their_users(served: Served) -> None:
    pool = served.world.environments.pool
    await until(lambda: pool.ready == 2)
    await served.ask("POST", "/v1/templates", SHOP | {"warm": 1})
    await until(lambda: served.world.templates.pool().ready == 1)
    for who, count in ((ALICE, 2), (BOB, 1), (ROOT, 1)):
        served.actor = who
        pools = (await served.ask("GET", "/v1/pools")).json["pools"]
        assert [p["name"] for p in pools] == ["slots", "template/shop"][:count]
        assert set(pools[0]) == {"name", "size", "target", "ready", "claimed", "missed", "reason"}
        assert pools[0]["size"] == 2


async def test_an_admin_resizes_the_pool_and_nobody_else_does(served: Served) -> None:
    pool = served.world.environments.pool
    for who in (ALICE, BOB):
        served.actor = who
        answer = await served.ask("PATCH", "/v1/pools/slots", {"size": 5})
        assert (answer.status, answer.code) == (403, "forbidden")
    assert pool.size == 2
    for who, size in ((ROOT, 5), (CAROL, 0), (ROOT, 1)):
        served.actor = who
        answer = await served.ask("PATCH", "/v1/pools/slots", {"size": size})
        assert answer.status == 200
        assert (answer.json["size"], answer.json["target"]) == (size, size)
        await until(lambda size=size: pool.ready == size)
    assert (await served.ask("GET", "/v1/pools")).json["pools"][0]["ready"] == 1


@pytest.mark.parametrize("body", [{"size": -1}, {"size": MOST_SLOTS + 1}, {"size": 2.5}, {"size": None}, {}, [],
                                  {"size": 2, "most": 3}])
async def test_a_bad_size_changes_nothing(served: Served, body: Any) -> None:
    served.actor = ROOT
    answer = await served.ask("PATCH", "/v1/pools/slots", body)
    assert answer.status in (400, 422)
    assert answer.code in ("invalid_request", "bad_json")
    assert served.world.environments.pool.size == 2


async def test_who_may_not_is_not_told_what_would_be_wrong(served: Served) -> None:
    assert (await served.ask("PATCH", "/v1/pools/slots", {"size": -1})).status == 403


# -- metrics --------------------------------------------------------------------------------------------------------


async def test_metrics_are_plain_text_for_anybody(served: Served) -> None:
    for who in (ALICE, BOB, ROOT):
        served.actor = who
        answer = await served.ask("GET", "/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert answer.body.endswith(b"\n")
