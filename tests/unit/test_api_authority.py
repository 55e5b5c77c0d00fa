"""Who may what: others' things are not there, web pages may nothing, and who changed what is told to admins."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from netnsd import wire
from netnsd.api import foreign
from netnsd.api.routes import ROUTES, Permission, Route
from netnsd.core.actor import Actor
from netnsd.core.tokens import VOUCHED_FOR
from netnsd.errors import ForeignRequest, KernelError, NotFound
from netnsd.observability import events
from netnsd.observability.events import EventLog
from tests.fakes.faults import raising
from tests.fakes.serving import Answer, Served, error_of, serving
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World, request

OF_ONE = [route for route in ROUTES if "{ref}" in route.path]
CHANGES = [route for route in ROUTES if route.method != "GET"]
SECRET = "hush-hush"
POLICY = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web"},
          "spec": {"podSelector": {}}}


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


def at(route: Route, name: str) -> str:
    """A route's path, of that one."""
    return re.sub(r"\{\w+\}", name, route.path)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


def told(served: Served) -> list[wire.Event]:
    """The audit trail so far."""
    return sorted((event for kept in served.audit._past.values() for event in kept), key=lambda event: event.seq)


async def execute(served: Served, ref: str, **fields: Any) -> Any:
    """What attach.sock answers."""
    body = json.dumps({"ref": ref, "command": ["sh"], "cwd": "/", **fields}).encode()
    async with await trio.open_unix_socket(served.attach_path) as stream:
        await stream.send_all(struct.pack(">I", len(body)) + body)
        with trio.fail_after(5):
            data = b""
            while part := await stream.receive_some(65536):
                data += part
    return json.loads(data[4:] or b"null")


# -- what is not one's own -----------------------------------------------------------------------------------------


async def theirs(served: Served, route: str) -> tuple[str, ...]:
    """What Bob has, by all that it can be called."""
    if route.startswith("/v1/templates"):
        made = await served.world.templates.add(wire.TemplateRequest(name="web", specification=wire.Specification(
            command=["server"])), BOB)
        return made.id, "web", "web.bob"
    if route.startswith("/v1/policies"):
        await served.world.policies.apply([POLICY], BOB)
        return "web", "web.bob"
    if route.startswith("/v1/tokens"):
        issued = await served.world.tokens.issue(wire.TokenRequest(name="web", scope="read"), BOB, VOUCHED_FOR)
        return issued.id, "web", "web.bob"
    environment = await served.world.environments.create(request("web", "server", ports=1), BOB)
    return environment.id, "web", "web.bob"


@pytest.mark.parametrize("route", OF_ONE, ids=named)
async def test_what_is_anothers_is_answered_as_what_is_nobodys(served: Served, route: Route) -> None:
    for ref in await theirs(served, route.path):
        nothing = "x" * len(ref)
        answers = [await served.ask(route.method, at(route, name)) for name in (ref, nothing)]
        assert [(answer.status, answer.code) for answer in answers] == [(404, "not_found")] * 2
        assert answers[0].body.replace(ref.encode(), nothing.encode()) == answers[1].body
        assert answers[0].headers == answers[1].headers


async def test_exec_in_anothers_is_answered_as_in_nobodys(served: Served) -> None:
    for ref in await theirs(served, "attach.sock"):
        nothing = "x" * len(ref)
        found, missing = await execute(served, ref), await execute(served, nothing)
        assert json.loads(json.dumps(found).replace(ref, nothing)) == missing
        assert missing["error"]["code"] == "not_found"


@pytest.mark.parametrize("route", OF_ONE, ids=named)
async def test_who_may_not_see_it_does_not_wait_for_what_is_under_way_there(served: Served, route: Route) -> None:
    (ref, *_) = await theirs(served, route.path)
    locks = [served.world.environments._particulars.lock(e) for e in served.world.environments.registry.all()]
    for lock in locks:
        await lock.acquire()
    with trio.fail_after(2):
        assert (await served.ask(route.method, at(route, ref))).code == "not_found"
        assert (await execute(served, ref))["error"]["code"] == "not_found"
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("route", [r for r in ROUTES if r.permission is Permission.ADMIN], ids=named)
async def test_what_is_for_admins_is_refused_to_others_and_not_to_them(served: Served, route: Route) -> None:
    for body in (None, {"nonsense": 1}, b"{"):
        answer = await served.ask(route.method, at(route, "alice"), body)
        assert (answer.status, answer.code) == (403, "forbidden")
    good = {"size": 0} if route.body is wire.PoolRequest else None
    path = at(route, "alice") + ("?follow=0" if "follow" in route.query else "")
    assert (await served.ask(route.method, path, good)).code == "forbidden"
    for admin in (CAROL, ROOT):
        served.actor = admin
        assert (await served.ask(route.method, path, good)).status == 200


