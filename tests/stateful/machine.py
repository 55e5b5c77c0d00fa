"""The rules: everything that two users and an admin ask, and everything that dies meanwhile."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.stateful import model
from tests.stateful.driver import ALICE, BOB, CAROL, Driver
from tests.stateful.model import Environment, Model, Port, Service, Template, Wanted

_PATH = "/v1/environments"
_USERS = st.sampled_from([ALICE, BOB])
_NAMES = st.sampled_from(["web", "db", "api"])
_NUMBERED = "web-5"  # is in the way of five called web, when some of them are made already
_TEMPLATES = st.sampled_from(["shop", "blog"])
_LABELS = st.sampled_from([(), (("app", "shop"),), (("app", "blog"),), (("app", "shop"), ("tier", "web"))])
_SERVED = st.sampled_from([(), (("main", model.SLEEPER),), (("main", model.LISTENER),),
                           (("a", model.SLEEPER), ("b", model.BRIEF)), (("a", model.LISTENER), ("b", model.SLEEPER))])
_UNSTARTABLE = st.just((("main", model.SLEEPER), ("last", model.MISSING)))
_MOMENTS = st.integers(0, 8) | st.integers(0, 60)  # how late; rows are written first
# Bodies that no creation takes, whatever there is, with the error that each must have.
_BAD = [
    ({"name": "Web!"}, "invalid_name"), ({"name": ""}, "invalid_name"), ({"name": "-web"}, "invalid_name"),
    ({"name": "a" * 64}, "invalid_name"), ({"nmae": "web"}, "invalid_request"), ({"name": 7}, "invalid_request"),
    ({"ports": [{"port": 0}]}, "invalid_port"), ({"ports": [{"port": 80}, {"port": 80}]}, "invalid_port"),
    ({"ports": [{"port": 80, "publish": 79}]}, "invalid_port"), ({"labels": {"": "x"}}, "invalid_label"),
    ({"command": []}, "invalid_command"), ({"command": ["x"], "services": []}, "invalid_command"),
    ({"command": ["x"], "cwd": "tmp"}, "invalid_command"), ({"env": {"A=B": "x"}}, "invalid_variable"),
    ({"count": 0}, "invalid_request"), ({"count": 501}, "invalid_request"), ({"template": "none"}, "not_found"),
    ({"share": "lan"}, "invalid_request"), ({"command": ["x"], "limits": {"files": 1}}, "invalid_command"),
]


_HAVE = precondition(lambda self: bool(self.model.environments))


@st.composite
def _wanted(draw: st.DrawFn, numbers: tuple[int, int]) -> Wanted:
    first = numbers[0]
    number = st.sampled_from([first, first + 1, first + 2, first + 40])
    ports = draw(st.one_of(
        st.just(()), st.just((Port(3000),)), number.map(lambda n: (Port(3000, number=n),)),
        number.map(lambda n: (Port(3000), Port(3001, "udp"), Port(3002, number=n)))))
    services = draw(st.one_of(_SERVED, _SERVED, _SERVED, _SERVED, _UNSTARTABLE))
    if any(command == model.LISTENER for _, command in services) and not ports:
        ports = (Port(3000),)
    return Wanted(services, ports, draw(_LABELS))


class Machine(RuleBasedStateMachine):
    """Subclasses name their driver."""

    driver: ClassVar[Driver]
    counts: ClassVar[Counter[str]] = Counter()  # of sequences, and of steps
    model: Model

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.driver.begin()
        self.counts["sequences"] += 1
        self.model = Model(self.driver.numbers)
        for user in (ALICE, BOB):  # something to work on
            wanted = data.draw(_wanted(self.driver.numbers), label=f"first of {user}'s")
            self._create(user, "web", wanted, self._body("web", wanted, replace=False), replace=False)
        self._create(ALICE, _NUMBERED, Wanted(), self._body(_NUMBERED, Wanted(), replace=False), replace=False)

    # -- making -----------------------------------------------------------------------------------------------------

    @rule(user=_USERS, name=_NAMES, data=st.data(), replace=st.booleans())
    def create(self, user: str, name: str, data: st.DataObject, replace: bool) -> None:
        wanted = data.draw(_wanted(self.driver.numbers), label="wanted")
        self._create(user, name, wanted, self._body(name, wanted, replace=replace), replace=replace)

    @rule(user=_USERS, name=_NAMES, template=_TEMPLATES, labels=_LABELS, replace=st.booleans())
    def create_from_template(self, user: str, name: str, template: str, labels: tuple[tuple[str, str], ...],
                             replace: bool) -> None:
        kept = self.model.templates.get((user, template))
        body = {"name": name, "template": template, "labels": dict(labels), "replace": replace}
        if kept is None:
            self._refused({"not_found"}, user, "POST", _PATH, body)
        else:
            self._create(user, name, kept.wanted, body, replace=replace, labels=labels)
            self._claimed(user, name, template)

    @rule(user=_USERS, name=st.sampled_from(["web", "db"]), data=st.data(), count=st.sampled_from([2, 5]))
    def create_many(self, user: str, name: str, data: st.DataObject, count: int) -> None:
        wanted = data.draw(_wanted(self.driver.numbers), label="wanted")
        names = [f"{name}-{number}" for number in range(1, count + 1)]
        body = {**self._body(name, wanted, replace=False), "count": count}
        refusals = [self.model.refusals(user, one, wanted, replace=False) for one in names]
        allowed = {code for codes, _ in refusals for code in codes}
        numbered = any(p.number is not None for p in wanted.ports) and count > 1
        if numbered:
            allowed.add("port_taken")
        if numbered or any(must for _, must in refusals):
            self._refused(allowed, user, "POST", _PATH, body)
            return
        status, answer = self.driver.ask(user, "POST", _PATH, body)
        if status == 201 or not allowed:
            assert status == 201, (status, answer)
            assert [e["name"] for e in answer["environments"]] == names
            for one, made in zip(names, answer["environments"], strict=True):
                self._made(user, one, wanted, made)
        else:
            assert answer["error"]["code"] in allowed, answer

    @rule(user=_USERS, bad=st.sampled_from(_BAD))
    def create_what_cannot_be(self, user: str, bad: tuple[dict[str, Any], str]) -> None:
        body, code = bad
        self._refused({code}, user, "POST", _PATH, {"name": "bad", **body})

    @rule(user=_USERS, name=_TEMPLATES, warm=st.integers(0, 1), labels=_LABELS, replace=st.booleans(),
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

    @rule(user=_USERS, name=_TEMPLATES)
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

    @_HAVE
    @rule(data=st.data(), verb=st.sampled_from(["start", "stop", "restart"]), by_id=st.booleans())
    def change_state(self, data: st.DataObject, verb: str, by_id: bool) -> None:
        environment = self._some(data)
        ref = environment.id if by_id else environment.name
        shown = self._done(environment.user, "POST", f"{_PATH}/{ref}/{verb}", _body_of(verb))
        for service in environment.services:
            if verb != "start" and service.state == "running":
                service.ended("stopped", {137, 143, None})
            if verb != "stop" and service.state != "running":
                service.started()
        environment.learn_pids(shown)

    @_HAVE
    @rule(data=st.data(), code=st.integers(0, 9))
    def execute(self, data: st.DataObject, code: int) -> None:
        environment = self._some(data)
        assert self.driver.execute(environment.user, environment.name, code) == code
        assert self.driver.execute(_other(environment.user), environment.id, code) == "not_found"

    @_HAVE
    @rule(data=st.data())
    def be_a_stranger(self, data: st.DataObject) -> None:
        environment = self._some(data)
        stranger = _other(environment.user)
        ref = data.draw(st.sampled_from([environment.id, f"{environment.name}.{environment.user}"]), label="ref")
        for method, rest, body in (("GET", "", None), ("DELETE", "", None), ("DELETE", "?wait=0", None),
                                   ("POST", "/start", {}), ("POST", "/stop", {}), ("POST", "/restart", {}),
                                   ("GET", "/wait?for=gone", None), ("GET", "/logs", None)):
            self._refused({"not_found"}, stranger, method, f"{_PATH}/{ref}{rest}", body)
        told = self._done(stranger, "DELETE", f"{_PATH}?ref={ref}")
        assert told["removed"] == []
        assert [failure["error"]["code"] for failure in told["failed"]] == ["not_found"]

    @_HAVE
    @rule(data=st.data())
    def reach(self, data: st.DataObject) -> None:
        environment = self._some(data)
        if not self._listens(environment):
            return
        number = next(p["published"] for p in environment.known["ports"] if p["port"] == 3000)
        self._done(environment.user, "GET", f"{_PATH}/{environment.id}/wait?for=ready&timeout=10",
                   ready=all(p["port"] == 3000 for p in environment.known["ports"]))
        self.driver.agree(lambda: _unless(self.driver.greeting(environment.user, number) == environment.id,
                                          f"{environment.name} does not answer at {number}"))
        assert self.driver.greeting(_other(environment.user), number) != environment.id

    @rule(user=_USERS, labels=_LABELS)
    def list_by_labels(self, user: str, labels: tuple[tuple[str, str], ...]) -> None:
        found = self._done(user, "GET", f"{_PATH}?{_labels(labels)}")["environments"]
        assert {e["id"] for e in found} == {e.id for e in self.model.labelled(user, labels)}

    # -- removing ---------------------------------------------------------------------------------------------------

    @_HAVE
    @rule(data=st.data(), wait=st.booleans())
    def remove(self, data: st.DataObject, wait: bool) -> None:
        environment = self._some(data)
        self._done(environment.user, "DELETE", f"{_PATH}/{environment.name}" + ("" if wait else "?wait=0"))
        self._gone([environment], wait=wait)

    @rule(user=_USERS, names=st.sets(_NAMES, min_size=1), wait=st.booleans())
    def remove_by_names(self, user: str, names: set[str], wait: bool) -> None:
        doomed = [e for e in self.model.of(user) if e.name in names]
        query = "&".join(f"ref={name}" for name in sorted(names))
        self._remove_many(user, query, doomed, names - {e.name for e in doomed}, wait=wait)

    @rule(user=_USERS, labels=_LABELS.filter(bool), wait=st.booleans())
    def remove_by_labels(self, user: str, labels: tuple[tuple[str, str], ...], wait: bool) -> None:
        self._remove_many(user, _labels(labels), self.model.labelled(user, labels), set(), wait=wait)

    @rule(user=_USERS, wait=st.booleans(), sure=st.integers(0, 4))
    def remove_everything(self, user: str, wait: bool, sure: int) -> None:
        if not sure:
            self._remove_many(user, "everything=1", self.model.of(user), set(), wait=wait)

    def _remove_many(self, user: str, query: str, doomed: list[Environment], missing: set[str], *, wait: bool) -> None:
        told = self._done(user, "DELETE", f"{_PATH}?{query}" + ("" if wait else "&wait=0"))
        assert sorted(told["removed"]) == sorted(e.name for e in doomed)
        assert {failure["ref"]: failure["error"]["code"] for failure in told["failed"]} == dict.fromkeys(
            missing, "not_found")
        self._gone(doomed, wait=wait)

    def _gone(self, doomed: Iterable[Environment], *, wait: bool) -> None:
        self.model.remove(*doomed)
        for environment in () if wait else doomed:
            self._done(environment.user, "GET", f"{_PATH}/{environment.id}/wait?for=gone&timeout=20", ready=False)

    # -- dying ------------------------------------------------------------------------------------------------------

    @_HAVE
    @rule(data=st.data())
    def end_a_server(self, data: st.DataObject) -> None:
        with self._deaths(data) as (pids, tell):
            if pids:
                tell(self.driver.end(pids))

    @rule(data=st.data(), launcher=st.booleans())
    def crash(self, data: st.DataObject, launcher: bool) -> None:
        with self._deaths(data) as (pids, tell):
            code: list[int] = []

            def meanwhile() -> None:
                if pids:
                    code.append(self.driver.end(pids))

            self.driver.crash(meanwhile, launcher=launcher)
            if launcher:
                self._forget_codes()
            if code:
                tell(code[0])

    @rule()
    def restart(self) -> None:
        self.driver.restart()

    @rule()
    def lose_the_launcher(self) -> None:
        self.driver.lose_launcher()
        self._forget_codes()

    @rule()
    def flush_the_rules(self) -> None:
        self.driver.flush()

    @rule(user=_USERS, name=_NAMES, data=st.data(), replace=st.booleans(), moment=_MOMENTS)
    def crash_while_creating(self, user: str, name: str, data: st.DataObject, replace: bool, moment: int) -> None:
        wanted = data.draw(_wanted(self.driver.numbers), label="wanted")
        before = self.model.environments.get((user, name))
        refusals, must_fail = self.model.refusals(user, name, wanted, replace=replace)
        self.driver.crash_during(user, "POST", _PATH, self._body(name, wanted, replace=replace), moment)
        if before is not None and "name_taken" in refusals:
            return
        shown = self._found(user, name)
        if before is not None and shown is not None and shown["id"] == before.id:
            return
        self.model.environments.pop((user, name), None)
        if shown is not None:
            assert not must_fail, f"{shown} is there, though it is {refusals}"
            self._made(user, name, wanted, shown)

    @precondition(lambda self: bool(self.model.templates))
    @rule(data=st.data(), name=_NAMES, moment=_MOMENTS)
    def crash_while_claiming(self, data: st.DataObject, name: str, moment: int) -> None:
        user, template = data.draw(st.sampled_from(sorted(self.model.templates)), label="template")
        kept = self.model.templates[user, template]
        if (user, name) in self.model.environments:
            return
        self.driver.crash_during(user, "POST", _PATH, {"name": name, "template": template}, moment)
        shown = self._found(user, name)
        if shown is not None:
            self._made(user, name, kept.wanted, shown)
            self._claimed(user, name, template)

    @precondition(lambda self: bool(self.model.templates))
    @rule(data=st.data(), moment=_MOMENTS)
    def crash_while_removing_a_template(self, data: st.DataObject, moment: int) -> None:
        user, name = data.draw(st.sampled_from(sorted(self.model.templates)), label="template")
        self.driver.crash_during(user, "DELETE", f"/v1/templates/{name}", None, moment)
        if name not in [t["name"] for t in self._done(user, "GET", "/v1/templates")["templates"]]:
            del self.model.templates[user, name]

    @_HAVE
    @rule(data=st.data(), wait=st.booleans(), moment=_MOMENTS)
    def crash_while_removing(self, data: st.DataObject, wait: bool, moment: int) -> None:
        environment = self._some(data)
        self.driver.crash_during(environment.user, "DELETE", f"{_PATH}/{environment.name}" + ("" if wait else
                                                                                              "?wait=0"), None, moment)
        if self._found(environment.user, environment.name) is None:
            self.model.remove(environment)

    @_HAVE
    @rule(data=st.data(), verb=st.sampled_from(["start", "stop", "restart"]), moment=_MOMENTS)
    def crash_while_changing_state(self, data: st.DataObject, verb: str, moment: int) -> None:
        environment = self._some(data)
        self.driver.crash_during(environment.user, "POST", f"{_PATH}/{environment.name}/{verb}", _body_of(verb), moment)
        before = {service.name: service.state for service in environment.services}
        shown = self._found(environment.user, environment.name)
        assert shown is not None, f"{environment.name} is gone"
        for seen in shown["services"]:
            allowed = {"start": {before[seen["name"]], "running"}, "stop": {before[seen["name"]], "stopped", "exited"},
                       "restart": {"running", "stopped", "exited"}}[verb]
            if model.BRIEF in [s.command for s in environment.services if s.name == seen["name"]]:
                allowed.add("exited")
            assert seen["state"] in allowed, f"{seen} after a crash in {verb}"
        environment.learn_states(shown)

    @contextlib.contextmanager
    def _deaths(self, data: st.DataObject) -> Iterator[tuple[list[int], Callable[[int], None]]]:
        """Some environment's servers, to be killed; the model is told their exit code."""
        doomed: list[Service] = []
        if self.model.environments:
            doomed = [s for s in self._some(data).services if s.state == "running"]
        if doomed:
            doomed = doomed[:data.draw(st.integers(1, len(doomed)), label="so many")]

        def tell(code: int) -> None:
            for service in doomed:
                service.ended("exited", {code, None} if service.pid in self._untold else {code})

        yield [s.pid for s in doomed if s.pid is not None], tell

    # -- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.counts["steps"] += 1
        self.driver.agree(self._differences)

    @_HAVE
    @invariant()
    def others_are_not_told(self) -> None:
        for environment in self.model.environments.values():
            self._refused({"not_found"}, _other(environment.user), "GET", f"{_PATH}/{environment.id}")

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for user in (ALICE, BOB):
            self._done(user, "DELETE", f"{_PATH}?everything=1")
        for template in self.model.templates.values():
            self._done(template.user, "DELETE", f"/v1/templates/{template.name}")
        self._done(CAROL, "PATCH", "/v1/pools/slots", {"size": 0})
        self.driver.agree(self.driver.residue)

    def _differences(self) -> list[str]:
        found: list[str] = []
        everyones = self._done(CAROL, "GET", f"{_PATH}?all=1")["environments"]
        for user in (ALICE, BOB):
            shown = {e["name"]: e for e in self._done(user, "GET", _PATH)["environments"]}
            expected = {e.name: e for e in self.model.of(user)}
            found += [f"{user} has {shown[name]}" for name in shown.keys() - expected.keys()]
            found += [f"{user} has no {name}" for name in expected.keys() - shown.keys()]
            for name in expected.keys() & shown.keys():
                found += expected[name].differences(shown[name])
            if [e for e in everyones if e["owner"]["user"] == user] != list(shown.values()):
                found.append(f"the admin sees others of {user}'s than {user} does")
            kept = {t["name"]: t["warm"] for t in self._done(user, "GET", "/v1/templates")["templates"]}
            if kept != {t.name: t.warm for t in self.model.templates.values() if t.user == user}:
                found.append(f"{user}'s templates are {kept}")
        found += self._running()
        taken = [number for e in self.model.environments.values() for number in e.published]
        addresses = [e.known["address"] for e in self.model.environments.values()]
        if len(set(taken)) != len(taken) or len(set(addresses)) != len(addresses):
            found.append(f"numbers or addresses are had twice: {taken}, {addresses}")
        return found or self.driver.inside(len(addresses), len(taken))

    def _running(self) -> Iterator[str]:
        for environment in self.model.environments.values():
            for service in environment.services:
                if service.state == "running" and not self.driver.is_alive(service.pid or 0):
                    yield f"{service.name} of {environment.name} has no process {service.pid}"

    # -- small things -----------------------------------------------------------------------------------------------

    def __init__(self) -> None:
        super().__init__()
        self._untold: set[int] = set()  # pids of which the exit code may be lost
        self._untold_stocks: set[tuple[str, str]] = set()

    def _forget_codes(self) -> None:
        """What runs now ends without anybody to tell its exit code, and so does what is in stock."""
        for environment in self.model.environments.values():
            self._untold.update(s.pid for s in environment.services if s.pid is not None)
        self._untold_stocks.update(self.model.templates)

    def _claimed(self, user: str, name: str, template: str) -> None:
        made = self.model.environments.get((user, name))
        if made is not None and (user, template) in self._untold_stocks:
            self._untold.update(s.pid for s in made.services if s.pid is not None)

    def _some(self, data: st.DataObject) -> Environment:
        return self.model.environments[data.draw(st.sampled_from(sorted(self.model.environments)), label="of")]

    @staticmethod
    def _listens(environment: Environment) -> bool:
        return any(s.command == model.LISTENER and s.state == "running" for s in environment.services)

    def _done(self, user: str, method: str, path: str, body: Any = None, *, ready: bool = True) -> Any:
        """The answer of what must be done; with ``ready`` False it may be refused."""
        status, answer = self.driver.ask(user, method, path, body)
        assert status in (200, 201, 202) or not ready, (user, method, path, status, answer)
        return answer

    def _refused(self, codes: set[str], user: str, method: str, path: str, body: Any = None) -> None:
        status, answer = self.driver.ask(user, method, path, body)
        assert status >= 400, f"{user} {method} {path} {body} was done, and not {codes}: {answer}"
        assert answer["error"]["code"] in codes, (user, method, path, body, answer)

    def _found(self, user: str, name: str) -> Any:
        status, answer = self.driver.ask(user, "GET", f"{_PATH}/{name}")
        assert status == 200 or answer["error"]["code"] == "not_found", answer
        return answer if status == 200 else None

    def _create(self, user: str, name: str, wanted: Wanted, body: dict[str, Any], *, replace: bool,
                labels: Iterable[tuple[str, str]] = ()) -> None:
        allowed, must_fail = self.model.refusals(user, name, wanted, replace=replace)
        status, answer = self.driver.ask(user, "POST", _PATH, body)
        if replace:
            self.model.environments.pop((user, name), None)
        if must_fail or (allowed and status != 201):
            assert status >= 400, f"{body} of {user} was done, and not {allowed}"
            assert answer["error"]["code"] in allowed, (body, answer)
        else:
            assert status == 201, (body, status, answer)
            self._made(user, name, wanted, answer, labels)

    def _made(self, user: str, name: str, wanted: Wanted, shown: Any, labels: Iterable[tuple[str, str]] = ()) -> None:
        made = Environment.of(name, user, wanted, labels)
        misfits = self.model.misfits(shown, wanted)
        assert not misfits, misfits
        made.learn(shown)
        self.model.environments[user, name] = made

    def _specification(self, wanted: Wanted) -> dict[str, Any]:
        return {"services": [{"name": name, **self.driver.specification(command)} for name, command in wanted.services],
                "ports": [{"port": p.port, "protocol": p.protocol, **({"publish": p.number} if p.number else {})}
                          for p in wanted.ports], "labels": dict(wanted.labels), "cwd": "/"}

    def _body(self, name: str, wanted: Wanted, *, replace: bool) -> dict[str, Any]:
        return {"name": name, "replace": replace, **self._specification(wanted)}


def _other(user: str) -> str:
    return BOB if user == ALICE else ALICE


def _body_of(verb: str) -> dict[str, Any]:
    return {} if verb == "start" else {"grace_seconds": 0}


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    return "&".join(f"label={key}={value}" for key, value in labels)


def _unless(holds: bool, line: str) -> list[str]:
    return [] if holds else [line]


def on(driver: Driver) -> type[Machine]:
    """The machine in that driver's world."""
    return type("Machine", (Machine,), {"driver": driver, "counts": Counter()})
