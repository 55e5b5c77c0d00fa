"""The rules by which two users and an admin ask for everything that there is to ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.stateful import model
from tests.stateful.base import Base
from tests.stateful.driver import ALICE, BOB, CAROL
from tests.stateful.model import Environment, Port, Template, Wanted
from tests.stateful.strategies import (
    BAD,
    HAVE,
    LABELS,
    NAMES,
    PATH,
    TEMPLATES,
    USERS,
    body_of,
    other,
    query_of,
    unless,
    wanted_in,
)


class Asking(Base):
    """What users do."""

    # -- making -----------------------------------------------------------------------------------------------------

    @rule(user=USERS, name=NAMES, data=st.data(), replace=st.booleans())
    def create(self, user: str, name: str, data: st.DataObject, replace: bool) -> None:
        wanted = data.draw(wanted_in(self.driver.numbers), label="wanted")
        self._create(user, name, wanted, self._body(name, wanted, replace=replace), replace=replace)

    @rule(user=USERS, name=NAMES, template=TEMPLATES, labels=LABELS, replace=st.booleans())
    def create_from_template(self, user: str, name: str, template: str, labels: tuple[tuple[str, str], ...],
                             replace: bool) -> None:
        kept = self.model.templates.get((user, template))
        body = {"name": name, "template": template, "labels": dict(labels), "replace": replace}
        if kept is None:
            self._refused({"not_found"}, user, "POST", PATH, body)
        else:
            self._create(user, name, kept.wanted, body, replace=replace, labels=labels)
            self._claimed(user, name, template)

    @rule(user=USERS, name=st.sampled_from(["web", "db"]), data=st.data(), count=st.sampled_from([2, 5]))
    def create_many(self, user: str, name: str, data: st.DataObject, count: int) -> None:
        wanted = data.draw(wanted_in(self.driver.numbers), label="wanted")
        names = [f"{name}-{number}" for number in range(1, count + 1)]
        body = {**self._body(name, wanted, replace=False), "count": count}
        refusals = [self.model.refusals(user, one, wanted, replace=False) for one in names]
        allowed = {code for codes, _ in refusals for code in codes}
        numbered = any(p.number is not None for p in wanted.ports) and count > 1
        if numbered:
            allowed.add("port_taken")
        if numbered or any(must for _, must in refusals):
            self._refused(allowed, user, "POST", PATH, body)
            return
        status, answer = self.driver.ask(user, "POST", PATH, body)
        if status == 201 or not allowed:
            assert status == 201, (status, answer)
            assert [e["name"] for e in answer["environments"]] == names
            for one, made in zip(names, answer["environments"], strict=True):
                self._made(user, one, wanted, made)
        else:
            assert answer["error"]["code"] in allowed, answer

    @rule(user=USERS, bad=st.sampled_from(BAD))
    def create_what_cannot_be(self, user: str, bad: tuple[dict[str, Any], str]) -> None:
        body, code = bad
        self._refused({code}, user, "POST", PATH, {"name": "bad", **body})

    @rule(user=USERS, name=TEMPLATES, warm=st.integers(0, 1), labels=LABELS, replace=st.booleans(),
          listens=st.booleans())
    def add_template(self, *, user: str, name: str, warm: int, labels: tuple[tuple[str, str], ...], replace: bool,
                     listens: bool) -> None:
        wanted = Wanted((("main", model.LISTENER if listens else model.SLEEPER),), (Port(3000),) if listens else (),
                        labels)
        body = {"name": name, "warm": warm, "replace": replace, "specification": self._specification(wanted)}
        if (user, name) in self.model.templates and not replace:
            self._refused({"name_taken"}, user, "POST", "/v1/templates", body)
            return
        shown = self._done(user, "POST", "/v1/templates", body)
        assert (shown["name"], shown["warm"], shown["labels"]) == (name, warm, dict(labels))
        self.model.templates.pop((user, name), None)
        self._untold_stocks.discard((user, name))
        self.model.templates[user, name] = Template(name, user, wanted, warm)

    @precondition(lambda self: bool(self.model.templates) or self._steps % 6 == 2)
    @rule(user=USERS, name=TEMPLATES)
    def remove_template(self, user: str, name: str) -> None:
        if self.model.templates.pop((user, name), None) is None:
            self._refused({"not_found"}, user, "DELETE", f"/v1/templates/{name}")
        else:
            self._done(user, "DELETE", f"/v1/templates/{name}")

    @rule(user=st.sampled_from([ALICE, BOB, CAROL, CAROL]), size=st.integers(0, 3))
    def resize_the_pool(self, user: str, size: int) -> None:
        if user == CAROL:
            assert self._done(user, "PATCH", "/v1/pools/slots", {"size": size})["size"] == size
        else:
            self._refused({"forbidden"}, user, "PATCH", "/v1/pools/slots", {"size": size})

    # -- using ------------------------------------------------------------------------------------------------------

    @HAVE
    @rule(data=st.data(), verb=st.sampled_from(["start", "stop", "restart"]), by_id=st.booleans())
    def change_state(self, data: st.DataObject, verb: str, by_id: bool) -> None:
        environment = self._some(data)
        ref = environment.id if by_id else environment.name
        shown = self._done(environment.user, "POST", f"{PATH}/{ref}/{verb}", body_of(verb))
        for service in environment.services:
            if verb != "start" and service.state == "running":
                service.ended("stopped", {137, 143, None})
            if verb != "stop" and service.state != "running":
                service.started()
        environment.learn_pids(shown)

    @HAVE
    @rule(data=st.data(), code=st.integers(0, 9))
    def execute(self, data: st.DataObject, code: int) -> None:
        environment = self._some(data)
        assert self.driver.execute(environment.user, environment.name, code) == code
        assert self.driver.execute(other(environment.user), environment.id, code) == "not_found"

    @HAVE
    @rule(data=st.data())
    def be_a_stranger(self, data: st.DataObject) -> None:
        environment = self._some(data)
        stranger = other(environment.user)
        ref = data.draw(st.sampled_from([environment.id, f"{environment.name}.{environment.user}"]), label="ref")
        for method, rest, body in (("GET", "", None), ("DELETE", "", None), ("DELETE", "?wait=0", None),
                                   ("POST", "/start", {}), ("POST", "/stop", {}), ("POST", "/restart", {}),
                                   ("GET", "/wait?for=gone", None), ("GET", "/logs", None)):
            self._refused({"not_found"}, stranger, method, f"{PATH}/{ref}{rest}", body)
        told = self._done(stranger, "DELETE", f"{PATH}?ref={ref}")
        assert told["removed"] == []
        assert [failure["error"]["code"] for failure in told["failed"]] == ["not_found"]

    @HAVE
    @rule(data=st.data())
    def reach(self, data: st.DataObject) -> None:
        environment = self._some(data)
        if not self._listens(environment):
            return
        number = next(p["published"] for p in environment.known["ports"] if p["port"] == 3000)
        self._done(environment.user, "GET", f"{PATH}/{environment.id}/wait?for=ready&timeout=10",
                   ready=all(p["port"] == 3000 for p in environment.known["ports"]))
        self.driver.agree(lambda: unless(self.driver.greeting(environment.user, number) == environment.id,
                                          f"{environment.name} does not answer at {number}"))
        assert self.driver.greeting(other(environment.user), number) != environment.id

    @rule(user=USERS, labels=LABELS)
    def list_by_labels(self, user: str, labels: tuple[tuple[str, str], ...]) -> None:
        found = self._done(user, "GET", f"{PATH}?{query_of(labels)}")["environments"]
        assert {e["id"] for e in found} == {e.id for e in self.model.labelled(user, labels)}

    # -- removing ---------------------------------------------------------------------------------------------------

    @HAVE
    @rule(data=st.data(), wait=st.booleans())
    def remove(self, data: st.DataObject, wait: bool) -> None:
        environment = self._some(data)
        self._done(environment.user, "DELETE", f"{PATH}/{environment.name}" + ("" if wait else "?wait=0"))
        self._gone([environment], wait=wait)

    @rule(user=USERS, names=st.sets(NAMES, min_size=1), wait=st.booleans())
    def remove_by_names(self, user: str, names: set[str], wait: bool) -> None:
        doomed = [e for e in self.model.of(user) if e.name in names]
        query = "&".join(f"ref={name}" for name in sorted(names))
        self._remove_many(user, query, doomed, names - {e.name for e in doomed}, wait=wait)

    @rule(user=USERS, labels=LABELS.filter(bool), wait=st.booleans())
    def remove_by_labels(self, user: str, labels: tuple[tuple[str, str], ...], wait: bool) -> None:
        self._remove_many(user, query_of(labels), self.model.labelled(user, labels), set(), wait=wait)

    @rule(user=USERS, wait=st.booleans(), sure=st.integers(0, 4))
    def remove_everything(self, user: str, wait: bool, sure: int) -> None:
        if not sure:
            self._remove_many(user, "everything=1", self.model.of(user), set(), wait=wait)

    def _remove_many(self, user: str, query: str, doomed: list[Environment], missing: set[str], *, wait: bool) -> None:
        told = self._done(user, "DELETE", f"{PATH}?{query}" + ("" if wait else "&wait=0"))
        assert sorted(told["removed"]) == sorted(e.name for e in doomed)
        assert {failure["ref"]: failure["error"]["code"] for failure in told["failed"]} == dict.fromkeys(
            missing, "not_found")
        self._gone(doomed, wait=wait)

    def _gone(self, doomed: Iterable[Environment], *, wait: bool) -> None:
        self.model.remove(*doomed)
        for environment in () if wait else doomed:
            self._done(environment.user, "GET", f"{PATH}/{environment.id}/wait?for=gone&timeout=20", ready=False)
