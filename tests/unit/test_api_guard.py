"""What two readers could understand in two ways never reaches the HTTP library."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from netnsd.api import stream
from netnsd.errors import BadRequest
from tests.fakes.serving import Served, serving

HOST = b"Host: localhost\r\n"
POST = b"POST /v1/environments HTTP/1.1\r\n" + HOST
HEALTH = b"GET /v1/health HTTP/1.1\r\n" + HOST

REFUSED = {
    "Content-Length and Transfer-Encoding":
        HEALTH + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding": HEALTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding in odd case": HEALTH + b"tRANSFER-eNCODING: identity\r\n\r\n",
    "Transfer-Encoding before a space": HEALTH + b"Transfer-Encoding : chunked\r\n\r\n",
    "folded header": HEALTH + b"X-A: 1\r\n 2\r\n\r\n",
    "folded header by tab": HEALTH + b"X-A: 1\r\n\t2\r\n\r\n",
    "folded first header": b"GET /v1/health HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "bare line feeds": b"GET /v1/health HTTP/1.1\nHost: localhost\n\n",
    "a bare line feed among good lines": HEALTH + b"X-A: 1\nX-B: 2\r\n\r\n",
    "bare line feeds before a body that ends a head": b"POST / HTTP/1.1\nContent-Length: 4\n\n\r\n\r\n",
    "a bare carriage return": HEALTH + b"X-A: 1\rX-B: 2\r\n\r\n",
    "a NUL": HEALTH + b"X-A: \0\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "upgrade to h2c": HEALTH + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n",
    "upgrade to a websocket": HEALTH + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "two lengths": HEALTH + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "two lengths in one": HEALTH + b"Content-Length: 0, 0\r\n\r\n",
    "a signed length": HEALTH + b"Content-Length: +1\r\n\r\nx",
    "a negative length": HEALTH + b"Content-Length: -1\r\n\r\n",
    "a hexadecimal length": HEALTH + b"Content-Length: 0x1\r\n\r\nx",
    "an empty length": HEALTH + b"Content-Length: \r\n\r\n",
    "a length of many digits": HEALTH + b"Content-Length: 9999999999999\r\n\r\n",
    "a length in other digits": HEALTH + "Content-Length: ١\r\n\r\nx".encode(),  # noqa: RUF001
    "no name": HEALTH + b": x\r\n\r\n",
    "no colon": HEALTH + b"nonsense\r\n\r\n",
    "a space in a name": HEALTH + b"X A: 1\r\n\r\n",
    "no request line": b"\r\n\r\n",
    "an empty line first": b"\r\n" + HEALTH + b"\r\n",
    "nonsense": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/0.9": b"GET /v1/health\r\n\r\n",
    "HTTP/1.2": b"GET /v1/health HTTP/1.2\r\n" + HOST + b"\r\n",
    "HTTP/2.0": b"GET /v1/health HTTP/2.0\r\n" + HOST + b"\r\n",
    "lower-case version": b"GET /v1/health http/1.1\r\n" + HOST + b"\r\n",
    "lower-case method": b"get /v1/health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space too many": b"GET  /v1/health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab": b"GET\t/v1/health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the path": b"GET /v1/ health HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes that are no ASCII in the path": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path of 9000 bytes": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host": b"GET /v1/health HTTP/1.1\r\n\r\n",
    "two hosts": HEALTH + HOST + b"\r\n",
    "a head that is too large": HEALTH + b"X-A: " + b"a" * stream.HEAD_BYTES + b"\r\n\r\n",
    "a head that is too large and does not end": HEALTH + b"X-A: " + b"a" * 3 * stream.HEAD_BYTES,
}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


@pytest.mark.parametrize("name", REFUSED)
async def test_ambiguous_requests_are_refused_and_the_connection_closed(served: Served, name: str) -> None:
    answer = await served.raw(REFUSED[name])
    assert (answer.status, answer.code) == (400, "bad_request")


@pytest.mark.parametrize("path", ["/v1/health", "/v1/health?x=%00%ff", "//", "/%2e%2e/", "*", "http://x/v1/health",
                                  "/v1/environments/%ff", "/v1/environments/%ed%a0%80", "/v1/environments/%00",
                                  "/v1/environments/..%2f..", "/?" + "a=b&" * 500, "/v1/health#x"])
async def test_odd_paths_get_an_answer_in_the_one_shape(served: Served, path: str) -> None:
    answer = await served.ask("GET", path)
    if answer.status != 200:
        assert answer.code in ("no_route", "not_found", "bad_request")


async def test_refusal_reaches_a_client_that_sends_byte_by_byte(served: Served) -> None:
    async with served.client() as client:
        for byte in REFUSED["folded header"]:
            await client.send(bytes([byte]))
        assert (await client.answer()).code == "bad_request"


async def test_good_requests_byte_by_byte_are_answered(served: Served) -> None:
    async with served.client() as client:
        for _ in range(2):
            for byte in POST + b"Content-Length: 14\r\n\r\n" + b'{"name":"A!!"}':
                await client.send(bytes([byte]))
            assert (await client.answer()).code == "invalid_name"


async def test_requests_on_one_connection_are_answered_in_order(served: Served) -> None:
    async with served.client() as client:
        for path, status in (("/v1/health", 200), ("/nothing", 404), ("/v1/info", 200), ("/v1/environments/x", 404)):
            assert (await client.ask("GET", path)).status == status


async def test_requests_that_are_sent_together_are_answered_in_order(served: Served) -> None:
    paths = ["/v1/health", "/v1/info", "/nothing", "/v1/environments", "/v1/health"] * 10
    async with served.client() as client:
        await client.send(b"".join(b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), HOST) for path in paths))
        statuses = [(await client.answer()).status for _ in paths]
        assert statuses == [404 if path == "/nothing" else 200 for path in paths]


async def test_a_body_that_looks_like_a_request_is_a_body(served: Served) -> None:
    inner = HEALTH + b"\r\n"
    async with served.client() as client:
        await client.send(POST + b"Content-Length: %d\r\n\r\n%s" % (len(inner), inner))
        assert (await client.answer()).code == "bad_json"
        assert (await client.ask("GET", "/v1/info")).json["pid"] == 1


async def test_a_bad_request_after_good_ones_is_refused_behind_their_answers(served: Served) -> None:
    async with served.client() as client:
        await client.send((HEALTH + b"\r\n") * 3 + REFUSED["folded header"])
        assert [(await client.answer()).status for _ in range(4)] == [200, 200, 200, 400]
        assert await client.rest() == b""


async def test_a_bad_request_during_an_answer_does_not_end_the_server(served: Served) -> None:
    """The refusal and an answer that the client does not read are sent by two tasks."""
    async with served.client() as client:
        await client.send(b"GET /openapi.json HTTP/1.1\r\n%s\r\n" % HOST * 200)
        with trio.move_on_after(0.2):
            await client.send(REFUSED["folded header"] * 1000)
        with trio.move_on_after(0.3):
            await trio.sleep_forever()
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_a_bad_request_during_a_stream_does_not_end_the_server(served: Served) -> None:
    async with served.client() as client:
        await client.send(b"GET /v1/events HTTP/1.1\r\n%s\r\n" % HOST)
        for number in range(300):
            served.events.emit("x" * 2000, 1001, "id", f"e{number}")
            await trio.lowlevel.checkpoint()
        await client.send(REFUSED["folded header"])
        await trio.sleep(0.2)
    assert (await served.ask("GET", "/v1/health")).status == 200


async def test_expect_100_is_answered(served: Served) -> None:
    async with served.client() as client:
        await client.send(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.answer(has_body=False)).status == 100
        await client.send(b"{}")
        assert (await client.answer()).status == 201


@pytest.mark.parametrize("head", [
    b"GET / HTTP/1.1\r\nX-A:" + b" " * 30_000 + b"\x01",
    b"GET / HTTP/1.1\r\nX-A:" + b"\t " * 15_000 + b"\x01",
    b"GET / HTTP/1.1\r\n" + b"a" * 30_000 + b" ",
    b"GET / HTTP/1.1\r\nContent-Length:" + b" " * 30_000 + b"x",
    b"GET / HTTP/1.1\r\nContent-Length:" + b" " * 15_000 + b"1" + b" " * 15_000,
    b"GET " + b"/" * 8_000 + b" " * 22_000 + b"HTTP/1.1",
    b"G" * 30_000,
    b"\r\n".join([b"GET / HTTP/1.1", *[b"a: b"] * 5_000]),
], ids=range(8))
def test_large_heads_are_checked_in_bounded_time(head: bytes) -> None:
    begun = time.perf_counter()
    with contextlib.suppress(BadRequest):
        stream._body_length(head)
    assert time.perf_counter() - begun < 0.1


@given(st.lists(st.sampled_from([b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"\r\n",
                                  b"\n", b"\r", b" ", b"\t", b":", b"a", b"1", b"Content-Length", b"GET /",
                                 b"HTTP/1.1", b"\0", b"\xff", b"\r\n\r\n", b"Host: x"]), max_size=30).map(b"".join))
def test_any_head_is_a_length_or_refused(head: bytes) -> None:
    try:
        assert stream._body_length(head) >= 0
    except BadRequest:
        return
    assert b"\n" not in head.replace(b"\r\n", b""), "a bare line feed passed"
    assert b"\r" not in head.replace(b"\r\n", b""), "a bare carriage return passed"
    library = h11.Connection(h11.SERVER)
    library.receive_data(head + b"\r\n\r\n")
    assert isinstance(library.next_event(), h11.Request), "the library refuses it in its own way"