# -- from elsewhere ------------------------------------------------------------------------------------------------


FOREIGN = {
    "a page of elsewhere": {"Origin": "http://evil.example"},
    "a page without an origin": {"Origin": "null"},
    "a page of elsewhere by TLS": {"Origin": "https://evil.example"},
    "a page at another port": {"Origin": "http://localhost:20007"},
    "a page of another scheme": {"Origin": "file://localhost"},
    "a page whose name begins alike": {"Origin": "http://localhost.evil.example"},
    "a page that says who it is": {"Origin": "http://localhost@evil.example"},
    "a link of elsewhere": {"Referer": "http://evil.example/http://localhost/"},
    "a link at another port": {"Referer": "http://localhost:20007/"},
    "a link that is none": {"Referer": "localhost"},
    "an empty link": {"Referer": ""},
    "another site": {"Sec-Fetch-Site": "cross-site"},
    "the same site at another port": {"Sec-Fetch-Site": "same-site"},
    "something new of browsers": {"Sec-Fetch-Site": "whatever"},
    "one that is good and one that is not": {"Origin": "http://localhost", "Referer": "http://evil.example/"},
}
STRANGE = ["evil.example", "localhost.evil.example", "netnsd", "localhost.", "127.0.0.1.evil.example", "127.1",
           "2130706433", "0x7f000001", "10.203.0.1", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "web.localhost",
           "localhost:", "localhost:x", "localhost:80:80", "a@localhost", "[localhost]", "::1",
           "localhost,evil.example", "\xe9"]


async def ask(served: Served, method: str, path: str, headers: dict[str, str]) -> Answer:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()),
             "Content-Length: 0"]
    async with served.client() as client:
        await client.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
        return await client.answer()


@pytest.mark.parametrize("how", FOREIGN)
async def test_what_a_page_of_elsewhere_has_a_browser_send_is_refused(served: Served, how: str) -> None:
    await served.world.environments.create(request("web", "server"), ALICE)
    before = served.world.held()
    for method, path in [*((route.method, at(route, "web")) for route in ROUTES), ("GET", "/openapi.json")]:
        answer = await ask(served, method, path, {"Host": "localhost", **FOREIGN[how]})
        assert (answer.status, answer.code) == (403, "foreign_request"), (method, path)
    assert served.world.held() == before


@pytest.mark.parametrize("host", STRANGE)
async def test_a_name_that_is_not_ours_is_refused(served: Served, host: str) -> None:
    for method, path in (("GET", "/v1/environments"), ("POST", "/v1/environments"), ("GET", "/openapi.json")):
        answer = await ask(served, method, path, {"Host": host})
        assert (answer.status, answer.code) == (403, "foreign_request")
    assert served.world.held() == {}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost:7070", "127.0.0.1", "127.8.9.10:80", "[::1]",
                                  "[::1]:7070", "[0:0:0:0:0:0:0:1]"])
