"""Slots and ports have one owner at a time, and come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netnsd.core.allocation import _KEEP_FREED, PortAllocator, SlotAllocator
from netnsd.errors import AddressesExhausted, PortsExhausted, PortTaken


def ports(low: int = 20000, high: int = 20004, listening: set[tuple[str, int]] | None = None) -> PortAllocator:
    return PortAllocator(low, high, lambda protocol, port: (protocol, port) in (listening or set()))


@given(st.integers(1, 100), st.lists(st.integers(0, 200), max_size=200), st.sets(st.integers(0, 99), max_size=20))
def test_slots_never_have_two_owners(size: int, moves: list[int], claimed: set[int]) -> None:
    slots, held = SlotAllocator(size), {index for index in claimed if index < size}
    for index in held:
        slots.claim(index)
    for move in moves:
        if move % 2 and held:
            index = sorted(held)[move % len(held)]
            held.remove(index)
            slots.release(index)
        elif len(held) == size:
            with pytest.raises(AddressesExhausted):
                slots.take()
        else:
            index = slots.take()
            assert index not in held
            assert 0 <= index < size
            held.add(index)
        assert slots.free == size - len(held)


@pytest.mark.parametrize("size", [1, 2, 250])
def test_slots_are_exhausted_at_their_number(size: int) -> None:
    slots = SlotAllocator(size)
    assert [slots.take() for _ in range(size)] == list(range(size))
    assert slots.free == 0
    with pytest.raises(AddressesExhausted):
        slots.take()
    slots.release(size - 1)
    assert slots.take() == size - 1


def test_freed_slots_come_back_in_the_order_of_their_freeing() -> None:
    slots = SlotAllocator(3)
    for _ in range(3):
        slots.take()
    for index in (1, 0, 2):
        slots.release(index)
    assert [slots.take() for _ in range(3)] == [1, 0, 2]


@pytest.mark.parametrize(("freed", "fresh"), [(_KEEP_FREED - 1, True), (_KEEP_FREED, True), (_KEEP_FREED + 1, False)])
def test_freed_slots_lie_still_for_a_while(freed: int, fresh: bool) -> None:
    slots = SlotAllocator(1000)
    taken = [slots.take() for _ in range(freed)]
    for index in taken:
        slots.release(index)
    assert (slots.take() not in taken) is fresh


def test_a_slot_that_is_freed_twice_is_handed_out_once() -> None:
    slots = SlotAllocator(2)
    first = slots.take()
    slots.release(first)
    slots.release(first)
    assert sorted([slots.take(), slots.take()]) == [0, 1]
    with pytest.raises(AddressesExhausted):
        slots.take()


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["tcp", "udp"]), st.integers(0, 9)), max_size=60))
def test_ports_never_have_two_holders(moves: list[tuple[bool, str, int]]) -> None:
    allocator = ports(20000, 20009)
    held: set[tuple[str, int]] = set()
    for take, protocol, number in moves:
        if take:
            if sum(p == protocol for p, _ in held) == 10:
                with pytest.raises(PortsExhausted):
                    allocator.take(protocol, "x")
                continue
            port = allocator.take(protocol, "x")
            assert (protocol, port) not in held
            assert 20000 <= port <= 20009
            held.add((protocol, port))
        else:
            allocator.release(protocol, 20000 + number)
            held.discard((protocol, 20000 + number))
        assert len(allocator.leases) == len(held)


def test_ports_go_round_before_one_is_used_again() -> None:
    allocator = ports()
    for expected in (20000, 20001, 20002, 20003, 20004, 20000, 20001):
        assert allocator.take("tcp", "x") == expected
        allocator.release("tcp", expected)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ports_are_exhausted_at_their_number_per_protocol(size: int) -> None:
    allocator = ports(20000, 20000 + size - 1)
    for _ in range(size):
        allocator.take("tcp", "x")
    with pytest.raises(PortsExhausted):
        allocator.take("tcp", "x")
    assert allocator.take("udp", "x") == 20000


def test_ports_of_the_hosts_servers_are_passed_over() -> None:
    listening = {("tcp", 20000), ("tcp", 20002), ("udp", 20001)}
    allocator = ports(listening=listening)
    assert [allocator.take("tcp", "x") for _ in range(3)] == [20001, 20003, 20004]
    with pytest.raises(PortsExhausted):
        allocator.take("tcp", "x")


@pytest.mark.parametrize(("known", "message", "details"), [
    (None, "published port 20001/tcp is taken", {"port": 20001}),
    ("web", "published port 20001/tcp is taken by web", {"port": 20001, "holder": "web"})])
def test_a_number_that_is_leased_is_refused_and_named_to_who_may_know(
    known: str | None, message: str, details: dict[str, object]
) -> None:
    allocator = ports()
    allocator.take_number("tcp", 20001, "id", lambda _: None)
    with pytest.raises(PortTaken) as caught:
        allocator.take_number("tcp", 20001, "other", lambda holder: known if holder == "id" else "wrong")
    assert (caught.value.message, caught.value.details) == (message, details)
    assert allocator.take_number("udp", 20001, "other", lambda _: None) == 20001


def test_a_number_of_the_hosts_server_is_refused() -> None:
    with pytest.raises(PortTaken, match="server of the host"):
        ports(listening={("tcp", 20001)}).take_number("tcp", 20001, "x", lambda _: None)


def test_a_restored_lease_is_not_handed_out() -> None:
    allocator = ports()
    allocator.restore("tcp", 20000, "x")
    assert allocator.take("tcp", "y") == 20001
