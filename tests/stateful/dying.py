"""The rules by which servers, the daemon and the launcher die, at rest and in the middle of what was asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.stateful import model
from tests.stateful.base import Base
from tests.stateful.model import Service
from tests.stateful.strategies import HAVE, MOMENTS, NAMES, PATH, USERS, body_of, wanted_in


class Dying(Base):
    """What nobody asks for."""

    @HAVE
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

    @precondition(lambda self: self._steps % 6 == 1)  # once is enough for a while
    @rule()
    def flush_the_rules(self) -> None:
        self.driver.flush()

    @rule(user=USERS, name=NAMES, data=st.data(), replace=st.booleans(), moment=MOMENTS)
    def crash_while_creating(self, user: str, name: str, data: st.DataObject, replace: bool, moment: int) -> None:
        wanted = data.draw(wanted_in(self.driver.numbers), label="wanted")
        before = self.model.environments.get((user, name))
        refusals, must_fail = self.model.refusals(user, name, wanted, replace=replace)
        self.driver.crash_during(user, "POST", PATH, self._body(name, wanted, replace=replace), moment)
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
    @rule(data=st.data(), name=NAMES, moment=MOMENTS)
    def crash_while_claiming(self, data: st.DataObject, name: str, moment: int) -> None:
        user, template = data.draw(st.sampled_from(sorted(self.model.templates)), label="template")
        kept = self.model.templates[user, template]
        if (user, name) in self.model.environments:
            return
        self.driver.crash_during(user, "POST", PATH, {"name": name, "template": template}, moment)
        shown = self._found(user, name)
        if shown is not None:
            self._made(user, name, kept.wanted, shown)
            self._claimed(user, name, template)

    @precondition(lambda self: bool(self.model.templates))
    @rule(data=st.data(), moment=MOMENTS)
    def crash_while_removing_a_template(self, data: st.DataObject, moment: int) -> None:
        user, name = data.draw(st.sampled_from(sorted(self.model.templates)), label="template")
        self.driver.crash_during(user, "DELETE", f"/v1/templates/{name}", None, moment)
        if name not in [t["name"] for t in self._done(user, "GET", "/v1/templates")["templates"]]:
            del self.model.templates[user, name]

    @HAVE
    @rule(data=st.data(), wait=st.booleans(), moment=MOMENTS)
    def crash_while_removing(self, data: st.DataObject, wait: bool, moment: int) -> None:
        environment = self._some(data)
        self.driver.crash_during(environment.user, "DELETE", f"{PATH}/{environment.name}" + ("" if wait else
                                                                                              "?wait=0"), None, moment)
        if self._found(environment.user, environment.name) is None:
            self.model.remove(environment)

    @HAVE
    @rule(data=st.data(), verb=st.sampled_from(["start", "stop", "restart"]), moment=MOMENTS)
    def crash_while_changing_state(self, data: st.DataObject, verb: str, moment: int) -> None:
        environment = self._some(data)
        self.driver.crash_during(environment.user, "POST", f"{PATH}/{environment.name}/{verb}", body_of(verb), moment)
        before = {service.name: service.state for service in environment.services}
        shown = self._found(environment.user, environment.name)
        assert shown is not None, f"{environment.name} is gone"
        for seen in shown["services"]:
            # A start that was begun and came to nothing is told as an end that nobody saw.
            allowed = {"start": {before[seen["name"]], "running", "exited"},
                       "stop": {before[seen["name"]], "stopped", "exited"},
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
