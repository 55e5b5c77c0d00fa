"""The accept loop goes on, whatever befalls a connection or the host."""

from __future__ import annotations

import errno
import socket

import pytest
import trio
import trio.testing

from netnsd.api import accepting

BAD_LUCK = [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EPERM, errno.EMFILE,
            errno.ENFILE, errno.ENOBUFS]


class Listening:
    """Accepts what it is told: an errno, or a connection."""

    def __init__(self, outcomes: list[object]) -> None:
        self._outcomes = outcomes

    async def accept(self) -> tuple[object, None]:
        await trio.lowlevel.checkpoint()
        if not self._outcomes:
            await trio.sleep_forever()
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, int):
            raise OSError(outcome, "bad luck")
        return outcome, None


async def admitted(outcomes: list[object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is let in of these."""
    monkeypatch.setattr(trio.socket, "from_stdlib_socket", lambda _listener: Listening(outcomes))
    seen: list[object] = []

    async def admit(connection: object) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(connection)

    async with trio.open_nursery() as nursery:
        with socket.socket() as listener:
            nursery.start_soon(accepting.accept_all, listener, admit, nursery)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1):
                while outcomes:
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return seen


@pytest.mark.parametrize("number", BAD_LUCK, ids=lambda number: errno.errorcode[number])
async def test_it_goes_on(number: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    assert await admitted(["one", number, number, "two"], monkeypatch) == ["one", "two"]


async def test_a_listener_that_is_none_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.RaisesGroup(OSError):
        await admitted(["one", errno.EINVAL], monkeypatch)
