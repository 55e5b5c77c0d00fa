"""TLS before the API: what it takes, what it refuses, and that the guard and the bounds stand behind it as well."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trustme

from netnsd import wire
from netnsd.api import stream, tcp
from netnsd.core.tokens import VOUCHED_FOR
from netnsd.errors import ConfigError
from tests.fakes.serving import Client, Served, serving
from tests.fakes.world import ALICE
from tests.unit.test_api_guard import REFUSED

HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n"


@dataclass(frozen=True)
class Files:
    """A certificate for localhost in files, and who signed it."""

    certificate: str
    key: str
    authority: trustme.CA

    def client(self) -> ssl.SSLContext:
        """A context that trusts it."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    (directory / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    return Files(str(directory / "cert.pem"), str(directory / "key.pem"), authority)


@pytest.fixture
async def served(tmp_path: Path, files: Files) -> AsyncIterator[Served]:
    async with serving(tmp_path, tls=tcp.tls_context(files.certificate, files.key)) as made:
        yield made


@asynccontextmanager
async def visit(served: Served, context: ssl.SSLContext) -> AsyncIterator[Client]:
    plain = await trio.open_tcp_stream("127.0.0.1", served.port)
    secured = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
    async with secured:
        with trio.fail_after(5):
            await secured.do_handshake()
        yield Client(secured)


async def words(served: Served) -> dict[str, str]:
    for old in served.world.tokens.shown(ALICE, everyones=False):
        served.world.tokens.revoke(old.id, ALICE)
    asked = wire.TokenRequest(name="t", scope="write")
    return {"Authorization": f"Bearer {(await served.world.tokens.issue(asked, ALICE, VOUCHED_FOR)).token}"}


async def until_gone(served: Served) -> None:
    with trio.fail_after(5):
        while served.tcp_gate.counts:
            await trio.sleep(0.002)


# -- that it works ----------------------------------------------------------------------------------------------


async def test_requests_large_answers_and_streams_come_through(served: Served, files: Files) -> None:
    bearer = await words(served)
    async with visit(served, files.client()) as client:
        assert (await client.ask("GET", "/v1/health", **bearer)).json == {"status": "ok"}
        assert len((await client.ask("GET", "/openapi.json", **bearer)).body) > 20_000
        body = {"name": "web", "command": ["server"], "env": {"A": "x" * 300_000}}
        assert (await client.ask("POST", "/v1/environments", body, **bearer)).status == 201
        assert (await client.ask("GET", "/v1/environments/web/logs?tail=2", **bearer)).body == b"tail 2\n"
        assert (await client.ask("GET", "/v1/health")).status == 401
        assert await client.rest() == b""
    await until_gone(served)


