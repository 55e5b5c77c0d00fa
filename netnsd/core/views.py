"""From what netnsd keeps to what it shows. Variables of commands are not shown: they hold secrets."""

from __future__ import annotations

from typing import Literal

from netnsd import wire
from netnsd.core.audit import Difference
from netnsd.core.environment import Environment, Template
from netnsd.core.policy import Policy
from netnsd.core.pool import Pool


def environment(kept: Environment) -> wire.Environment:
    """An environment as users see it."""
    return wire.Environment(
        id=kept.id, name=kept.name, owner=wire.Owner(uid=kept.uid, user=kept.user), state=kept.shown_state,
        address=kept.slot.address, netns=kept.netns_path,
        ports=[wire.Port(port=p.port, protocol="udp" if p.protocol == "udp" else "tcp", published=p.published,
                         listen="0.0.0.0" if kept.share == "lan" else p.listen) for p in kept.ports],
        services=[wire.Service(name=s.name, command=list(s.command.argv), pid=s.pid, state=s.state,
                               exit_code=s.exit_code, restart=s.restart, restarts=s.restarts, health=s.health)
                  for s in kept.services.values()],
        labels=kept.labels, share=kept.share, egress=kept.egress, resources=kept.resources,
        oom_kills=kept.oom_kills, created_at=kept.created_at)


def difference(found: Difference) -> wire.Difference:
    """Something in which state file and kernel do not agree."""
    return wire.Difference(kind=found.kind, what=found.what, subject=found.subject, message=found.message,
                           environment=found.environment)


def pool(kept: Pool) -> wire.Pool:
    """The pool of slots."""
    return wire.Pool(name="slots", size=kept.size, target=kept.target, ready=kept.ready, claimed=kept.claimed,
                     missed=kept.missed, reason=kept.reason)


def policy(kept: Policy, selects: list[str]) -> wire.Policy:
    """A policy as users see it."""
    types: list[Literal["Ingress", "Egress"]] = []
    if kept.ingress is not None:
        types.append("Ingress")
    if kept.egress is not None:
        types.append("Egress")
    return wire.Policy(name=kept.name, owner=wire.Owner(uid=kept.uid, user=kept.user), types=types, selects=selects,
                       document=kept.document, created_at=kept.created_at)


def template(kept: Template, *, ready: int, reason: str) -> wire.Template:
    """A template as users see it."""
    wanted = kept.specification
    services = list(wanted.services or [])
    if wanted.command is not None:
        services = [wire.ServiceRequest(command=wanted.command)]
    return wire.Template(
        id=kept.id, name=kept.name, owner=wire.Owner(uid=kept.uid, user=kept.user), warm=kept.warm, ready=ready,
        reason=reason, ports=wanted.ports, labels=wanted.labels, created_at=kept.created_at,
        services=[wire.TemplateService(name=s.name, command=s.command, cwd=s.cwd or wanted.cwd) for s in services])
