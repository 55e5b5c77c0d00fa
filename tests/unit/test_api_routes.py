"""The table of routes: who may, what answers, and one shape for every error."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from netnsd import wire
from netnsd.api import openapi
from netnsd.api.routes import ROUTES, Permission, Route
from tests.fakes.serving import Served, error_of, serving
from tests.fakes.world import ALICE, BOB, CAROL, request

OF_ONE = [route for route in ROUTES if route.path.startswith("/v1/environments/{ref}")]
OF_A_TOKEN = [route for route in ROUTES if route.path.startswith("/v1/tokens/{ref}")]
OF_A_TEMPLATE = [route for route in ROUTES if route.path.startswith("/v1/templates/{ref}")]
OF_A_POLICY = [route for route in ROUTES if route.path.startswith("/v1/policies/{ref}")]


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


def test_every_route_names_its_permission() -> None:
    assert all(isinstance(route.permission, Permission) for route in ROUTES)
    of_somebodys = OF_ONE + OF_A_TEMPLATE + OF_A_POLICY + OF_A_TOKEN
    assert all(route.permission is Permission.OWNER for route in of_somebodys)
    assert [route for route in ROUTES if "{ref}" in route.path] == of_somebodys
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    assert all(route.summary for route in ROUTES)


# -- quotas -----------------------------------------------------------------------------------------------------

OF_QUOTAS = [route for route in ROUTES if route.path.startswith("/v1/quotas")]


def test_who_may_do_what_with_quotas() -> None:
    assert {(r.method, r.path): r.permission for r in OF_QUOTAS} == {
        ("GET", "/v1/quotas"): Permission.OWNER, ("GET", "/v1/quotas/{user}"): Permission.OWNER,
        ("PUT", "/v1/quotas/{user}"): Permission.ADMIN, ("DELETE", "/v1/quotas/{user}"): Permission.ADMIN}


async def test_ones_own_quota_is_shown_with_what_one_has_and_no_other(served: Served) -> None:
    await served.world.environments.create(request("web", ports=2, resources=wire.Resources(memory=5 << 20, cpu=0.5)),
                                           ALICE)
    await served.world.environments.create(request("theirs"), BOB)
    own = {"owner": {"uid": ALICE.uid, "user": "alice"}, "own": [],
           "limits": dict.fromkeys(("environments", "ports", "memory", "cpu", "creations_per_minute")),
           "used": {"environments": 1, "ports": 2, "memory": 5 << 20, "cpu": 0.5}}
    assert (await served.ask("GET", "/v1/quotas")).json == {"quotas": [own]}
    for user in ("alice", str(ALICE.uid)):
        assert (await served.ask("GET", f"/v1/quotas/{user}")).json == own
    refusals = [await served.ask("GET", f"/v1/quotas/{user}") for user in ("bob", str(BOB.uid), "nobody-at-all", "0")]
    assert {(answer.status, answer.code, error_of(answer)["message"]) for answer in refusals} == {
        (403, "forbidden", "others' quotas are not yours to see")}, "nothing tells who there is"
    for method, body in (("PUT", {"environments": 100}), ("DELETE", None)):
        for user in ("alice", "bob"):
            assert (await served.ask(method, f"/v1/quotas/{user}", body)).code == "forbidden"
    assert served.world.environments.registry.quotas.known() == {}


async def test_an_admin_sets_and_sees_everyones_and_what_is_beyond_is_refused(served: Served) -> None:
    served.actor = CAROL
    answer = await served.ask("PUT", "/v1/quotas/alice", {"environments": 1, "memory": None, "cpu": 0.5})
    assert (answer.status, answer.json["own"]) == (200, ["cpu", "environments", "memory"])
    assert answer.json["limits"]["environments"] == 1
    await served.ask("PUT", f"/v1/quotas/{BOB.uid}", {"creations_per_minute": 1})
    users = [quota["owner"]["user"] for quota in (await served.ask("GET", "/v1/quotas")).json["quotas"]]
    assert users == ["alice", "bob", "carol"]
    served.actor = ALICE
    body = {"name": "web", "resources": {"cpu": 0.5}}
    assert (await served.ask("POST", "/v1/environments", body)).status == 201
    answer = await served.ask("POST", "/v1/environments", {**body, "name": "more"})
    assert (answer.status, answer.code) == (403, "quota_exceeded")
    assert error_of(answer)["details"] == {"quota": "environments", "limit": 1, "used": 1, "asked": 1}
    served.actor = BOB
    assert (await served.ask("POST", "/v1/environments", {"name": "a"})).status == 201
    answer = await served.ask("POST", "/v1/environments", {"name": "b"})
    assert (answer.status, answer.code) == (429, "too_many_creations")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    served.actor = CAROL
    assert (await served.ask("DELETE", "/v1/quotas/alice")).json["own"] == []
    assert (await served.ask("GET", "/v1/quotas/bob")).json["limits"]["creations_per_minute"] == 1
    assert (await served.ask("GET", "/v1/quotas/nobody-at-all")).code == "not_found"
    del served.world.accounts[BOB.uid]
    assert (await served.ask("DELETE", "/v1/quotas/bob")).json["own"] == [], "somebody who is gone"


@pytest.mark.parametrize("body", [
    {"environments": -1}, {"environments": 1.5}, {"environments": "3"}, {"memory": True}, {"cpu": 1e999}, {"typo": 1},
    {"ports": 1 << 60}, {"creations_per_minute": []}])
async def test_a_quota_that_cannot_be_is_refused(served: Served, body: dict[str, Any]) -> None:
    served.actor = CAROL
    answer = await served.ask("PUT", "/v1/quotas/alice", body)
    assert answer.code in ("invalid_request", "bad_json")
    assert served.world.environments.registry.quotas.known() == {}


@pytest.mark.parametrize("route", OF_ONE, ids=named)
async def test_anothers_environment_is_not_there(served: Served, route: Route) -> None:
    theirs = await served.world.environments.create(request("web", "server", ports=1), BOB)
    before = served.world.held()
    for ref in (theirs.id, "web", "web.bob"):
        answer = await served.ask(route.method, route.path.format(ref=ref))
        assert (answer.status, answer.code) == (404, "not_found")
        nothing = await served.ask(route.method, route.path.format(ref="x" * len(ref)))
        assert answer.json["error"]["message"].replace(ref, "") == nothing.json["error"]["message"].replace(
            "x" * len(ref), ""), "the answer tells that it exists"
    assert served.world.held() == before


@pytest.mark.parametrize("route", OF_ONE, ids=named)
async def test_an_admin_and_the_owner_find_it(served: Served, route: Route) -> None:
    for caller in (CAROL, BOB):
        served.actor = caller
        environment = await served.world.environments.create(request("web"), BOB)
        answer = await served.ask(route.method, route.path.format(ref=environment.id))
        assert answer.status != 404 or "service" in error_of(answer)["message"], answer
        if environment in served.world.environments.registry:
            await served.world.environments.remove(environment)


async def test_lists_hold_ones_own_and_all_of_them_for_admins_who_ask(served: Served) -> None:
    for owner in (ALICE, BOB, CAROL):
        await served.world.environments.create(request(f"of-{owner.user}", labels={"team": owner.user}), owner)

    async def names(path: str) -> list[str]:
        return [e["name"] for e in (await served.ask("GET", path)).json["environments"]]

    assert await names("/v1/environments") == ["of-alice"]
    assert await names("/v1/environments?all=1") == ["of-alice"]
    served.actor = CAROL
    assert await names("/v1/environments") == ["of-carol"]
    assert await names("/v1/environments?all=1") == ["of-alice", "of-bob", "of-carol"]
    assert await names("/v1/environments?all=1&label=team=bob") == ["of-bob"]
    assert await names("/v1/environments?all=1&label=team=bob&label=x=y") == []


async def test_events_are_of_ones_own(served: Served) -> None:
    for owner in (BOB, ALICE):
        served.events.emit("created", owner.uid, owner.user, f"of-{owner.user}")
    async with served.client() as client:
        await client.send(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        seen = b""
        with trio.fail_after(5):
            while b"of-alice" not in seen:
                seen += await client.stream.receive_some(65536)
    assert b"of-bob" not in seen


@pytest.mark.parametrize("request_line", ["GET {} HTTP/1.1\r\nConnection: close", "GET {} HTTP/1.0"])
@pytest.mark.parametrize("path", ["/v1/health", "/metrics", "/v1/events?follow=0"])
async def test_a_connection_is_closed_where_that_is_asked_for(served: Served, path: str, request_line: str) -> None:
    async with served.client() as client:
        await client.send(f"{request_line.format(path)}\r\nHost: localhost\r\n\r\n".encode())
        assert b" 200 " in await client.rest()


async def test_a_connection_that_waits_after_a_stream_is_closed_in_the_end(served: Served) -> None:
    served.http._config.keep_alive_timeout = 0.05
    async with served.client() as client:
        assert (await client.ask("GET", "/metrics")).status == 200
        assert (await client.ask("GET", "/v1/health")).status == 200
        assert (await client.ask("GET", "/metrics")).status == 200
        assert await client.rest() == b""


async def test_followers_that_left_are_forgotten(served: Served) -> None:
    for _ in range(3):
        async with served.client() as client:
            await client.send(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with trio.fail_after(5):
                while not served.events._followers:
                    await trio.sleep(0.005)
        with trio.fail_after(5):
            while served.events._followers or served.gate._open:
                await trio.sleep(0.005)


async def test_life_of_an_environment_over_the_api(served: Served) -> None:
    made = await served.ask("POST", "/v1/environments", {"name": "web", "command": ["server"], "ports": [{"port": 80}]})
    assert made.status == 201
    environment = made.json
    assert environment["owner"] == {"uid": ALICE.uid, "user": "alice"}
    assert environment["ports"] == [{"port": 80, "protocol": "tcp", "published": 20000, "listen": "127.0.0.1"}]
    assert environment["services"][0]["state"] == "running"
    assert (await served.ask("GET", "/v1/environments/web")).json == environment
    served.world.network.listen(served.world.environments.registry.find("web", ALICE).slot, "tcp", 80)
    assert (await served.ask("GET", "/v1/environments/web/wait?for=ready&timeout=1")).json == environment
    assert (await served.ask("POST", "/v1/environments/web/stop", {"grace_seconds": 0})).json["state"] == "stopped"
    assert (await served.ask("POST", "/v1/environments/web/start")).json["state"] == "running"
    assert (await served.ask("POST", "/v1/environments/web/restart", {"grace_seconds": 0})).json["state"] == "running"
    assert (await served.ask("GET", "/v1/environments/web/logs?tail=3")).body == b"tail 3\n"
    assert (await served.ask("DELETE", "/v1/environments/web")).json == {}
    assert (await served.ask("GET", "/v1/environments/web")).code == "not_found"
    assert served.world.held() == {}


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/environments", "/v1/environments/", "/v1/health/",
                                  "/v1/environments/a/b",
                                  "/openapi.json/", "/v1/environments//wait"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_unknown_paths_have_the_one_shape(served: Served, method: str, path: str) -> None:
    answer = await served.ask(method, path)
    assert (answer.status, answer.code) in ((404, "no_route"), (404, "not_found"), (405, "method_not_allowed"))


@pytest.mark.parametrize(("method", "path"), [
    (method, path) for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "CONNECT", "BREW")
    for path in ("/v1/health", "/v1/environments", "/v1/environments/web", "/openapi.json", "/v1/events")
    if (method, path) not in {(route.method, route.path.replace("{ref}", "web")) for route in ROUTES}])
async def test_other_methods_have_the_one_shape(served: Served, method: str, path: str) -> None:
    answer = await served.ask(method, path)
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    taken = {route.method for route in ROUTES if route.path.replace("{ref}", "web") == path} or {"GET"}
    assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == taken


@pytest.mark.parametrize("path", ["/v1/health", "/v1/environments", "/openapi.json", "/nothing", "/v1/events",
                                  "/v1/environments/web", "/v1/environments/web/logs?follow=1"])
async def test_head_is_answered_without_a_body_and_the_connection_goes_on(served: Served, path: str) -> None:
    async with served.client() as client:
        answer = await client.ask("HEAD", path)
        assert answer.headers["netnsd-version"]
        assert (await client.ask("GET", "/v1/health")).json == {"status": "ok"}


@pytest.mark.parametrize("query", ["all=2", "all=true", "label=x", "label==v", "label=k", "all=", "label=a=1&label=a=2",
                                   "&".join(["label=a=1"] * 65)])
async def test_bad_query_parameters_of_lists_are_named(served: Served, query: str) -> None:
    answer = await served.ask("GET", f"/v1/environments?{query}")
    assert answer.status == 422
    assert answer.code in ("invalid_request", "invalid_label")


@pytest.mark.parametrize("query", ["for=never", "timeout=x", "timeout=-1", "timeout=nan", "timeout=inf",
                                   "timeout=1e300", "timeout=", "timeout=1_0", "timeout=%201", "timeout=%D9%A1"])
async def test_bad_query_parameters_of_waits_are_named(served: Served, query: str) -> None:
    await served.world.environments.create(request("web"), ALICE)
    answer = await served.ask("GET", f"/v1/environments/web/wait?{query}")
    assert (answer.status, answer.code) == (422, "invalid_request")


@pytest.mark.parametrize("path", ["/v1/environments/web/logs?tail=1.5", "/v1/environments/web/logs?tail=",
                                  "/v1/environments/web/logs?follow=yes", "/v1/events?after=-1", "/v1/events?after=x"])
async def test_bad_query_parameters_of_streams_are_named(served: Served, path: str) -> None:
    await served.world.environments.create(request("web", "server"), ALICE)
    answer = await served.ask("GET", path)
    assert (answer.status, answer.code) == (422, "invalid_request")


@pytest.mark.parametrize("seconds", [-1, 3601, 1e300])
async def test_grace_is_bounded(served: Served, seconds: float) -> None:
    await served.world.environments.create(request("web"), ALICE)
    for verb in ("stop", "restart"):
        answer = await served.ask("POST", f"/v1/environments/web/{verb}", {"grace_seconds": seconds})
        assert answer.code == "invalid_request"


async def test_bodies_of_posts_without_fields_are_checked(served: Served) -> None:
    await served.world.environments.create(request("web"), ALICE)
    assert (await served.ask("POST", "/v1/environments/web/start", {"force": True})).code == "invalid_request"


async def test_a_fault_is_answered_in_the_one_shape_without_its_text(served: Served, tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("secret")

    (tmp_path / "other").mkdir()
    async with serving(tmp_path / "other", doctor=broken) as other:
        answer = await other.ask("GET", "/v1/doctor")
        assert (answer.status, answer.code) == (500, "internal")
        assert b"secret" not in answer.body
        assert answer.json["error"]["details"]["request_id"]


async def test_requests_are_refused_while_the_daemon_stops(served: Served) -> None:
    async with served.client() as client:
        assert (await client.ask("GET", "/v1/health")).status == 200
        served.http._stopping = True
        answer = await client.ask("GET", "/v1/health")
        assert (answer.status, answer.code) == (503, "shutting_down")


async def test_openapi_covers_every_route_and_resolves(served: Served) -> None:
    document = (await served.ask("GET", "/openapi.json")).json
    assert document["openapi"] == "3.1.0"
    assert document == json.loads(json.dumps(openapi.document(served.world.environments.settings.published_range)))
    assert document["security"] == [{"bearer": []}, {}]
    assert document["components"]["securitySchemes"]["bearer"].items() >= {"type": "http", "scheme": "bearer"}.items()
    operations = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert operations == {(route.method, route.path) for route in ROUTES}
    for reference in re.findall(r'"\$ref": "([^"]*)"', json.dumps(document)):
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in document["components"][kind], reference
    identifiers = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(identifiers)) == len(identifiers)
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert set(operation) <= {"operationId", "summary", "description", "parameters", "responses", "requestBody"}
        assert ("requestBody" in operation) == (route.body is not None)
        in_path = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert in_path == re.findall(r"\{(\w+)\}", route.path)
        assert {p["name"] for p in operation["parameters"] if p["in"] == "query"} == set(route.query)
        assert str(route.status) in operation["responses"]
        assert route.permission.value in operation["description"]
        assert operation["description"].endswith(f"Scope of a token: {route.scope}.")