async def test_a_head_that_does_not_come_is_given_up(
        served: Served, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEAD_SECONDS", 0.1)
    async with visit(served, files.client()) as client:
        await client.send(HEALTH)
        assert (await client.answer()).code == "request_timeout"
        assert await client.rest() == b""


async def test_byte_by_byte_is_as_good(served: Served, files: Files) -> None:
    bearer = await words(served)
    async with visit(served, files.client()) as client:
        for byte in HEALTH + f"Authorization: {bearer['Authorization']}\r\n\r\n".encode():
            await client.send(bytes([byte]))
        assert (await client.answer()).status == 200


# -- what it refuses --------------------------------------------------------------------------------------------


async def test_a_handshake_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HANDSHAKE_SECONDS", 0.2)
    for begun in (b"", b"\x16\x03\x01"):
        async with served.visit() as client:
            await client.send(begun)
            assert await client.rest() == b""
    await until_gone(served)


async def test_handshakes_of_one_address_are_bounded_in_a_second(
        tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HANDSHAKES_AT_ONCE", 2)
    monkeypatch.setattr(tcp, "HANDSHAKES_PER_SECOND", 0.01)
    async with serving(tmp_path, tls=tcp.tls_context(files.certificate, files.key)) as served:
        for _ in range(2):
            async with visit(served, files.client()) as client:
                assert (await client.ask("GET", "/v1/health", **await words(served))).status == 200
        with pytest.raises(trio.BrokenResourceError):
            async with visit(served, files.client()):
                pass
        async with await connected(served, "127.0.0.7") as other:
            secured = trio.SSLStream(other, files.client(), server_hostname="localhost", https_compatible=True)
            with trio.fail_after(5):
                await secured.do_handshake()


async def connected(served: Served, address: str) -> trio.SocketStream:
    """A connection from that address."""
    made = trio.socket.socket()
    await made.bind((address, 0))
    await made.connect(("127.0.0.1", served.port))
    return trio.SocketStream(made)


async def test_what_the_guard_refuses_it_refuses_behind_tls(served: Served, files: Files) -> None:
    for name, data in REFUSED.items():
        async with visit(served, files.client()) as client:
            await client.send(data)
            assert (await client.answer()).code == "bad_request", name
            assert await client.rest() == b"", name


async def test_what_is_no_tls_is_not_heard(served: Served) -> None:
    bearer = await words(served)
    async with served.visit() as client:
        await client.send(HEALTH + f"Authorization: {bearer['Authorization']}\r\n\r\n".encode())
        assert b"HTTP/" not in await client.rest()
    await until_gone(served)


@pytest.mark.parametrize(("version", "good"), [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True),
                                               (ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1, False)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_tls_is_1_2_or_later(served: Served, files: Files, version: ssl.TLSVersion, good: bool) -> None:
    context = files.client()
    context.set_ciphers("ALL:@SECLEVEL=0")  # else the client itself refuses
    context.minimum_version = context.maximum_version = version
    if good:
        async with visit(served, context) as client:
            assert (await client.ask("GET", "/v1/health", **await words(served))).status == 200
    else:
        with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
            async with visit(served, context):
                pass
    await until_gone(served)


async def test_http_2_is_not_spoken(served: Served, files: Files) -> None:
    context = files.client()
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with visit(served, context) as client:
        assert isinstance(client.stream, trio.SSLStream)
        assert client.stream.selected_alpn_protocol() == "http/1.1"


# -- who does not read, and the end -----------------------------------------------------------------------------


async def test_the_end_does_not_wait_for_who_does_not_read_or_shake_hands(served: Served, files: Files) -> None:
    bearer = await words(served)
    async with served.visit(), visit(served, files.client()) as client:
        request = HEALTH.replace(b"/v1/health", b"/openapi.json") + f"Authorization: {bearer['Authorization']}\r\n\r\n"\
            .encode()
        with trio.move_on_after(0.5):
            await client.stream.send_all(request * 400)  # answers of megabytes that nobody takes
        with trio.fail_after(5):
            await served.http.stop(0.2)
            while ALICE.uid in served.tcp_gate.counts:
                await trio.sleep(0.01)


# -- files ------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(other))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing of the kind")
    for certificate, key, named in (
            (str(tmp_path / "none"), files.key, "tls_certificate"),
            (files.certificate, str(tmp_path / "none"), "tls_key"),
            (str(tmp_path), files.key, "directory"), (files.certificate, str(other), "other.pem"),
            (str(nonsense), files.key, "nonsense.pem"), (files.certificate, str(nonsense), "nonsense.pem"),
            (files.key, files.key, "key.pem")):
        with pytest.raises(ConfigError, match=named):
            tcp.tls_context(certificate, key)


def test_a_key_with_a_password_is_refused_and_nobody_asked_for_it(files: Files, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    subprocess.run(["openssl", "pkey", "-in", files.key, "-aes128", "-passout", "pass:secret", "-out", str(locked)],
                   check=True)
    program = f"from netnsd.api import tcp; tcp.tls_context({files.certificate!r}, {str(locked)!r})"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as started:
        try:
            started.wait(timeout=20)  # its input stays open, and says nothing
        finally:
            started.kill()
        assert started.stderr is not None
        assert "ConfigError" in started.stderr.read()
