"""What nobody waits for is done while nobody waits, and not put off for ever."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core.quiet import _PATIENCE_SECONDS, _PAUSE_SECONDS, Quiet

MILLISECOND = 0.001


@given(st.integers(0, 1200), st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 300)), max_size=12))
def test_waiting_ends_in_a_quiet_moment_or_when_patience_does(start: int, spans: list[tuple[int, int]]) -> None:
    """``start`` of the wait and (begin, length) of each disturbance are in milliseconds."""
    async def main() -> None:
        quiet = Quiet()

        async def disturb(begin: int, length: int) -> None:
            await trio.sleep(begin * MILLISECOND)
            with quiet.disturbed():
                await trio.sleep(length * MILLISECOND)

        async with trio.open_nursery() as nursery:
            for span in spans:
                nursery.start_soon(disturb, *span)
            await trio.sleep(start * MILLISECOND)
            await quiet.wait()
            found.append(trio.current_time() - began)

    found: list[float] = []
    clock = trio.testing.MockClock(autojump_threshold=0)
    began = clock.current_time()
    trio.run(main, clock=clock)
    ended, least = found[0], start * MILLISECOND
    assert ended >= least
    assert ended <= least + _PATIENCE_SECONDS + _PAUSE_SECONDS + MILLISECOND / 2
    if ended < least + _PATIENCE_SECONDS - MILLISECOND / 2:
        for begin, length in spans:
            # At the very moment that a disturbance begins either may be first.
            before = ended < begin * MILLISECOND + MILLISECOND / 2
            after = ended > (begin + length) * MILLISECOND + _PAUSE_SECONDS - MILLISECOND / 2
            assert before or after, (begin, length)


async def test_nobody_waits_where_nothing_happened(autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(1)
    began = trio.current_time()
    await Quiet().wait()
    assert trio.current_time() == began


async def test_the_last_of_several_disturbances_counts(autojump_clock: trio.testing.MockClock) -> None:
    quiet = Quiet()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quiet.wait)
        with quiet.disturbed():
            with quiet.disturbed():
                await trio.sleep(0.1)
            await trio.sleep(0.1)
            assert len(nursery.child_tasks) == 1
    assert 0.2 <= trio.current_time() <= 0.22


async def test_who_failed_disturbs_no_longer(autojump_clock: trio.testing.MockClock) -> None:
    quiet = Quiet()
    try:
        with quiet.disturbed():
            raise RuntimeError
    except RuntimeError:
        pass
    began = trio.current_time()
    await quiet.wait()
    assert trio.current_time() - began <= 2 * _PAUSE_SECONDS
