"""From what netnsd keeps to what it shows. Variables of commands are not shown: they hold secrets."""

from __future__ import annotations

from netnsd import wire
from netnsd.core.environment import Environment


def environment(kept: Environment) -> wire.Environment:
    """An environment as users see it."""
    return wire.Environment(
        id=kept.id, name=kept.name, owner=wire.Owner(uid=kept.uid, user=kept.user), state=kept.shown_state,
        address=kept.slot.address, netns=kept.netns_path,
        ports=[wire.Port(port=p.port, protocol="udp" if p.protocol == "udp" else "tcp", published=p.published,
                         listen=p.listen) for p in kept.ports],
        services=[wire.Service(name=s.name, command=list(s.command.argv), pid=s.pid, state=s.state,
                               exit_code=s.exit_code) for s in kept.services.values()],
        labels=kept.labels, share=kept.share, created_at=kept.created_at)
