"""What every rule needs, and what must hold after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from tests.stateful import model
from tests.stateful.driver import ALICE, BOB, CAROL, Driver
from tests.stateful.model import Environment, Model, Wanted
from tests.stateful.strategies import HAVE, NUMBERED, PATH, other, wanted_in


class Base(RuleBasedStateMachine):
    """The model beside the driver's world. Subclasses name their driver."""

    driver: ClassVar[Driver]
    counts: ClassVar[Counter[str]] = Counter()  # of sequences, and of steps
    model: Model

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.driver.begin()
        self.counts["sequences"] += 1
        self.model = Model(self.driver.numbers)
        for user in (ALICE, BOB):  # something to work on
            wanted = data.draw(wanted_in(self.driver.numbers), label=f"first of {user}'s")
            self._create(user, "web", wanted, self._body("web", wanted, replace=False), replace=False)
        self._create(ALICE, NUMBERED, Wanted(), self._body(NUMBERED, Wanted(), replace=False), replace=False)

    # -- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.counts["steps"] += 1
        self._steps += 1
        self.driver.agree(self._differences)

    @HAVE
    @invariant()
    def others_are_not_told(self) -> None:
        for environment in self.model.environments.values():
            self._refused({"not_found"}, other(environment.user), "GET", f"{PATH}/{environment.id}")

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for user in (ALICE, BOB):
            self._done(user, "DELETE", f"{PATH}?everything=1")
        for template in self.model.templates.values():
            self._done(template.user, "DELETE", f"/v1/templates/{template.name}")
        self._done(CAROL, "PATCH", "/v1/pools/slots", {"size": 0})
        self.driver.agree(self.driver.residue)

    def _differences(self) -> list[str]:
        found: list[str] = []
        everyones = self._done(CAROL, "GET", f"{PATH}?all=1")["environments"]
        for user in (ALICE, BOB):
            shown = {e["name"]: e for e in self._done(user, "GET", PATH)["environments"]}
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
        self._steps = 0
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
        status, answer = self.driver.ask(user, "GET", f"{PATH}/{name}")
        assert status == 200 or answer["error"]["code"] == "not_found", answer
        return answer if status == 200 else None

    def _create(self, user: str, name: str, wanted: Wanted, body: dict[str, Any], *, replace: bool,
                labels: Iterable[tuple[str, str]] = ()) -> None:
        allowed, must_fail = self.model.refusals(user, name, wanted, replace=replace)
        status, answer = self.driver.ask(user, "POST", PATH, body)
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
