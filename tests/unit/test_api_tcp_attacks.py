"""What goes on after its right has ended, who crowds out whom, and what of a token is seen where it has no place."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.api import app, tcp
from netnsd.core.actor import Actor
from netnsd.core.tokens import VOUCHED_FOR
from netnsd.errors import Forbidden
from netnsd.observability import events
from netnsd.observability.events import EventLog
from tests.fakes.serving import Client, Served, serving
from tests.fakes.world import BOB, CAROL, request
from tests.unit.test_api_authority import told
from tests.unit.test_api_tcp import from_address, token_of, until_counted


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


# -- what goes on after its right has ended ----------------------------------------------------------------------


def revoked(served: Served) -> None:
    served.world.tokens.revoke("t", CAROL)


def expired(served: Served) -> None:
    (token,) = served.world.tokens._by_id.values()
    served.world.tokens._by_id[token.id] = dataclasses.replace(token, expires_at="2000-01-01T00:00:00.000000Z")


def account_gone(served: Served) -> None:
    del served.world.accounts[CAROL.uid]


def account_anothers(served: Served) -> None:
    served.world.accounts[CAROL.uid] = dataclasses.replace(CAROL, user="somebody")


def admin_no_more(served: Served) -> None:
    served.world.accounts[CAROL.uid] = dataclasses.replace(CAROL, is_admin=False)


@asynccontextmanager
async def streaming(served: Served, path: str, first: Callable[[], None]) -> AsyncIterator[Client]:
    """A stream that a token of an admin's follows, and of which it has had something."""
    token = await token_of(served, CAROL, "admin", name="t")
    async with served.visit() as client:
        await client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                          f"Authorization: Bearer {token}\r\n\r\n".encode())
        assert (await client.answer(has_body=False)).status == 200
        with trio.fail_after(5):
            seen = b""
            while b"one of old" not in seen:
                first()
                with trio.move_on_after(0.05):
                    seen += await client.stream.receive_some(65536)
        yield client


@pytest.mark.parametrize("end", [revoked, expired, account_gone, account_anothers, admin_no_more])
@pytest.mark.parametrize("path", ["/v1/events", "/v1/audit"])
async def test_a_stream_tells_nothing_more_when_its_right_has_ended(
        served: Served, path: str, end: Callable[[Served], None], monkeypatch: pytest.MonkeyPatch) -> None:
    if end not in (revoked, expired):  # for these alone it is not the account that is looked at
        monkeypatch.setattr(app, "STANDING_SECONDS", 0.0)
    log = served.events if path == "/v1/events" else served.audit
    async with streaming(served, path, lambda: log.emit("told", BOB.uid, "", "one of old")) as client:
        end(served)
        log.emit("told", BOB.uid, "", "one of new")
        assert b"one of new" not in await client.rest()


async def test_who_waits_with_a_token_that_is_revoked_meanwhile_learns_nothing(served: Served) -> None:
    environment = await served.world.environments.create(request("web", "server"), CAROL)
    token = await token_of(served, CAROL, "read", name="t")
    async with served.visit() as client:
        await client.send(b"GET /v1/environments/web/wait?for=gone HTTP/1.1\r\nHost: localhost\r\n"
                          b"Authorization: Bearer " + token.encode() + b"\r\n\r\n")
        await until_counted(served, {CAROL.uid: 1})
        await trio.sleep(0.05)  # it waits by now; if it does not, it is refused all the same
        revoked(served)
        await served.world.environments.remove(environment)
        assert (await client.answer()).code == "unauthorized"


# -- who crowds out whom ------------------------------------------------------------------------------------------


async def test_silent_connections_of_ones_own_address_keep_nobody_out(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback, and behind a translator of addresses, everybody has the same one."""
    monkeypatch.setattr(tcp, "UNKNOWN_OF_ONE_ADDRESS", 3)
    token = await token_of(served)
    async with served.visit() as first, served.visit(), served.visit():
        await until_counted(served, {"127.0.0.1": 3, None: 3})
        assert (await served.ask_with(token, "GET", "/v1/info")).status == 200
        assert await first.rest() == b"", "the oldest of them made room"
        await until_counted(served, {"127.0.0.1": 2, None: 2})


async def test_silent_connections_of_many_addresses_keep_nobody_out(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "UNKNOWN_IN_ALL", 3)
    token = await token_of(served)
    async with (await from_address(served, "127.0.0.8") as one, await from_address(served, "127.0.0.7") as other,
                await from_address(served, "127.0.0.7")):
        await until_counted(served, {"127.0.0.8": 1, "127.0.0.7": 2, None: 3})
        assert (await served.ask_with(token, "GET", "/v1/info")).status == 200
        with trio.fail_after(5):
            assert await other.receive_some(1) == b"", "an older one, of whom there are most, made room"
        await until_counted(served, {"127.0.0.8": 1, "127.0.0.7": 1, None: 2})
        await one.send_all(b"GET /v1/info HTTP/1.1\r\n\r\n")
        with trio.fail_after(5):
            assert (await one.receive_some(100)).startswith(b"HTTP/1.1 400")


async def test_what_others_do_at_once_does_not_end_who_follows() -> None:
    log = EventLog(lambda: "")
    seen: list[str] = []

    async def follow(uid: int) -> None:
        async for event in log.follow(lambda other: other == uid, 0):
            seen.append(event.name)  # noqa: PERF401  # it does not end

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, 1)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5 * events._REMEMBERED):
            log.emit("b", 2, "", str(number))
        for number in range(events._REMEMBERED):  # as many as one request can be about
            log.emit("a", 1, "", str(number))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [str(number) for number in range(events._REMEMBERED)]
        nursery.cancel_scope.cancel()


async def test_a_thousand_names_of_nothing_are_one_line_of_the_trail(served: Served) -> None:
    refs = [f"{number:x}" for number in range(1000)]
    answer = await served.ask("DELETE", "/v1/environments?" + "&".join(f"ref={ref}" for ref in refs))
    assert [failure["ref"] for failure in answer.json["failed"]] == refs
    [event] = told(served)
    assert (event.environment, event.details["code"]) == ("", "not_found")
    assert event.name.startswith("0 1 2 3")


# -- what of a token is seen, and whose it is -----------------------------------------------------------------------


async def test_a_token_in_place_of_its_name_is_not_told(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    token = await token_of(served)
    secret = token.rpartition("_")[2]
    for path in ("/v1/tokens/", "/v1/environments/", "/v1/environments?ref=", "/v1/templates/x"):
        await served.ask("DELETE", f"{path}{token}")
    await served.ask("POST", "/v1/environments", {"name": token})
    shown = repr(told(served))
    for text in (shown, capsys.readouterr().out):
        assert secret[:8] not in text
    assert token[:19] in shown, "which it is, is told"


async def test_who_has_the_name_of_a_user_by_now_gets_no_token_for_a_connection_of_that_users(served: Served) -> None:
    """A process of a removed user goes on, and so does its connection, while the name is given to somebody else."""
    former = Actor(4242, 4242, (), "bob", "/", "/bin/sh", is_admin=False)
    with pytest.raises(Forbidden):
        await served.world.tokens.issue(wire.TokenRequest(name="x", scope="write", user="bob"), former, VOUCHED_FOR)
    assert served.world.tokens.shown(BOB, everyones=False) == []
