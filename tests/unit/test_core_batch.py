"""What many ask for at once is found once, after they asked, and not without a rest."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from netnsd.core.batch import Shared
from netnsd.errors import KernelError

Clock = trio.testing.MockClock


class Looks:
    """Takes a second to say how often it was asked; ``fails`` says at which of these times."""

    def __init__(self, fails: int = 0) -> None:
        self.begun = 0
        self.fails = fails

    async def look(self) -> int:
        self.begun += 1
        number = self.begun
        await trio.sleep(1)
        if number == self.fails:
            raise KernelError("not now")
        return number


async def test_who_ask_at_once_share_an_answer(autojump_clock: Clock) -> None:
    looks, found = Looks(), []
    shared = Shared(looks.look)

    async def ask() -> None:
        found.append(await shared.get())

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert found == [1] * 20
    assert looks.begun == 1


async def test_an_answer_is_found_after_it_was_asked_for(autojump_clock: Clock) -> None:
    looks = Looks()
    shared = Shared(looks.look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.get)
        await trio.sleep(0.5)
        assert await shared.get() == 2
    assert await shared.get() == 3


async def test_at_most_half_of_the_time_is_spent(autojump_clock: Clock) -> None:
    looks = Looks()
    shared = Shared(looks.look)
    with trio.move_on_after(20.5):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(_for_ever, shared)
    assert looks.begun <= 11
    began = trio.current_time()
    await trio.sleep(10)
    await shared.get()
    assert trio.current_time() - began == pytest.approx(11), "it has rested"


async def test_a_failure_is_one_askers_and_so_is_its_end(autojump_clock: Clock) -> None:
    looks = Looks(fails=1)
    shared = Shared(looks.look)
    with pytest.raises(KernelError):
        await shared.get()
    assert await shared.get() == 2
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1.5):
            await shared.get()
        nursery.start_soon(shared.get)
    assert looks.begun == 4


async def _for_ever(shared: Shared[int]) -> None:
    while True:
        await shared.get()
