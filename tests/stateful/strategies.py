"""What is drawn: users, names, creations, and what no creation takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition

from tests.stateful import model
from tests.stateful.driver import ALICE, BOB
from tests.stateful.model import Port, Wanted

PATH = "/v1/environments"
USERS = st.sampled_from([ALICE, BOB])
NAMES = st.sampled_from(["web", "db", "api"])
NUMBERED = "web-5"  # is in the way of five called web, when some of them are made already
TEMPLATES = st.sampled_from(["shop", "blog"])
LABELS = st.sampled_from([(), (("app", "shop"),), (("app", "blog"),), (("app", "shop"), ("tier", "web"))])
_SERVED = st.sampled_from([(), (("main", model.SLEEPER),), (("main", model.LISTENER),),
                           (("a", model.SLEEPER), ("b", model.BRIEF)), (("a", model.LISTENER), ("b", model.SLEEPER))])
_UNSTARTABLE = st.just((("main", model.SLEEPER), ("last", model.MISSING)))
MOMENTS = st.integers(0, 8) | st.integers(0, 60)  # how late; rows are written first
# Bodies that no creation takes, whatever there is, with the error that each must have.
BAD = [
    ({"name": "Web!"}, "invalid_name"), ({"name": ""}, "invalid_name"), ({"name": "-web"}, "invalid_name"),
    ({"name": "a" * 64}, "invalid_name"), ({"nmae": "web"}, "invalid_request"), ({"name": 7}, "invalid_request"),
    ({"ports": [{"port": 0}]}, "invalid_port"), ({"ports": [{"port": 80}, {"port": 80}]}, "invalid_port"),
    ({"ports": [{"port": 80, "publish": 79}]}, "invalid_port"), ({"labels": {"": "x"}}, "invalid_label"),
    ({"command": []}, "invalid_command"), ({"command": ["x"], "services": []}, "invalid_command"),
    ({"command": ["x"], "cwd": "tmp"}, "invalid_command"), ({"env": {"A=B": "x"}}, "invalid_variable"),
    ({"count": 0}, "invalid_request"), ({"count": 501}, "invalid_request"), ({"template": "none"}, "not_found"),
    ({"share": "lan"}, "invalid_request"), ({"command": ["x"], "limits": {"files": 1}}, "invalid_command"),
]


HAVE = precondition(lambda self: bool(self.model.environments))


@st.composite
def wanted_in(draw: st.DrawFn, numbers: tuple[int, int]) -> Wanted:
    first = numbers[0]
    number = st.sampled_from([first, first + 1, first + 2, first + 40])
    ports = draw(st.one_of(
        st.just(()), st.just((Port(3000),)), number.map(lambda n: (Port(3000, number=n),)),
        number.map(lambda n: (Port(3000), Port(3001, "udp"), Port(3002, number=n)))))
    services = draw(st.one_of(_SERVED, _SERVED, _SERVED, _SERVED, _UNSTARTABLE))
    if any(command == model.LISTENER for _, command in services) and not ports:
        ports = (Port(3000),)
    return Wanted(services, ports, draw(LABELS))


def other(user: str) -> str:
    return BOB if user == ALICE else ALICE


def body_of(verb: str) -> dict[str, Any]:
    return {} if verb == "start" else {"grace_seconds": 0}


def query_of(labels: Iterable[tuple[str, str]]) -> str:
    return "&".join(f"label={key}={value}" for key, value in labels)


def unless(holds: bool, line: str) -> list[str]:
    return [] if holds else [line]
