"""The API over TCP: who may connect, what a token is good for, and what existing scripts call."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import trio
import trio.testing

from netnsd import wire
from netnsd.api import bearer, tcp
from netnsd.api.routes import ROUTES, Permission, Route
from netnsd.core.actor import Actor
from netnsd.core.pace import Pace
from netnsd.core.tokens import VOUCHED_FOR
from tests.fakes.serving import Client, Served, error_of, serving
from tests.fakes.world import ALICE, BOB, CAROL, request

SCOPES: tuple[wire.Scope, ...] = ("read", "write", "admin")
CAP = 6


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, connections_per_user=CAP) as made:
        yield made


async def token_of(served: Served, owner: Actor = ALICE, scope: wire.Scope = "write", **fields: Any) -> str:
    asked = wire.TokenRequest(name=fields.pop("name", scope), scope=scope, **fields)
    return (await served.world.tokens.issue(asked, owner, VOUCHED_FOR)).token


# -- who asks ---------------------------------------------------------------------------------------------------


async def test_a_token_is_its_owner(served: Served) -> None:
    token = await token_of(served)
    made = await served.ask_with(token, "POST", "/v1/environments", {"name": "web", "command": ["server"]})
    assert (made.status, made.json["owner"]) == (201, {"uid": ALICE.uid, "user": "alice"})
    command = served.world.environments.registry.find("web", ALICE).services["main"].command
    assert (command.uid, command.gid, command.groups, command.cwd) == (ALICE.uid, ALICE.gid, ALICE.groups, ALICE.home)
    await served.world.environments.create(request("hers"), BOB)
    assert (await served.ask_with(token, "GET", "/v1/environments/hers.bob")).code == "not_found"


@pytest.mark.parametrize("change", [
    lambda token: "", lambda token: token[:-1] + ("0" if token[-1] != "0" else "1"), lambda token: token + "0",
    lambda token: token.upper(), lambda token: "netnsd_000000000000_" + "0" * 64, lambda token: "x",
    lambda token: token.partition("_")[2], lambda token: "\xff" * 84,
], ids=range(8))
async def test_what_is_no_good_token_has_one_answer(served: Served, change: Callable[[str], str]) -> None:
    wrong = change(await token_of(served))
    seen = []
    for path in ("/v1/environments", "/nothing", "/openapi.json", "/v1/health", "/metrics"):
        async with served.visit() as client:
            words = f"Authorization: Bearer {wrong}\r\n".encode("latin-1") if wrong else b""
            await client.send(b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (path.encode(), words))
            answer = await client.answer()
            assert await client.rest() == b"", "the connection went on"
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        seen.append(error_of(answer))
    assert all(error == seen[0] for error in seen)
    assert seen[0]["code"] == "unauthorized"


async def test_expired_revoked_and_orphaned_tokens_have_the_answer_of_unknown_ones(served: Served) -> None:
    unknown = error_of(await served.ask_with("netnsd_x", "GET", "/v1/info"))
    expired = await token_of(served, name="short", expires_seconds=1)
    revoked = await token_of(served, name="gone")
    served.world.tokens.revoke("gone", ALICE)
    orphaned, renamed = await token_of(served, BOB), await token_of(served, name="kept")
    del served.world.accounts[BOB.uid]
    for token in (expired, revoked, orphaned):
        assert error_of(await served.ask_with(token, "GET", "/v1/info")) == unknown
    assert (await served.ask_with(renamed, "GET", "/v1/info")).status == 200
    served.world.accounts[ALICE.uid] = Actor(ALICE.uid, ALICE.gid, (), "somebody", "/", "/bin/sh", is_admin=False)
    assert error_of(await served.ask_with(renamed, "GET", "/v1/info")) == unknown


async def test_a_fault_of_the_name_service_is_answered_in_the_one_shape(served: Served) -> None:
    token = await token_of(served)

    async def broken(_key: int | str) -> Actor | None:
        raise RuntimeError("secret")

    served.world.tokens._login = broken
    answer = await served.ask_with(token, "GET", "/v1/info")
    assert (answer.status, answer.code) == (500, "internal")
    assert b"secret" not in answer.body


async def test_revocation_acts_on_the_next_request_of_an_open_connection(served: Served) -> None:
    words = {"Authorization": f"Bearer {await token_of(served, name='t')}"}
    async with served.visit() as client:
        assert (await client.ask("GET", "/v1/info", **words)).status == 200
        assert (await client.ask("GET", "/v1/info", **words)).status == 200
        served.world.tokens.revoke("t", ALICE)
        assert (await client.ask("GET", "/v1/info", **words)).status == 401


async def test_each_request_of_a_connection_needs_its_own_token(served: Served) -> None:
    async with served.visit() as client:
        words = {"Authorization": f"bearer {await token_of(served)}"}  # the scheme's case is free, RFC 9110, 11.1
        assert (await client.ask("GET", "/v1/info", **words)).status == 200
        assert (await client.ask("GET", "/v1/info")).status == 401


@pytest.mark.parametrize("words", [b"Authorization: Bearer %s\r\nAuthorization: Bearer %s\r\n",
                                   b"Authorization: Basic %s\r\n", b"Authorization: %s\r\n",
                                   b"X-Authorization: Bearer %s\r\n", b"Proxy-Authorization: Bearer %s\r\n"])
async def test_a_token_comes_once_and_in_its_own_header(served: Served, words: bytes) -> None:
    token = (await token_of(served)).encode()
    async with served.visit() as client:
        await client.send(b"GET /v1/info HTTP/1.1\r\nHost: localhost\r\n" + words.replace(b"%s", token) + b"\r\n")
        assert (await client.answer()).code == "unauthorized"


async def test_a_body_behind_a_wrong_token_does_not_cost_the_answer(served: Served) -> None:
    async with served.visit() as client:
        await client.send(b"POST /v1/environments HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n")
        for _ in range(20):  # a client that sends what nobody waits for is reset
            await trio.sleep(0.01)
            await client.send(b"x" * 1000)
        assert (await client.answer()).status == 401
        assert await client.rest() == b""


async def test_a_head_alone_is_refused_without_a_body(served: Served) -> None:
    async with served.visit() as client:
        answer = await client.ask("HEAD", "/v1/health")
        assert (answer.status, await client.rest()) == (401, b"")


async def test_on_the_unix_socket_a_token_is_refused_whatever_it_is(served: Served) -> None:
    for token in (await token_of(served), "nonsense"):
        answer = await served.ask("GET", "/v1/info", Authorization=f"Bearer {token}")
        assert (answer.status, answer.code) == (400, "bad_request")
    assert (await served.ask("GET", "/v1/info")).status == 200


# -- what it may ------------------------------------------------------------------------------------------------


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


def test_rows_state_a_scope_that_fits() -> None:
    for route in ROUTES:
        assert (route.scope == "admin") == (route.permission is Permission.ADMIN), named(route)
        assert (route.scope == "read") == (route.method == "GET" and route.scope != "admin"), named(route)


async def answered(client: Client, route: Route, owner: Actor, token: str = "") -> tuple[int, str]:
    """Status and error's code of a request to what is not there, or the caller's; of streams the head alone is read."""
    path = route.path.format(ref="nothing-of-that-name", user=owner.user)
    words = f"Authorization: Bearer {token}\r\n" if token else ""
    await client.send(f"{route.method} {path} HTTP/1.1\r\nHost: localhost\r\n{words}\r\n".encode())
    answer = await client.answer(has_body=False)
    is_error = answer.status >= 400
    return answer.status, (await client.body_of(answer)).code if is_error else ""


@pytest.mark.parametrize("owner", [ALICE, CAROL], ids=["a user", "an admin"])
@pytest.mark.parametrize("route", ROUTES, ids=named)
async def test_every_route_asks_for_its_scope(served: Served, route: Route, owner: Actor) -> None:
    may_at_all = owner.is_admin or route.permission is not Permission.ADMIN
    served.actor = owner
    async with served.client() as on_the_unix_socket:
        status, code = await answered(on_the_unix_socket, route, owner)
        assert (code == "forbidden") == (status == 403) == (not may_at_all)
        assert status != 401
    async with served.visit() as without:
        assert await answered(without, route, owner) == (401, "unauthorized")
    for scope in SCOPES if owner.is_admin else SCOPES[:2]:
        async with served.visit() as client:
            status, code = await answered(client, route, owner, await token_of(served, owner, scope))
        may = may_at_all and SCOPES.index(scope) >= SCOPES.index(route.scope)
        assert (code == "forbidden") == (status == 403) == (not may), scope
        assert status != 401, scope


async def test_an_admins_token_sees_everyones_with_the_scope_admin_alone(served: Served) -> None:
    theirs = await served.world.environments.create(request("web"), BOB)
    for scope in SCOPES:
        token = await token_of(served, CAROL, scope)
        answer = await served.ask_with(token, "GET", f"/v1/environments/{theirs.id}")
        assert answer.status == (200 if scope == "admin" else 404)
        listed = (await served.ask_with(token, "GET", "/v1/environments?all=1")).json["environments"]
        assert len(listed) == (scope == "admin")


async def test_who_is_an_admin_no_more_has_a_users_token(served: Served) -> None:
    token = await token_of(served, CAROL, "admin")
    assert (await served.ask_with(token, "PATCH", "/v1/pools/slots", {"size": 0})).status == 200
    served.world.accounts[CAROL.uid] = Actor(CAROL.uid, CAROL.gid, (), "carol", "/", "/bin/sh", is_admin=False)
    assert (await served.ask_with(token, "PATCH", "/v1/pools/slots", {"size": 0})).code == "forbidden"
    assert (await served.ask_with(token, "POST", "/v1/tokens", {"name": "x", "scope": "admin"})).code == "forbidden"
    assert (await served.ask_with(token, "POST", "/v1/environments", {"name": "web"})).status == 201


async def test_tokens_over_the_api(served: Served) -> None:
    made = await served.ask("POST", "/v1/tokens", {"name": "ci", "scope": "write", "expires_seconds": 3600})
    assert made.status == 201
    token = made.json["token"]
    listed = (await served.ask_with(token, "GET", "/v1/tokens")).json["tokens"]
    assert listed == [{key: value for key, value in made.json.items() if key != "token"}]
    child = await served.ask_with(token, "POST", "/v1/tokens", {"name": "child"})
    assert (child.json["parent"], child.json["expires_at"]) == (listed[0]["id"], listed[0]["expires_at"])
    assert (await served.ask_with(token, "POST", "/v1/tokens", {"name": "x", "scope": "admin"})).code == "forbidden"
    assert (await served.ask_with(token, "POST", "/v1/tokens", {"name": "x", "user": "bob"})).code == "forbidden"
    assert (await served.ask("DELETE", "/v1/tokens/ci")).json == {}
    for gone in (token, child.json["token"]):
        assert (await served.ask_with(gone, "GET", "/v1/tokens")).status == 401
    assert (await served.ask("GET", "/v1/tokens")).json == {"tokens": []}
    assert token not in str(served.world.events)
    assert [kind for kind in served.world.kinds() if "token" in kind] == [
        "token_created", "token_created", "token_revoked", "token_revoked"]


# -- bounds -----------------------------------------------------------------------------------------------------


async def test_guessing_is_answered_with_429_soon_and_good_tokens_go_on(served: Served) -> None:
    good = await token_of(served)
    answers = [await served.ask_with(f"netnsd_{n:012}_{'0' * 64}", "GET", "/v1/info")
               for n in range(bearer.FAILURES_AT_ONCE + 2)]
    assert [a.status for a in answers] == [401] * bearer.FAILURES_AT_ONCE + [429] * 2
    assert answers[-1].code == "rate_limited"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 5
    assert (await served.ask_with(good, "GET", "/v1/info")).status == 200


async def test_requests_of_one_token_are_bounded_and_those_of_another_not(tmp_path: Path) -> None:
    async with serving(tmp_path, pace=Pace(0.5, 3)) as served:
        one, other = await token_of(served, name="one"), await token_of(served, name="other")
        answers = [await served.ask_with(one, "GET", "/v1/info") for _ in range(4)]
        assert [a.status for a in answers] == [200, 200, 200, 429]
        assert answers[-1].headers["retry-after"] == "2"
        assert (await served.ask_with(other, "GET", "/v1/info")).status == 200


async def until_counted(served: Served, counts: dict[object, int]) -> None:
    with trio.fail_after(5):
        while dict(served.tcp_gate.counts) != counts:
            await trio.sleep(0.002)


async def test_who_has_not_said_who_it_is_is_bounded_and_who_has_is_not_kept_out(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "UNKNOWN_OF_ONE_ADDRESS", 3)
    words = {"Authorization": f"Bearer {await token_of(served)}"}
    async with served.visit() as known:
        assert (await known.ask("GET", "/v1/info", **words)).status == 200
        async with served.visit(), served.visit(), served.visit():
            await until_counted(served, {ALICE.uid: 1, "127.0.0.1": 3, None: 3})
            for _ in range(3):  # more than are held: of each before, an older one goes
                async with served.visit():
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    assert served.tcp_gate.counts["127.0.0.1"] == served.tcp_gate.counts[None] <= 3
            assert (await known.ask("GET", "/v1/info", **words)).status == 200
        await until_counted(served, {ALICE.uid: 1})
    await until_counted(served, {})


async def from_address(served: Served, address: str) -> trio.SocketStream:
    made = trio.socket.socket()
    await made.bind((address, 0))
    await made.connect(("127.0.0.1", served.port))
    return trio.SocketStream(made)


async def test_connections_of_one_user_are_bounded(served: Served) -> None:
    words = {"Authorization": f"Bearer {await token_of(served)}"}
    async with trio.open_nursery() as nursery:
        done = trio.Event()

        async def stay() -> None:
            async with served.visit() as client:
                assert (await client.ask("GET", "/v1/info", **words)).status == 200
                await done.wait()

        for _ in range(CAP):
            nursery.start_soon(stay)
        await until_counted(served, {ALICE.uid: CAP})
        async with served.visit() as client:
            answer = await client.ask("GET", "/v1/info", **words)
            assert (answer.status, answer.code) == (503, "too_many_connections")
        assert (await served.ask_with(await token_of(served, BOB), "GET", "/v1/info")).status == 200
        done.set()
    await until_counted(served, {})


async def test_who_says_nothing_is_closed_and_who_is_known_stays(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "UNKNOWN_SECONDS", 0.3)
    words = {"Authorization": f"Bearer {await token_of(served)}"}
    async with served.visit() as known, served.visit() as silent, served.visit() as slow:
        assert (await known.ask("GET", "/v1/info", **words)).status == 200
        await slow.send(b"GET /v1/info HTTP/1.1\r\n")
        assert await silent.rest() == await slow.rest() == b""
        assert (await known.ask("GET", "/v1/info", **words)).status == 200
    await until_counted(served, {})


async def test_a_peer_in_the_supernet_is_closed_unheard(served: Served) -> None:
    served.tcp_gate._supernet = ipaddress.IPv4Network("127.0.0.8/29")
    token = await token_of(served)
    head = f"GET /v1/info HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    for address, heard in (("127.0.0.9", False), ("127.0.0.1", True)):
        async with await from_address(served, address) as peer:
            with trio.fail_after(5):
                try:
                    await peer.send_all(head)
                    got = await peer.receive_some(100)
                except trio.BrokenResourceError:
                    got = b""
        assert got.startswith(b"HTTP/1.1 200") == heard


async def test_the_guard_stands_before_tcp_too(served: Served) -> None:
    async with served.visit() as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
                          b"Transfer-Encoding: chunked\r\n\r\n")
        assert (await client.answer()).code == "bad_request"
        assert await client.rest() == b""


def test_addresses_of_one_site_count_together() -> None:
    def origin(text: str) -> str:
        return tcp._origin(ipaddress.ip_address(text))

    assert origin("2001:db8:1:2:3::4") == origin("2001:db8:1:2:ffff::") != origin("2001:db8:1:3::1")
    assert origin("192.0.2.1") != origin("192.0.2.2")


# -- what existing scripts call ---------------------------------------------------------------------------------


def start_environment(api_url: str, token: str) -> requests.Response:
    """As it is written in scripts that are not ours: nothing of it may need a change."""
    return requests.post(f"{api_url}/environments/start", headers={"Authorization": f"Bearer {token}"},
                         json={"dev_id": "user123", "project": "new_feature"})


async def test_an_existing_script_works_as_it_is(served: Served) -> None:
    answer = await trio.to_thread.run_sync(
        start_environment, f"http://127.0.0.1:{served.port}/api", await token_of(served))
    assert answer.status_code == 200
    made = answer.json()
    assert (made["owner"]["user"], made["state"]) == ("alice", "running")
    assert made["labels"] == {"dev_id": "user123", "project": "new_feature"}
    refused = await trio.to_thread.run_sync(start_environment, f"http://127.0.0.1:{served.port}/api", "wrong")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")


