"""Tokens: who gets which, how long they are good, and what ends with them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from netnsd import wire
from netnsd.core import tokens
from netnsd.core.actor import Actor
from netnsd.core.tokens import VOUCHED_FOR, Grant
from netnsd.errors import (
    Forbidden,
    InvalidName,
    InvalidRequest,
    NameTaken,
    NetnsdError,
    NotFound,
    StoreError,
    Unauthorized,
)
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World

READ, WRITE, ADMIN = Grant("read"), Grant("write"), Grant("admin")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    made.accounts[ROOT.uid] = ROOT
    async with made.running():
        yield made


async def issue(world: World, name: str = "t", actor: Actor = ALICE, grant: Grant = VOUCHED_FOR,
                **fields: Any) -> wire.IssuedToken:
    return await world.tokens.issue(wire.TokenRequest(name=name, **fields), actor, grant)


async def test_a_token_is_recognisable_random_and_kept_as_a_hash(world: World) -> None:
    texts = {(await issue(world, f"t{number}")).token for number in range(20)}
    assert len({text.rpartition("_")[2] for text in texts}) == 20
    assert all(re.fullmatch(r"netnsd_[0-9a-f]{12}_[0-9a-f]{64}", text) for text in texts)
    kept = repr(world.store.tokens()) + repr(world.events) + repr(world.tokens.shown(ALICE, everyones=True))
    assert not any(text.rpartition("_")[2] in kept for text in texts)
    for path in world.directory.iterdir():
        data = path.read_bytes()
        assert not any(text.rpartition("_")[2].encode() in data for text in texts), path


async def test_a_token_is_known_and_nothing_like_it(world: World) -> None:
    issued = await issue(world)
    found = world.tokens.verify(issued.token)
    assert found is not None
    assert found.id == issued.id
    for place in range(len(issued.token)):
        near = issued.token[:place] + ("0" if issued.token[place] != "0" else "1") + issued.token[place + 1:]
        assert world.tokens.verify(near) is None, place
    for text in ("", issued.token[:-1], issued.token + "0", issued.token + "\n", " " + issued.token):
        assert world.tokens.verify(text) is None


async def test_tokens_are_there_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running():
        kept, gone = await issue(world, "kept", scope="write", expires_seconds=1e6), await issue(world, "gone")
        child = await issue(world, "child", grant=Grant("write", kept.id))
        world.tokens.revoke("gone", ALICE)
        before = world.tokens.shown(ALICE, everyones=False)
    async with world.running():
        assert world.tokens.shown(ALICE, everyones=False) == before
        assert await world.tokens.authority(kept.token) == (ALICE, Grant("write", kept.id))
        with pytest.raises(Unauthorized):
            await world.tokens.authority(gone.token)
        world.tokens.revoke(kept.id, ALICE)
        with pytest.raises(Unauthorized):
            await world.tokens.authority(child.token)
        assert world.store.tokens() == []


@pytest.mark.parametrize(("grant", "scope", "may"), [
    (READ, "read", True), (READ, "write", False), (READ, "admin", False),
    (WRITE, "read", True), (WRITE, "write", True), (WRITE, "admin", False),
    (ADMIN, "read", True), (ADMIN, "write", True), (ADMIN, "admin", True)])
async def test_none_is_wider_than_what_it_was_made_with(world: World, grant: Grant, scope: wire.Scope,
                                                        may: bool) -> None:
    with_token = dataclasses.replace(grant, token=(await issue(world, "parent", CAROL)).id)
    for number, each in enumerate((grant, with_token)):
        if may:
            assert (await issue(world, f"n{number}", CAROL, each, scope=scope)).scope == scope
        else:
            with pytest.raises(Forbidden):
                await issue(world, f"n{number}", CAROL, each, scope=scope)


async def test_only_an_admin_has_one_of_the_scope_admin(world: World) -> None:
    with pytest.raises(Forbidden):
        await issue(world, actor=ALICE, scope="admin")
    with pytest.raises(Forbidden):
        await issue(world, actor=CAROL, user="alice", scope="admin")
    with pytest.raises(Forbidden):  # of a session that is older than the membership
        await issue(world, actor=dataclasses.replace(CAROL, is_admin=False), scope="admin")
    issued = await issue(world, actor=CAROL, scope="admin")
    assert await world.tokens.authority(issued.token) == (CAROL, Grant("admin", issued.id))
    world.accounts[CAROL.uid] = dataclasses.replace(CAROL, is_admin=False)
    actor, grant = await world.tokens.authority(issued.token)
    assert (actor.is_admin, grant.scope) == (False, "write")


async def test_an_admin_makes_them_for_others_but_for_root(world: World) -> None:
    issued = await issue(world, actor=CAROL, user="bob", scope="write")
    assert issued.owner == wire.Owner(uid=BOB.uid, user="bob")
    assert (await world.tokens.authority(issued.token))[0] == BOB
    with pytest.raises(Forbidden):
        await issue(world, actor=ALICE, user="bob")
    with pytest.raises(Forbidden, match="root"):
        await issue(world, actor=CAROL, user="root")
    assert (await issue(world, actor=ROOT, user="root", scope="admin")).owner.uid == 0
    assert (await issue(world, actor=ALICE, user="alice")).owner.uid == ALICE.uid
    with pytest.raises(InvalidRequest, match="nobody-of-that-name"):
        await issue(world, actor=CAROL, user="nobody-of-that-name")
    with pytest.raises(InvalidRequest):  # a uid without an account, which may well connect
        await issue(world, actor=Actor(4711, 4711, (), "4711", "/", "/bin/sh", is_admin=False))


async def test_an_account_that_is_gone_or_anothers_by_now_is_refused(world: World) -> None:
    issued = await issue(world)
    world.accounts[ALICE.uid] = dataclasses.replace(ALICE, user="alicia")
    with pytest.raises(Unauthorized):
        await world.tokens.authority(issued.token)
    del world.accounts[ALICE.uid]
    with pytest.raises(Unauthorized):
        await world.tokens.authority(issued.token)
    world.accounts[ALICE.uid] = dataclasses.replace(ALICE, groups=(7,))
    assert (await world.tokens.authority(issued.token))[0].groups == (7,), "its rights are not those of now"


async def test_expiry_is_to_the_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(["2030-01-01T00:00:00.000000Z"] * 2)
    monkeypatch.setattr(world.clock, "now", lambda: next(moments))
    issued = await issue(world, expires_seconds=90000.5)
    assert issued.expires_at == "2030-01-02T01:00:00.500000Z"
    for now, good in (("2030-01-02T01:00:00.499999Z", True), ("2030-01-02T01:00:00.500000Z", False),
                      ("2030-01-02T01:00:00.500001Z", False), ("2029-12-31T00:00:00.000000Z", True)):
        monkeypatch.setattr(world.clock, "now", lambda now=now: now)
        assert (world.tokens.verify(issued.token) is not None) == good, now
        assert [t.expired for t in world.tokens.shown(ALICE, everyones=False)] == [not good]


@pytest.mark.parametrize(("seconds", "may"), [(0.9, False), (1, True), (tokens.MOST_SECONDS, True),
                                              (tokens.MOST_SECONDS + 1, False), (-1, False), (float("nan"), False),
                                              (float("inf"), False)])
async def test_expiry_has_limits(world: World, seconds: float, may: bool) -> None:
    if may:
        await issue(world, expires_seconds=seconds)
    else:
        with pytest.raises(InvalidRequest):
            await issue(world, expires_seconds=seconds)


async def test_what_was_made_with_a_token_does_not_outlive_it(world: World) -> None:
    parent = await issue(world, "parent", scope="write", expires_seconds=1000)
    grant = Grant("write", parent.id)
    assert (await issue(world, "longer", grant=grant, expires_seconds=5000)).expires_at == parent.expires_at
    assert (await issue(world, "for-ever", grant=grant)).expires_at == parent.expires_at
    shorter = await issue(world, "shorter", grant=grant, expires_seconds=10)
    assert parent.expires_at is not None
    assert shorter.expires_at is not None
    assert shorter.expires_at < parent.expires_at
    grandchild = await issue(world, "grandchild", grant=Grant("read", shorter.id))
    other = await issue(world, "other")
    world.tokens.revoke("parent", ALICE)
    assert [t.name for t in world.tokens.shown(ALICE, everyones=False)] == ["other"]
    assert world.tokens.verify(grandchild.token) is None
    assert world.tokens.verify(other.token) is not None
    assert [t.name for t in world.store.tokens()] == ["other"]
    with pytest.raises(Unauthorized):
        await issue(world, "late", grant=grant)


async def test_names_are_ones_own_and_taken_until_they_expire(world: World) -> None:
    await issue(world, "ci", expires_seconds=20)
    await issue(world, "ci", BOB)
    with pytest.raises(NameTaken):
        await issue(world, "ci")
    for name in ("", "CI", "a b", "x" * 64):
        with pytest.raises(InvalidName):
            await issue(world, name)
    for _ in range(30):  # a look is a second
        world.clock.now()
    assert (await issue(world, "ci")).expires_at is None
    assert len(world.tokens.shown(CAROL, everyones=True)) == 2


async def test_one_user_has_so_many(world: World) -> None:
    for number in range(tokens.MOST_TOKENS):
        await issue(world, f"t{number}")
    with pytest.raises(InvalidRequest, match="100 tokens"):
        await issue(world, "more")
    await issue(world, "t", BOB)
    world.tokens.revoke("t5", ALICE)
    await issue(world, "more")


async def test_ones_own_are_seen_and_revoked_and_an_admins_are_all(world: World) -> None:
    mine, theirs = await issue(world), await issue(world, "bobs", BOB)
    assert [t.id for t in world.tokens.shown(ALICE, everyones=True)] == [mine.id]
    assert [t.id for t in world.tokens.shown(CAROL, everyones=True)] == [mine.id, theirs.id]
    assert world.tokens.shown(CAROL, everyones=False) == []
    messages = set()
    for ref in (theirs.id, "bobs", "x" * 12):
        with pytest.raises(NotFound) as caught:
            world.tokens.revoke(ref, ALICE)
        messages.add(caught.value.message.replace(ref, ""))
    assert len(messages) == 1
    with pytest.raises(NotFound):
        world.tokens.revoke("bobs", CAROL)  # a name is one's own
    world.tokens.revoke(theirs.id, CAROL)
    assert world.tokens.verify(theirs.token) is None


async def test_where_the_disk_fails_nothing_changes(world: World) -> None:
    kept = await issue(world, "kept")
    world.faults.broken |= {"store.add_token", "store.delete_token"}
    with pytest.raises(StoreError):
        await issue(world, "new")
    with pytest.raises(StoreError):
        world.tokens.revoke("kept", ALICE)
    world.faults.broken.clear()
    assert [t.name for t in world.tokens.shown(ALICE, everyones=False)] == ["kept"]
    assert world.tokens.verify(kept.token) is not None
    assert await issue(world, "new")


async def test_revoked_while_its_owner_was_looked_up_is_refused(world: World) -> None:
    issued = await issue(world)
    real = world.tokens._login

    async def revoking(key: int | str) -> Actor | None:
        world.tokens.revoke(issued.id, ALICE)
        return await real(key)

    world.tokens._login = revoking
    with pytest.raises(NetnsdError) as caught:
        await world.tokens.authority(issued.token)
    assert caught.value.code == "unauthorized"
