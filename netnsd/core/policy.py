"""NetworkPolicy: what a document means, and whom it selects. Plain values.

The meaning is upstream's, word for word where it can be: k8s.io/api networking/v1/types.go, and for selectors
k8s.io/apimachinery pkg/labels/selector.go. A pod is an environment; a namespace is a user, with the label
``kubernetes.io/metadata.name`` that every namespace has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from netnsd.core.environment import Environment
from netnsd.core.judgement import Span
from netnsd.core.traffic import Traffic

Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]
NAMESPACE_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on labels."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether these labels meet it. ``NotIn`` is met where there is no such label."""
        if self.operator == "In":
            return labels.get(self.key) in self.values
        if self.operator == "NotIn":
            return labels.get(self.key) not in self.values
        return (self.key in labels) == (self.operator == "Exists")


@dataclass(frozen=True, slots=True)
class Selector:
    """Conditions that must all be met; with none it selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it selects what has these labels."""
        return all(requirement.matches(labels) for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class Peers:
    """Environments that a rule names. ``uid``: of this user alone, where it names no namespaces."""

    uid: int | None
    namespaces: Selector
    pods: Selector

    def match(self, environment: Environment) -> bool:
        """Whether it is one of them."""
        return ((self.uid is None or self.uid == environment.uid)
                and self.namespaces.matches({NAMESPACE_LABEL: environment.user})
                and self.pods.matches(environment.labels))


@dataclass(frozen=True, slots=True)
class Rule:
    """``traffic`` with any of ``peers``, and with the addresses in ``blocks``, which are never environments'.

    ``is_for_all``: with everybody, and every address.
    """

    traffic: Traffic
    peers: tuple[Peers, ...] = ()
    blocks: tuple[Span, ...] = ()
    is_for_all: bool = False

    @property
    def parts(self) -> int:
        """How much there is of it: combinations of peers and ports, and what is asked of peers."""
        asked = sum(len(peers.namespaces.requirements) + len(peers.pods.requirements) for peers in self.peers)
        return max(1, len(self.peers) + len(self.blocks)) * max(1, len(self.traffic)) + asked


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A document that was checked, equal to itself alone.

    ``ingress``, ``egress``: its rules of that kind, None where it has no say. ``document`` is what its owner wrote.
    """

    uid: int
    user: str
    name: str
    pods: Selector
    ingress: tuple[Rule, ...] | None
    egress: tuple[Rule, ...] | None
    document: dict[str, Any]
    created_at: str

    def selects(self, environment: Environment) -> bool:
        """Whether it is about this environment."""
        return self.uid == environment.uid and self.pods.matches(environment.labels)

    def concerns(self, environment: Environment) -> bool:
        """Whether it would say something else if there were no such environment."""
        return self.selects(environment) or any(
            rule.is_for_all or any(peers.match(environment) for peers in rule.peers)
            for rule in (*(self.ingress or ()), *(self.egress or ())))

    @property
    def parts(self) -> int:
        """How much there is of it: that of its rules, and what it asks of those that it is about."""
        return len(self.pods.requirements) + sum(rule.parts for rule in (*(self.ingress or ()), *(self.egress or ())))


def concerning(policies: Iterable[Policy], environment: Environment) -> bool:
    """Whether it matters to anybody's policies that this environment is there, or to itself."""
    return environment.egress != "allow" or any(policy.concerns(environment) for policy in policies)
