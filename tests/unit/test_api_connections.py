"""What a client may cost: connections, time and bytes are bounded, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from netnsd.api import app, attach, peer, stream
from netnsd.core.actor import Actor
from tests.fakes.serving import Client, Served, error_of, serving
from tests.fakes.world import ALICE, BOB, ROOT, request

HEAD = b"POST /v1/environments HTTP/1.1\r\nHost: localhost\r\n"
CAP = 4


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, connections_per_user=CAP) as made:
        yield made


def be(monkeypatch: pytest.MonkeyPatch, actor: Actor) -> None:
    """Have the kernel vouch for somebody else."""
    async def actor_of(_connection: trio.socket.SocketType, _admin_group: str) -> Actor:
        await trio.lowlevel.checkpoint()
        return actor

    monkeypatch.setattr(peer, "actor_of", actor_of)


async def until_open(served: Served, count: int) -> None:
    with trio.fail_after(5):
        while sum(served.gate._open.values()) != count:
            await trio.sleep(0.002)


async def test_a_body_that_is_announced_as_too_large_is_refused_unread(served: Served) -> None:
    async with served.client() as client:
        await client.send(HEAD + b"Content-Length: 104857600\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert await client.rest() == b""
    await until_open(served, 0)


async def test_a_hundred_megabytes_are_not_read(served: Served) -> None:
    async with served.client() as client:
        await client.send(HEAD + b"Content-Length: 104857600\r\n\r\n")
        sent = 0
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            for _ in range(1600):
                await client.stream.send_all(b"x" * 65536)
                sent += 65536
        assert sent < 8 << 20
        assert (await client.answer()).code == "body_too_large"
    await until_open(served, 0)


@pytest.mark.parametrize(("size", "code"), [(app.BODY_BYTES - 1, "bad_json"), (app.BODY_BYTES, "bad_json"),
                                            (app.BODY_BYTES + 1, "body_too_large")])
async def test_bodies_are_read_up_to_the_bound(served: Served, size: int, code: str) -> None:
    async with served.client() as client:
        await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        with trio.move_on_after(2):
            with contextlib.suppress(trio.BrokenResourceError):
                await client.stream.send_all(b"x" * size)
        assert (await client.answer()).code == code


async def test_a_head_of_the_largest_size_is_read(served: Served) -> None:
    line = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nX-A: "
    async with served.client() as client:
        await client.send(line + b"a" * (stream.HEAD_BYTES - len(line)) + b"\r\n\r\n")
        assert (await client.answer()).status == 200
    assert (await served.raw(line + b"a" * (stream.HEAD_BYTES - len(line) + 1) + b"\r\n\r\n")).code == "bad_request"


async def test_a_head_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEAD_SECONDS", 0.1)
    async with served.client() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle, client, b"GET /v1/health HTTP/1.1\r\n" + b"a" * 1000)
            answer = await client.answer()
            nursery.cancel_scope.cancel()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert await client.rest() == b""
    await until_open(served, 0)


async def test_a_body_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    async with served.client() as client:
        await client.send(HEAD + b"Content-Length: 1000\r\n\r\n")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle, client, b"x" * 1000)
            answer = await client.answer()
            nursery.cancel_scope.cancel()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert await client.rest() == b""
    await until_open(served, 0)


async def test_a_slow_request_does_not_hold_up_others(served: Served) -> None:
    async with served.client() as slow, served.client() as half:
        await slow.send(b"GET /v1/he")
        await half.send(HEAD + b"Content-Length: 1000\r\n\r\nx")
        assert (await served.ask("GET", "/v1/health")).status == 200


async def test_connections_that_are_closed_do_not_count(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, ALICE)
    for number in range(3 * CAP):
        async with served.client() as client:
            if number % 3 == 0:
                assert (await client.ask("GET", "/v1/health")).status == 200
            elif number % 3 == 1:
                await client.send(b"GET /v1/he")
        await until_open(served, 0)


@pytest.mark.parametrize("pipelined", [1, 2, 5])
async def test_a_client_that_leaves_before_its_answer_does_not_count(
    served: Served, monkeypatch: pytest.MonkeyPatch, pipelined: int
) -> None:
    be(monkeypatch, ALICE)
    environment = await served.world.environments.create(request("web", "server", ports=1), ALICE)
    for _ in range(2 * CAP):
        async with served.client() as client:
            wait = b"GET /v1/environments/web/wait?timeout=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await client.send(wait * pipelined)
            await trio.sleep(0.01)
        await until_open(served, 0)
    assert environment in served.world.environments.registry


async def test_one_connection_too_many_is_told_so_and_others_may_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, ALICE)
    async with trio.open_nursery() as nursery:
        for _ in range(CAP):
            nursery.start_soon(idle, served)
        await until_open(served, CAP)
        async with served.client() as client:
            answer = await client.answer()
            assert (answer.status, answer.code) == (503, "too_many_connections")
            assert await client.rest() == b""
        be(monkeypatch, BOB)
        assert (await served.ask("GET", "/v1/health")).status == 200
        be(monkeypatch, ROOT)
        for _ in range(CAP):
            nursery.start_soon(idle, served)
        assert (await served.ask("GET", "/v1/health")).status == 200
        nursery.cancel_scope.cancel()
    await until_open(served, 0)
    be(monkeypatch, ALICE)
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_connections_too_many_that_are_gone_already_do_not_end_the_server(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, ALICE)
    async with trio.open_nursery() as nursery:
        for _ in range(CAP):
            nursery.start_soon(idle, served)
        await until_open(served, CAP)
        for _ in range(50):
            async with served.client():
                pass
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    await until_open(served, 0)
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_the_cap_holds_for_attach_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, ALICE)
    async with trio.open_nursery() as nursery:
        for _ in range(CAP):
            nursery.start_soon(idle, served)
        await until_open(served, CAP)
        async with await trio.open_unix_socket(served.attach_path) as connection:
            with trio.fail_after(5):
                data = await connection.receive_some(65536)
        assert b"too_many_connections" in data
        nursery.cancel_scope.cancel()


async def test_many_silent_attach_clients_do_not_hold_up_the_api(tmp_path: Path) -> None:
    async with serving(tmp_path, connections_per_user=1000) as served, trio.open_nursery() as nursery:
        async def silent() -> None:
            async with await trio.open_unix_socket(served.attach_path) as connection:
                await connection.send_all(b"\0")
                await trio.sleep_forever()

        for _ in range(100):
            nursery.start_soon(silent)
        await until_open(served, 100)
        with trio.fail_after(2):
            for _ in range(5):
                assert (await served.ask("GET", "/v1/health")).status == 200
        nursery.cancel_scope.cancel()


async def test_an_attach_request_that_trickles_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "BODY_SECONDS", 0.1)
    async with await trio.open_unix_socket(served.attach_path) as connection, trio.open_nursery() as nursery:
        client = Client(connection)
        await client.send(struct.pack(">I", 1000))
        nursery.start_soon(trickle, client, b"x" * 1000)
        with trio.fail_after(5):
            data = await connection.receive_some(65536)
        assert b"request_timeout" in data
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("size", "body", "code"), [
    (3, b"not", b"bad_json"), (2, b"{}", b"invalid_request"), (1 << 31, b"", b"body_too_large"),
    (None, b'{"ref": "none", "command": ["x"]}', b"not_found"),
    (None, b'{"ref": "web", "command": []}', b"invalid_command"),
])
async def test_bad_attach_requests_are_answered_in_a_frame(
    served: Served, size: int | None, body: bytes, code: bytes
) -> None:
    await served.world.environments.create(request("web"), ALICE)
    async with await trio.open_unix_socket(served.attach_path) as connection:
        await connection.send_all(struct.pack(">I", len(body) if size is None else size) + body)
        data = b""
        with trio.fail_after(5):
            while part := await connection.receive_some(65536):
                data += part
    assert struct.unpack(">I", data[:4])[0] == len(data) - 4
    assert b'"code":"' + code + b'"' in data


async def test_anothers_environment_is_not_there_for_attach(served: Served) -> None:
    theirs = await served.world.environments.create(request("web"), BOB)
    body = b'{"ref": "%s", "command": ["sh"]}' % theirs.id.encode()
    async with await trio.open_unix_socket(served.attach_path) as connection:
        await connection.send_all(struct.pack(">I", len(body)) + body)
        with trio.fail_after(5):
            assert b"not_found" in await connection.receive_some(65536)
    assert served.world.processes.attached == []


async def test_stopping_ends_what_a_client_that_does_not_read_holds_up(served: Served) -> None:
    async with served.client() as deaf:
        await deaf.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        await trio.sleep(0.1)
        with trio.fail_after(3):
            await served.http.stop(0.1)
            await until_open(served, 0)


async def test_connections_leave_no_descriptor_behind(served: Served) -> None:
    async def use() -> None:
        assert error_of(await served.ask("GET", "/nothing"))
        await served.raw(b"nonsense\r\n\r\n")
        async with served.client() as client:
            await client.send(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await client.stream.receive_some(10)
        await until_open(served, 0)

    await use()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await use()
    assert len(os.listdir("/proc/self/fd")) == before


async def idle(served: Served) -> None:
    async with served.client():
        await trio.sleep_forever()


async def trickle(client: Client, data: bytes) -> None:
    for byte in data:
        try:
            await client.send(bytes([byte]))
        except trio.BrokenResourceError:
            return
        await trio.sleep(0.01)
