"""The parts of the harness that need no root."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

from tests.harness import ALICE, DeadlineError, Snapshot, differences, settle, wait_until
from tests.harness import snapshot as snapshots
from tests.harness.users import group_lines, passwd_lines

EMPTY = Snapshot(**{field.name: frozenset() for field in dataclasses.fields(Snapshot)})


def test_wait_until_returns_what_the_condition_found() -> None:
    found: Iterator[str] = iter(["", "", "here"])
    assert wait_until(lambda: next(found), seconds=1) == "here"


def test_wait_until_tries_once_more_at_the_deadline_and_names_what_it_waited_for() -> None:
    tries: list[int] = []
    with pytest.raises(DeadlineError, match=r"the port did not hold within 0 s \(last seen: None\)"):
        wait_until(lambda: tries.append(1), seconds=0, what="the port")
    assert len(tries) == 1


def test_differences_name_the_kind_and_the_direction() -> None:
    before = dataclasses.replace(EMPTY, links=frozenset({"lo", "nd0"}))
    after = dataclasses.replace(EMPTY, links=frozenset({"lo"}), tables=frozenset({"inet netnsd"}))
    assert differences(before, after) == ["links: went nd0", "tables: came inet netnsd"]
    assert differences(before, after, ignore=["links"]) == ["tables: came inet netnsd"]


@pytest.mark.parametrize("kind", [field.name for field in dataclasses.fields(Snapshot)])
def test_differences_cover_every_kind(kind: str) -> None:
    assert differences(EMPTY, dataclasses.replace(EMPTY, **{kind: frozenset({"x"})})) == [f"{kind}: came x"]


def test_settle_waits_for_what_goes_a_little_later() -> None:
    lingering = dataclasses.replace(EMPTY, namespaces=frozenset({"1"}))
    moments = iter([lingering, lingering, EMPTY])
    assert settle(EMPTY, lambda: next(moments), seconds=5) == []


def test_settle_reports_what_stays_and_can_overlook_what_went() -> None:
    before = dataclasses.replace(EMPTY, files=frozenset({"/run/a"}))
    after = dataclasses.replace(EMPTY, files=frozenset({"/run/b"}))
    assert settle(before, lambda: after, seconds=0, only_new=True) == ["files: came /run/b"]
    assert settle(before, lambda: after, seconds=0) == ["files: came /run/b", "files: went /run/a"]


def test_a_mount_point_that_is_mounted_on_twice_counts_twice() -> None:
    line = "36 35 98:0 / /run/netns/web rw - nsfs nsfs rw\n"
    assert list(snapshots._mounts(line * 2)) == ["/run/netns/web nsfs 1", "/run/netns/web nsfs 2"]


def test_open_descriptors_name_a_file_that_was_opened() -> None:
    before = snapshots.open_descriptors(os.getpid())
    with open("/etc/hostname", encoding="utf-8"):
        during = snapshots.open_descriptors(os.getpid())
    assert "/etc/hostname" in during
    assert snapshots.open_descriptors(os.getpid()) == before


def test_users_and_groups_are_lines_of_their_files() -> None:
    assert f"alice:x:{ALICE.uid}:{ALICE.gid}:alice:{ALICE.home}:/bin/sh\n" in passwd_lines()
    assert "netnsdtest:x:61010:alice\n" in group_lines()
    assert "netnsd:x:61020:alice,bob,carol\n" in group_lines()
