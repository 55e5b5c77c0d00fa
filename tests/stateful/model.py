"""What there should be, by what the manual says of each request. It shares no code and no idea with the daemon.

What the daemon is free to choose (ids, addresses, numbers of ports, pids) is learned from its answers once, and must
stay from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Answer = dict[str, Any]
# Commands by what becomes of them. A listener listens at $PORT; a brief one ends with 7 by itself.
SLEEPER, LISTENER, BRIEF, MISSING = "sleeper", "listener", "brief", "missing"
BRIEF_CODE = 7


@dataclass(frozen=True, slots=True)
class Port:
    """``number``: the published one that was asked for; None: any."""

    port: int
    protocol: str = "tcp"
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a creation, or a template, asks for: commands of services by their names, in order."""

    services: tuple[tuple[str, str], ...] = ()
    ports: tuple[Port, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Service:
    """``codes``: exit codes that may be shown."""

    name: str
    command: str
    state: str = "running"
    codes: frozenset[int | None] = frozenset({None})
    pid: int | None = None

    def ended(self, state: str, codes: Iterable[int | None]) -> None:
        """It does not run any more."""
        self.state, self.codes, self.pid = state, frozenset(codes), None

    def started(self) -> None:
        """It was started; its pid is learned."""
        self.state, self.codes, self.pid = "running", frozenset({None}), None
        if self.command == BRIEF:
            self.ended("exited", {BRIEF_CODE})


@dataclass(slots=True)
class Environment:
    """``known``: what was learned of it."""

    name: str
    user: str
    wanted: Wanted
    labels: dict[str, str]
    services: list[Service]
    known: Answer = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, user: str, wanted: Wanted, more_labels: Iterable[tuple[str, str]] = ()) -> Environment:
        """One that was just made."""
        made = cls(name, user, wanted, {**dict(wanted.labels), **dict(more_labels)},
                   [Service(*pair) for pair in wanted.services])
        for service in made.services:
            service.started()
        return made

    @property
    def id(self) -> str:
        """Its id."""
        found: str = self.known["id"]
        return found

    @property
    def state(self) -> str:
        """What is shown."""
        return "running" if not self.services or any(s.state == "running" for s in self.services) else "stopped"

    @property
    def published(self) -> list[tuple[str, int]]:
        """Its numbers, by protocol."""
        return [(p["protocol"], p["published"]) for p in self.known["ports"]]

    def learn(self, shown: Answer) -> None:
        """Take what the daemon chose from its answer."""
        self.known = {key: shown[key] for key in ("id", "address", "netns", "ports", "created_at")}
        self.learn_pids(shown)

    def learn_pids(self, shown: Answer) -> None:
        """Take the pids of what was just started."""
        for service, seen in zip(self.services, shown["services"], strict=True):
            if service.state == "running":
                service.pid = seen["pid"]

    def learn_states(self, shown: Answer) -> None:
        """Take what became of services where that was left to chance."""
        for service, seen in zip(self.services, shown["services"], strict=True):
            if service.command == BRIEF and seen["state"] != "stopped":  # it is about to end, or did
                service.ended("exited", {BRIEF_CODE, 137, 143, None})
            elif seen["state"] != service.state or seen["pid"] != service.pid:
                service.state, service.pid = seen["state"], seen["pid"]
                service.codes = frozenset({None} if seen["state"] == "running" else {seen["exit_code"]})
            elif service.state != "running":  # another start of it may have begun, whose end nobody saw
                service.codes |= {None}

    def differences(self, shown: Answer) -> list[str]:
        """How what is shown differs from what should be, a line each."""
        found = [f"{key} is {shown[key]!r} and not {value!r}"
                 for key, value in (*self.known.items(), ("name", self.name), ("state", self.state),
                                    ("labels", self.labels)) if shown[key] != value]
        if shown["owner"]["user"] != self.user:
            found.append(f"the owner is {shown['owner']}")
        if [s["name"] for s in shown["services"]] != [s.name for s in self.services]:
            return [*found, f"the services are {shown['services']}"]
        for service, seen in zip(self.services, shown["services"], strict=True):
            if (seen["state"], seen["pid"]) != (service.state, service.pid) or seen["exit_code"] not in service.codes:
                found.append(f"{service.name} is {seen} and not {service}")
        return [f"{self.name} of {self.user}: {line}" for line in found]


