"""attach.sock is anybody's: whatever comes through it, its sender is told or left, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netnsd.api.app import BODY_BYTES
from tests.fakes.serving import serving
from tests.fakes.world import ALICE, request

GOOD: dict[str, Any] = {"ref": "web", "command": ["true"], "env": {}, "cwd": "/", "umask": 18, "limits": {},
                        "tty": False}
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(
    ["\0", "web", 2**64, -1, 0o1000, "nofile"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)
BODIES = st.one_of(
    st.binary(max_size=100), JSON.map(json.dumps).map(str.encode),
    st.builds(lambda name, value: json.dumps({**GOOD, name: value}).encode(), st.sampled_from(sorted(GOOD)), JSON),
    st.sampled_from([b"", b"[" * 50_000, b'{"ref": "web", "ref": "web"}', b'{"ref": "\\ud800", "command": ["x"]}',
                     b'{"ref": "web", "command": ["x"], "umask": 1e999}']))


def frame(body: bytes, more: int = 0) -> bytes:
    return struct.pack(">I", max(len(body) + more, 0) & 0xFFFFFFFF) + body


FRAMES = st.builds(frame, BODIES, st.sampled_from([0] * 6 + [-1, 1, 1000, 1 << 31, BODY_BYTES])) | st.binary(max_size=8)


def send_with_files(path: str, data: bytes, count: int) -> bytes:
    """What is answered until the end. Runs in a thread."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        files = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
        try:
            socket.send_fds(client, [data or b"\0"], files)
        except OSError:  # refused by the kernel, or closed already
            client.sendall(data or b"\0")
        finally:
            for fd in files:
                os.close(fd)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while part := client.recv(65536):
            answer += part
        return answer


def check_answer(answer: bytes) -> None:
    """None, or one frame with an error that is the sender's own."""
    if answer:
        assert struct.unpack(">I", answer[:4])[0] == len(answer) - 4
        code = json.loads(answer[4:])["error"]["code"]
        assert code not in ("internal", "kernel_error", "store_error"), answer


@given(st.lists(st.tuples(FRAMES, st.sampled_from([0, 0, 0, 1, 3, 200])), min_size=1, max_size=10))
@example([(frame(json.dumps(GOOD).encode()), 3)])
@example([(frame(b"{}", 1 << 31), 0)])
@settings(max_examples=25)
def test_frames_of_any_kind(frames: list[tuple[bytes, int]]) -> None:
    async def main(directory: Path) -> None:
        with trio.fail_after(20):
            async with serving(directory) as served:
                await served.world.environments.create(request("web", "server"), ALICE)
                before = len(os.listdir("/proc/self/fd"))
                for data, files in frames:
                    with contextlib.suppress(ConnectionError):  # left, with what was sent unread
                        check_answer(await trio.to_thread.run_sync(send_with_files, served.attach_path, data, files))
                assert (await served.ask("GET", "/v1/health")).json == {"status": "ok"}
                while served.gate._open:
                    await trio.sleep(0.005)
                assert len(os.listdir("/proc/self/fd")) <= before + 1, "descriptors are left"
                assert [e.name for e in served.world.environments.registry.all()] == ["web"]

    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
