"""A creation that is asked for again under the same key is not done again, whatever happened meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.core.once import MOST_CHARACTERS
from tests.fakes.faults import raising
from tests.fakes.serving import Answer, Served, serving
from tests.fakes.world import ALICE, BOB, CAROL, World

BODY = {"name": "web", "command": ["server"], "ports": [{"port": 80}]}
KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


async def create(served: Served, body: Any = None, key: str = KEY) -> Answer:
    return await served.ask("POST", "/v1/environments", BODY if body is None else body, Idempotency_Key=key)


def names(served: Served) -> list[str]:
    return sorted(e.name for e in served.world.environments.registry.all())


async def test_the_same_again_is_what_the_first_made(served: Served) -> None:
    first = await create(served)
    again = await create(served)
    unquoted = await create(served, key=KEY.strip('"'))
    assert (first.status, again.status, unquoted.status) == (201, 201, 201)
    assert first.json == again.json == unquoted.json
    assert names(served) == ["web"]
    assert len(served.world.processes.launches) == 1


async def test_another_key_or_none_is_another_creation(served: Served) -> None:
    await create(served)
    assert (await create(served, key="another")).code == "name_taken"
    assert (await served.ask("POST", "/v1/environments", BODY)).code == "name_taken"


@pytest.mark.parametrize("other", [{**BODY, "name": "db"}, {**BODY, "env": {"A": "1"}}, {**BODY, "count": 1},
                                   {**BODY, "replace": True}, {"name": "web"}, {}])
async def test_another_request_under_a_key_is_a_conflict_that_changes_nothing(served: Served, other: Any) -> None:
    await create(served)
    before = served.world.held()
    answer = await create(served, other)
    assert (answer.status, answer.code) == (422, "idempotency_conflict")
    assert served.world.held() == before


async def test_a_key_is_its_users_own_and_tells_others_nothing(served: Served) -> None:
    first = (await create(served)).json
    for other in (BOB, CAROL):  # an admin as well
        served.actor = other
        for body in ({**BODY, "name": "db"}, BODY):  # as if nobody had used it: the first is made, the second conflicts
            answer = await create(served, body)
            if body is BODY:
                assert answer.code == "idempotency_conflict"
            else:
                assert (answer.status, answer.json["owner"]["user"]) == (201, other.user)
                assert answer.json["id"] != first["id"]
        assert first["id"] not in str((await served.ask("GET", "/v1/environments")).json)


async def test_what_is_gone_is_made_again(served: Served) -> None:
    first = (await create(served)).json
    assert (await served.ask("DELETE", "/v1/environments/web")).status == 200
    again = await create(served, {**BODY, "name": "other"})
    assert again.status == 201, "the key went with what it made"
    assert again.json["id"] != first["id"]
    await served.ask("DELETE", "/v1/environments/other")
    await settled()
    assert served.world.environments.registry._by_key == {}


async def test_one_that_comes_while_the_first_is_under_way_waits_and_gets_the_same(
        served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Answer] = []
    entered, go = trio.Event(), trio.Event()
    launch = served.world.processes.launch

    async def slow(order: Any) -> int:
        entered.set()
        await go.wait()
        return await launch(order)

    monkeypatch.setattr(served.world.processes, "launch", slow)

    async def ask() -> None:
        answers.append(await create(served))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await entered.wait()
        for _ in range(5):
            nursery.start_soon(ask)
        assert (await create(served, {**BODY, "name": "db"})).code == "idempotency_conflict"
        served.actor = BOB  # waits for nobody else's
        bobs = trio.Event()

        async def bob() -> None:
            assert (await create(served)).status == 201
            bobs.set()

        nursery.start_soon(bob)
        await settled()
        assert answers == []
        go.set()
        with trio.fail_after(5):
            await bobs.wait()
    assert len(answers) == 6
    assert {answer.status for answer in answers} == {201}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert names(served) == ["web", "web"], "one of alice's, one of bob's"


async def test_where_the_first_fails_the_next_tries(served: Served) -> None:
    with served.world.faults.fail_at(1, raising(RuntimeError)):
        assert (await create(served)).status == 500
    assert (await create(served)).status == 201
    assert names(served) == ["web"]


async def test_one_who_waits_for_a_first_that_fails_makes_it(served: Served) -> None:
    answers: list[Answer] = []
    once, environments = served.world.environments.once, served.world.environments
    request = wire.CreateRequest(name="web")

    async def fail(_mark: str, _there: Any) -> Any:
        await settled()
        raise RuntimeError("boom")

    async def first() -> None:
        with pytest.raises(RuntimeError):
            await once.make(ALICE, "key", request, fail)

    async def second() -> None:
        answers.append(await create(served, {"name": "web"}, key="key"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.lowlevel.checkpoint()
        nursery.start_soon(second)
    assert answers[0].status == 201
    assert len(environments.registry) == 1


async def test_it_holds_over_a_restart_of_the_daemon(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    async with serving(tmp_path, world=world) as served:
        first = (await create(served)).json
    for path in ("api.sock", "attach.sock"):
        (tmp_path / path).unlink()
    async with serving(tmp_path, world=world) as served:
        assert (await create(served)).json["id"] == first["id"]
        assert (await create(served, {"name": "db"})).code == "idempotency_conflict"
        assert names(served) == ["web"]


async def test_of_many_all_are_there_after_asking_again(served: Served) -> None:
    body = {"name": "w", "count": 4}
    first = (await create(served, body)).json["environments"]
    assert (await create(served, body)).json["environments"] == first
    # As where the daemon was killed in the middle, and began anew with some of them.
    await served.ask("DELETE", "/v1/environments?ref=w-2&ref=w-4")
    again = (await create(served, body)).json["environments"]
    assert [e["name"] for e in again] == ["w-1", "w-2", "w-3", "w-4"]
    assert [e["id"] for e in again][::2] == [e["id"] for e in first][::2]
    nameless = (await create(served, {"count": 3}, key="nameless")).json["environments"]
    await served.ask("DELETE", f"/v1/environments/{nameless[0]['id']}")
    kept = {e["id"] for e in nameless[1:]}
    again = (await create(served, {"count": 3}, key="nameless")).json["environments"]
    assert len(again) == 3
    assert kept < {e["id"] for e in again}


async def test_what_was_handed_over_of_a_template_is_found_by_its_key(
        tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path / "state")
    async with serving(tmp_path, world=world) as served:
        await served.ask("POST", "/v1/templates", {"name": "shop", "warm": 1, "specification": {"command": ["server"]}})
        await trio.sleep(5)
        body = {"name": "web", "template": "shop"}
        first = (await create(served, body)).json
        assert world.templates.pools(ALICE)[0].claimed == 1
        assert (await create(served, body)).json["id"] == first["id"]
        assert [row.request for row in world.store.environments() if row.id == first["id"]] != [""]
        assert world.templates.pools(ALICE)[0].claimed == 1


@pytest.mark.parametrize("key", ["", '""', "x" * (MOST_CHARACTERS + 1), "a\tb"])
async def test_a_key_that_cannot_be_one_is_refused(served: Served, key: str) -> None:
    answer = await create(served, key=key)
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert names(served) == []


async def test_two_keys_are_refused(served: Served) -> None:
    head = b"POST /v1/environments HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    async with served.client() as client:
        await client.send(head + b"Idempotency-Key: a\r\nIdempotency-Key: a\r\n\r\n{}")
        assert (await client.answer()).code == "invalid_request"


async def test_a_key_of_the_largest_size_is_taken(served: Served) -> None:
    for _ in range(2):
        assert (await create(served, key="x" * MOST_CHARACTERS)).status == 201


async def test_the_state_file_has_neither_key_nor_body(served: Served) -> None:
    await create(served, {**BODY, "env": {"TOKEN": "hush"}}, key="my-key")
    [row] = served.world.store.environments()
    assert row.request
    assert "my-key" not in row.request
    assert len(row.request) == 65
