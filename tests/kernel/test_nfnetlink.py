"""Every nf_tables message that is packed by hand means, to pyroute2, what it should."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_set_elem_list_msg

from netnsd.kernel import nfnetlink
from netnsd.kernel.nfnetlink import Element

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
REQUEST, ACK, CREATE = 0x1, 0x4, 0x400
NEW, DELETE = 12, 14
KEY = nfnetlink.concatenation(b"\x06", struct.pack(">H", 20007))
DATA = nfnetlink.concatenation(socket.inet_aton("10.203.0.2"), struct.pack(">H", 3000))
OWNER = nfnetlink.concatenation(socket.inet_aton("10.203.0.2"), struct.pack("=I", 61001))


def _value(part: Any) -> bytes:
    if part is None:
        return b""
    value = part.get_attr("NFTA_DATA_VALUE")
    return bytes.fromhex(value.replace(":", "")) if isinstance(value, str) else bytes(value)


def decoded(message: bytes) -> dict[str, Any]:
    """Table, set and the (key, data) pairs of one message."""
    parsed = nft_set_elem_list_msg(message)
    parsed.decode()
    attributes = dict(parsed["attrs"])
    assert parsed["nfgen_family"] == socket.AF_INET
    pairs = []
    for element in attributes["NFTA_SET_ELEM_LIST_ELEMENTS"]:
        parts = dict(element["attrs"])
        pairs.append(Element(*(_value(parts.get(f"NFTA_SET_ELEM_{name}")) for name in ("KEY", "DATA", "KEY_END"))))
    return {"table": attributes["NFTA_SET_ELEM_LIST_TABLE"], "set": attributes["NFTA_SET_ELEM_LIST_SET"],
            "pairs": pairs}


def test_parts_of_a_concatenation_begin_at_registers() -> None:
    assert bytes([6, 0, 0, 0, 0x4E, 0x27, 0, 0]) == KEY
    assert bytes([10, 203, 0, 2, 0x0B, 0xB8, 0, 0]) == DATA
    assert len(OWNER) == 8


@pytest.mark.parametrize(("kind", "flags"), [(NEW, REQUEST | ACK | CREATE), (DELETE, REQUEST | ACK)])
def test_a_batch_names_table_sets_and_elements(kind: int, flags: int) -> None:
    table = nfnetlink._text(1, "netnsd")
    begin, published, owners, end = nfnetlink.batch(
        kind, table, {"published": [Element(KEY, DATA)], "owners": [Element(OWNER)]})
    for control, number in ((begin, 0x10), (end, 0x11)):
        length, found, its_flags, _sequence, _pid, _family, _version, subsystem = struct.unpack("=IHHIIBB2s", control)
        assert (length, found, its_flags, subsystem) == (len(control), number, REQUEST, b"\0\x0a")
    for message in (published, owners):
        assert struct.unpack_from("=IHHII", message) == (len(message), 10 << 8 | kind, flags, 0, 0)
    assert decoded(published) == {"table": "netnsd", "set": "published", "pairs": [Element(KEY, DATA)]}
    assert decoded(owners) == {"table": "netnsd", "set": "owners", "pairs": [Element(OWNER)]}


def test_many_elements_are_several_messages_of_one_batch() -> None:
    keys = [struct.pack(">Q", number) for number in range(2500)]
    messages = nfnetlink.batch(NEW, nfnetlink._text(1, "netnsd"), {"owners": [Element(key) for key in keys]})
    assert len(messages) == 2 + 3
    assert [key for message in messages[1:-1] for key, *_ in decoded(message)["pairs"]] == keys
    assert all(len(message) < 1 << 16 for message in messages)


def test_a_range_has_its_last_key_too() -> None:
    span = Element(socket.inet_aton("10.203.0.2"), b"", socket.inet_aton("10.203.0.9"))
    [_, message, _] = nfnetlink.batch(NEW, nfnetlink._text(1, "netnsd"), {"allowed": [span]})
    assert decoded(message) == {"table": "netnsd", "set": "allowed", "pairs": [span]}


def test_a_message_is_of_the_tables_family() -> None:
    [_, message, _] = nfnetlink.batch(NEW, nfnetlink._text(1, "netnsd"), {"seats": [Element(KEY)]}, socket.AF_BRIDGE)
    assert nft_set_elem_list_msg(message).decode() is None
    assert message[16] == socket.AF_BRIDGE