async def test_programs_and_our_own_pages_are_answered(served: Served, host: str) -> None:
    for headers in ({}, {"Origin": f"http://{host}"}, {"Referer": f"https://{host}/console?x=http://evil.example"},
                    {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert (await ask(served, "GET", "/v1/health", {"Host": host, **headers})).status == 200


def test_by_tls_the_certificate_says_whose_name_it_is_and_pages_are_foreign_all_the_same() -> None:
    own = [(b"host", b"build.example:8443")]
    foreign.require_own(own, is_certified=True)
    foreign.require_own([*own, (b"origin", b"https://build.example:8443")], is_certified=True)
    for header in ((b"origin", b"https://evil.example"), (b"origin", b"https://build.example"),
                   (b"sec-fetch-site", b"cross-site")):
        with pytest.raises(ForeignRequest):
            foreign.require_own([*own, header], is_certified=True)
    with pytest.raises(ForeignRequest):
        foreign.require_own(own, is_certified=False)
    with pytest.raises(ForeignRequest):  # HTTP/1.0 has no host, and no browser speaks it
        foreign.require_own([(b"origin", b"http://localhost")], is_certified=False)
    foreign.require_own([], is_certified=False)


# -- the audit trail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", CHANGES, ids=named)
async def test_every_change_that_is_asked_for_is_told_whatever_comes_of_it(served: Served, route: Route) -> None:
    served.actor = BOB
    path = at(route, "nothing")
    answers = [await served.ask(route.method, path, {"nonsense": SECRET}), await served.ask(route.method, path),
               await served.ask(route.method, path, b"{"),
               await ask(served, route.method, path, {"Host": "localhost", "Origin": "null"})]
    codes = [error_of(answer)["code"] if answer.status >= 400 else "ok" for answer in answers]
    assert [event.details["code"] for event in told(served)] == codes
    for event in told(served):
        assert event.kind == "audit"
        assert {name: event.details[name] for name in ("uid", "user", "how", "method", "route", "ref")} == {
            "uid": BOB.uid, "user": "bob", "how": "unix", "method": route.method, "route": route.path,
            "ref": "nothing" if "{" in route.path else ""}
    assert SECRET not in str(told(served))


async def test_a_look_is_not_told_unless_it_is_refused(served: Served) -> None:
    await served.world.environments.create(request("web"), ALICE)
    for route in ROUTES:
        if route.method == "GET" and route.answer is not None:
            name = "alice" if "{user}" in route.path else "web"
            await served.ask("GET", at(route, name) + ("?for=ready" if route.waits else ""))
    assert told(served) == []
    await served.ask("GET", "/v1/audit")
    [event] = told(served)
    assert (event.details["route"], event.details["code"]) == ("/v1/audit", "forbidden")


async def test_a_change_names_the_environment_and_its_owner(served: Served) -> None:
    made = (await served.ask("POST", "/v1/environments", {
        "name": "web", "command": ["server", SECRET], "env": {"TOKEN": SECRET}, "labels": {"secret": SECRET}})).json
    served.actor = CAROL
    await served.ask("POST", "/v1/environments/web.alice/stop", {"grace_seconds": 0})
    await served.ask("DELETE", f"/v1/environments/{made['id']}")
    assert [(e.environment, e.name, e.details["user"], e.details["ref"], e.details["owner"], e.details["code"])
            for e in told(served)] == [
        (made["id"], "web", "alice", "", ALICE.uid, "ok"),
        (made["id"], "web", "carol", "web.alice", ALICE.uid, "ok"),
        (made["id"], "web", "carol", made["id"], ALICE.uid, "ok")]
    assert SECRET not in str(told(served))


async def test_a_creation_that_is_refused_names_what_was_asked_for(served: Served) -> None:
    await served.world.environments.create(request("web"), ALICE)
    secrets = {"command": [SECRET], "env": {"TOKEN": SECRET}, "labels": {"secret": SECRET}}
    await served.ask("POST", "/v1/environments", {"name": "web", **secrets})
    await served.ask("POST", "/v1/templates", {"name": "a b", "specification": secrets})
    assert [(e.environment, e.name, e.details["code"]) for e in told(served)] == [
        ("", "web", "name_taken"), ("", "a b", "invalid_name")]
    assert SECRET not in str(told(served))


async def test_of_many_each_is_told_with_what_came_of_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (await served.ask("POST", "/v1/environments", {"name": "w", "count": 3})).json["environments"]
    assert [(e.environment, e.details["code"]) for e in told(served)] == [(e["id"], "ok") for e in made]
    stuck = served.world.environments.registry.find("w-2", ALICE)
    remove_many = served.world.environments.remove_many

    async def one_fails(environments: Any) -> Any:
        await remove_many([e for e in environments if e is not stuck])
        return {stuck.id: KernelError("busy")}

    monkeypatch.setattr(served.world.environments, "remove_many", one_fails)
    await served.ask("DELETE", "/v1/environments?ref=w-1&ref=w-2&ref=none")
    assert {(e.environment, e.name, e.details["code"]) for e in told(served)[3:]} == {
        (made[0]["id"], "w-1", "ok"), (stuck.id, "w-2", "kernel_error"), ("", "none", "not_found")}
    await served.ask("DELETE", "/v1/environments?everything=1&wait=0")
    assert {(e.name, e.details["code"]) for e in told(served)[6:]} == {("w-2", "ok"), ("w-3", "ok")}


async def test_commands_by_attach_are_told_without_their_arguments(served: Served) -> None:
    environment = await served.world.environments.create(request("web"), ALICE)
    assert (await execute(served, "none", env={"TOKEN": SECRET}))["error"]["code"] == "not_found"
    assert (await execute(served, "web", command=["", SECRET]))["error"]["code"] == "invalid_command"
    await execute(served, "web", command=["sh", SECRET], env={"TOKEN": SECRET})
    assert [(e.environment, e.details["method"], e.details["ref"], e.details["code"]) for e in told(served)] == [
        ("", "EXEC", "none", "not_found"), (environment.id, "EXEC", "web", "invalid_command"),
        (environment.id, "EXEC", "web", "ok")]
    assert SECRET not in str(told(served))


async def test_a_fault_is_told_as_one(served: Served) -> None:
    with served.world.faults.fail_at(1, raising(RuntimeError)):
        assert (await served.ask("POST", "/v1/environments", {"name": "web"})).status == 500
    assert [e.details["code"] for e in told(served)] == ["internal"]


@pytest.mark.parametrize("ref", ["%0a%1b[31m", "%e2%80%ae", "x" * 500])
async def test_what_a_client_sends_does_not_break_the_logs_lines(
        served: Served, ref: str, capsys: pytest.CaptureFixture[str]) -> None:
    await served.ask("DELETE", f"/v1/environments/{ref}")
    [event] = told(served)
    assert event.details["ref"].isprintable()
    assert len(event.details["ref"]) <= 480
    assert "\x1b" not in (line := capsys.readouterr().out)
    assert line.count("\n") <= 1


async def test_the_trail_is_read_by_admins_and_ends_where_it_is_asked_to(served: Served) -> None:
    for name in ("a", "b", "c"):
        await served.ask("POST", "/v1/environments", {"name": name})
    served.actor = CAROL
    lines = [json.loads(line) for line in (await served.ask("GET", "/v1/audit?follow=0&after=1")).body.splitlines()]
    assert [(line["seq"], line["name"]) for line in lines] == [(2, "b"), (3, "c")]
    async with served.client() as client:
        await client.send(b"GET /v1/audit?after=3 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with trio.fail_after(5):
            while not served.audit._followers:
                await trio.sleep(0.005)
            await served.ask("POST", "/v1/environments", {"name": "d"})
            seen = b""
            while b'"name":"d"' not in seen:
                seen += await client.stream.receive_some(65536)


async def test_events_end_where_they_are_asked_to(served: Served) -> None:
    for owner in (ALICE, BOB, ALICE):
        served.events.emit("created", owner.uid, "", owner.user)
    answer = await served.ask("GET", "/v1/events?follow=0")
    assert [json.loads(line)["seq"] for line in answer.body.splitlines()] == [1, 3]
    assert (await served.ask("GET", "/v1/events?follow=x")).code == "invalid_request"


def test_nobody_crowds_out_of_memory_what_others_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_REMEMBERED", 10)
    log = EventLog(lambda: "")
    for number in range(3):
        log.emit("a", 1, "", str(number))
    for number in range(100):
        log.emit("b", 2, "", str(number))
    assert [[event.name for event in log._past[uid]] for uid in (1, 2)] == [
        ["0", "1", "2"], [str(number) for number in range(93, 100)]]


async def test_looking_for_anothers_by_name_takes_as_many_steps_as_for_nobodys(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is asserted: what is done is the same, whether there is one of that name or not."""
    world = World(tmp_path)
    async with world.running() as environments:
        for name in ("first", "web", "last"):
            await environments.create(request(name), BOB)
        steps: list[int] = []
        may_see = Actor.may_see

        def counted(actor: Actor, uid: int) -> bool:
            steps.append(uid)
            return may_see(actor, uid)

        monkeypatch.setattr(Actor, "may_see", counted)
        counts = []
        for ref in ("first.bob", "last.bob", "none.bob", "none.nobody"):
            steps.clear()
            with pytest.raises(NotFound):
                environments.registry.find(ref, ALICE)
            counts.append(len(steps))
        assert set(counts) == {3}


async def test_a_change_by_a_token_names_the_token_and_not_its_text(served: Served) -> None:
    issued = (await served.ask("POST", "/v1/tokens", {"name": "ci", "scope": "write"})).json
    async with served.visit() as client:
        answer = await client.ask("POST", "/v1/environments", {"name": "web"},
                                  Authorization=f"Bearer {issued['token']}")
        assert answer.status == 201
    made, used = told(served)
    assert (made.name, made.details["how"], made.details["token"]) == ("ci", "unix", None)
    assert (used.name, used.details["how"], used.details["token"]) == ("web", "token", issued["id"])
    assert issued["token"] not in str(told(served))
    async with served.visit() as client:  # a page that has a token is foreign all the same
        answer = await client.ask("GET", "/v1/environments", Authorization=f"Bearer {issued['token']}",
                                  Origin="http://evil.example")
        assert answer.code == "foreign_request"


async def test_a_developers_project_is_told_with_its_environment(served: Served) -> None:
    pair = {"dev_id": "user1", "project": "shop"}
    made = (await served.ask("POST", "/api/environments/start", pair)).json
    await served.ask("POST", "/api/environments/terminate", pair)
    assert [(e.environment, e.details["ref"], e.details["code"]) for e in told(served)] == [
        (made["id"], "user1/shop", "ok")] * 2
