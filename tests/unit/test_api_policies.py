"""The API of policies: a document goes in and comes back, its owner is who asks, and others' are not there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.serving import Served, error_of, serving
from tests.fakes.world import ALICE, BOB, CAROL, request
from tests.policies.worlds import document

OPEN: dict[str, Any] = document("open", {"podSelector": {}, "ingress": [{}]})
PATH = "/v1/policies"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


async def test_a_document_goes_in_and_comes_back(served: Served) -> None:
    await served.world.environments.create(request("web"), ALICE)
    answer = await served.ask("POST", PATH, {"policies": [OPEN, document("out", {"policyTypes": ["Egress"]})]})
    assert answer.status == 200
    first, second = answer.json["policies"]
    assert first == {"name": "open", "owner": {"uid": ALICE.uid, "user": "alice"}, "types": ["Ingress"],
                     "selects": ["web"], "document": OPEN, "created_at": first["created_at"]}
    assert second["types"] == ["Egress"]
    assert (await served.ask("GET", PATH)).json["policies"] == [first, second]
    assert (await served.ask("GET", f"{PATH}/open")).json == first
    assert (await served.ask("DELETE", f"{PATH}/open")).json == {}
    assert (await served.ask("GET", f"{PATH}/open")).code == "not_found"
    assert (await served.ask("POST", PATH, {"policies": []})).json == {"policies": []}


@pytest.mark.parametrize(("body", "code", "part"), [
    ({"policies": [document("p", {"egres": []})]}, "invalid_policy", "spec.egres"),
    ({"policies": ["p"]}, "invalid_request", "policies[0]"), ({}, "invalid_request", "policies"),
    ({"policies": [OPEN], "replace": True}, "invalid_request", "replace"),
    ({"policies": [document("p", {}, namespace="bob")]}, "forbidden", "bob")])
async def test_what_cannot_be_is_refused_and_named(served: Served, body: Any, code: str, part: str) -> None:
    answer = await served.ask("POST", PATH, body)
    assert answer.code == code
    assert part in error_of(answer)["message"]
    assert served.world.store.policies() == []


async def test_anothers_policy_is_not_there_but_for_admins(served: Served) -> None:
    await served.world.policies.apply([OPEN], BOB)
    for method in ("GET", "DELETE"):
        for ref in ("open", "open.bob"):
            answer = await served.ask(method, f"{PATH}/{ref}")
            nothing = await served.ask(method, f"{PATH}/{'x' * len(ref)}")
            assert (answer.status, answer.code) == (404, "not_found")
            assert error_of(answer)["message"].replace(ref, "") == error_of(nothing)["message"].replace(
                "x" * len(ref), ""), "the answer tells that it exists"
    assert (await served.ask("GET", f"{PATH}?all=1")).json["policies"] == []
    served.actor = CAROL
    assert (await served.ask("GET", PATH)).json["policies"] == []
    assert [p["name"] for p in (await served.ask("GET", f"{PATH}?all=1")).json["policies"]] == ["open"]
    assert (await served.ask("DELETE", f"{PATH}/open.bob")).status == 200