@dataclass(frozen=True, slots=True)
class Template:
    """What is kept under a name."""

    name: str
    user: str
    wanted: Wanted
    warm: int


@dataclass(slots=True)
class Model:
    """Everything that users have. ``numbers``: the range of published ports, inclusive."""

    numbers: tuple[int, int]
    environments: dict[tuple[str, str], Environment] = field(default_factory=dict)
    templates: dict[tuple[str, str], Template] = field(default_factory=dict)

    def of(self, user: str) -> list[Environment]:
        """A user's environments."""
        return [e for e in self.environments.values() if e.user == user]

    def labelled(self, user: str, labels: Iterable[tuple[str, str]]) -> list[Environment]:
        """Those with all of these labels."""
        return [e for e in self.of(user) if all(e.labels.get(key) == value for key, value in labels)]

    def remove(self, *environments: Environment) -> None:
        """They are gone."""
        for environment in environments:
            self.environments.pop((environment.user, environment.name), None)

    def refusals(self, user: str, name: str, wanted: Wanted, *, replace: bool) -> tuple[set[str], bool]:
        """The errors with which a creation may be refused, and whether it must be.

        With ``replace`` the one that was there is gone first, whatever comes then.
        """
        existing = self.environments.get((user, name))
        if existing is not None and not replace:
            return {"name_taken"}, True
        taken = {number for e in self.environments.values() if e is not existing for number in e.published}
        asked = {(p.protocol, p.number) for p in wanted.ports if p.number is not None}
        if asked & taken:
            return {"port_taken"}, True
        if any(command == MISSING for _, command in wanted.services):
            return {"launch_failed"} | ({"port_taken"} if asked and self._has_hidden_ports() else set()), True
        return ({"port_taken"}, False) if asked and self._has_hidden_ports() else (set(), False)

    def _has_hidden_ports(self) -> bool:
        """Whether a template's stock, which nobody sees, may hold any number."""
        return any(t.warm and t.wanted.ports for t in self.templates.values())

    def misfits(self, made: Answer, wanted: Wanted) -> list[str]:
        """What is wrong with an environment that was just made, before anything is learned of it."""
        found = []
        others = [e for e in self.environments.values() if e.known and e.id != made["id"]]
        ports = [(p["port"], p["protocol"]) for p in made["ports"]]
        if ports != [(p.port, p.protocol) for p in wanted.ports]:
            found.append(f"its ports are {made['ports']} and not {wanted.ports}")
        numbers = [(p["protocol"], p["published"]) for p in made["ports"]]
        low, high = self.numbers
        if any(not low <= number <= high for _, number in numbers) or len(set(numbers)) != len(numbers):
            found.append(f"its numbers are {numbers}")
        for port, (_, number) in zip(wanted.ports, numbers, strict=False):
            if port.number not in (None, number):
                found.append(f"{port} got {number}")
        for other in others:
            if set(other.published) & set(numbers):
                found.append(f"it shares numbers with {other.name} of {other.user}: {numbers}")
            if made["address"] == other.known["address"] or made["netns"] == other.known["netns"]:
                found.append(f"it shares its address or namespace with {other.name} of {other.user}")
        base = f"/run/netns/{made['name']}"
        if made["netns"] not in (base, f"{base}.{made['owner']['user']}"):
            found.append(f"its namespace is {made['netns']}")
        if made["netns"] != base and base not in [e.known["netns"] for e in others]:
            found.append(f"its namespace is {made['netns']}, and nobody has {base}")
        return found
